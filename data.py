"""Which images there are, and one look at all of them before training: what they hold, and whether they go together.

A broken file is found here and not in the third hour. What is wrong raises DataError, see image_folder.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from image_folder import DEEPGLOBE, IGNORE, DataError, ImageFolder, open_folder, read_image, scale
from options import check_sizes
from synthetic import LinesAndCircles


def build_datasets(config: dict) -> dict[str, Dataset]:
    """Train, val and test, as --dataset says. Of the synthetic images, val and test have an eighth of the training
    images each; the discs are kept apart by tiles of about 32x32 pixels whatever the network's grid, so that all models
    see the same images."""
    if config["dataset"] == "synthetic":
        count, size = config["train_images"], config["image_size"]
        lengths = {"train": count, "val": max(count // 8, 1), "test": max(count // 8, 1)}
        grid = tuple(max(pixels // 32, 1) for pixels in size)
        return {split: LinesAndCircles(length, size, grid, split, config["seed"]) for split, length in lengths.items()}
    return open_folder(Path(config["data"]), config["dataset"] == "deepglobe", config["seed"], config["crop"],
                                    config["augment"])


def describe(config: dict, progress: Callable) -> dict:
    """What the data add to the configuration: channels, dtype (None: any), classes, colors, mean, std and image_size.
    DataError."""
    try:
        datasets = build_datasets(config)
    except DataError:
        raise
    except ValueError:
        raise DataError(f"--image-size {'x'.join(map(str, config['image_size']))}: synthetic images must hold two tiles of "
                        "32x32; take 64 or more for one side, 32 or more for the other") from None
    data = datasets["train"]
    if config["dataset"] == "synthetic":
        known = {"channels": data.channels, "classes": data.classes, "colors": data.colors, "mean": [0.0], "std": [1.0],
                 "dtype": None}
        sizes = {config["image_size"]: "--image-size"}
    else:
        names = class_names(Path(config["data"]), config["dataset"] == "deepglobe")
        known, sizes = survey(datasets, names, progress)
        print(f"{len(known['classes'])} classes ({', '.join(known['classes'])}), {known['channels']}-channel images: "
              + ", ".join(f"{len(data)} for {split}" for split, data in datasets.items()))
    return known | {"image_size": check_sizes(config, sizes, len(data))}


def collate(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A batch. A batch of one is a view: an image that is mapped into memory is not read here."""
    return [x[None] for x in pairs[0]] if len(pairs) == 1 else default_collate(pairs)


def survey(folders: dict[str, ImageFolder], names: list[str] | None,
           progress: Callable = lambda text: None) -> tuple[dict, dict]:
    """Reads every pair of train, val and test once. names: of the classes, if they are known. DataError.

    Returns what the images tell (channels; dtype; classes and colors; mean and std of each channel of the training images,
    where white is 1), and the sizes of the training images: {(H, W): an image of that size}.
    """
    pairs = [(folder, pair) for folder in folders.values() for pair in folder.pairs]
    sums, squares, pixels, kinds, sizes = 0, 0, 0, {}, {}
    occurring = {folder: set() for folder in folders.values()}
    for done, (folder, (image_path, mask_path)) in enumerate(pairs, start=1):
        progress(f"looking at image {done} of {len(pairs)}")
        image, mask = read_image(image_path), folder.read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            raise DataError(f"{image_path}: {image.shape[0]}x{image.shape[1]} pixels, but its mask {mask_path.name} has "
                            f"{mask.shape[0]}x{mask.shape[1]}; they must be equal"
                            + "; if the array is (C,H,W), save array.transpose(1, 2, 0)" * (image.shape[1:] == mask.shape))
        kinds.setdefault(f"{image.shape[2]}-channel {image.dtype}", image_path)
        if len(kinds) > 1:
            raise DataError(f"{image_path}: " + ", but {} is ".join(reversed(kinds)).format(next(iter(kinds.values())).name)
                            + "; convert the images to one kind")
        if folder.crop and (mask.shape[0] < folder.crop[0] or mask.shape[1] < folder.crop[1]):
            raise DataError(f"{image_path}: {mask.shape[0]}x{mask.shape[1]} pixels are fewer than --crop "
                            f"{folder.crop[0]}x{folder.crop[1]}; take a smaller crop")
        occurring[folder] |= indices(mask, mask_path, len(names) if names else IGNORE)
        for x in finite_blocks(image, image_path):
            if folder is folders["train"]:
                x = x.double() / scale(x)
                sums, squares, pixels = sums + x.sum((0, 1)), squares + x.square().sum((0, 1)), pixels + x[..., 0].numel()
                sizes.setdefault(mask.shape, image_path)
    progress("")

    for split, folder in folders.items():
        if not occurring[folder]:
            raise DataError(f"{folder.pairs[0][1].parent}: no pixel of the masks for {split} counts, all are {IGNORE}; add "
                            "a mask with a class")
    found = set.union(*occurring.values())
    if found == {0}:
        raise DataError(f"{mask_path.parent}: the masks know a single class, 0; save the others as 1, 2, ... (a pixel of "
                        f"{IGNORE} does not count: if it shall be a class, save it as 1)")
    if names is None and len(found) <= max(found):
        gap = min(set(range(IGNORE)) - found)
        raise DataError(f"{mask_path.parent}: the masks go up to {max(found)}, but {gap} does not occur; number the classes "
                        "0, 1, 2, ... without a gap, or name all of them in DIR/classes.txt")
    names = names or [f"class {i}" for i in sorted(found)]
    mean = sums / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
    return {"channels": image.shape[2], "dtype": str(image.dtype), "classes": names, "colors": class_colors(names),
            "mean": mean.tolist(), "std": std.where(std > 0, 1).tolist()}, sizes


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows at a time, a few million pixels: a mapped array may be larger than the memory."""
    rows = max(2**22 // array.shape[1], 1)
    return (array[top:top + rows] for top in range(0, len(array), rows))


def finite_blocks(image: np.ndarray, path: Path) -> Iterator[Tensor]:
    """The blocks of an image. DataError: one holds what no float32 can."""
    for x in map(torch.from_numpy, blocks(image)):
        if x.is_floating_point() and not x.float().isfinite().all():
            raise DataError(f"{path}: holds nan, inf or numbers beyond 1e38; replace them")
        yield x


def indices(mask: np.ndarray, path: Path, classes: int) -> set[int]:
    """The class indices that occur. DataError: there is one that is no class."""
    found = set()
    for block in blocks(mask):
        known = block[block != IGNORE]
        if known.size:
            value = min(known.min(), 0) or known.max()
            if not 0 <= value < classes:
                raise DataError(f"{path}: holds the value {value}; a mask holds 0 to {classes - 1}, or {IGNORE} for pixels "
                                "that do not count")
            found |= set(np.bincount(known.astype(np.uint8)).nonzero()[0].tolist())
    return found


def class_names(root: Path, deepglobe: bool) -> list[str] | None:
    """DeepGlobe's, or the lines of DIR/classes.txt, or None. DataError."""
    if deepglobe:
        return list(DEEPGLOBE)
    path = root / "classes.txt"
    if not path.exists():
        return None
    try:
        names = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save it as text, one name a line") from None
    if not 2 <= len(set(names)) == len(names) <= IGNORE:
        raise DataError(f"{path}: holds {len(names)} names, {len(set(names))} of them different; 2 to {IGNORE} different "
                        "ones were expected, one a line")
    return names


def class_colors(names: list[str]) -> list[tuple[float, float, float]]:
    """Red, green and blue from 0 to 1 for each class: DeepGlobe's own, else those of a colour map."""
    if names == list(DEEPGLOBE):
        return list(DEEPGLOBE.values())
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return [tuple(map(float, palette(i % palette.N)[:3])) for i in range(len(names))]
