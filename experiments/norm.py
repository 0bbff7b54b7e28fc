"""Is batch norm to keep its statistics? The default against batch norm that never does, and group norm, on two tasks.

    OMP_NUM_THREADS=1 python -m experiments.norm --tasks areas      # minutes of one core
    OMP_NUM_THREADS=1 python -m experiments.norm --tasks lines      # hours of one core
    python -m experiments.norm --quick                              # seconds

lines: the discs and lines of train.py. areas: images that are dark or bright, as a whole or by
halves, so that a tile is all of one class; normalised by its own statistics, a dark tile looks like
a bright one. 2x2 tiles that communicate are trained with one, four and sixteen images in a step, at
the learning rate that train.py takes for them. The last setting has group norm of eight groups in
encoder and decoder; its communication network has batch norm, frozen as by default. Scores are those
of the test images: the IoU of the line, and the mean IoU of the areas. What has been trained before
is not trained again. Writes norm.md to runs/norm.
"""

import functools
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image  # comes with matplotlib
from torch import nn

from experiments.common import QUICK, make_folder, make_parser, mean_and_spread, parse, save_table, train_seeds
from support.model import build_model
from support.options import number

GROUP_NORM = "group norm"
SETTINGS = {  # options of train.py
    "default": [],
    "never": ["--freeze-batch-norm", "1"],
    GROUP_NORM: [],
}
SCORES = {"lines": "IoU of the line", "areas": "mean IoU"}
AREAS = {"train": 160, "val": 40, "test": 80}  # images


def draw_areas(folder: Path, images: dict[str, int]):
    """Grey images (64,64) that are dark or bright, as a whole or by halves, and masks of 0 (dark)
    and 1 (bright), as train.py reads them. So each of 2x2 tiles is of one class, and normalised by
    its own statistics it tells nothing."""
    rng = np.random.default_rng(0)
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


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels), channels)


def score(task: str, setting: str, options: list[str], folder: Path, name: str, seeds: list[int]) -> str:
    """A cell of the table."""
    norm = group_norm if setting == GROUP_NORM else nn.BatchNorm2d
    build = functools.partial(build_model, norm=norm)
    with mock.patch("support.model.build_model", build):
        runs = train_seeds(folder, name, options + SETTINGS[setting], seeds)
    if task == "lines":
        return mean_and_spread([run["test"]["iou"]["line"] for run in runs])
    return mean_and_spread([run["test"]["mean_iou"] for run in runs])


def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(SCORES), default=list(SCORES), help="what to learn")
    parser.add_argument("--batch-sizes", type=number(1), nargs="+", default=[1, 4, 16], help="images in a step")
    asked = parse(parser, arguments)
    images = AREAS
    common = ["--grid", "2x2"]
    if asked.quick:
        images = {"train": 8, "val": 2, "test": 2}
        common += QUICK
        asked.batch_sizes = [2]

    folder = make_folder("norm", asked.quick)
    data = folder / "areas"
    if not data.exists():
        draw_areas(data, images)
    tasks = {"lines": [], "areas": ["--dataset", "folder", "--data", str(data), "--no-augment", "--workers", "0"]}
    if not asked.quick:
        tasks["areas"] += ["--epochs", "8"]
    table = []
    for task in asked.tasks:
        for size in asked.batch_sizes:
            cells = [task, size]
            options = common + tasks[task] + ["--batch-size", str(size)]
            for setting in SETTINGS:
                name = f"{task}-batch{size}-{setting}"
                cells.append(score(task, setting, options, folder, name, asked.seeds))
            table.append(cells)
    save_table(folder / "norm.md", ["task", "images in a step", *SETTINGS], table)


if __name__ == "__main__":
    main()
