"""DeepGlobe's land cover: an ordinary folder of it, and Table 1 of the poster, the mean IoU of three models.

    python -m experiments.deepglobe --convert DIR OUT                        # of DIR/train/ID_sat.jpg, ID_mask.png
    python -m experiments.deepglobe OUT                                      # with it, without, and the plain U-Net
    python -m experiments.deepglobe OUT --seeds 0 --recompute --epochs 10    # any options of train.py after OUT
    python -m experiments.deepglobe --quick                                  # small images made here, in seconds

--convert copies the images, and writes masks of class indices, in which unknown pixels are 255: they
are neither learned nor scored. Images go to train, val and test as in the literature; those that it
does not know, to train.

Trains each model with three seeds on whole images, and tells the scores of the best epoch, without
crops or augmentation. The mean is over the classes that occur, the IoU of each over all pixels of a
split. The networks are the paper's (width 32, depth 4, K 64, dropout 0.1), in 2x2 tiles; epochs,
batch size and learning rate are a choice of our own, not tried on the data. With them the plain
U-Net needs 42 GiB on its one GPU by plan.py's count, and half of it with --batch-size 1. What has
been trained before is not trained again. Writes deepglobe.md to runs/deepglobe.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image  # comes with matplotlib

from experiments.common import (HERE, MODELS, SILENT, TALKING, WHOLE, make_folder, make_parser, mean_and_spread,
                                save_table, train_seeds)
from support.images import DataError, read_image
from support.loss import IGNORE
from support.options import one_line_errors, show_progress

CLASSES = {  # red, green, blue
    "urban": (0, 1, 1),
    "agriculture": (1, 1, 0),
    "rangeland": (1, 0, 1),
    "forest": (0, 1, 0),
    "water": (0, 0, 1),
    "barren": (1, 1, 1),
}
NETWORK = "--width 32 --depth 4 --comm-channels 64 --dropout 0.1 --grid 2x2".split()
TRAINING = "--epochs 50 --batch-size 2 --lr 0.002".split()
QUICK = "--width 2 --depth 2 --comm-channels 4 --grid 2x2 --epochs 1 --batch-size 4 --workers 0".split()
POSTER = {  # the mean IoU of the test images, and of those by which the best epoch is chosen
    "test": {TALKING: 0.6680, SILENT: 0.6474, WHOLE: 0.6723},
    "val": {TALKING: 0.6907, SILENT: 0.6631, WHOLE: 0.6858},
}


# An ordinary folder

def to_indices(colors: np.ndarray) -> np.ndarray:
    """(H,W,3) as DeepGlobe's masks are -> (H,W) class indices.

    The colours are not always pure, so they are cut at 128. Black stands for unknown, and red for
    nothing: both are 255.
    """
    bright = colors >> 7  # 0 below 128, else 1
    indices = np.full(colors.shape[:2], IGNORE, np.uint8)
    for label, color in enumerate(CLASSES.values()):
        indices[(bright == color).all(axis=2)] = label
    return indices


def save_indexed(indices: np.ndarray, path: Path):
    """A PNG of class indices that shows DeepGlobe's colours."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(CLASSES)] = 255 * np.array(list(CLASSES.values()))
    picture = Image.fromarray(indices)
    picture.putpalette(palette.tobytes())
    picture.save(path)


def convert(source: Path, out: Path):
    """The folder `out`, which appears as a whole or not at all. DataError: it is there, or there is no data."""
    if out.exists():
        raise DataError(f"{out}: is there already; name another folder")
    images = sorted((source / "train").glob("*_sat.jpg"))
    if not images:
        raise DataError(f"{source / 'train'}: no image named ID_sat.jpg, as DeepGlobe is distributed")
    split = dict(line.split() for line in (HERE / "deepglobe_split.txt").read_text().splitlines())
    unfinished = out.with_name(f".unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for done, image in enumerate(images):
            show_progress(f"converting image {done + 1} of {len(images)}")
            name = image.name.removesuffix("_sat.jpg")
            folder = unfinished / split.get(name, "train")
            for kind in ("images", "masks"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
            mask = image.with_name(f"{name}_mask.png")
            colors = read_image(mask)
            if colors.shape[2] != 3 or colors.dtype != np.uint8:
                raise DataError(f"{mask}: no mask in DeepGlobe's colours; remove it and its image, or put it back")
            save_indexed(to_indices(colors), folder / f"masks/{name}.png")
            shutil.copyfile(image, folder / f"images/{name}.jpg")
        (unfinished / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    show_progress("")
    print(f"{out}: {len(images)} pairs; train with: python train.py --dataset folder --data {out}")


# Images for a smoke run

def make_images(root: Path, pairs: int = 12, size: tuple[int, int] = (48, 64)):
    """DeepGlobe's layout: in each image two fields of different classes, in mask colours that are not pure."""
    rng = np.random.default_rng(0)
    colors = 255 * np.array([*CLASSES.values(), (0, 0, 0)])
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


# The command

def save_scores(path: Path, runs: dict[str, list[dict]]):
    """runs: those of each model, which hold the scores of the best epoch."""
    header = ["model"]
    for split in POSTER:
        header += [f"{split} mean IoU", f"poster, {split}"]
    table = []
    for name, of_model in runs.items():
        cells = [name]
        for split, of_poster in POSTER.items():
            scores = [run[split]["mean_iou"] for run in of_model]
            cells += [mean_and_spread(scores), f"{of_poster[name]:.4f}"]
        table.append(cells)
    save_table(path, header, table)


def main(arguments: list[str] | None = None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("data", metavar="OUT", type=Path, nargs="?", help="what --convert made; any options of "
                        "train.py may follow")
    parser.add_argument("--convert", metavar=("DIR", "OUT"), type=Path, nargs=2, help="make an ordinary folder OUT of "
                        "DeepGlobe's, that which holds train/, and end")
    asked, more = parser.parse_known_args(arguments)
    if asked.convert:
        with one_line_errors(parser):
            convert(*asked.convert)
        return
    if asked.data is None and not asked.quick:
        parser.error("give --convert DIR OUT, the folder OUT that it made, or --quick")
    folder = make_folder("deepglobe", asked.quick)
    options = NETWORK + TRAINING + more
    if asked.quick:
        options = QUICK
        asked.seeds = [0]
        asked.data = folder / "data"
        if not asked.data.exists():
            make_images(folder / "distributed")
            convert(folder / "distributed", asked.data)
    options = ["--dataset", "folder", "--data", str(asked.data)] + options
    runs = {}
    for name in MODELS:
        runs[name] = train_seeds(folder, name, options + MODELS[name], asked.seeds)
    save_scores(folder / "deepglobe.md", runs)


if __name__ == "__main__":
    main()
