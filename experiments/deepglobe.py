"""Table 1 of the poster: mean IoU on DeepGlobe's land cover, with communication, without, and of the plain U-Net.

    python -m experiments.deepglobe DIR                                      # DIR/train/ID_sat.jpg, ID_mask.png
    python -m experiments.deepglobe DIR --seeds 0 --recompute --epochs 10    # any options of train.py after DIR
    python -m experiments.deepglobe --quick                                  # a few small images made here, in seconds

Trains each model with three seeds on whole images, and scores the best epoch on all three splits, without crops or
augmentation. The mean is over the classes that occur, the IoU of each over all pixels of a split; pixels whose true
class is unknown are neither learned nor scored. The networks are the paper's (width 32, depth 4, K 64, dropout 0.1), in
2x2 tiles; epochs, batch size and learning rate are a choice of our own, not tried on the data. With them the plain
U-Net needs 42 GiB on its one GPU by plan.py's count, and half of it with --batch-size 1. Results are added to
runs/deepglobe/deepglobe.csv as they come, and what is there already is not made again. Writes deepglobe.md and
deepglobe.png beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image  # comes with matplotlib
from torch.utils.data import DataLoader

import plots
import train
from data import build_datasets, collate
from experiments.common import (CPU_OR_GPUS, MODELS, append, bar_spread, load, make_parser, mean_and_spread, read,
                                save_table, trained, where)
from image_folder import DEEPGLOBE

NETWORK = "--width 32 --depth 4 --comm-channels 64 --dropout 0.1 --grid 2x2".split()
TRAINING = "--epochs 50 --batch-size 2 --lr 0.002".split()
QUICK = "--width 2 --depth 2 --comm-channels 4 --grid 2x2 --epochs 1 --batch-size 4".split()
SPLITS = ("train", "test", "val")  # in the order of the poster
POSTER = dict(zip(MODELS, ((0.7229, 0.6680, 0.6907), (0.7025, 0.6474, 0.6631), (0.7239, 0.6723, 0.6858))))


def make_folder(root: Path, pairs: int = 12, size: tuple[int, int] = (48, 64)):
    """DeepGlobe's layout: in each image two fields of different classes, in the mask colours that are not pure."""
    rng, colors = np.random.default_rng(0), 255 * np.array(list(DEEPGLOBE.values()))
    (root / "train").mkdir(parents=True, exist_ok=True)
    for i in range(pairs):
        classes = np.where(np.arange(size[1]) < rng.integers(8, size[1] - 8), i % 7, (i + 1 + i // 7) % 7)
        for ending, contrast, noise in (("mask.png", 1, 60), ("sat.jpg", 0.4, 30)):
            picture = contrast * colors[classes] + rng.integers(-noise, noise + 1, (*size, 3))
            Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(root / f"train/{i}_{ending}")


def score(out: Path) -> list[dict]:
    """Mean IoU and that of every class, for each split of the run in the folder `out`."""
    model, config = load(out)
    datasets = build_datasets(config | {"crop": None, "augment": False})
    rows = []
    for split in SPLITS:
        found = train.evaluate(model, DataLoader(datasets[split], 1, collate_fn=collate), config, CPU_OR_GPUS)
        rows.append({"split": split, "mean_iou": found["mean_iou"],
                     **{name: found["iou"][name] for name in DEEPGLOBE if name != "unknown"}})
    return rows


def draw(path: Path, results: list[dict]):
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, name in enumerate(MODELS):
        for at, split in enumerate(SPLITS):
            first = (i, at) == (0, 0)
            scores = [row["mean_iou"] for row in where(results, model=name, split=split)]
            x = at + 0.27 * (i - 1)
            bar_spread(axes, x, scores, color=f"C{i}", width=0.25, label=None if at else name)
            axes.plot(x, POSTER[name][at], "D", color="white", markeredgecolor="black",
                      label="the poster's" if first else None)
    axes.set_xticks(range(len(SPLITS)), SPLITS)
    axes.set(ylabel="mean IoU", ylim=(0, 1), title="DeepGlobe: mean of the seeds, and each of them as a dot")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=9, ncols=2, loc="upper center")
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DIR", type=Path, nargs="?", help="DeepGlobe's folder, that which holds "
                        "train/; any options of train.py may follow")
    asked, more = parser.parse_known_args(arguments)
    folder, options, seeds = Path("runs/deepglobe"), [*NETWORK, *TRAINING, *more], asked.seeds
    if asked.quick:
        folder, options, seeds = Path("runs/deepglobe-quick"), QUICK, [0]
        asked.data = folder / "data"
        make_folder(asked.data)
    if asked.data is None:
        parser.error("give DeepGlobe's folder, that which holds train/, or --quick")
    folder.mkdir(parents=True, exist_ok=True)

    results = folder / "deepglobe.csv"
    for seed in seeds:
        for name, flags in MODELS.items():
            if not where(read(results), model=name, seed=seed):
                out = folder / f"{name.split()[0]}-seed{seed}"
                data = ["--dataset", "deepglobe", "--data", str(asked.data)]
                trained(out, [*data, *options, *flags, "--seed", str(seed)])
                append(results, [{"model": name, "seed": seed, **row} for row in score(out)])

    table = []
    for name in MODELS:
        mine = where(read(results), model=name)
        if mine:
            cells = [name]
            for split, theirs in zip(SPLITS, POSTER[name]):
                cells += [mean_and_spread([row["mean_iou"] for row in where(mine, split=split)]), f"{theirs:.4f}"]
            table.append([*cells, len(where(mine, split="test"))])
    header = [column for split in SPLITS for column in (f"{split} mean IoU", f"poster, {split}")]
    save_table(folder / "deepglobe.md", ["model", *header, "seeds"], table)
    draw(folder / "deepglobe.png", read(results))


if __name__ == "__main__":
    main()
