"""Trained in few tiles, used in many: do tiles of another number, or larger images, need another training?

    OMP_NUM_THREADS=1 python -m experiments.generalise       # 20 minutes of one core
    python -m experiments.generalise --quick                 # seconds

Trains with the defaults of train.py (64x64 pixels in 2x2 tiles), three seeds, and the plain U-Net beside it. Then,
without more training, tests them on 300 new images:
  64x64 cut in 1x1, 2x2, 4x4 and 8x8: the same images in larger and smaller tiles than those of training;
  128x128 in 4x4 and 256x256 in 8x8: tiles as in training, but more of them. There the discs are once in any two tiles
  of 32x32, and once in neighbouring ones, which keeps them as close as in training.
The plain U-Net always gets the whole image. Results are added to runs/generalise/generalise.csv as they come, and what
is there already is not made again. Writes generalise.md and generalise.png beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from torch.utils.data import DataLoader

import plots
import train
from experiments.common import (CPU_OR_GPUS, MODELS, QUICK, append, bar_spread, load, make_parser, mean_and_spread,
                                plot_spread, read, save_table, trained, where)
from synthetic import LinesAndCircles

DECOMPOSED, _, PLAIN = MODELS
ANY, NEAR = "any two tiles", "neighbouring tiles"
CUTS = (1, 2, 4, 8)  # of 64x64 pixels, in both directions
CASES = {  # model: (side of the image, tiles in each direction, where the discs are)
    DECOMPOSED: [*((64, tiles, ANY) for tiles in CUTS), *((32 * n, n, discs) for n in (4, 8) for discs in (ANY, NEAR))],
    PLAIN: [(64, 1, ANY), *((side, 1, discs) for side in (128, 256) for discs in (ANY, NEAR))],
}
TESTED = 300  # images
CLASSES = ("line", "background", "circle")


def test(model, config: dict, side: int, tiles: int, discs: str, images: int) -> dict[str, float]:
    """IoU of each class on square images that were not seen in training, cut in tiles x tiles."""
    data = LinesAndCircles(images, (side, side), (side // 32, side // 32), "test", config["seed"],
                           max_apart=1 if discs == NEAR else None)
    changed = config | {"image_size": (side, side), "grid": (tiles, tiles)}
    return train.evaluate(model, DataLoader(data, config["batch_size"]), changed, CPU_OR_GPUS)["iou"]


def draw(path: Path, results: list[dict]):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    small = where(results, side=64)
    for i, tiles in enumerate(CUTS):
        bar_spread(left, i, [row["line"] for row in where(small, model=DECOMPOSED, tiles=tiles)], width=0.6,
                   color="C0" if tiles == 2 else "lightsteelblue")
    bar_spread(left, len(CUTS), [row["line"] for row in where(small, model=PLAIN)], width=0.6, color="C1")
    names = [f"{tiles}x{tiles}" + ("\n(as trained)" if tiles == 2 else "") for tiles in CUTS]
    left.set_xticks(range(len(CUTS) + 1), [*names, "plain\nU-Net"])
    left.set(xlabel="tiles", ylabel="line IoU", ylim=(0, 1), title="The same 64x64 images, cut otherwise")

    for i, (name, tiles, label) in enumerate(((DECOMPOSED, 2, "tiles of 32x32"), (PLAIN, 1, "plain U-Net"))):
        as_trained = where(small, model=name, tiles=tiles)  # there any two tiles are neighbours
        for discs, style in ((NEAR, "-"), (ANY, "--")):
            larger = [row for row in where(results, model=name, discs=discs) if row["side"] > 64]
            plot_spread(right, as_trained + larger, "side", "line", marker="o", linestyle=style, color=f"C{i}",
                        label=f"{label}, discs in {discs}")
    right.set_xscale("log", base=2)
    right.set_xticks([64, 128, 256], ["64x64\n(as trained)", "128x128", "256x256"])
    right.set(xlabel="image", xlim=(56, 292), title="Larger images, without more training")
    right.legend(fontsize=9, loc=(0.3, 0.51))
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    asked = make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    folder, options, seeds, tested = Path("runs/generalise"), [], asked.seeds, TESTED
    if asked.quick:
        folder, options, seeds, tested = Path("runs/generalise-quick"), QUICK, [0], 4
    folder.mkdir(parents=True, exist_ok=True)

    results = folder / "generalise.csv"
    for seed in seeds:
        for name, cases in CASES.items():
            out = folder / f"{name.split()[0]}-seed{seed}"
            trained(out, ["--grid", "2x2", *options, *MODELS[name], "--seed", str(seed)])
            model, config = load(out)
            for side, tiles, discs in cases:
                case = {"model": name, "seed": seed, "side": side, "tiles": tiles, "discs": discs}
                if not where(read(results), **case):
                    scores = test(model, config, side, tiles, discs, tested)
                    append(results, [case | {label: scores[label] for label in CLASSES}])

    table = []
    for name, cases in CASES.items():
        for side, tiles, discs in cases:
            mine = where(read(results), model=name, side=side, tiles=tiles, discs=discs)
            if mine:
                table.append([name, f"{side}x{side}", f"{tiles}x{tiles}", discs,
                              *(mean_and_spread([row[label] for row in mine]) for label in CLASSES), len(mine)])
    save_table(folder / "generalise.md",
               ["model", "image", "tiles", "discs in", *(f"IoU {label}" for label in CLASSES), "seeds"], table)
    draw(folder / "generalise.png", read(results))


if __name__ == "__main__":
    main()
