"""How far does it see? The line between two discs against their distance in tiles, for networks of several reaches.

    OMP_NUM_THREADS=1 python -m experiments.reach                       # 110 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.reach --grids 1x16          # 80 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.reach --grids 4x4           # 3 hours of one core
    python -m experiments.reach --quick                                 # seconds

The images are a row of 8 or 16 tiles of 32x32 pixels, or a square of 4x4; the discs lie in any two of them. Every model
is trained on 2000 images for 12 epochs. Then the line IoU of 2000 others is taken, all together and by distance (in a
square: rows or columns apart, whichever are more). Results are added to runs/reach/reach.csv as they come, what is there
already is not made again, and two processes with different --grids or --seeds may run side by side. Writes reach.md and
reach.png beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from torch.utils.data import DataLoader, Subset

import options
import plots
import train
from comm_net import CommNet
from experiments.common import (CPU_OR_GPUS, append, load, make_parser, mean_and_spread, plot_spread, read, save_table,
                                trained, where)
from synthetic import LinesAndCircles


class Added(CommNet):
    """Adds what it has to say to the channels it was given, instead of replacing them."""

    def forward(self, coarse_map):
        return coarse_map + super().forward(coarse_map)


def plain(width: int, depth: int) -> list[str]:
    return f"--grid 1x1 --comm-channels 0 --width {width} --depth {depth}".split()


def dilated(k: int, *dilations: int) -> list[str]:
    return ["--comm-channels", str(k), "--dilations", *map(str, dilations)]


MODELS = {  # tiles of the image: name: (options of train.py, communication network)
    "1x8": {
        "3 convolutions, K 32 (the paper's)": ([], CommNet),
        "6 convolutions, K 22": (dilated(22, 1, 1, 1, 1, 1, 1), CommNet),
        "dilations 1 2 4, K 32": (dilated(32, 1, 2, 4), CommNet),
        "dilations 1 2 4, K 16": (dilated(16, 1, 2, 4), CommNet),
        "dilations 1 2 4 8, K 27": (dilated(27, 1, 2, 4, 8), CommNet),
        "the same, added": (dilated(27, 1, 2, 4, 8), Added),
        "plain U-Net": (plain(8, 3), CommNet),
        "plain U-Net, wider": (plain(10, 3), CommNet),
        "plain U-Net, depth 4": (plain(8, 4), CommNet),
        "plain U-Net, depth 5": (plain(8, 5), CommNet),
    },
    "1x16": {
        "3 convolutions, K 32 (the paper's)": ([], CommNet),
        "dilations 1 2 4 8 16, K 24": (dilated(24, 1, 2, 4, 8, 16), CommNet),
        "plain U-Net, depth 5": (plain(8, 5), CommNet),
    },
    "4x4": {
        "3 convolutions, K 32 (the paper's)": ([], CommNet),
        "dilations 1 2 4, K 32": (dilated(32, 1, 2, 4), CommNet),
        "plain U-Net": (plain(8, 3), CommNet),
        "plain U-Net, depth 5": (plain(8, 5), CommNet),
    },
}
TRAINING = "--train-images 2000 --epochs 12 --lr 0.005".split()
TESTED = 2000  # images
TILE = 32  # pixels


def by_distance(model, config: dict, images: int) -> dict[int, float]:
    """Line IoU of images that were not seen in training, by the distance of the discs in tiles; 0 stands for all."""
    grid = [side // TILE for side in config["image_size"]]
    data = LinesAndCircles(images, config["image_size"], grid, "test", config["seed"])
    distance = []
    for i in range(images):
        first, second = data.draw_tiles(np.random.default_rng((*data.key, i)))
        distance.append(abs(first - second).max())
    scores = {}
    for asked in range(max(grid)):
        chosen = Subset(data, [i for i in range(images) if asked in (0, distance[i])])
        if len(chosen):
            scores[asked] = train.evaluate(model, DataLoader(chosen, 16), config, CPU_OR_GPUS)["iou"]["line"]
    return scores


def draw(path: Path, results: list[dict]):
    """Line IoU against distance, a panel for each grid; the reach of each network as a dotted line."""
    grids = [grid for grid in MODELS if where(results, tiles=grid)] or list(MODELS)
    figure, panels = plt.subplots(1, len(grids), figsize=(6.4 * len(grids), 5), squeeze=False, sharey=True,
                                  layout="constrained")
    for axes, grid in zip(panels[0], grids):
        for i, name in enumerate(MODELS[grid]):
            mine = [row for row in where(results, tiles=grid, model=name) if row["distance"]]
            plot_spread(axes, mine, "distance", "line_iou", marker="o", color=f"C{i}", label=name,
                        linestyle="--" if name.startswith("plain") else "-")
            if mine and mine[0]["reach"]:
                axes.axvline(mine[0]["reach"] * 8 / TILE, color=f"C{i}", linestyle=":")  # a cell is 8 pixels wide
        axes.set(xlabel="distance of the discs, in tiles (dotted: how far the network hears)", ylim=(0, 1),
                 title=f"{grid} tiles of {TILE}x{TILE} pixels")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))  # below, where no line is
    panels[0][0].set_ylabel("line IoU")
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--grids", nargs="+", choices=MODELS, default=["1x8"], help="tiles of the image")
    asked = parser.parse_args(arguments)
    folder, training, tested = Path("runs/reach"), TRAINING, TESTED
    if asked.quick:
        folder, training, tested = Path("runs/reach-quick"), "--train-images 8 --epochs 1 --batch-size 4".split(), 8
        asked.grids, asked.seeds = ["1x8"], [0]

    results = folder / "reach.csv"
    for grid in asked.grids:
        rows, columns = options.pair(grid)
        image = ["--grid", grid, "--image-size", f"{TILE * rows}x{TILE * columns}"]
        for seed in asked.seeds:
            for name, (of_model, comm_net) in MODELS[grid].items():
                if where(read(results), tiles=grid, seed=seed, model=name):
                    continue
                out = folder / f"{grid}-{name.replace(' ', '-')}-seed{seed}".replace(",", "").replace("'", "")
                metrics = trained(out, [*image, *training, *of_model, "--seed", str(seed)], comm_net)
                model, config = load(out, comm_net)
                reach = model.comm_net.reach(depth=0) if model.comm_net else 0
                append(results, [{"tiles": grid, "model": name, "seed": seed, "parameters": metrics["parameters"],
                                  "reach": reach, "distance": distance, "line_iou": score}
                                 for distance, score in by_distance(model, config, tested).items()])

    table = []
    for grid, models in MODELS.items():
        for name in models:
            mine = where(read(results), tiles=grid, model=name, distance=0)
            if mine:
                reach = f"{mine[0]['reach']:.0f}" if mine[0]["reach"] else "-"
                table.append([grid, name, reach, f"{mine[0]['parameters']:,.0f}",
                              mean_and_spread([row["line_iou"] for row in mine]), len(mine)])
    save_table(folder / "reach.md", ["tiles", "model", "reach, cells", "parameters", "line IoU", "seeds"], table)
    draw(folder / "reach.png", read(results))


if __name__ == "__main__":
    main()
