"""How far does it see? The line between two discs against their distance in tiles, for networks of several reaches.

    OMP_NUM_THREADS=1 python -m experiments.reach                       # 70 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.reach --grid 1x16           # 80 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.reach --grid 4x4            # 3 hours of one core
    python -m experiments.reach --quick                                 # seconds

The images are a row of 8 or 16 tiles of 32x32 pixels, or a square of 4x4; the discs lie in any two
of them. Every model is trained on 2000 images for 12 epochs. Then the line IoU of 2000 others is
taken, all together and by distance (in a square: rows or columns apart, whichever are more). What
has been trained before is not trained again. Writes reach_GRID.md and reach_GRID.png to runs/reach.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from torch.utils.data import DataLoader, Subset

import train
from experiments.common import (CPU_OR_GPUS, load, make_folder, make_parser, mean_and_spread, measured, parameters,
                                parse, plot_spread, run_folder, save_table, train_seeds)
from support import plots
from support.options import pair
from synthetic import LinesAndCircles

PAPER = "3 convolutions (the paper's)"
PLAIN = "plain U-Net"
DEEP = "plain U-Net, depth 5"
MODELS = {  # options of train.py
    PAPER: "",
    "6 convolutions, K 22": "--comm-channels 22 --dilations 1 1 1 1 1 1",
    "dilations 1 2 4": "--dilations 1 2 4",
    "dilations 1 2 4 8, K 27": "--comm-channels 27 --dilations 1 2 4 8",
    "dilations 1 2 4 8 16, K 24": "--comm-channels 24 --dilations 1 2 4 8 16",
    PLAIN: "--grid 1x1 --comm-channels 0",
    DEEP: "--grid 1x1 --comm-channels 0 --depth 5",
}
GRIDS = {  # tiles of the image: the models
    "1x8": [PAPER, "6 convolutions, K 22", "dilations 1 2 4", "dilations 1 2 4 8, K 27", PLAIN, DEEP],
    "1x16": [PAPER, "dilations 1 2 4 8 16, K 24", DEEP],
    "4x4": [PAPER, "dilations 1 2 4", PLAIN, DEEP],
}
TRAINING = "--train-images 2000 --epochs 12 --lr 0.005".split()
QUICK = "--train-images 4 --epochs 1 --batch-size 4".split()
TILE = 32  # pixels
CELL = 8  # pixels, at depth 3


# Scores

def scores_by_distance(out: Path, images: int) -> dict[str, float]:
    """Line IoU of images that were not seen in training, by the distance of the discs in tiles; "all" for all.

    out: the folder of a run.
    """
    model, config = load(out)
    grid = [side // TILE for side in config["image_size"]]
    data = LinesAndCircles(images, config["image_size"], grid, "test", config["seed"])
    at_distance = {"all": list(range(images))}  # numbers of images
    for distance in range(1, max(grid)):
        at_distance[str(distance)] = []
    for i in range(images):
        at_distance[str(distance_of_discs(data, i))].append(i)
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


def reach_in_cells(dilations: list[int], comm_channels: int) -> int | None:
    """How far the communication network sees: a 5x5 convolution 2 cells, times its dilation. None if there is none."""
    if comm_channels == 0:
        return None
    return 2 * sum(dilations)


# The picture

def draw(path: Path, grid: str, curves: dict[str, list[dict]], reaches: dict[str, int | None]):
    """Line IoU against distance: a line for each model, dashed for plain U-Nets, and its reach as a dotted line.

    curves: for each model what `scores_by_distance` returned for each seed.
    """
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for i, (name, of_seeds) in enumerate(curves.items()):
        values = {}
        for scores in of_seeds:
            for distance, score in scores.items():
                if distance != "all":
                    values.setdefault(int(distance), []).append(score)
        style = "--" if reaches[name] is None else "-"
        plot_spread(axes, dict(sorted(values.items())), marker="o", color=f"C{i}", label=name, linestyle=style)
        if reaches[name] is not None:
            axes.axvline(reaches[name] * CELL / TILE, color=f"C{i}", linestyle=":")
    axes.set(xlabel="distance of the discs, in tiles (dotted: how far the communication reaches)",
             ylabel="line IoU", ylim=(0, 1), title=f"{grid} tiles of {TILE}x{TILE} pixels")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))  # below, where no line is
    plots.save(figure, path)


# The command

def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=list(GRIDS), default="1x8", help="tiles of the image")
    asked = parse(parser, arguments)
    training, images = TRAINING, 2000
    names = GRIDS[asked.grid]
    if asked.quick:
        training, images = QUICK, 4
        names = names[-2:]

    folder = make_folder("reach", asked.quick)
    rows, columns = pair(asked.grid)
    options = ["--grid", asked.grid, "--image-size", f"{TILE * rows}x{TILE * columns}"] + training
    table, curves, reaches = [], {}, {}
    for name in names:
        of_model = f"{asked.grid}-{name}"
        runs = train_seeds(folder, of_model, options + MODELS[name].split(), asked.seeds)
        config = runs[0]["config"]
        reaches[name] = reach_in_cells(config["dilations"], config["comm_channels"])
        curves[name] = []
        for seed in asked.seeds:
            out = run_folder(folder, of_model, seed)
            curves[name].append(measured(out / "by_distance.json", scores_by_distance, out, images))
        score = mean_and_spread([scores["all"] for scores in curves[name]])
        table.append([name, reaches[name] or "-", parameters(runs), score])
    save_table(folder / f"reach_{asked.grid}.md", ["model", "reach, cells", "parameters", "line IoU"], table)
    draw(folder / f"reach_{asked.grid}.png", asked.grid, curves, reaches)


if __name__ == "__main__":
    main()
