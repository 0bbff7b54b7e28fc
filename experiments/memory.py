"""Figure 4 of the poster: the peak memory of each GPU in a training step, against the size of the image.

    OMP_NUM_THREADS=1 python -m experiments.memory   # 3 minutes of one core, without a GPU
    python -m experiments.memory --sizes 2048 16384
    python -m experiments.memory --quick             # seconds

The network is the paper's: width 64, depth 4, dropout 0.1, K 64; one image of 3 channels and 7 classes. The plain U-Net
has one GPU, the decomposed ones share 8x8 tiles among all there are. Where there is a GPU, real steps are made and its
allocator asked for the peak, and a step that does not fit is "out of memory"; where there is none, 4 are pretended, and
plan.py adds up the tensors alive (weights, gradients, Adam's averages, activations; not the workspace of convolutions).
Results are added to runs/memory/memory.csv as they come, and what is there already is not made again. Writes memory.md,
communication.md (the share of the communication network) and memory.png beside it.
"""

import argparse
import gc
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import plan
import plots
import train
from experiments.common import CPU_OR_GPUS, append, read, save_table, where
from options import Parser, build_tiling, number

NETWORK = {"width": 64, "depth": 4, "channels": 3, "classes": range(7), "comm_channels": 64, "dilations": [1, 1, 1],
           "dropout": 0.1, "recompute": False, "batch_size": 1, "grid": (8, 8), "overlap": 0,
           "mean": [0.0] * 3, "std": [1.0] * 3, "amp": False}
PLAIN, SILENT, TALKING, RECOMPUTED = MODELS = (
    "plain U-Net", "without communication", "with communication", "with communication, --recompute")
CHANGES = {PLAIN: {"grid": (1, 1), "gpus": 1, "comm_channels": 0}, SILENT: {"comm_channels": 0}, TALKING: {},
           RECOMPUTED: {"recompute": True}}
GPUS = torch.cuda.device_count()
MACHINE = f"{GPUS} x {torch.cuda.get_device_name(0)}" if GPUS else "predicted"
FULL = "out of memory"


def measured(config: dict) -> list:
    """Peak MiB of each GPU in a real training step."""
    devices = CPU_OR_GPUS[:config["gpus"]]
    gc.collect()  # what a step that did not fit has left
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        model = train.build_model(config).to(devices[0])
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        images = torch.rand(config["batch_size"], config["channels"], *config["image_size"])
        masks = torch.zeros(config["batch_size"], *config["image_size"], dtype=torch.uint8)
        for _ in range(2):  # the first one makes Adam's averages
            optimizer.zero_grad()
            train.batch_loss(model, images, masks, build_tiling(config, config["image_size"]), devices).backward()
            optimizer.step()
    except torch.OutOfMemoryError:
        return [FULL] * len(devices)
    return [torch.cuda.max_memory_allocated(device) / 2**20 for device in devices]


def predicted(config: dict) -> list:
    """The same from fake tensors: every tile is run, since plan.predict's straight line holds only for large tiles."""
    peak = plan.fake_step(config).peak
    return [peak[f"cpu:{i + 1}"] / 2**20 for i in range(config["gpus"])]


def draw(path: Path, results: list[dict]):
    """A solid line for GPU 0, which also runs the communication network, a dashed one for the fullest of the others."""
    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    fits = [row for row in results if row["peak_mib"] != FULL]
    for i, name in enumerate(MODELS):
        mine = where(fits, model=name)
        for others, style in ((False, "-"), (True, "--")):
            sizes = sorted({row["size"] for row in mine if (row["gpu"] > 0) == others})
            peaks = [max(row["peak_mib"] for row in where(mine, size=size) if (row["gpu"] > 0) == others) / 2**10
                     for size in sizes]
            if peaks:
                axes.plot([math.log2(size) for size in sizes], peaks, f"o{style}", color=f"C{i}", markersize=4,
                          label=None if others else name, linewidth=1 if others else 4 if name == SILENT else 2)
    axes.set_yscale("log")
    axes.set_yticks([0.01, 0.1, 1, 10, 100, 1000], ["0.01", "0.1", "1", "10", "100", "1000"])
    axes.autoscale(axis="y")
    sizes = sorted({int(row["size"]) for row in results})
    axes.set_xticks([math.log2(size) for size in sizes], [f"{size}x{size}" for size in sizes])
    for card in (24, 80):
        axes.axhline(card, color="gray", linestyle=":")
        axes.text(1.01, card, f"a card of\n{card} GiB", color="gray", va="center", fontsize=9,
                  transform=axes.get_yaxis_transform())
    axes.set(xlabel="image", ylabel="peak memory of a GPU, GiB", title=f"One training step ({MACHINE})")
    axes.grid(alpha=0.3)
    axes.plot([], [], "--", color="black", linewidth=1, label="the other GPUs")
    axes.legend(fontsize=9)
    plots.save(figure, path)


def peak(row: dict) -> str:
    return FULL if row["peak_mib"] == FULL else f"{row['peak_mib'] / 2**10:.2f}"


def save_tables(folder: Path, rows: list[dict], network: dict):
    table, share, model = [], [], train.build_model(network)
    parameters, everything = (sum(weight.numel() for weight in part.parameters()) for part in (model.comm_net, model))
    for size in sorted({row["size"] for row in rows}):
        gpus = {name: where(rows, size=size, model=name) for name in MODELS}
        if not all(gpus.values()):
            continue  # an earlier run was stopped here
        image = f"{size:.0f}x{size:.0f}"
        table.append([image, *(" / ".join(dict.fromkeys(map(peak, gpus[name]))) for name in MODELS)])
        silent, talking = gpus[SILENT][0]["peak_mib"], gpus[TALKING][0]["peak_mib"]
        coarse = 4 * network["batch_size"] * network["comm_channels"] * (size / 2 ** network["depth"]) ** 2 / 2**20
        more = FULL if FULL in (silent, talking) else f"{talking - silent:.1f} ({(talking - silent) / silent:.1%})"
        share.append([image, f"{parameters:,} of {everything:,}", f"{coarse:.2f}", more])
    save_table(folder / "memory.md", ["image", *(f"{name}, GiB" for name in MODELS)], table)
    print("First GPU 0, then the others where they differ.")
    save_table(folder / "communication.md", ["image", "parameters of the communication network",
                                             "its coarse map, MiB", "peak memory it adds on GPU 0, MiB"], share)


def main(arguments: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=number(256), nargs="+", default=[512, 1024, 2048, 4096, 8192],
                        help="sides of the image")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    folder, network = Path("runs/memory"), NETWORK | {"gpus": GPUS or 4}
    if asked.quick:
        folder, asked.sizes = Path("runs/memory-quick"), [64, 128]
        network |= {"width": 2, "depth": 2, "comm_channels": 8, "grid": (1, 2), "gpus": min(network["gpus"], 2)}
    folder.mkdir(parents=True, exist_ok=True)

    results = folder / "memory.csv"
    for size in asked.sizes:
        for name, changes in CHANGES.items():
            if where(read(results), machine=MACHINE, size=size, model=name):
                continue
            peaks = (measured if GPUS else predicted)(network | changes | {"image_size": (size, size)})
            append(results, [{"machine": MACHINE, "size": size, "model": name, "gpu": i, "peak_mib": mib}
                             for i, mib in enumerate(peaks)])

    rows = where(read(results), machine=MACHINE)
    save_tables(folder, rows, network)
    draw(folder / "memory.png", rows)


if __name__ == "__main__":
    main()
