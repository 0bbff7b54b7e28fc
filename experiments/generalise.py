"""Trained in few tiles, used in many: do tiles of another number, or larger images, need another training?

    OMP_NUM_THREADS=1 python -m experiments.generalise       # 20 minutes of one core
    python -m experiments.generalise --quick                 # seconds

Trains with the defaults of train.py (64x64 pixels in 2x2 tiles), three seeds, and the plain U-Net
beside it. Then, without more training, tests them on 300 new images:
- 64x64 cut in 1x1, 2x2, 4x4 and 8x8: the same images in larger and smaller tiles than those of
  training;
- 128x128 in 4x4 and 256x256 in 8x8: tiles as in training, but more of them. There the discs are
  once in any two tiles of 32x32, and once in neighbouring ones, which keeps them as close as in
  training.
The plain U-Net always gets the whole image. Results are added to runs/generalise/generalise.csv as
they come, and what is there already is not made again. Writes generalise.md and generalise.png
beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from torch.utils.data import DataLoader

import train
from experiments.common import (CLASS_HEADER, CLASSES, CPU_OR_GPUS, MODELS, QUICK, append_rows, bar_spread,
                                class_scores, column, is_measured, load, make_folder, make_parser, plot_spread,
                                read_rows, save_table, spread_of_columns, trained, where)
from support import plots
from synthetic import LinesAndCircles

DECOMPOSED, PLAIN = "with communication", "plain U-Net, whole image"
ANY, NEAR = "any two tiles", "neighbouring tiles"
CASES = [  # model, side of the image in pixels, tiles in each direction, where the discs are
    (DECOMPOSED, 64, 1, ANY),
    (DECOMPOSED, 64, 2, ANY),
    (DECOMPOSED, 64, 4, ANY),
    (DECOMPOSED, 64, 8, ANY),
    (DECOMPOSED, 128, 4, ANY),
    (DECOMPOSED, 128, 4, NEAR),
    (DECOMPOSED, 256, 8, ANY),
    (DECOMPOSED, 256, 8, NEAR),
    (PLAIN, 64, 1, ANY),
    (PLAIN, 128, 1, ANY),
    (PLAIN, 128, 1, NEAR),
    (PLAIN, 256, 1, ANY),
    (PLAIN, 256, 1, NEAR),
]
TESTED = 300  # images


def measure(case: dict, folder: Path, options: list[str], images: int) -> dict:
    """The row of a case: scores on so many images. Its model is trained now, unless it has been trained before."""
    name, seed = case["model"], case["seed"]
    out = folder / f"{name.split()[0]}-seed{seed}"
    trained(out, ["--grid", "2x2"] + options + MODELS[name] + ["--seed", str(seed)])
    model, config = load(out)
    scores = test(model, config, case["side"], case["tiles"], case["discs"], images)
    return {**case, **scores}


def test(model, config: dict, side: int, tiles: int, discs: str, images: int) -> dict[str, float]:
    """IoU of each class on square images that were not seen in training, cut in tiles x tiles."""
    max_apart = None
    if discs == NEAR:
        max_apart = 1
    data = LinesAndCircles(images, (side, side), (side // 32, side // 32), "test", config["seed"], max_apart)
    config = {**config, "image_size": (side, side), "grid": (tiles, tiles)}
    loader = DataLoader(data, config["batch_size"])
    return class_scores(train.evaluate(model, loader, config, CPU_OR_GPUS))


def save_scores(path: Path, rows: list[dict]):
    table = []
    for name, side, tiles, discs in CASES:
        mine = where(rows, model=name, side=side, tiles=tiles, discs=discs)
        if mine:
            cells = [name, f"{side}x{side}", f"{tiles}x{tiles}", discs]
            table.append(cells + spread_of_columns(mine, CLASSES) + [len(mine)])
    save_table(path, ["model", "image", "tiles", "discs in"] + CLASS_HEADER + ["seeds"], table)


def draw(path: Path, rows: list[dict]):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    draw_other_tiles(left, where(rows, side=64))
    draw_larger_images(right, rows)
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
    plots.save(figure, path)


def draw_other_tiles(axes, rows: list[dict]):
    """A bar for each number of tiles, and one for the plain U-Net. rows: those of images of 64x64."""
    names = {1: "1x1", 2: "2x2\n(as trained)", 4: "4x4", 8: "8x8"}
    for i, tiles in enumerate(names):
        color = "C0" if tiles == 2 else "lightsteelblue"
        mine = where(rows, model=DECOMPOSED, tiles=tiles)
        bar_spread(axes, i, column(mine, "line"), width=0.6, color=color)
    plain = where(rows, model=PLAIN)
    bar_spread(axes, len(names), column(plain, "line"), width=0.6, color="C1")
    axes.set_xticks(range(len(names) + 1), list(names.values()) + ["plain\nU-Net"])
    axes.set(xlabel="tiles", ylabel="line IoU", ylim=(0, 1), title="The same 64x64 images, cut otherwise")


def draw_larger_images(axes, rows: list[dict]):
    """Line IoU against the side of the image: a colour for each model, a dashed line for discs in any two tiles."""
    draw_sides(axes, rows, DECOMPOSED, 2, color="C0", label="tiles of 32x32")
    draw_sides(axes, rows, PLAIN, 1, color="C1", label="plain U-Net")
    axes.set_xscale("log", base=2)
    axes.set_xticks([64, 128, 256], ["64x64\n(as trained)", "128x128", "256x256"])
    axes.set(xlabel="image", xlim=(56, 292), title="Larger images, without more training")
    axes.legend(fontsize=9, loc=(0.3, 0.51))


def draw_sides(axes, rows: list[dict], model: str, tiles: int, color: str, label: str):
    """The two lines of a model that was trained in tiles x tiles."""
    as_trained = where(rows, model=model, side=64, tiles=tiles)  # there any two tiles are neighbours
    for discs, style in ((NEAR, "-"), (ANY, "--")):
        mine = list(as_trained)
        for row in where(rows, model=model, discs=discs):
            if row["side"] > 64:
                mine.append(row)
        label_of_line = f"{label}, discs in {discs}"
        plot_spread(axes, mine, "side", "line", marker="o", linestyle=style, color=color, label=label_of_line)


def main(arguments: list[str] | None = None):
    asked = make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    options = []
    images = TESTED
    if asked.quick:
        options = QUICK
        images = 4
        asked.seeds = [0]

    folder = make_folder("generalise", asked.quick)
    results = folder / "generalise.csv"
    for seed in asked.seeds:
        for name, side, tiles, discs in CASES:
            case = {"model": name, "seed": seed, "side": side, "tiles": tiles, "discs": discs}
            if not is_measured(results, case):
                append_rows(results, [measure(case, folder, options, images)])

    rows = read_rows(results)
    save_scores(folder / "generalise.md", rows)
    draw(folder / "generalise.png", rows)


if __name__ == "__main__":
    main()
