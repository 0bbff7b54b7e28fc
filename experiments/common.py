"""What the experiments share: runs and results that are not made twice, tables, pictures of several seeds."""

import argparse
import csv
import json
import shutil
import statistics
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import options
import train
from comm_net import CommNet

torch.backends.cudnn.allow_tf32 = False  # by default a GPU rounds what its convolutions multiply to 10 bits
HERE = Path(__file__).parent
CPU_OR_GPUS = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
QUICK = "--train-images 32 --epochs 1 --width 2 --comm-channels 4".split()  # options of a run that takes seconds
MODELS = {  # the three-way comparison: options of train.py
    "with communication": [],
    "without communication": ["--comm-channels", "0"],
    "plain U-Net, whole image": ["--grid", "1x1", "--comm-channels", "0"],
}


def make_parser(description: str) -> options.Parser:
    """The two options that most experiments have."""
    parser = options.Parser(description=description, allow_abbrev=False,
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=options.number(0), nargs="+", default=[0, 1, 2], help="of weights and images")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    return parser


def trained(out: Path, options: list[str], comm_net: type[nn.Module] = CommNet) -> dict:
    """The metrics of the run in the folder `out`. It is trained now, unless it has been trained before; an interrupted
    run goes on. In float32, so that the hardware makes no difference. comm_net: another communication network than that
    of comm_net.py."""
    if not (out / "metrics.json").exists():
        resume = (out / "last.pt").exists()
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        print(f"\n{out}: python train.py {' '.join(options)}", flush=True)
        with mock.patch("train.CommNet", comm_net):
            train.main(["--resume", str(out)] if resume else ["--no-amp", *options, "--out", str(out)])
    return json.loads((out / "metrics.json").read_text())


def load(out: Path, comm_net: type[nn.Module] = CommNet) -> tuple[nn.Module, dict]:
    """The network of a run on the first device, and its configuration."""
    with mock.patch("train.CommNet", comm_net):
        model, config = train.load_model(out / "best.pt")
    return model.to(CPU_OR_GPUS[0]), config


def read(path: Path) -> list[dict]:
    """The rows of a CSV file, numbers as numbers; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def append(path: Path, rows: list[dict]):
    """Adds rows to a CSV file, so that an interrupted experiment goes on where it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def where(rows: list[dict], **values) -> list[dict]:
    """The rows that hold these values."""
    return [row for row in rows if values.items() <= row.items()]


def mean_and_spread(values: list[float]) -> str:
    """`mean (smallest to largest)` of a few runs."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def save_table(path: Path, header: list[str], rows: list[list]):
    """A table in Markdown, written to a file and printed."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    path.write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


def plot_spread(axes, rows: list[dict], x: str, y: str, **style):
    """A line through the mean of `y` at every `x`, and a band from the smallest to the largest."""
    points = {at: [row[y] for row in where(rows, **{x: at})] for at in sorted({row[x] for row in rows})}
    (line,) = axes.plot(list(points), [statistics.mean(values) for values in points.values()], **style)
    axes.fill_between(list(points), [min(values) for values in points.values()],
                      [max(values) for values in points.values()], color=line.get_color(), alpha=0.15, linewidth=0)


def bar_spread(axes, x: float, values: list[float], **style):
    """A bar as high as the mean, and a dot for every value. No values, no bar."""
    if values:
        axes.bar(x, statistics.mean(values), **style)
        axes.set_axisbelow(True)  # the grid
        axes.plot([x] * len(values), values, "o", color="black", markersize=3.5, alpha=0.7)
