"""Figure 4 of the poster: the peak memory of each GPU in a training step, against the size of the image.

    OMP_NUM_THREADS=1 python -m experiments.memory   # 3 minutes of one core, without a GPU
    python -m experiments.memory --sizes 2048 16384
    python -m experiments.memory --quick             # seconds

The network is the paper's: width 64, depth 4, dropout 0.1, K 64; one image of 3 channels and 7
classes. The plain U-Net has one GPU, the decomposed ones share 8x8 tiles among all there are. Where
there is a GPU, real steps are made and its allocator asked for the peak, and a step that does not
fit is "out of memory"; where there is none, some are pretended, and plan.py adds up the tensors
alive (weights, gradients, Adam's averages, activations; not the workspace of convolutions). Results
are added to runs/memory/memory.csv as they come, and what is there already is not made again.
Writes memory.md, communication.md (the share of the communication network) and memory.png beside
it.
"""

import gc
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import plan
import train
from experiments.common import (CPU_OR_GPUS, append_rows, column, different, is_measured, make_folder, read_rows,
                                save_table, where)
from support import plots
from support.model import build_from_config
from support.options import DefaultsInHelp, Parser, number
from support.sizes import build_tiling

GPUS = torch.cuda.device_count()
NETWORK = {
    "width": 64,
    "depth": 4,
    "channels": 3,
    "classes": range(7),
    "comm_channels": 64,
    "dilations": [1, 1, 1],
    "dropout": 0.1,
    "recompute": False,
    "batch_size": 1,
    "grid": (8, 8),
    "overlap": 0,
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
    "amp": False,
    "image_processes": 1,
}
SILENT, TALKING = "without communication", "with communication"
MODELS = {  # what they change
    "plain U-Net": {"grid": (1, 1), "gpus": 1, "comm_channels": 0},
    SILENT: {"comm_channels": 0},
    TALKING: {},
    "with communication, --recompute": {"recompute": True},
}
FULL = "out of memory"


# The peak of each GPU

def name_machine(gpus: int) -> str:
    if GPUS > 0:
        return f"{gpus} x {torch.cuda.get_device_name(0)}"
    return f"{gpus} GPUs, predicted"


def measure(case: dict, config: dict) -> list[dict]:
    """The rows of a case, one for each GPU."""
    if GPUS > 0:
        peaks = measured(config)
    else:
        peaks = predicted(config)
    return [{**case, "gpu": i, "peak_mib": peak} for i, peak in enumerate(peaks)]


def measured(config: dict) -> list:
    """Peak MiB of each GPU in a real training step, or FULL."""
    devices = CPU_OR_GPUS[:config["gpus"]]
    gc.collect()  # what a step that did not fit has left
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        make_two_steps(config, devices)
    except torch.OutOfMemoryError:
        return [FULL] * len(devices)
    return [torch.cuda.max_memory_allocated(device) / 2**20 for device in devices]


def make_two_steps(config: dict, devices: list[torch.device]):
    """Two training steps, as the first one makes Adam's averages."""
    model = build_from_config(config).to(devices[0])
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    batch, (height, width) = config["batch_size"], config["image_size"]
    images = torch.rand(batch, config["channels"], height, width)
    masks = torch.zeros(batch, height, width, dtype=torch.uint8)
    tiling = build_tiling(config, (height, width))
    for _ in range(2):
        optimizer.zero_grad()
        loss = train.batch_loss(model, images, masks, tiling, devices, config)
        loss.backward()
        optimizer.step()


def predicted(config: dict) -> list[float]:
    """The same from fake tensors: every tile is run, since plan.predict's straight line holds only for large tiles."""
    memory, _ = plan.fake_step(config)
    return [memory.peak[f"cpu:{i + 1}"] / 2**20 for i in range(config["gpus"])]


# Tables

def save_tables(folder: Path, rows: list[dict], network: dict):
    peaks, shares = [], []
    for size in different(rows, "size"):
        of_size = where(rows, size=size)
        if set(column(of_size, "model")) != set(MODELS):
            continue  # an earlier run was stopped here
        image = f"{size:.0f}x{size:.0f}"
        peaks.append([image] + [peaks_in_gib(where(of_size, model=name)) for name in MODELS])
        shares.append([image] + share_of_communication(of_size, size, network))

    save_table(folder / "memory.md", ["image"] + [f"{name}, GiB" for name in MODELS], peaks)
    print("First GPU 0, then the others where they differ.")
    header = ["image", "parameters of the communication network", "its coarse map, MiB",
              "peak memory it adds on GPU 0, MiB"]
    save_table(folder / "communication.md", header, shares)


def peaks_in_gib(rows: list[dict]) -> str:
    """The different peaks of the GPUs, in their order."""
    peaks = []
    for row in rows:
        peak = row["peak_mib"]
        if peak != FULL:
            peak = f"{peak / 2**10:.2f}"
        if peak not in peaks:
            peaks.append(peak)
    return " / ".join(peaks)


def share_of_communication(rows: list[dict], size: float, network: dict) -> list[str]:
    """What the communication network has of the parameters, and of the memory of GPU 0 for images of one size."""
    model = build_from_config(network)
    coarse_side = size / 2 ** network["depth"]
    coarse_bytes = 4 * network["batch_size"] * network["comm_channels"] * coarse_side**2
    silent = where(rows, model=SILENT)[0]["peak_mib"]
    talking = where(rows, model=TALKING)[0]["peak_mib"]
    if FULL in (silent, talking):
        more = FULL
    else:
        more = f"{talking - silent:.1f} ({(talking - silent) / silent:.1%})"
    return [f"{count(model.comm_net):,} of {count(model):,}", f"{coarse_bytes / 2**20:.2f}", more]


def count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(weight.numel() for weight in model.parameters())


# The picture

def draw(path: Path, rows: list[dict]):
    """A solid line for GPU 0, which also runs the communication network, a dashed one for the fullest of the others."""
    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    for i, name in enumerate(MODELS):
        first, others = [], []
        for row in where(rows, model=name):
            if row["peak_mib"] == FULL:
                continue
            if row["gpu"] == 0:
                first.append(row)
            else:
                others.append(row)
        width = 4 if name == SILENT else 2  # its line would hide behind that with communication
        draw_largest(axes, first, "o-", color=f"C{i}", markersize=4, label=name, linewidth=width)
        draw_largest(axes, others, "o--", color=f"C{i}", markersize=4, linewidth=1)
    axes.set_yscale("log")
    axes.set_yticks([0.01, 0.1, 1, 10, 100, 1000], ["0.01", "0.1", "1", "10", "100", "1000"])
    axes.autoscale(axis="y")
    sizes = [int(size) for size in different(rows, "size")]
    axes.set_xticks([math.log2(size) for size in sizes], [f"{size}x{size}" for size in sizes])
    for card in (24, 80):
        axes.axhline(card, color="gray", linestyle=":")
        axes.text(1.01, card, f"a card of\n{card} GiB", color="gray", va="center", fontsize=9,
                  transform=axes.get_yaxis_transform())
    axes.set(xlabel="image", ylabel="peak memory of a GPU, GiB")
    if rows:
        axes.set_title(f"One training step ({rows[0]['machine']})")
    axes.grid(alpha=0.3)
    axes.plot([], [], "--", color="black", linewidth=1, label="the other GPUs")
    axes.legend(fontsize=9)
    plots.save(figure, path)


def draw_largest(axes, rows: list[dict], line: str, **style):
    """A line through the largest peak at each size of the image. No rows, no line."""
    positions, peaks = [], []
    for size in different(rows, "size"):
        positions.append(math.log2(size))
        peaks.append(max(column(where(rows, size=size), "peak_mib")) / 2**10)
    if rows:
        axes.plot(positions, peaks, line, **style)


def main(arguments: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=DefaultsInHelp)
    parser.add_argument("--sizes", type=number(256), nargs="+", default=[512, 1024, 2048, 4096, 8192],
                        help="sides of the image")
    parser.add_argument("--gpus", type=number(1), default=4, help="to pretend, where there is none")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    gpus = GPUS or asked.gpus
    machine = name_machine(gpus)
    network = {**NETWORK, "gpus": gpus}
    if asked.quick:
        asked.sizes = [128]
        network.update(width=2, depth=1, comm_channels=4, grid=(1, 2), gpus=min(gpus, 2))

    folder = make_folder("memory", asked.quick)
    results = folder / "memory.csv"
    for size in asked.sizes:
        for name, changes in MODELS.items():
            case = {"machine": machine, "size": size, "model": name}
            if not is_measured(results, case):
                config = {**network, **changes, "image_size": (size, size)}
                append_rows(results, measure(case, config))

    rows = where(read_rows(results), machine=machine)
    save_tables(folder, rows, network)
    draw(folder / "memory.png", rows)


if __name__ == "__main__":
    main()
