"""Images and masks in a folder of your own: the pairs, reading them, and one look at all of them before training.

    DIR/train/images/NAME.png    DIR/train/masks/NAME.png    and the same in DIR/val (or DIR/valid) and DIR/test
    DIR/classes.txt              names of the classes, one a line; without it they are numbered

Subfolders of images and masks are read, too. Without val or test, a tenth of the training pairs, drawn by the seed,
stands in; or, where there are only one or two, a tenth of their rows at the bottom. Which files can be read tells
images.py. Letters as in decompose.py.
"""

import functools
import glob
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from support.images import (PICTURES, DataError, count_pixels, drawn_in_white, mean_and_std, read_header, read_image,
                            read_mask, single_class_error, sums)
from support.loss import IGNORE
from support.options import show_progress

SPLITS = ("train", "val", "test")
MOST_NUMBERED = 10  # classes without names; masks with more values are seldom masks of classes
TENTHS = {"train": (0, 8), "val": (8, 9), "test": (9, 10)}  # of the rows, where there are too few images
THREADS = 4  # that look at images; each has one in memory
Pair = tuple[Path, Path]  # image, mask


# Finding the pairs

@functools.cache
def warn_once(line: str):
    """Prints each line once, however often a folder is opened."""
    print(line)


def name_of(path: Path) -> str:
    """The name that an image and its mask share. File systems write accents in two ways; here they are one."""
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def find_files(folder: Path) -> dict[str, Path]:
    """The images or masks in a folder and its subfolders, by their paths in it without the suffix.

    Hidden files are no images, and a line tells of those of other kinds. DataError: two files have the same name.
    """
    found = {}
    others = []
    for relative in sorted(glob.glob("**", root_dir=folder, recursive=True)):  # without what is hidden
        path = folder / relative
        name = name_of(Path(relative))
        if path.is_dir():
            continue
        if path.suffix.lower() not in (*PICTURES, ".npy"):
            others.append(relative)
        elif name in found:
            raise DataError(f"{path}: {found[name].name} has the same name; keep one of the two")
        else:
            found[name] = path
    if others:
        warn_once(f"{folder}: files of other kinds are left out ({len(others)}, the first is {others[0]})")
    return found


def pairs_in(folder: Path) -> list[Pair]:
    """The pairs of a split. DataError: there are none, or one of a pair is missing."""
    images = find_files(folder / "images")
    masks = find_files(folder / "masks")
    without_mask = sorted(images.keys() - masks.keys())
    without_image = sorted(masks.keys() - images.keys())
    if without_mask or without_image or not images:
        raise DataError(f"{folder}: there must be images ({', '.join(PICTURES)}, .npy) in its folder images, and for each a "
                        f"mask of the same name in masks; {len(without_mask)} images have no mask {without_mask[:3]}, and "
                        f"{len(without_image)} masks no image {without_image[:3]}")
    return [(images[name], masks[name]) for name in images]


def find_pairs(root: Path) -> dict[str, list[Pair]]:
    """The pairs of each split that has a folder, as train must. A line tells of each other folder, which is left out."""
    pairs = {}
    for folder in sorted({root / "train", *root.iterdir()}):  # val before valid
        split = folder.name.replace("valid", "val")
        if split in SPLITS and split not in pairs:
            pairs[split] = pairs_in(folder)
        elif folder.is_dir() and not folder.name.startswith("."):
            warn_once(f"{folder}: is left out; what shall be used belongs in train, val or test")
    return pairs


def class_names(root: Path) -> list[str] | None:
    """The lines of DIR/classes.txt, if there is one. DataError: it cannot be used."""
    path = root / "classes.txt"
    if not path.exists():
        return None
    text = path.read_text("utf-8-sig", errors="replace")  # some editors begin a text with an invisible sign
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(set(names)) < len(names) or not 2 <= len(names) <= IGNORE:
        raise DataError(f"{path}: holds {len(names)} names; write 2 to {IGNORE} different ones, one a line, the first "
                        "for the value 0")
    return names


# The data set

@dataclass
class Look:
    """What one pair tells. pixels: how many pixels of the mask have each value. palette: the colours of an indexed mask.
    sums: see images.py, of the pixels that count."""

    image: Path
    mask: Path
    size: tuple[int, int]
    turned: bool
    pixels: Counter
    palette: list
    sums: np.ndarray


class ImageFolder(Dataset):
    """Pairs of an image (C,H,W) and a mask (H,W), both in the types of their files. What is mapped stays so.

    tenths: which tenths of the rows of each image belong to this data set; (0, 10): all.
    """

    def __init__(self, pairs: list[Pair], tenths: tuple[int, int] = (0, 10)):
        self.pairs = pairs
        self.tenths = tenths

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """DataError: they cannot be read, or are not of the same size."""
        image, mask = self.read(i)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The image (H,W,C) and the mask (H,W)."""
        image_path, mask_path = self.pairs[i]
        image = read_image(image_path)
        mask = read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            raise DataError(f"{image_path}: height, width and channels are {image.shape}, but its mask is {mask.shape}; "
                            "height and width must be equal")
        first, last = self.tenths
        rows = slice(len(mask) * first // 10, len(mask) * last // 10)
        return image[rows], mask[rows]

    def look_at(self, i: int, classes: int, first: np.ndarray, shift: np.ndarray) -> Look:
        """classes: how many there can be; first: an image (H,W,C) of the kind that all must have; shift: see `sums`.

        DataError: the pair cannot be used.
        """
        image_path, mask_path = self.pairs[i]
        image, mask = self.read(i)
        if image.shape[2] != first.shape[2] or image.dtype != first.dtype:
            raise DataError(f"{image_path}: {image.shape[2]} channels of {image.dtype}, but the first image has "
                            f"{first.shape[2]} of {first.dtype}; convert the images to one kind")
        pixels = count_pixels(mask, mask_path, classes)
        found = sums(image, mask, shift)
        if found[0].min() < pixels.total() - pixels[IGNORE]:
            raise DataError(f"{image_path}: holds nan or inf; give these pixels {IGNORE} in the mask, so that they do "
                            "not count, or replace them")
        image_turned, _ = read_header(image_path)
        mask_turned, palette = read_header(mask_path)
        return Look(image_path, mask_path, mask.shape, image_turned or mask_turned, pixels, palette, found)


def open_folder(root: Path, seed: int) -> dict[str, ImageFolder]:
    """Train, val and test of DIR. DataError: see `find_files` and `pairs_in`."""
    pairs = find_pairs(root)
    train = pairs["train"]
    missing = [name for name in SPLITS if name not in pairs]
    few = len(train) <= len(missing)
    if missing and not few:
        tenth = max(len(train) // 10, 1)
        np.random.default_rng(seed).shuffle(train)
        for name in missing:
            pairs[name] = train[:tenth]
            del train[:tenth]
        warn_once(f"no {' or '.join(missing)}, so {tenth} of the training pairs, drawn by the seed, take the place of each")
    datasets = {name: ImageFolder(pairs.get(name, train)) for name in SPLITS}
    if few:
        warn_once(f"{root}: too few images for {' and '.join(missing)}, so each of these gets a tenth of the rows, at the "
                  "bottom of each image, and training the rows above")
        for name in ["train"] + missing:
            datasets[name].tenths = TENTHS[name]
    return datasets


# One look at all of it

def survey(datasets: dict[str, ImageFolder], names: list[str] | None) -> tuple[dict, dict[str, list[Look]]]:
    """Reads every pair of train, val and test once, so that a broken file is found now and not in the third hour.

    names: of the classes, if they are known. DataError: a pair cannot be used (the first such pair is named), or the
    pairs do not go together.

    Returns what the images tell: channels; dtype; classes and colors; mean and std of each channel of the training
    images, where white is 1; class_pixels, how many pixels of each class the training masks hold; and not_in_val, the
    classes of these that the masks for val lack. And the looks at each split.
    """
    first, mask = datasets["train"].read(0)
    zeros = np.zeros(first.shape[2])
    shift, _ = mean_and_std(sums(first, mask, zeros), zeros)
    classes = len(names) if names else IGNORE
    looks = {}
    pixels = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for split, dataset in datasets.items():
            looks[split] = []
            pixels[split] = Counter()
            numbers = range(len(dataset))
            for look in pool.map(dataset.look_at, numbers, repeat(classes), repeat(first), repeat(shift)):  # in order
                looks[split].append(look)
                pixels[split].update(look.pixels)
                show_progress(f"looking at {split} image {len(looks[split])} of {len(dataset)}")
    show_progress("")
    check_palettes(looks["train"] + looks["val"] + looks["test"])
    names = check_classes(pixels, names)
    mean, std = mean_and_std(sum(look.sums for look in looks["train"]), shift)
    std[std <= 1e-9 * np.abs(mean)] = 1  # no more than rounding leaves: the channel is the same everywhere
    known = {
        "channels": first.shape[2],
        "dtype": str(first.dtype),
        "classes": names,
        "colors": class_colors(len(names)),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "class_pixels": [pixels["train"][label] for label in range(len(names))],
        "not_in_val": say_missing(pixels, names),
    }
    return known, looks


def check_palettes(looks: list[Look]):
    """DataError: two indexed masks show a class in different colours. Says in a line whether pictures are turned."""
    colors = {}
    for look in looks:
        if look.turned:
            warn_once("images and masks are turned as their EXIF data says")
        for label, color in enumerate(look.palette):
            if label in look.pixels and label != IGNORE and colors.setdefault(label, color) != color:
                raise DataError(f"{look.mask}: shows class {label} in the colour {color}, but a mask before it in "
                                f"{colors[label]}; give all masks one palette, or save them as grey values if their "
                                "numbers are right")


def check_classes(pixels: dict[str, Counter], names: list[str] | None) -> list[str]:
    """The names of the classes. pixels: of each value of a mask, in each split. DataError: these cannot be classes."""
    training = pixels["train"]
    if set(training) <= {0, IGNORE}:
        raise single_class_error("train")
    for split, values in pixels.items():
        if drawn_in_white(values) and IGNORE not in training:  # otherwise 255 is hardly an object
            raise single_class_error(split)
    if names is not None:
        return names
    found = sorted((training | pixels["val"] | pixels["test"]).keys() - {IGNORE})
    if len(found) > MOST_NUMBERED:
        raise DataError(f"the masks hold {len(found)} values, but more than {MOST_NUMBERED} classes need a "
                        "DIR/classes.txt with their names; if these are numbered objects (instances) or interpolated "
                        "values (of resizing, of JPEG), make classes of them first (docs/own-images.md)")
    if found != list(range(len(found))):
        raise DataError(f"the masks hold the values {found}, but classes are numbered 0, 1, 2, ... without a gap; "
                        "resizing with interpolation, JPEG and colours make other values; if a class does not occur, "
                        "name all of them in DIR/classes.txt (docs/own-images.md)")
    return [f"class {label}" for label in found]


def say_missing(pixels: dict[str, Counter], names: list[str]) -> list[str]:
    """A line for each split that lacks a class. Returns the classes that train has and val lacks.

    pixels: of each value of a mask, in each split.
    """
    missing = {}
    for split in SPLITS:
        missing[split] = [name for label, name in enumerate(names) if pixels[split][label] == 0]
        if missing[split]:
            print(f"no mask for {split} holds {' or '.join(missing[split])}: a class that train lacks cannot be learned, "
                  "and where val lacks one, best.pt is the last epoch")
    return sorted(set(missing["val"]) - set(missing["train"]))


def class_colors(classes: int) -> list[tuple[float, float, float]]:
    """Red, green and blue from 0 to 1 for each class."""
    palette = matplotlib.colormaps["tab10" if classes <= 10 else "tab20"].colors
    return [palette[label % len(palette)] for label in range(classes)]
