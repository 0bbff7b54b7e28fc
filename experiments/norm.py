"""When is batch norm to keep its statistics? The freezing point, the batch size and group norm, on two tasks.

    OMP_NUM_THREADS=1 python -m experiments.norm --tasks areas      # an hour of one core
    OMP_NUM_THREADS=1 python -m experiments.norm --tasks lines      # many hours of one core
    python -m experiments.norm --quick                              # seconds

lines: the discs and lines of train.py. areas: images that are dark or bright, as a whole or by
halves, so that a tile is all of one class; normalised by its own statistics, a dark tile looks like
a bright one. Three models (with communication, without, and the U-Net on the whole image) are
trained with one, four and sixteen images in a step. The peak of the learning rate is 0.015 for
sixteen images, and goes with the root of the batch size. Batch norm is frozen after a quarter, a
half, three quarters of the steps, or never. A last setting has group norm of eight groups in
encoder and decoder, and the communication network frozen after a half. Scores are those of the test
images: the IoU of the line, and the mean IoU of the areas. Results are added to runs/norm/norm.csv
as they come, what is there already is not made again, and two processes with different --tasks,
--batch-sizes or --seeds may run side by side. Writes norm.md and norm.png beside it.
"""

import functools
import itertools
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image  # comes with matplotlib
from torch import nn

from experiments.common import (MODELS, QUICK, append_rows, column, different, file_name, is_measured, make_folder,
                                make_parser, mean_and_spread, plot_spread, read_rows, save_table, trained, where)
from support import plots
from support.model import build_model
from support.options import number

GROUP_NORM = "group norm"
SETTINGS = {  # the part of the steps after which batch norm is frozen
    "after 0.25": 0.25,
    "after 0.5": 0.5,
    "after 0.75": 0.75,
    "never": 1.0,
    GROUP_NORM: 0.5,
}
SCORES = {"lines": "IoU of the line", "areas": "mean IoU"}
GROUPS = 8
OPTIONS = {"lines": [], "areas": ["--epochs", "8"]}  # of train.py
QUICK_OPTIONS = {"lines": QUICK, "areas": "--epochs 1 --width 2 --comm-channels 4".split()}
AREAS = {"train": 160, "val": 40, "test": 80}  # images
QUICK_AREAS = {"train": 8, "val": 2, "test": 2}


# The images of the task `areas`

def draw_areas(folder: Path, images: dict[str, int], seed: int):
    """Grey images (64,64) that are dark or bright, as a whole or by halves, and masks of 0 (dark)
    and 1 (bright), as train.py reads them. So each of 2x2 tiles is of one class, and normalised by
    its own statistics it tells nothing."""
    rng = np.random.default_rng(seed)
    for split, count in images.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            mask = np.full((64, 64), rng.integers(2), np.uint8)
            if rng.random() < 0.5:
                mask[:, :32] = rng.integers(2)
            if rng.random() < 0.5:
                mask = mask.T
            grey = np.where(mask, 180, 60) + rng.normal(0, 8, mask.shape)
            Image.fromarray(grey.astype(np.uint8)).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{i}.png")


# Training

def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(GROUPS, channels), channels)


def measure(case: dict, folder: Path, data: Path, options: list[str]) -> dict:
    """The row of a case. Its model is trained now, unless it has been trained before. data: the folder of the areas."""
    task, size, model = case["task"], case["batch_size"], case["model"]
    setting, seed = case["setting"], case["seed"]
    learning_rate = 0.015 * (size / 16) ** 0.5
    options = ["--grid", "2x2"] + options + MODELS[model]
    options += ["--batch-size", str(size), "--lr", f"{learning_rate:.5f}", "--seed", str(seed)]
    options += ["--freeze-batch-norm", str(SETTINGS[setting])]
    if task == "areas":
        options += ["--dataset", "folder", "--data", str(data), "--no-augment"]

    out = folder / f"{task}-{model.split()[0]}-batch{size}-{file_name(setting)}-seed{seed}"
    norm = group_norm if setting == GROUP_NORM else nn.BatchNorm2d
    build = functools.partial(build_model, norm=norm)
    with mock.patch("support.model.build_model", build):
        metrics = trained(out, options)

    score = metrics["test"]["mean_iou"]
    if task == "lines":
        score = metrics["test"]["iou"]["line"]
    return {**case, "score": score, **metrics["loss_of_training_images"]}


# The table and the picture

def save_scores(path: Path, rows: list[dict]):
    table = []
    for task, size, model in itertools.product(SCORES, different(rows, "batch_size"), MODELS):
        mine = where(rows, task=task, batch_size=size, model=model)
        cells = [task, f"{size:.0f}", model]
        for setting in SETTINGS:
            scores = column(where(mine, setting=setting), "score")
            cells.append(mean_and_spread(scores) if scores else "")
        if mine:
            table.append(cells)
    save_table(path, ["task", "batch", "model"] + list(SETTINGS), table)


def draw(path: Path, rows: list[dict]):
    """A panel for each task and batch size: the score against the freezing point, a colour for each model."""
    sizes = different(rows, "batch_size") or [1]
    figure, panels = plt.subplots(len(SCORES), len(sizes), figsize=(3.6 * len(sizes) + 1, 6.4), squeeze=False,
                                  sharex=True, sharey="row", layout="constrained")
    for row_of_panels, (task, score) in zip(panels, SCORES.items()):
        for axes, size in zip(row_of_panels, sizes):
            draw_panel(axes, where(rows, task=task, batch_size=size))
            images = "1 image" if size == 1 else f"{size:.0f} images"
            axes.set(title=f"{task}, {images} in a step")
        row_of_panels[0].set_ylabel(score)
    for axes in panels[-1]:
        axes.set_xlabel("batch norm is frozen after")
    lines, labels = panels[-1][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(MODELS), frameon=False)
    plots.save(figure, path)


def draw_panel(axes, rows: list[dict]):
    """A line for each model, and beside it a cross for each run with group norm."""
    for i, model in enumerate(MODELS):
        frozen, grouped = [], []
        for row in where(rows, model=model):
            if row["setting"] == GROUP_NORM:
                grouped.append(row["score"])
            else:
                frozen.append({"after": SETTINGS[row["setting"]], "score": row["score"]})
        if frozen:
            plot_spread(axes, frozen, "after", "score", marker="o", color=f"C{i}", label=model)
        axes.plot([1.25] * len(grouped), grouped, "x", color=f"C{i}")
    axes.set(ylim=(-0.02, 1.02))
    axes.set_xticks([0.25, 0.5, 0.75, 1, 1.25], ["1/4", "1/2", "3/4", "never", "group\nnorm"])
    axes.grid(alpha=0.3)


# The command

def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(SCORES), default=list(SCORES), help="what to learn")
    parser.add_argument("--batch-sizes", type=number(1), nargs="+", default=[16, 1, 4], help="images in a step")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="of batch norm")
    asked = parser.parse_args(arguments)
    options = OPTIONS
    images = AREAS
    if asked.quick:
        options = QUICK_OPTIONS
        images = QUICK_AREAS
        asked.seeds = [0]
        asked.batch_sizes = [2]
        asked.settings = [GROUP_NORM]

    folder = make_folder("norm", asked.quick)
    results = folder / "norm.csv"
    for seed in asked.seeds:
        data = folder / f"areas-seed{seed}"
        if "areas" in asked.tasks and not data.exists():
            draw_areas(data, images, seed)
        for task, size, model, setting in itertools.product(asked.tasks, asked.batch_sizes, MODELS, asked.settings):
            case = {"task": task, "batch_size": size, "model": model, "setting": setting, "seed": seed}
            if not is_measured(results, case):
                append_rows(results, [measure(case, folder, data, options[task])])

    rows = read_rows(results)
    save_scores(folder / "norm.md", rows)
    draw(folder / "norm.png", rows)


if __name__ == "__main__":
    main()
