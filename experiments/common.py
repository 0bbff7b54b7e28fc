"""What the experiments share: runs and results that are not made twice, tables, pictures of several seeds.

A result is a row of a CSV file: a dictionary from the name of each column to a number or a text.
What tells the rows of one measurement from the others (the model, the seed, ...) is called its
case.
"""

import csv
import json
import shutil
import statistics
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import train
from comm_net import CommNet
from support.model import load_model
from support.options import DefaultsInHelp, Parser, number

HERE = Path(__file__).parent
CPU_OR_GPUS = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
if not CPU_OR_GPUS:
    CPU_OR_GPUS = [torch.device("cpu")]
QUICK = "--train-images 32 --epochs 1 --width 2 --comm-channels 4".split()  # options of a run that takes seconds
MODELS = {  # the three-way comparison: options of train.py
    "with communication": [],
    "without communication": ["--comm-channels", "0"],
    "plain U-Net, whole image": ["--grid", "1x1", "--comm-channels", "0"],
}
CLASSES = ["line", "background", "circle"]  # of the synthetic images, the hard one first
CLASS_HEADER = [f"IoU {name}" for name in CLASSES]


# The command

def make_parser(description: str) -> Parser:
    """The two options that most experiments have."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=DefaultsInHelp)
    parser.add_argument("--seeds", type=number(0), nargs="+", default=[0, 1, 2], help="of weights and images")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    return parser


def make_folder(name: str, quick: bool) -> Path:
    """The folder of an experiment, runs/NAME, or runs/NAME-quick for a smoke run."""
    if quick:
        name = f"{name}-quick"
    folder = Path("runs", name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_name(name: str) -> str:
    """The name of a model, as part of the name of a folder."""
    return name.replace(" ", "-").replace(",", "").replace("'", "")


# Runs of train.py

def trained(out: Path, options: list[str], comm_net: type[nn.Module] = CommNet) -> dict:
    """The metrics of the run in the folder `out`.

    It is trained now, unless it has been trained before; an interrupted run goes on. In float32, so
    that the hardware makes little difference. comm_net: another communication network than that of
    comm_net.py.
    """
    if not (out / "metrics.json").exists():
        options = ["--no-amp"] + options
        print(f"\n{out}: python train.py {' '.join(options)}", flush=True)
        if (out / "last.pt").exists():
            arguments = ["--resume", str(out)]
        else:
            shutil.rmtree(out, ignore_errors=True)
            arguments = options + ["--out", str(out)]
        with mock.patch("support.model.CommNet", comm_net):
            train.main(arguments)
    return json.loads((out / "metrics.json").read_text())


def load(out: Path, comm_net: type[nn.Module] = CommNet) -> tuple[nn.Module, dict]:
    """The network of a run on the first device, and its configuration."""
    with mock.patch("support.model.CommNet", comm_net):
        model, config = load_model(out / "best.pt")
    return model.to(CPU_OR_GPUS[0]), config


def class_scores(scores: dict) -> dict[str, float]:
    """The IoU of each class of the synthetic images, in the order of CLASSES. scores: what `train.evaluate` returns."""
    return {name: scores["iou"][name] for name in CLASSES}


# Results

def read_rows(path: Path) -> list[dict]:
    """The rows of a CSV file, numbers as numbers; none if there is no file."""
    if not path.exists():
        return []
    rows = []
    with open(path, newline="") as file:
        for texts in csv.DictReader(file):
            rows.append({name: number_or_text(text) for name, text in texts.items()})
    return rows


def number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def append_rows(path: Path, rows: list[dict]):
    """Adds rows to a CSV file, so that an interrupted experiment goes on where it was."""
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def is_measured(path: Path, case: dict) -> bool:
    """Whether the CSV file has a row of this case. It is read anew, as another process may have written to it."""
    return len(where(read_rows(path), **case)) > 0


def where(rows: list[dict], **values) -> list[dict]:
    """The rows that hold these values."""
    return [row for row in rows if holds(row, values)]


def holds(row: dict, values: dict) -> bool:
    for name, value in values.items():
        if row[name] != value:
            return False
    return True


def column(rows: list[dict], name: str) -> list:
    """The values of a column, in the order of the rows."""
    return [row[name] for row in rows]


def different(rows: list[dict], name: str) -> list:
    """The values of a column, each once, sorted."""
    return sorted(set(column(rows, name)))


# Tables

def mean_and_spread(values: list[float]) -> str:
    """`mean (smallest to largest)` of a few runs."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def spread_of_columns(rows: list[dict], names: list[str]) -> list[str]:
    """`mean (smallest to largest)` of each of these columns."""
    return [mean_and_spread(column(rows, name)) for name in names]


def parameters(rows: list[dict]) -> str:
    """The number of parameters of a model, of which these are rows."""
    return f"{rows[0]['parameters']:,.0f}"


def save_table(path: Path, header: list[str], rows: list[list]):
    """A table in Markdown, written to a file and printed."""
    lines = [table_line(header), "|---" * len(header) + "|"]
    for row in rows:
        lines.append(table_line(row))
    table = "\n".join(lines)
    path.write_text(table + "\n")
    print("\n" + table)


def table_line(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


# Pictures

def plot_spread(axes, rows: list[dict], x: str, y: str, **style):
    """A line through the mean of the column y at every value of the column x, with a band from the
    smallest to the largest."""
    positions = different(rows, x)
    means, smallest, largest = [], [], []
    for position in positions:
        values = [row[y] for row in rows if row[x] == position]
        means.append(statistics.mean(values))
        smallest.append(min(values))
        largest.append(max(values))
    (line,) = axes.plot(positions, means, **style)
    axes.fill_between(positions, smallest, largest, color=line.get_color(), alpha=0.15, linewidth=0)


def bar_spread(axes, x: float, values: list[float], **style):
    """A bar as high as the mean, and a dot for every value. No values, no bar."""
    if values:
        axes.bar(x, statistics.mean(values), **style)
        axes.set_axisbelow(True)  # the grid
        axes.plot([x] * len(values), values, "o", color="black", markersize=3.5, alpha=0.7)
