"""The training step of train.py against that of the plain U-Net: time and peak memory from 256x256 to 2048x2048 pixels.

    python -m experiments.benchmark                                       # 15 minutes on two CPU cores
    python -m experiments.benchmark --sizes 64 --grid 2x2 --batch-size 16 --width 8 --depth 3 --dropout 0
    python -m experiments.benchmark --sizes 8192 --grid 16x16 --only "recompute, bf16" --rounds 1    # 10 minutes
    python -m experiments.benchmark --sizes 8192 --width 64 --channels 3 --classes 7 --comm-channels 64
    python -m experiments.benchmark --quick                               # seconds

`train.train_step` on random images that are there already: no data loading. The second line is the
step of `python train.py`, the third needs 2 GiB, the fourth a GPU. "frozen" is a step in
which batch norm keeps its statistics. All contestants take turns in one process, so that the ratios
hold on a machine whose speed drifts; times are medians over the rounds, after a step to warm up.
Peak memory is what the allocator says on a GPU, and on a CPU the sum of all tensors alive (weights,
gradients, Adam's two averages and the images included); beside it stands what plan.py predicts.
Contestants that the memory does not hold are shown as such. Writes benchmark.csv and benchmark.png
to runs/benchmark; the last line of the output is JSON. On Linux the C library's ways with large
tensors show in the times of large images, and in the memory of the process: docs/what-fits.md has
the variables to put in front of the command.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator
from torch.optim.lr_scheduler import ConstantLR
from torch.utils._pytree import tree_leaves

import plan
import train
from experiments.common import CPU_OR_GPUS, make_folder
from support import checkpoints, plots, processes
from support.memory import LiveMemory
from support.model import build_from_config
from support.options import Parser, number, pair
from support.sizes import build_tiling

FIRST = "plain U-Net"  # whose time and memory are 1
PLAIN = {"grid": (1, 1), "comm_channels": 0}
CONTESTANTS = {  # what they change; frozen: batch norm keeps its statistics
    "plain U-Net": PLAIN,
    "plain U-Net, bf16": {**PLAIN, "amp": True},
    "plain U-Net, frozen": {**PLAIN, "frozen": True},
    "decomposed": {},
    "decomposed, bf16": {"amp": True},
    "decomposed, frozen": {"frozen": True},
    "decomposed, bf16, frozen": {"amp": True, "frozen": True},
    "recompute": {"recompute": True},
    "recompute, bf16": {"recompute": True, "amp": True},
    "recompute, frozen": {"recompute": True, "frozen": True},
}
COLORS = {"plain U-Net": "C0", "decomposed": "C1", "recompute": "C2"}
LINES = {"": "-", "bf16": "--", "frozen": ":", "bf16, frozen": "-."}
COLUMNS = ["size", "model", "seconds", "megapixels_per_second", "peak_mib", "predicted_mib", "time_ratio",
           "memory_ratio"]


# The step

def memory_gib() -> float:
    """The memory that a step may need: nine tenths of that of the smallest GPU, or of the machine
    if there is no GPU."""
    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    else:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    return 0.9 * min(sizes) / 2**30


class Contestant:
    """One model and one batch on it: `step()` is a training step, `seconds()` and `peak_mib()` measure one."""

    def __init__(self, config: dict, device: torch.device):
        self.before = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # bytes of the other contestants
        batch, (height, width) = config["batch_size"], config["image_size"]
        torch.manual_seed(0)
        self.config = config
        self.device = device
        self.model = build_from_config(config).to(device)
        train.set_training_mode(self.model, config["frozen"])
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.schedule = ConstantLR(self.optimizer, factor=1)
        self.images = torch.rand(batch, config["channels"], height, width)
        self.masks = torch.randint(0, len(config["classes"]), (batch, height, width), dtype=torch.uint8)
        self.step()  # warms up, and makes Adam's averages

    def step(self):
        train.train_step(self.model, self.images, self.masks, self.optimizer, self.schedule, self.config,
                         [self.device])

    def seconds(self) -> float:
        self.wait()
        started = time.perf_counter()
        self.step()
        self.wait()
        return time.perf_counter() - started

    def wait(self):
        """Until a GPU has done all that it was given; a CPU has always."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_mib(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return (torch.cuda.max_memory_allocated() - self.before) / 2**20
        with LiveMemory() as memory:
            averages = self.optimizer.state_dict()["state"]
            for tensor in tree_leaves([self.model.state_dict(), averages, self.images, self.masks]):
                memory.follow(tensor)
            self.step()
        return memory.peak["cpu"] / 2**20


# Measuring

def predicted_mib(config: dict) -> float:
    """What plan.py predicts for such a step."""
    peak, _ = plan.predict(config, config["frozen"])
    return peak[plan.FIRST] / 2**20


def enter(config: dict, device: torch.device, predicted: float) -> tuple[Contestant, float] | None:
    """A contestant and its peak in MiB, or None if it does not fit. predicted: MiB of its step."""
    if device.type == "cpu" and predicted > memory_gib() * 2**10:  # to try would be to be killed
        return None
    try:
        contestant = Contestant(config, device)
        return contestant, contestant.peak_mib()
    except torch.OutOfMemoryError:
        return None


def measure(config: dict, names: list[str], rounds: int, device: torch.device) -> list[dict]:
    """The rows of the contestants with these names, for images of one size."""
    contestants, predictions, peaks, times = {}, {}, {}, {}
    for name in names:
        of_contestant = {**config, **CONTESTANTS[name]}
        predictions[name] = predicted_mib(of_contestant)
        entered = enter(of_contestant, device, predictions[name])
        if entered is not None:
            contestants[name], peaks[name] = entered
            times[name] = []
    for _ in range(rounds):
        for name in list(contestants):
            try:
                times[name].append(contestants[name].seconds())
            except torch.OutOfMemoryError:  # it fitted while there were fewer others
                del contestants[name]

    rows = []
    for name in names:
        height, width = config["image_size"]
        row = dict.fromkeys(COLUMNS)  # None, unless it is known
        row["size"] = height
        row["model"] = name
        row["predicted_mib"] = round(predictions[name], 1)
        if name in contestants:
            seconds = statistics.median(times[name])
            row["seconds"] = round(seconds, 4)
            row["megapixels_per_second"] = round(config["batch_size"] * height * width / 1e6 / seconds, 4)
            row["peak_mib"] = round(peaks[name], 1)
            if FIRST in contestants:
                row["time_ratio"] = round(median_ratio(times[name], times[FIRST]), 3)
                row["memory_ratio"] = round(peaks[name] / peaks[FIRST], 4)
        rows.append(row)
    return rows


def median_ratio(times: list[float], of_first: list[float]) -> float:
    """Each time is divided by that of the same round, as the speed of the machine drifts."""
    ratios = []
    for mine, first in zip(times, of_first):
        ratios.append(mine / first)
    return statistics.median(ratios)


# The picture and the lines of the output

def draw(path: Path, rows: list[dict]):
    """Time and memory against pixels: a line for each contestant, through the sizes that fitted."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    sizes = sorted({row["size"] for row in rows})
    labels = {"seconds": "seconds per training step", "peak_mib": "peak memory, MiB"}
    for axes, (value, label) in zip(panels, labels.items()):
        for name in CONTESTANTS:
            network, _, variant = name.partition(", ")
            mine = [row for row in rows if row["model"] == name and row[value] is not None]
            axes.loglog([row["size"] ** 2 for row in mine], [row[value] for row in mine], marker="o", label=name,
                        color=COLORS[network], linestyle=LINES[variant])
        axes.set_xticks([size**2 for size in sizes], [f"{size}x{size}" for size in sizes])
        axes.set(xlabel="image", ylabel=label)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
    plots.save(figure, path)


def describe(row: dict) -> str:
    line = f"{row['size']}x{row['size']}  {row['model']:24}"
    if row["seconds"] is None:
        return f"{line} out of memory"
    line += f" {row['seconds']:8.3f} s"
    if row["time_ratio"] is not None:
        line += f" ({row['time_ratio']:.2f}x)"
    line += f"  {row['peak_mib']:8.1f} MiB"
    if row["memory_ratio"] is not None:
        line += f" ({row['memory_ratio']:.3f}x)"
    return f"{line}, predicted {row['predicted_mib']:8.1f} MiB"


# The command

def make_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("--sizes", type=number(16), nargs="+", default=[256, 512, 1024, 2048], help="sides of the image")
    option("--grid", type=pair, default="8x8", help="tiles of the decomposed models")
    option("--batch-size", type=number(1), default=1, help="images in the step")
    option("--width", type=number(1), default=16, help="channels of the first level")
    option("--depth", type=number(1), default=4, help="number of poolings")
    option("--channels", type=number(1), default=1, help="of the image")
    option("--classes", type=number(2), default=3, help="of the mask")
    option("--comm-channels", type=number(0), default=32, help="communicated channels")
    option("--dropout", type=number(0, float, 0.99), default=0.1, help="probability with which a channel is left out")
    option("--rounds", type=number(1), default=3, help="steps of each contestant")
    option("--only", default="", metavar="WORD", help="contestants with this word in their name")
    option("--quick", action="store_true", help="a smoke run")
    return parser


def make_config(grid: tuple[int, int], batch_size: int, width: int, depth: int, channels: int, classes: int,
                comm_channels: int, dropout: float = 0.1) -> dict:
    """The configuration of a contestant that changes nothing, but for the size of the image."""
    return {
        "grid": grid,
        "batch_size": batch_size,
        "width": width,
        "depth": depth,
        "channels": channels,
        "classes": range(classes),
        "comm_channels": comm_channels,
        "dropout": dropout,
        "dilations": [1, 1, 1],
        "recompute": False,
        "amp": False,
        "frozen": False,
        "dtype": None,
        "loss_weights": None,
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
        "overlap": 0,
        "gpus": 0,
        "image_processes": 1,
    }


def main(arguments: list[str] | None = None):
    parser = make_parser()
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.sizes = [64]
        asked.grid = (2, 2)
        asked.width = 2
        asked.depth = 2
        asked.rounds = 1
        asked.comm_channels = 8
    config = make_config(asked.grid, asked.batch_size, asked.width, asked.depth, asked.channels, asked.classes,
                         asked.comm_channels, asked.dropout)
    device = CPU_OR_GPUS[0]
    if device.type == "cuda":
        config["gpus"] = 1
    for size in asked.sizes:
        try:
            build_tiling(config, (size, size), asked.grid)
        except ValueError as error:
            parser.error(f"--sizes {size}: {error}")

    folder = make_folder("benchmark", asked.quick)
    names = [name for name in CONTESTANTS if asked.only in name]
    rows = []
    for size in asked.sizes:
        of_size = measure({**config, "image_size": (size, size)}, names, asked.rounds, device)
        for row in of_size:
            print(describe(row), flush=True)
        rows += of_size
        checkpoints.write_log(folder / "benchmark.csv", rows)
        draw(folder / "benchmark.png", rows)
    print(json.dumps({
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_mib_of_the_process": processes.peak_mib([device]),
        "rows": rows,
    }))


if __name__ == "__main__":
    main()
