"""Table 1 of the poster: mean IoU on DeepGlobe's land cover, with communication, without, and of the plain U-Net.

    python -m experiments.deepglobe DIR                                      # DIR/train/ID_sat.jpg, ID_mask.png
    python -m experiments.deepglobe DIR --seeds 0 --recompute --epochs 10    # any options of train.py after DIR
    python -m experiments.deepglobe --quick                                  # a few small images made here, in seconds

Trains each model with three seeds on whole images, and scores the best epoch on all three splits,
without crops or augmentation. The mean is over the classes that occur, the IoU of each over all
pixels of a split; pixels whose true class is unknown are neither learned nor scored. The networks
are the paper's (width 32, depth 4, K 64, dropout 0.1), in 2x2 tiles; epochs, batch size and
learning rate are a choice of our own, not tried on the data. With them the plain U-Net needs 42 GiB
on its one GPU by plan.py's count, and half of it with --batch-size 1. Results are added to
runs/deepglobe/deepglobe.csv as they come, and what is there already is not made again. Writes
deepglobe.md and deepglobe.png beside it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image  # comes with matplotlib
from torch.utils.data import DataLoader

import train
from experiments.common import (CPU_OR_GPUS, MODELS, append_rows, bar_spread, column, is_measured, load, make_folder,
                                make_parser, mean_and_spread, read_rows, save_table, trained, where)
from support import plots
from support.datasets import build_datasets
from support.mask_files import DEEPGLOBE
from support.loaders import collate

NETWORK = "--width 32 --depth 4 --comm-channels 64 --dropout 0.1 --grid 2x2".split()
TRAINING = "--epochs 50 --batch-size 2 --lr 0.002".split()
QUICK = "--width 2 --depth 2 --comm-channels 4 --grid 2x2 --epochs 1 --batch-size 4".split()
SPLITS = ["train", "test", "val"]  # in the order of the poster
POSTER = {  # the mean IoU of each split
    "with communication": [0.7229, 0.6680, 0.6907],
    "without communication": [0.7025, 0.6474, 0.6631],
    "plain U-Net, whole image": [0.7239, 0.6723, 0.6858],
}


# Images for a smoke run

def make_images(root: Path, pairs: int = 12, size: tuple[int, int] = (48, 64)):
    """DeepGlobe's layout: in each image two fields of different classes, in the mask colours that are not pure."""
    rng = np.random.default_rng(0)
    colors = 255 * np.array(list(DEEPGLOBE.values()))
    (root / "train").mkdir(parents=True, exist_ok=True)
    for i in range(pairs):
        border = rng.integers(8, size[1] - 8)
        left, right = i % 7, (i + 1 + i // 7) % 7
        picture = colors[np.where(np.arange(size[1]) < border, left, right)]
        save_noisy(root / f"train/{i}_mask.png", picture, 60, size, rng)
        save_noisy(root / f"train/{i}_sat.jpg", 0.4 * picture, 30, size, rng)


def save_noisy(path: Path, picture: np.ndarray, noise: int, size: tuple[int, int], rng: np.random.Generator):
    """Saves a picture whose rows are all alike, (W,3), with noise of at most so much."""
    picture = picture + rng.integers(-noise, noise + 1, (*size, 3))
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path)


# Training and scores

def measure(case: dict, out: Path, options: list[str]) -> list[dict]:
    """The rows of a case, one for each split. Its model is trained now, unless it has been trained before."""
    trained(out, options + MODELS[case["model"]] + ["--seed", str(case["seed"])])
    model, config = load(out)
    datasets = build_datasets({**config, "crop": None, "augment": False})
    rows = []
    for split in SPLITS:
        loader = DataLoader(datasets[split], 1, collate_fn=collate)
        scores = train.evaluate(model, loader, config, CPU_OR_GPUS)
        row = {**case, "split": split, "mean_iou": scores["mean_iou"]}
        for name in DEEPGLOBE:
            if name != "unknown":
                row[name] = scores["iou"][name]
        rows.append(row)
    return rows


def save_scores(path: Path, rows: list[dict]):
    header = ["model"]
    for split in SPLITS:
        header += [f"{split} mean IoU", f"poster, {split}"]
    table = []
    for name in MODELS:
        mine = where(rows, model=name)
        if mine:
            cells = [name]
            for split, of_poster in zip(SPLITS, POSTER[name]):
                scores = column(where(mine, split=split), "mean_iou")
                cells += [mean_and_spread(scores), f"{of_poster:.4f}"]
            table.append(cells + [len(scores)])
    save_table(path, header + ["seeds"], table)


def draw(path: Path, rows: list[dict]):
    """Three bars for each split, and the poster's scores as diamonds."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    diamond = {"marker": "D", "color": "white", "markeredgecolor": "black"}
    for i, name in enumerate(MODELS):
        for position, split in enumerate(SPLITS):
            x = position + 0.27 * (i - 1)
            scores = column(where(rows, model=name, split=split), "mean_iou")
            label = name if position == 0 else None  # one entry of the legend for each model, and one for the poster
            bar_spread(axes, x, scores, color=f"C{i}", width=0.25, label=label)
            label = "the poster's" if i == 0 and position == 0 else None
            axes.plot(x, POSTER[name][position], linestyle="none", label=label, **diamond)
    axes.set_xticks(range(len(SPLITS)), SPLITS)
    axes.set(ylabel="mean IoU", ylim=(0, 1), title="DeepGlobe: mean of the seeds, and each of them as a dot")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=9, ncols=2, loc="upper center")
    plots.save(figure, path)


# The command

def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DIR", type=Path, nargs="?", help="DeepGlobe's folder, that which holds "
                        "train/; any options of train.py may follow")
    asked, more = parser.parse_known_args(arguments)
    if asked.data is None and not asked.quick:
        parser.error("give DeepGlobe's folder, that which holds train/, or --quick")
    folder = make_folder("deepglobe", asked.quick)
    options = NETWORK + TRAINING + more
    if asked.quick:
        options = QUICK
        asked.seeds = [0]
        asked.data = folder / "data"
        make_images(asked.data)
    options = ["--dataset", "deepglobe", "--data", str(asked.data)] + options

    results = folder / "deepglobe.csv"
    for seed in asked.seeds:
        for name in MODELS:
            case = {"model": name, "seed": seed}
            if not is_measured(results, case):
                out = folder / f"{name.split()[0]}-seed{seed}"
                append_rows(results, measure(case, out, options))

    rows = read_rows(results)
    save_scores(folder / "deepglobe.md", rows)
    draw(folder / "deepglobe.png", rows)


if __name__ == "__main__":
    main()
