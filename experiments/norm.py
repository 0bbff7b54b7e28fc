"""When is batch norm to keep its statistics? The freezing point, the batch size and group norm, on two tasks.

    OMP_NUM_THREADS=1 python -m experiments.norm --tasks areas      # 40 minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.norm --tasks lines      # 3 hours of one core
    python -m experiments.norm --quick                              # seconds

lines: the discs and lines of train.py. areas: images with two areas of different grey, each larger than most tiles, so
that a tile is often all of one class; normalised by its own statistics, a dark tile looks like a bright one.
Three models (with communication, without, and the U-Net on the whole image) are trained with one, four and sixteen
images in a step; batch norm is frozen after a quarter, a half, three quarters of the steps, or never. A last row has
group norm of eight groups in encoder and decoder, and the communication network frozen after a half.
Scores are those of the test images: the IoU of the line, and the mean IoU of the areas. Results are added to
runs/norm/norm.csv as they come, what is there already is not made again, and two processes with different --tasks,
--batch-sizes or --seeds may run side by side. Writes norm.md and norm.png beside it.
"""

import functools
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from torch import nn

import plots
from experiments.common import (MODELS, QUICK, append, make_parser, mean_and_spread, plot_spread, read, save_table,
                                trained, where)
from options import number
from unet import DoubleConv

SETTINGS = {"after 0.25": 0.25, "after 0.5": 0.5, "after 0.75": 0.75, "never": 1.0, "group norm": 0.5}
SCORES = {"lines": "IoU of the line", "areas": "mean IoU"}
GROUPS = 8
AREAS = {"train": 320, "val": 40, "test": 80}  # images


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(GROUPS, channels), channels)


def draw_areas(folder: Path, images: dict[str, int], seed: int):
    """Images (64,64) cut by a line into a dark and a bright part, with noise, and masks of 0 and 1, as train.py reads
    them. The line may miss the image: then all of it is of one class."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-31.5:32, -31.5:32]
    for split, count in images.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(-40, 40)
            mask = (np.cos(angle) * x + np.sin(angle) * y > distance).astype(np.uint8)
            grey = np.where(mask, 150, 90) + rng.normal(0, 10, mask.shape)
            Image.fromarray(grey.astype(np.uint8)).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{i}.png")


def train_one(task: str, data: Path, setting: str, out: Path, options: list[str]) -> dict:
    """The metrics of a run."""
    options = [*options, "--freeze-batch-norm", str(SETTINGS[setting])]
    if task == "areas":
        options += ["--dataset", "folder", "--data", str(data), "--no-augment"]
    norm = group_norm if setting == "group norm" else nn.BatchNorm2d
    with mock.patch("unet.DoubleConv", functools.partial(DoubleConv, norm=norm)):
        return trained(out, options)


def draw(path: Path, results: list[dict]):
    """A panel for each task and batch size: the score against the freezing point, a colour for each model."""
    sizes = sorted({row["batch_size"] for row in results}) or [1]
    figure, panels = plt.subplots(len(SCORES), len(sizes), figsize=(3.6 * len(sizes) + 1, 6.4), squeeze=False, sharex=True,
                                  sharey="row", layout="constrained")
    for row_of_panels, (task, score) in zip(panels, SCORES.items()):
        for axes, size in zip(row_of_panels, sizes):
            for i, model in enumerate(MODELS):
                mine = where(results, task=task, batch_size=size, model=model)
                frozen = [row | {"after": SETTINGS[row["setting"]]} for row in mine if row["setting"] != "group norm"]
                if frozen:
                    plot_spread(axes, frozen, "after", "score", marker="o", color=f"C{i}", label=model)
                grouped = [row["score"] for row in where(mine, setting="group norm")]
                axes.plot([1.25] * len(grouped), grouped, "x", color=f"C{i}")
            axes.set(title=f"{task}, {size:.0f} image{'s' if size > 1 else ''} in a step", ylim=(-0.02, 1.02))
            axes.set_xticks([0.25, 0.5, 0.75, 1, 1.25], ["1/4", "1/2", "3/4", "never", "group\nnorm"])
            axes.grid(alpha=0.3)
        row_of_panels[0].set_ylabel(score)
    for axes in panels[-1]:
        axes.set_xlabel("batch norm is frozen after")
    if results:
        panels[0][0].legend(fontsize=8)
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(SCORES), default=list(SCORES), help="what to learn")
    parser.add_argument("--batch-sizes", type=number(1), nargs="+", default=[16, 1, 4], help="images in a step")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="of batch norm")
    asked = parser.parse_args(arguments)
    folder, images = Path("runs/norm"), AREAS
    options = {"lines": [], "areas": ["--epochs", "8"]}
    if asked.quick:
        folder, images = Path("runs/norm-quick"), {"train": 8, "val": 2, "test": 2}
        options = {"lines": QUICK, "areas": "--epochs 1 --width 2 --comm-channels 4".split()}
        asked.seeds, asked.batch_sizes, asked.settings = [0], [2], ["never", "group norm"]
    folder.mkdir(parents=True, exist_ok=True)

    results = folder / "norm.csv"
    for seed in asked.seeds:
        data = folder / f"areas-seed{seed}"
        if "areas" in asked.tasks and not data.exists():
            draw_areas(data, images, seed)
        for task in asked.tasks:
            for size in asked.batch_sizes:
                for model, flags in MODELS.items():
                    for setting in asked.settings:
                        case = {"task": task, "batch_size": size, "model": model, "setting": setting, "seed": seed}
                        if where(read(results), **case):
                            continue
                        name = f"{task}-{model.split()[0]}-batch{size}-{setting.replace(' ', '-')}-seed{seed}"
                        metrics = train_one(task, data, setting, folder / name,
                                            ["--grid", "2x2", *options[task], *flags, "--batch-size", str(size),
                                             "--seed", str(seed)])
                        test = metrics["test"]
                        append(results, [case | {"score": test["iou"]["line"] if task == "lines" else test["mean_iou"],
                                                 **metrics["loss_of_training_images"]}])

    rows, table = read(results), []
    for task in SCORES:
        for size in sorted({row["batch_size"] for row in rows}):
            for model in MODELS:
                mine = where(rows, task=task, batch_size=size, model=model)
                scores = {setting: [row["score"] for row in where(mine, setting=setting)] for setting in SETTINGS}
                if mine:
                    table.append([task, f"{size:.0f}", model,
                                  *(mean_and_spread(values) if values else "" for values in scores.values())])
    save_table(folder / "norm.md", ["task", "batch", "model", *SETTINGS], table)
    draw(folder / "norm.png", rows)


if __name__ == "__main__":
    main()
