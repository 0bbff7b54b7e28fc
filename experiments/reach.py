"""How far does it see? The line between two discs against their distance in tiles, for networks of several reaches.

    OMP_NUM_THREADS=1 python -m experiments.reach                       # 110 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.reach --grids 1x16          # 80 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.reach --grids 4x4           # 3 hours of one core
    python -m experiments.reach --quick                                 # seconds

The images are a row of 8 or 16 tiles of 32x32 pixels, or a square of 4x4; the discs lie in any two
of them. Every model is trained on 2000 images for 12 epochs. Then the line IoU of 2000 others is
taken, all together and by distance (in a square: rows or columns apart, whichever are more).
Results are added to runs/reach/reach.csv as they come, what is there already is not made again, and
two processes with different --grids or --seeds may run side by side. Writes reach.md and reach.png
beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from torch.utils.data import DataLoader, Subset

import train
from comm_net import CommNet
from experiments.common import (CPU_OR_GPUS, append_rows, column, file_name, is_measured, load, make_folder,
                                make_parser, mean_and_spread, parameters, plot_spread, read_rows, save_table, trained,
                                where)
from support import plots
from support.options import pair
from synthetic import LinesAndCircles


class Added(CommNet):
    """Adds what it has to say to the channels it was given, instead of replacing them."""

    def forward(self, coarse_map):
        return coarse_map + super().forward(coarse_map)


MODELS = {  # options of train.py
    "3 convolutions, K 32 (the paper's)": "",
    "6 convolutions, K 22": "--comm-channels 22 --dilations 1 1 1 1 1 1",
    "dilations 1 2 4, K 32": "--comm-channels 32 --dilations 1 2 4",
    "dilations 1 2 4, K 16": "--comm-channels 16 --dilations 1 2 4",
    "dilations 1 2 4 8, K 27": "--comm-channels 27 --dilations 1 2 4 8",
    "dilations 1 2 4 8, K 27, added": "--comm-channels 27 --dilations 1 2 4 8",
    "dilations 1 2 4 8 16, K 24": "--comm-channels 24 --dilations 1 2 4 8 16",
    "plain U-Net": "--grid 1x1 --comm-channels 0 --width 8 --depth 3",
    "plain U-Net, width 10": "--grid 1x1 --comm-channels 0 --width 10 --depth 3",
    "plain U-Net, depth 4": "--grid 1x1 --comm-channels 0 --width 8 --depth 4",
    "plain U-Net, depth 5": "--grid 1x1 --comm-channels 0 --width 8 --depth 5",
}
COMM_NETS = {"dilations 1 2 4 8, K 27, added": Added}  # where it is another than that of comm_net.py
COLORS = {  # the models that are drawn, each in the same colour in every panel and every picture
    "3 convolutions, K 32 (the paper's)": "tab:blue",
    "dilations 1 2 4, K 32": "tab:green",
    "dilations 1 2 4 8, K 27": "tab:purple",
    "dilations 1 2 4 8 16, K 24": "black",
    "plain U-Net": "tab:orange",
    "plain U-Net, depth 5": "tab:red",
}
GRIDS = {  # tiles of the image: the models
    "1x8": [
        "3 convolutions, K 32 (the paper's)",
        "6 convolutions, K 22",
        "dilations 1 2 4, K 32",
        "dilations 1 2 4, K 16",
        "dilations 1 2 4 8, K 27",
        "dilations 1 2 4 8, K 27, added",
        "plain U-Net",
        "plain U-Net, width 10",
        "plain U-Net, depth 4",
        "plain U-Net, depth 5",
    ],
    "1x16": ["3 convolutions, K 32 (the paper's)", "dilations 1 2 4 8 16, K 24", "plain U-Net, depth 5"],
    "4x4": ["3 convolutions, K 32 (the paper's)", "dilations 1 2 4, K 32", "plain U-Net", "plain U-Net, depth 5"],
}
TRAINING = "--train-images 2000 --epochs 12 --lr 0.005".split()
QUICK = "--train-images 8 --epochs 1 --batch-size 4".split()
TESTED = 2000  # images
TILE = 32  # pixels
CELL = 8  # pixels, at depth 3


# Training and scores

def measure(case: dict, folder: Path, training: list[str], images: int) -> list[dict]:
    """The rows of a case, one for each distance. Its model is trained now, unless it has been trained before."""
    grid, name, seed = case["tiles"], case["model"], case["seed"]
    rows, columns = pair(grid)
    options = ["--grid", grid, "--image-size", f"{TILE * rows}x{TILE * columns}"]
    options += training + MODELS[name].split() + ["--seed", str(seed)]
    comm_net = COMM_NETS.get(name, CommNet)
    out = folder / f"{grid}-{file_name(name)}-seed{seed}"
    metrics = trained(out, options, comm_net)
    model, config = load(out, comm_net)
    reach = 0
    if model.comm_net is not None:
        reach = model.comm_net.reach(depth=0)  # in cells
    measured = []
    for distance, score in scores_by_distance(model, config, images).items():
        measured.append({**case, "parameters": metrics["parameters"], "reach": reach, "distance": distance,
                         "line_iou": score})
    return measured


def scores_by_distance(model, config: dict, images: int) -> dict[int, float]:
    """Line IoU of images that were not seen in training, by the distance of the discs in tiles; 0 stands for all."""
    grid = [side // TILE for side in config["image_size"]]
    data = LinesAndCircles(images, config["image_size"], grid, "test", config["seed"])
    at_distance = {0: list(range(images))}  # numbers of images
    for distance in range(1, max(grid)):
        at_distance[distance] = []
    for i in range(images):
        at_distance[distance_of_discs(data, i)].append(i)
    scores = {}
    for distance, chosen in at_distance.items():
        if chosen:
            loader = DataLoader(Subset(data, chosen), 16)
            scores[distance] = train.evaluate(model, loader, config, CPU_OR_GPUS)["iou"]["line"]
    return scores


def distance_of_discs(data: LinesAndCircles, i: int) -> int:
    """How many tiles the discs of image i are apart: rows or columns, whichever are more."""
    first, second = data.draw_tiles(np.random.default_rng((*data.key, i)))  # as when the image is drawn
    return int(abs(first - second).max())


# The table and the picture

def save_scores(path: Path, rows: list[dict]):
    table = []
    for grid, names in GRIDS.items():
        for name in names:
            mine = where(rows, tiles=grid, model=name, distance=0)
            if mine:
                reach = "-"
                if mine[0]["reach"] > 0:
                    reach = f"{mine[0]['reach']:.0f}"
                score = mean_and_spread(column(mine, "line_iou"))
                table.append([grid, name, reach, parameters(mine), score, len(mine)])
    save_table(path, ["tiles", "model", "reach, cells", "parameters", "line IoU", "seeds"], table)


def draw(path: Path, rows: list[dict]):
    """Line IoU against distance, a panel for each grid that has rows."""
    grids = [grid for grid in GRIDS if where(rows, tiles=grid)]
    if not grids:
        grids = list(GRIDS)
    figure, panels = plt.subplots(1, len(grids), figsize=(6.4 * len(grids), 5), squeeze=False, sharey=True,
                                  layout="constrained")
    for axes, grid in zip(panels[0], grids):
        draw_panel(axes, GRIDS[grid], where(rows, tiles=grid))
        axes.set_title(f"{grid} tiles of {TILE}x{TILE} pixels")
    panels[0][0].set_ylabel("line IoU")
    plots.save(figure, path)


def draw_panel(axes, names: list[str], rows: list[dict]):
    """A line for each model that has a colour, dashed for plain U-Nets, and its reach as a dotted line."""
    for name in names:
        if name not in COLORS:
            continue
        mine = [row for row in where(rows, model=name) if row["distance"] > 0]
        style = "--" if name.startswith("plain") else "-"
        plot_spread(axes, mine, "distance", "line_iou", marker="o", color=COLORS[name], label=name, linestyle=style)
        if mine and mine[0]["reach"] > 0:
            axes.axvline(mine[0]["reach"] * CELL / TILE, color=COLORS[name], linestyle=":")
    axes.set(xlabel="distance of the discs, in tiles (dotted: how far the communication reaches)", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))  # below, where no line is


# The command

def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=["1x8"], help="tiles of the image")
    asked = parser.parse_args(arguments)
    training = TRAINING
    images = TESTED
    if asked.quick:
        training = QUICK
        images = 8
        asked.grids = ["4x4"]
        asked.seeds = [0]

    folder = make_folder("reach", asked.quick)
    results = folder / "reach.csv"
    for grid in asked.grids:
        for seed in asked.seeds:
            for name in GRIDS[grid]:
                case = {"tiles": grid, "model": name, "seed": seed}
                if not is_measured(results, case):
                    append_rows(results, measure(case, folder, training, images))

    rows = read_rows(results)
    save_scores(folder / "reach.md", rows)
    draw(folder / "reach.png", rows)


if __name__ == "__main__":
    main()
