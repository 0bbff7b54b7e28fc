"""Figure 4 of the poster: the peak memory of each GPU in a training step, against the size of the image.

    OMP_NUM_THREADS=1 python -m experiments.memory   # 3 minutes of one core, without a GPU
    python -m experiments.memory --quick             # seconds

As plan.py predicts it: no GPU is needed. The network is the paper's: width 64, depth 4, dropout 0.1,
K 64; one image of 3 channels and 7 classes, in float32. The plain U-Net has one GPU, the decomposed
ones share 8x8 tiles among four. What a real GPU says: experiments.benchmark. Writes memory.md and
memory.png to runs/memory.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import plan
from experiments.benchmark import make_config
from experiments.common import SILENT, TALKING, make_folder, save_table
from support import plots
from support.options import Parser, number

PAPER = {
    "width": 64,
    "depth": 4,
    "channels": 3,
    "classes": 7,
    "comm_channels": 64,
    "grid": (8, 8),
    "batch_size": 1,
}
MODELS = {  # what they change
    "plain U-Net, one GPU": {"grid": (1, 1), "gpus": 1, "comm_channels": 0},
    SILENT: {"comm_channels": 0},
    TALKING: {},
    "with communication, --recompute": {"recompute": True},
}


def peaks_in_gib(config: dict) -> list[float]:
    """The peak memory of the first GPU, and of each other one, if there are others."""
    peak, _ = plan.predict(config)
    return [size / 2**30 for size in peak.values() if size > 0]


def draw(path: Path, sizes: list[int], results: dict[str, list[list[float]]]):
    """A solid line for GPU 0, which also runs the communication network, a dashed one for each other GPU.

    results: for each model the peaks at each size.
    """
    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    for i, (name, peaks) in enumerate(results.items()):
        first, others = np.array(peaks)[:, [0, -1]].T
        axes.plot(sizes, first, "o-", color=f"C{i}", label=name)
        axes.plot(sizes, others, "o--", color=f"C{i}", linewidth=1)
    axes.axhline(24, color="gray", linestyle=":", label="a card of 24 GiB")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size}x{size}" for size in sizes])
    axes.set(xlabel="image", ylabel="GiB of a GPU, predicted", title="One training step (dashed: each other GPU)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=number(256), nargs="+", default=[512, 1024, 2048, 4096, 8192],
                        help="sides of the image")
    parser.add_argument("--gpus", type=number(1), default=4, help="that share the tiles")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    network = make_config(**PAPER)
    if asked.quick:
        asked.sizes = [128]
        network.update(width=2, depth=1, comm_channels=4, grid=(1, 4))

    folder = make_folder("memory", asked.quick)
    table = []
    results = {name: [] for name in MODELS}
    for size in asked.sizes:
        cells = [f"{size}x{size}"]
        for name, changes in MODELS.items():
            config = {**network, "gpus": asked.gpus, "image_size": (size, size), **changes}
            peaks = peaks_in_gib(config)
            results[name].append(peaks)
            cells.append(f"{peaks[0]:.2f} / {peaks[-1]:.2f}")
        table.append(cells)
    save_table(folder / "memory.md", ["GiB of the first GPU / each other one", *MODELS], table)
    draw(folder / "memory.png", asked.sizes, results)


if __name__ == "__main__":
    main()
