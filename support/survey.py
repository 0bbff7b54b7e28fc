"""One look at all images and masks of a folder before training: what they hold, and whether they go together."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.utils.data import Dataset

from support.identity import checksum, digest
from support.image_files import DataError, has_transparency, is_turned
from support.image_folder import ImageFolder, check_same_size, say_once
from support.loaders import Loader
from support.loss import IGNORE
from support.mask_files import (DEEPGLOBE, classes_in, count_pixels, drawn_in_white, mask_colors, read_mask,
                                single_class_error)
from support.options import show_progress
from support.values import Extremes, counted_pixels, range_line, white, without_outliers


class Statistics:
    """Mean and standard deviation of each channel, where white is 1."""

    def __init__(self):
        self.sums = 0
        self.squares = 0
        self.pixels = 0

    def add(self, pixels: np.ndarray):
        """pixels: (n,C). NumPy adds up in one thread, so that the number of threads does not change the rounding."""
        x = pixels.astype(np.float64) / white(torch.from_numpy(pixels))
        self.sums = self.sums + x.sum(0)
        self.squares = self.squares + np.square(x).sum(0)
        self.pixels += len(x)

    def add_all(self, other: "Statistics"):
        self.sums = self.sums + other.sums
        self.squares = self.squares + other.squares
        self.pixels += other.pixels

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """A standard deviation of 0 becomes 1, because images are divided by it. Rounding can leave
        a little more than 0 of such a variance, so what is that small counts as 0."""
        mean = self.sums / self.pixels
        square = self.squares / self.pixels
        variance = square - np.square(mean)
        constant = variance <= 1e-12 * square
        return mean.tolist(), np.sqrt(np.where(constant, 1, variance)).tolist()


# One pair

@dataclass
class PairSummary:
    """What one pair tells.

    size: (H, W). pixels: how many pixels of the mask have each value. palette: the colours of an indexed mask.
    extremes, statistics: of the pixels that count.
    """

    size: tuple[int, int]
    channels: int
    dtype: np.dtype
    transparent: bool
    turned: bool
    pixels: Counter
    palette: list[tuple[int, int, int]]
    extremes: Extremes
    statistics: Statistics
    checksums: tuple[int, int]  # of the two files


def summarise_pair(folder: ImageFolder, number: int, classes: int) -> PairSummary:
    """Reads a pair, whole or block by block. DataError: it cannot be used."""
    image_path, mask_path = folder.pairs[number]
    image, mask = folder.read(number)
    check_pair(image, image_path, mask, mask_path, folder.crop)
    pixels = count_pixels(mask, mask_path, classes)
    channels = image.shape[2]
    extremes = Extremes(channels, image.dtype)
    statistics = Statistics()
    for block in counted_pixels(image, image_path, mask):
        statistics.add(block)
        for channel in range(channels):
            extremes.add(channel, block[:, channel])
    palette = mask_colors(mask_path) if folder.read_mask is read_mask else []
    checksums = checksum(image_path), checksum(mask_path)  # now, while the system still holds both files in memory
    return PairSummary(mask.shape, channels, image.dtype, has_transparency(image_path), is_turned(image_path), pixels,
                       palette, extremes, statistics, checksums)


class PairSummaries(Dataset):
    """What the pairs of train, val and test tell, one after the other: for worker processes."""

    def __init__(self, folders: dict[str, ImageFolder], classes: int):
        self.folders = folders
        self.classes = classes
        self.pairs = []  # (split, number)
        for split, folder in folders.items():
            for number in range(len(folder.pairs)):
                self.pairs.append((split, number))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> PairSummary:
        split, number = self.pairs[i]
        return summarise_pair(self.folders[split], number, self.classes)


# All of them

class Findings:
    """What all pairs tell together."""

    def __init__(self, folders: dict[str, ImageFolder]):
        self.statistics = Statistics()  # of the training images
        self.extremes = {}  # of each split
        self.sizes = {split: {} for split in folders}  # in each split: {(H, W): an image of that size}
        self.pixels = {split: Counter() for split in folders}  # in each split: the pixels of each value of a mask
        self.pixels_of_folder = {}  # the same in each folder, from which several splits may be drawn
        self.checksums = []  # of all files
        self.channels, self.dtype = None, None  # of all images
        self.kinds = {}  # {kind of image: the first image of that kind}
        self.colors = {}  # {class: its colour in indexed masks, and the first of these}
        self.transparent = None  # the first image with transparency
        self.turned = None  # the first image that is turned as it is read
        self.white = None  # the first mask that holds 0 and IGNORE alone
        self.ignores = False  # whether IGNORE occurs in other masks, too

    def add(self, split: str, summary: PairSummary, image_path: Path, mask_path: Path):
        """Adds what one pair of a split tells. DataError: it does not go together with those before."""
        self.kinds.setdefault(f"{summary.channels}-channel {summary.dtype}", image_path)
        check_kinds(self.kinds)
        self.channels, self.dtype = summary.channels, summary.dtype  # the same in all pairs
        check_colors(self.colors, classes_in(summary.pixels), summary.palette, mask_path)
        if summary.transparent and self.transparent is None:
            self.transparent = image_path
        if summary.turned and self.turned is None:
            self.turned = image_path
        if drawn_in_white(summary.pixels):
            self.white = self.white or mask_path
        elif IGNORE in summary.pixels:
            self.ignores = True
        self.pixels[split].update(summary.pixels)
        self.pixels_of_folder.setdefault(mask_path.parent, Counter()).update(summary.pixels)
        self.extremes.setdefault(split, Extremes(summary.channels, summary.dtype)).add_all(summary.extremes)
        self.sizes[split].setdefault(summary.size, image_path)
        self.checksums += summary.checksums
        if split == "train":
            self.statistics.add_all(summary.statistics)


def survey(folders: dict[str, ImageFolder], names: list[str] | None, workers: int = 0) -> tuple[dict, dict]:
    """Reads every pair of train, val and test once.

    names: of the classes, if they are known; workers: processes that read, whose number does not change what comes out.
    DataError: a pair cannot be used (the first such pair is named), or the pairs do not go together.

    Returns what the images tell: channels; dtype; classes and colors; mean and std of each channel
    of the training images, where white is 1; range, the smallest and the largest value of each of
    their channels; class_pixels, how many pixels of each class the training masks hold; not_in_val,
    the classes of these that the masks for val lack; file_contents, which stands for all files (see
    identity.py). And the sizes that occur in each split: {(H, W): an image of that size}.
    """
    summaries = PairSummaries(folders, len(names) if names is not None else IGNORE)
    found = Findings(folders)
    loader = Loader(summaries, batch_size=None, num_workers=workers)  # it keeps the order
    for done, summary in enumerate(loader):
        show_progress(f"looking at image {done + 1} of {len(summaries)}")
        split, number = summaries.pairs[done]
        image_path, mask_path = folders[split].pairs[number]
        found.add(split, summary, image_path, mask_path)
    show_progress("")

    check_counted(found.pixels, folders)
    if found.turned is not None:
        say_once(f"{found.turned}: is turned as its EXIF data says; make sure that the masks of such images are turned "
                 "in the same way")
    if found.transparent is not None:
        say_once(f"{found.transparent}: its last channel is taken for transparency and left out, also in other images; "
                 "if it is anything else, such as infrared, save the images as .npy")
    labels = classes_in(sum(found.pixels.values(), Counter()))
    _, first_mask = folders["train"].pairs[0]
    if names is None:
        names = number_classes(labels, first_mask.parent)
    elif labels == {0}:
        raise single_class_error(first_mask.parent)
    check_white(found.pixels_of_folder, names)
    if found.white is not None and not found.ignores and names != list(DEEPGLOBE):
        say_once(f"{found.white}: holds 0 and {IGNORE} alone, and {IGNORE} does not count; if it is an object, save it "
                 "as 1")
    missing = missing_classes(found.pixels, names)
    print_missing(missing)
    print_outliers(found.extremes)

    mean, std = found.statistics.mean_and_std()
    known = {
        "channels": found.channels,
        "dtype": str(found.dtype),
        "classes": names,
        "colors": class_colors(names),
        "mean": mean,
        "std": std,
        "range": found.extremes["train"].value_range(),
        "class_pixels": [found.pixels["train"][label] for label in range(len(names))],
        "not_in_val": missing["val"],
        "file_contents": digest(folders, found.checksums),
    }
    return known, found.sizes


# What must go together

def check_counted(pixels: dict[str, Counter], folders: dict[str, ImageFolder]):
    """DataError: no pixel of a split counts. pixels: of each value of a mask, in each split."""
    for split, folder in folders.items():
        if not classes_in(pixels[split]):
            _, mask_path = folder.pairs[0]
            remedy = "add a mask with a class"
            if split != "train":
                remedy += f", or give {split} images and masks of its own (DIR/{split})"
            raise DataError(f"{mask_path.parent}: no pixel of the masks for {split} counts, all are {IGNORE}; {remedy}")


def check_pair(image: np.ndarray, image_path: Path, mask: np.ndarray, mask_path: Path, crop: tuple[int, int] | None):
    """DataError: an image and its mask are not of one size, or smaller than the windows of --crop."""
    check_same_size(image, image_path, mask, mask_path)
    height, width = mask.shape
    if crop is not None and (height < crop[0] or width < crop[1]):
        raise DataError(f"{image_path}: {height}x{width} pixels are fewer than --crop {crop[0]}x{crop[1]}; take a "
                        "smaller crop")


def check_kinds(kinds: dict[str, Path]):
    """DataError: there are two kinds of images. kinds: the first image of each."""
    if len(kinds) > 1:
        (first, first_path), (second, path) = kinds.items()
        raise DataError(f"{path}: {second}, but {first_path.name} is {first}; convert the images to one kind")


def check_colors(colors: dict[int, tuple], labels: set[int], palette: list[tuple[int, int, int]], path: Path):
    """DataError: a class has another colour in this indexed mask than in those before."""
    for label in sorted(labels):
        if label >= len(palette):
            continue
        color, first_path = colors.setdefault(label, (palette[label], path))
        if palette[label] != color:
            raise DataError(f"{path}: shows class {label} in the colour {palette[label]}, but {first_path.name} in "
                            f"{color}; give all masks one palette, or if their numbers are right, save them as grey "
                            "values")


def check_white(pixels_of_folder: dict[Path, Counter], names: list[str]):
    """DataError: the masks of a folder hold 0 and 255 alone. DeepGlobe's masks are in colour, so
    they are not checked."""
    if names == list(DEEPGLOBE):
        return
    for folder, pixels in pixels_of_folder.items():
        if drawn_in_white(pixels):
            raise single_class_error(folder)


def missing_classes(pixels: dict[str, Counter], names: list[str]) -> dict[str, list[str]]:
    """The classes that val and test lack although train has them, that train lacks although another
    split has them, and that none has ("all")."""
    missing = {"train": [], "val": [], "test": [], "all": []}
    for label, name in enumerate(names):
        having = [split for split in pixels if pixels[split][label] > 0]
        if not having and names == list(DEEPGLOBE) and name == "unknown":
            continue  # which never counts
        if not having:
            missing["all"].append(name)
        elif "train" not in having:
            missing["train"].append(name)
        else:
            for split in pixels.keys() - having:
                missing[split].append(name)
    return missing


def print_missing(missing: dict[str, list[str]]):
    """A line for each split that lacks a class."""
    effects = {
        "train": "no mask for train holds {}, so it cannot be learned; put images with it into train",
        "val": "no mask for val holds {}, so val cannot tell how well it is found, and best.pt will be the last epoch "
               "instead of the one with the best mean IoU; put images with it into val",
        "test": "no mask for test holds {}, so the test scores will say nothing about it; put images with it into test",
        "all": "no mask holds {}, although it is among the names of the classes",
    }
    for split, names in missing.items():
        if names:
            print(effects[split].format(" or ".join(names)))


def number_classes(found: set[int], folder: Path) -> list[str]:
    """Names for classes that have none. DataError: there is a gap between their numbers."""
    if found == {0}:
        raise single_class_error(folder)
    for label in range(max(found)):
        if label not in found:
            values = " ".join(map(str, sorted(found)[:8])) + (" ..." if len(found) > 8 else "")
            raise DataError(f"{folder}: the masks hold the values {values} (and perhaps {IGNORE}, which does not "
                            f"count), but {label} does not occur; number the classes 0, 1, 2, ... without a gap, or "
                            "name all of them in DIR/classes.txt")
    return [f"class {label}" for label in sorted(found)]


def print_outliers(extremes: dict[str, Extremes]):
    """Prints a line for a value of the training images that is far outside all others of its
    channel, and one for a split with quite other values than theirs."""
    outlier = find_outlier(extremes["train"])
    if outlier:
        print(f"train: {outlier}; if it marks pixels without data, give these {IGNORE} in the masks")
    trained = extremes["train"].value_range()
    for split in ("val", "test"):
        line = range_line(extremes[split].value_range(), trained)
        if line:
            print(f"{split}: {line}")


def find_outlier(extremes: Extremes) -> str | None:
    """What is to be said of the first channel with a value far outside all others."""
    for channel, values in enumerate(extremes.values):
        smallest, largest = without_outliers(values)
        for outlier in (values[0], values[-1]):
            if not smallest <= outlier <= largest:
                return f"{outlier:g} in channel {channel} is far outside all other values, {smallest:g} to {largest:g}"
    return None


def class_colors(names: list[str]) -> list[tuple[float, float, float]]:
    """Red, green and blue from 0 to 1 for each class: DeepGlobe's own, else those of a colour map."""
    if names == list(DEEPGLOBE):
        return list(DEEPGLOBE.values())
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colors = []
    for i in range(len(names)):
        red, green, blue, _ = palette(i % palette.N)
        colors.append((float(red), float(green), float(blue)))
    return colors
