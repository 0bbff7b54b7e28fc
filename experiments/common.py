"""What the experiments share: runs of train.py that are not made twice, tables, and lines with a spread.

A run is the dictionary of its metrics.json. Each model is trained with several seeds, so a model has a list of runs.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.utils.data import Subset

import train
from comm_net import CommNet
from support import plots
from support.checkpoints import write_json
from support.datasets import build_datasets
from support.model import load_model
from support.options import Parser, number

HERE = Path(__file__).parent
CPU_OR_GPUS = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
if not CPU_OR_GPUS:
    CPU_OR_GPUS = [torch.device("cpu")]
QUICK = "--train-images 8 --epochs 1 --width 2 --comm-channels 4".split()  # options of a run that takes seconds
TALKING = "with communication"
SILENT = "without communication"
WHOLE = "plain U-Net, whole image"
MODELS = {  # the three-way comparison: options of train.py
    TALKING: [],
    SILENT: ["--comm-channels", "0"],
    WHOLE: ["--grid", "1x1", "--comm-channels", "0"],
}
CLASSES = ["line", "background", "circle"]  # of the synthetic images, the hard one first
CLASS_HEADER = [f"IoU {name}" for name in CLASSES]


# The command

def make_parser(description: str) -> Parser:
    """The two options that most experiments have."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=number(0), nargs="+", default=[0, 1, 2], help="of weights and images")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    return parser


def parse(parser: Parser, arguments: list[str] | None):
    """The options. A smoke run has one seed."""
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.seeds = [0]
    return asked


def make_folder(name: str, quick: bool) -> Path:
    """The folder of an experiment, runs/NAME, or runs/NAME-quick for a smoke run."""
    if quick:
        name = f"{name}-quick"
    folder = Path("runs", name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Runs of train.py

def trained(out: Path, options: list[str], comm_net: type[nn.Module] = CommNet) -> dict:
    """The run in the folder `out`.

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


def train_seeds(folder: Path, name: str, options: list[str], seeds: list[int],
                comm_net: type[nn.Module] = CommNet) -> list[dict]:
    """The runs of a model, one for each seed."""
    runs = []
    for seed in seeds:
        out = run_folder(folder, name, seed)
        runs.append(trained(out, options + ["--seed", str(seed)], comm_net))
    return runs


def run_folder(folder: Path, name: str, seed: int) -> Path:
    name = name.replace(" ", "-").replace(",", "")
    return folder / f"{name}-seed{seed}"


def load(out: Path) -> tuple[nn.Module, dict]:
    """The network of the run in the folder `out`, on the first device, and its configuration."""
    model, config = load_model(out / "best.pt")
    return model.to(CPU_OR_GPUS[0]), config


def measured(path: Path, measure: Callable, *arguments):
    """What measure(*arguments) returns, which is kept in a JSON file, so that it is not measured twice."""
    if not path.exists():
        write_json(path, measure(*arguments))
    return json.loads(path.read_text())


# Tables

def mean_and_spread(values: list[float]) -> str:
    """`mean (smallest to largest)` of a few runs."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def mean_iou(runs: list[dict]) -> str:
    """Of the test images."""
    return mean_and_spread([run["test"]["mean_iou"] for run in runs])


def class_scores(runs: list[dict], classes: list[str] = CLASSES) -> list[str]:
    """The IoU of each class, of the test images."""
    cells = []
    for name in classes:
        cells.append(mean_and_spread([run["test"]["iou"][name] for run in runs]))
    return cells


def parameters(runs: list[dict]) -> str:
    """The number of parameters of a model."""
    return f"{runs[0]['parameters']:,}"


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

def draw_models(path: Path, folders: dict[str, Path], images: list[int]):
    """Test images with these numbers, their true masks, and what each model makes of them.

    folders: that of a run of each model. All show the tiles of the first model.
    """
    columns = {}
    boxes = []
    for name, folder in folders.items():
        model, config = load(folder)
        dataset = Subset(build_datasets(config)["test"], images)
        pictures, tiles = train.predict_some(model, dataset, config, CPU_OR_GPUS[:1])
        columns["image"] = pictures["image"]
        columns["true mask"] = pictures["true mask"]
        columns[name.replace(" ", "\n", 1)] = pictures["prediction"]
        if not boxes:
            boxes = tiles
    plots.draw_predictions(path, columns, boxes, config["classes"], config["colors"])


def plot_spread(axes, values: dict[float, list[float]], **style):
    """A line through the mean of the values at each x, with a band from the smallest to the largest."""
    means, smallest, largest = [], [], []
    for of_x in values.values():
        means.append(statistics.mean(of_x))
        smallest.append(min(of_x))
        largest.append(max(of_x))
    (line,) = axes.plot(list(values), means, **style)
    axes.fill_between(list(values), smallest, largest, color=line.get_color(), alpha=0.15, linewidth=0)
