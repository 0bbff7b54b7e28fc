"""The bare training step against that of the plain U-Net: time and peak memory from 256x256 to 2048x2048 pixels.

    python -m experiments.benchmark                                       # 12 minutes on two CPU cores
    python -m experiments.benchmark --sizes 8192 --grid 16x16 --only "recompute, bf16" --rounds 1    # 10 minutes
    python -m experiments.benchmark --sizes 8192 --width 64 --channels 3 --classes 7 --comm-channels 64    # on a GPU
    python -m experiments.benchmark --distributed                         # two processes against one: distributed.py
    python -m experiments.benchmark --quick                               # seconds

Forward, loss, backward and Adam on one random image that is there already: no data loading. All
contestants take turns in one process, so that the ratios hold on a machine whose speed drifts;
times are medians over the rounds, after a step to warm up. Peak memory is what the allocator says
on a GPU, and on a CPU the sum of all tensors alive (weights, gradients, Adam's two averages and the
image included). Contestants that the memory does not hold are shown as such. Writes
runs/benchmark/benchmark.csv and benchmark.png; the last line of the output is JSON. On Linux the C
library's ways with large tensors show in the times of large images, and in the memory of the
process: "What it costs" in the README has the variables to put in front of the command.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator
from torch.utils._pytree import tree_leaves

import plan
import train
from experiments import distributed
from experiments.common import CPU_OR_GPUS, column, different, make_folder, where
from support import checkpoints, plots, processes
from support.memory import LiveMemory
from support.model import build_from_config
from support.options import DefaultsInHelp, Parser, number, pair
from support.sizes import build_tiling

FIRST = "plain U-Net"  # whose time and memory are 1
PLAIN = {"grid": (1, 1), "comm_channels": 0}
CONTESTANTS = {  # what they change; frozen: batch norm keeps its statistics
    "plain U-Net": PLAIN,
    "plain U-Net, bf16": {**PLAIN, "amp": True},
    "decomposed": {},
    "decomposed, bf16": {"amp": True},
    "decomposed, frozen": {"frozen": True},
    "recompute": {"recompute": True},
    "recompute, bf16": {"recompute": True, "amp": True},
    "recompute, frozen": {"recompute": True, "frozen": True},
}
COLORS = {"plain U-Net": "C0", "decomposed": "C1", "recompute": "C2"}
LINES = {"": "-", "bf16": "--", "frozen": ":"}
COLUMNS = ["size", "model", "seconds", "megapixels_per_second", "peak_mib", "time_ratio", "memory_ratio"]


# The step

class Contestant:
    """One model and one image on it: `step()` is a training step, `seconds()` and `peak_mib()` measure one."""

    def __init__(self, config: dict, device: torch.device):
        self.before = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # bytes of the other contestants
        height, width = config["image_size"]
        torch.manual_seed(0)
        self.config = config
        self.device = device
        self.model = build_from_config(config).to(device)
        train.set_training_mode(self.model, config["frozen"])
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.tiling = build_tiling(config, (height, width))
        self.image = torch.rand(1, config["channels"], height, width)
        self.mask = torch.randint(0, len(config["classes"]), (1, height, width), dtype=torch.uint8)
        self.step()  # warms up, and makes Adam's averages

    def step(self):
        self.optimizer.zero_grad()
        loss = train.batch_loss(self.model, self.image, self.mask, self.tiling, [self.device], self.config)
        loss.backward()
        self.optimizer.step()

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
            for tensor in tree_leaves([self.model.state_dict(), averages, self.image, self.mask]):
                memory.follow(tensor)
            self.step()
        return memory.peak["cpu"] / 2**20


# Measuring

def enter(config: dict, device: torch.device) -> tuple[Contestant, float] | None:
    """A contestant and its peak in MiB, or None if it does not fit."""
    if device.type == "cpu":  # to try would be to be killed
        peak, _ = plan.predict(config)
        if peak["cpu:1"] > processes.memory_gib() * 2**30:
            return None
    try:
        contestant = Contestant(config, device)
        return contestant, contestant.peak_mib()
    except torch.OutOfMemoryError:
        return None


def measure(config: dict, names: list[str], rounds: int, device: torch.device) -> list[dict]:
    """The rows of the contestants with these names, for images of one size."""
    contestants, peaks, times = {}, {}, {}
    for name in names:
        entered = enter({**config, **CONTESTANTS[name]}, device)
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
        if name in contestants:
            seconds = statistics.median(times[name])
            row["seconds"] = round(seconds, 4)
            row["megapixels_per_second"] = round(height * width / 1e6 / seconds, 4)
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

def draw(rows: list[dict], path: Path):
    """Time and memory against pixels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    draw_panel(left, rows, "seconds", "seconds per training step")
    draw_panel(right, rows, "peak_mib", "peak memory, MiB")
    if rows:
        lines, labels = left.get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False)
    plots.save(figure, path)


def draw_panel(axes, rows: list[dict], value: str, label: str):
    """A line for each contestant, and a cross at the upper edge where it ran out of memory."""
    for name in CONTESTANTS:
        mine = where(rows, model=name)
        if mine:
            draw_contestant(axes, mine, name, value)
    sizes = different(rows, "size")
    axes.set_xticks([size**2 for size in sizes], [f"{size}x{size}" for size in sizes])
    title = "image (x: out of memory)" if None in column(rows, value) else "image"
    axes.set(xlabel=title, ylabel=label)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def draw_contestant(axes, rows: list[dict], name: str, value: str):
    network, _, variant = name.partition(", ")
    pixels, values = [], []
    for row in rows:
        if row[value] is not None:
            pixels.append(row["size"] ** 2)
            values.append(row[value])
    axes.loglog(pixels, values, marker="o", label=name, color=COLORS[network], linestyle=LINES[variant])
    for row in where(rows, **{value: None}):
        axes.plot(row["size"] ** 2, 0.96, "x", color=COLORS[network], transform=axes.get_xaxis_transform())


def describe(row: dict) -> str:
    line = f"{row['size']}x{row['size']}  {row['model']:22}"
    if row["seconds"] is None:
        return f"{line} out of memory"
    line += f" {row['seconds']:8.3f} s"
    if row["time_ratio"] is not None:
        line += f" ({row['time_ratio']:.2f}x)"
    line += f"  {row['peak_mib']:8.1f} MiB"
    if row["memory_ratio"] is not None:
        line += f" ({row['memory_ratio']:.3f}x)"
    return line


# The command

def make_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=DefaultsInHelp)
    option = parser.add_argument
    option("--sizes", type=number(16), nargs="+", default=[256, 512, 1024, 2048], help="sides of the image")
    option("--grid", type=pair, default="8x8", help="tiles of the decomposed models")
    option("--width", type=number(1), default=16, help="channels of the first level")
    option("--depth", type=number(1), default=4, help="number of poolings")
    option("--channels", type=number(1), default=1, help="of the image")
    option("--classes", type=number(2), default=3, help="of the mask")
    option("--comm-channels", type=number(0), default=32, help="communicated channels")
    option("--rounds", type=number(1), default=3, help="steps of each contestant")
    option("--only", default="", metavar="WORD", help="contestants with this word in their name")
    option("--distributed", action="store_true", help="two processes against one instead; see "
           "experiments/distributed.py")
    option("--quick", action="store_true", help="a smoke run")
    return parser


def make_config(asked: argparse.Namespace) -> dict:
    """The configuration of a contestant that changes nothing, but for the size of the image."""
    return {
        "width": asked.width,
        "depth": asked.depth,
        "channels": asked.channels,
        "classes": range(asked.classes),
        "dropout": 0.1,
        "comm_channels": asked.comm_channels,
        "dilations": [1, 1, 1],
        "recompute": False,
        "amp": False,
        "frozen": False,
        "mean": [0.0] * asked.channels,
        "std": [1.0] * asked.channels,
        "grid": asked.grid,
        "overlap": 0,
        "batch_size": 1,
        "gpus": 0,
        "image_processes": 1,
    }


def main(arguments: list[str] | None = None):
    parser = make_parser()
    asked = parser.parse_args(arguments)
    if asked.distributed:
        distributed.main(asked.quick)
        return
    if asked.quick:
        asked.sizes = [64]
        asked.grid = (2, 2)
        asked.width = 2
        asked.depth = 2
        asked.rounds = 1
        asked.comm_channels = 8
    config = make_config(asked)
    for size in asked.sizes:
        try:
            build_tiling(config, (size, size), asked.grid)
        except ValueError as error:
            parser.error(f"--sizes {size}: {error}")

    folder = make_folder("benchmark", asked.quick)
    device = CPU_OR_GPUS[0]
    names = [name for name in CONTESTANTS if asked.only in name]
    rows = []
    for size in asked.sizes:
        of_size = measure({**config, "image_size": (size, size)}, names, asked.rounds, device)
        for row in of_size:
            print(describe(row), flush=True)
        rows += of_size
        checkpoints.write_log(folder / "benchmark.csv", rows)
        draw(rows, folder / "benchmark.png")
    print(json.dumps({
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_mib_of_the_process": processes.peak_mib([device]),
        "rows": rows,
    }))


if __name__ == "__main__":
    main()
