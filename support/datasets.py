"""Which images there are, and what the network has to know of them. Letters as in decompose.py."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from torch.utils.data import Dataset

from support.folder import SPLITS, ImageFolder, class_names, open_folder
from support.images import (DataError, count_pixels, drawn_in_white, merge, read_palette, single_class_error,
                            statistics)
from support.loss import IGNORE, balanced_weights
from support.options import show_progress
from support.sizes import check_sizes, check_tiling
from synthetic import LinesAndCircles

MOST_NUMBERED = 10  # classes without names; masks with more values are seldom masks of classes
FEW_STEPS = 100  # fewer are often too few
THREADS = 4  # that look at images; each has one in memory


def build_datasets(config: dict) -> dict[str, Dataset]:
    """Train, val and test, as --dataset says.

    Of the synthetic images, val and test have an eighth of the training images each. Their discs
    are kept apart by tiles of about 32x32 pixels, whatever the network's grid is, so that all
    models see the same images.
    """
    if config["dataset"] == "folder":
        return open_folder(Path(config["data"]), config["seed"])
    height, width = config["image_size"]
    rows = max(height // 32, 1)
    columns = max(width // 32, 1)
    count = config["train_images"]
    datasets = {}
    for split in SPLITS:
        length = count if split == "train" else max(count // 8, 1)
        datasets[split] = LinesAndCircles(length, (height, width), (rows, columns), split, config["seed"])
    return datasets


def describe(config: dict) -> dict:
    """What the data add to the configuration: channels, dtype (None: any), classes, colors, mean and std of each
    channel (where white is 1), image_size and loss_weights. Those of a folder also add class_pixels (how many pixels
    of each class the training masks hold), not_in_val (the classes of these that the masks for val lack), windows (how
    many of each training image an epoch has) and files (see `sizes_of_files`).

    DataError: an image or a mask cannot be used, or they do not go together or with the options.
    """
    if config["dataset"] == "folder":
        known = describe_folder(config)
    else:
        known = describe_synthetic(config)
    weights = config["class_weights"]
    classes = known["classes"]
    if weights == ["balanced"]:
        weights = balanced_weights(known["class_pixels"])
    if weights is not None and ("balanced" in weights or len(weights) != len(classes) or not any(weights)):
        raise DataError(f"--class-weights: {len(weights)} numbers, but there are {len(classes)} classes "
                        f"({', '.join(classes)}); give one for each, not all 0, or balanced")
    known["loss_weights"] = weights
    return known


def describe_synthetic(config: dict) -> dict:
    size = config["image_size"]
    try:
        data = build_datasets(config)["train"]
    except ValueError as error:
        raise DataError(f"--image-size: {error}; take 64 or more for one side, 32 or more for the other") from None
    return {
        "channels": data.channels,
        "dtype": None,
        "classes": data.classes,
        "colors": data.colors,
        "mean": [0.0],
        "std": [1.0],
        "image_size": check_sizes(config, {tuple(size): "--image-size"}),
    }


# One look at all images of a folder

def describe_folder(config: dict) -> dict:
    """Reads every pair of train, val and test once, so that a broken file is found now and not in the third hour."""
    root = Path(config["data"])
    datasets = build_datasets(config)
    names = class_names(root)
    looks, pixels = look_at_all(datasets, len(names) if names else IGNORE)
    check_alike(looks["train"] + looks["val"] + looks["test"])
    classes = find_classes(pixels, names)

    training = looks["train"]
    channels, dtype = training[0].kind
    _, mean, variance = merge([look.statistics for look in training])
    std = np.sqrt(variance)
    std[std <= 1e-9 * np.abs(mean)] = 1  # no more than rounding leaves: the channel is the same everywhere

    sizes = {look.size: look.image.name for look in training}
    image_size = check_sizes(config, sizes)
    settings = {**config, "image_size": image_size}
    for look in looks["val"] + looks["test"]:
        check_tiling(settings, look.size, look.image.name)
    windows = []
    for look in training:
        window = math.prod(config["crop"] or look.size)
        windows.append(math.ceil(math.prod(look.size) / window))
    batches = math.ceil(sum(windows) / config["batch_size"])
    steps = config["epochs"] * batches
    counts = [f"{len(dataset)} for {split}" for split, dataset in datasets.items()]
    print(f"{len(classes)} classes ({', '.join(classes)}), {channels}-channel images: {', '.join(counts)}; "
          f"{steps} steps of training")
    if 0 < steps < FEW_STEPS:
        print("these are few steps: take more --epochs, a smaller --batch-size, or windows with --crop")
    return {
        "channels": channels,
        "dtype": dtype,
        "classes": classes,
        "colors": class_colors(len(classes)),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "class_pixels": [pixels["train"][label] for label in range(len(classes))],
        "not_in_val": say_missing(pixels, classes),
        "image_size": image_size,
        "windows": windows,
        "files": sizes_of_files(root, datasets),
    }


class Look(NamedTuple):
    """What one pair tells. size: (H,W). kind: channels and type of the image. pixels: how many pixels of the mask have
    each value. palette: the colours of an indexed mask. statistics: see images.py, of the pixels that count."""

    image: Path
    mask: Path
    size: tuple[int, int]
    kind: tuple[int, str]
    pixels: Counter
    palette: list
    statistics: np.ndarray


def look_at(dataset: ImageFolder, i: int, classes: int) -> Look:
    """classes: how many there can be. DataError: pair i cannot be used."""
    image_path, mask_path = dataset.pairs[i]
    image, mask = dataset.read(i)
    pixels = count_pixels(mask, mask_path, classes)
    found = statistics(image, mask)
    if found[0].min() < pixels.total() - pixels[IGNORE]:
        raise DataError(f"{image_path}: holds nan or inf; give these pixels {IGNORE} in the mask, so that they do not "
                        "count, or replace them")
    kind = image.shape[2], str(image.dtype)
    return Look(image_path, mask_path, mask.shape, kind, pixels, read_palette(mask_path), found)


def look_at_all(datasets: dict[str, ImageFolder], classes: int) -> tuple[dict[str, list[Look]], dict[str, Counter]]:
    """For each split: the looks at its pairs, and how many pixels of its masks have each value.

    DataError: as above; the first pair that cannot be used is named.
    """
    looks = {}
    pixels = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for split, dataset in datasets.items():
            looks[split] = []
            pixels[split] = Counter()
            for look in pool.map(look_at, repeat(dataset), range(len(dataset)), repeat(classes)):  # in their order
                looks[split].append(look)
                pixels[split].update(look.pixels)
                show_progress(f"looking at {split} image {len(looks[split])} of {len(dataset)}")
    show_progress("")
    return looks, pixels


def check_alike(looks: list[Look]):
    """DataError: images are of different kinds, or two indexed masks show a class in different colours."""
    colors = {}
    for look in looks:
        if look.kind != looks[0].kind:
            raise DataError(f"{look.image}: channels and type are {look.kind}, but those of the first image "
                            f"{looks[0].kind}; convert the images to one kind")
        for label, color in enumerate(look.palette):
            if label not in look.pixels or label == IGNORE:
                continue
            before = colors.setdefault(label, color)
            if color != before:
                raise DataError(f"{look.mask}: shows class {label} in the colour {color}, but a mask before it in "
                                f"{before}; give all masks one palette, or save them as grey values if their numbers "
                                "are right")


def find_classes(pixels: dict[str, Counter], names: list[str] | None) -> list[str]:
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
    if len(found) > MOST_NUMBERED or found != list(range(len(found))):
        raise DataError(f"the masks hold {len(found)} values, up to {found[-1]}, but without a DIR/classes.txt with "
                        f"their names classes are 0, 1, 2, ... without a gap, and at most {MOST_NUMBERED}; if these "
                        "are numbered objects (instances), colours or interpolated values (of resizing, of JPEG), "
                        "make classes of them first (docs/own-images.md)")
    if len(found) > 2:
        print(f"without a DIR/classes.txt, each of the {len(found)} values in the masks is taken for a class; if they "
              "number objects (instances), make classes of them first (docs/own-images.md)")
    return [f"class {label}" for label in range(len(found))]


def say_missing(pixels: dict[str, Counter], names: list[str]) -> list[str]:
    """A line for each split that lacks a class. Returns the classes that train has and val lacks.

    pixels: of each value of a mask, in each split.
    """
    missing = {}
    for split, values in pixels.items():
        missing[split] = [name for label, name in enumerate(names) if values[label] == 0]
        if missing[split]:
            print(f"no mask for {split} holds {' or '.join(missing[split])}: a class that train lacks cannot be "
                  "learned, and where val lacks one, best.pt is the last epoch")
    return sorted(set(missing["val"]) - set(missing["train"]))


def class_colors(classes: int) -> list[tuple[float, float, float]]:
    """Red, green and blue from 0 to 1 for each class."""
    palette = matplotlib.colormaps["tab10" if classes <= 10 else "tab20"].colors
    return [palette[label % len(palette)] for label in range(classes)]


# A run that goes on

def sizes_of_files(root: Path, datasets: dict[str, ImageFolder]) -> dict[str, int]:
    """The bytes of each image and each mask, by its path in the folder."""
    sizes = {}
    for dataset in datasets.values():
        for pair in dataset.pairs:
            for path in pair:
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    return sizes


def check_unchanged(config: dict):
    """DataError: the files of a run that goes on are not those that it was begun with, by their names and sizes."""
    if config["dataset"] == "folder":
        root = Path(config["data"])
        found = sizes_of_files(root, build_datasets(config))
        changed = found.items() ^ config["files"].items()
        if changed:
            name, _ = min(changed)
            raise DataError(f"{root / name}: this file is not the one that the run was begun with, by its name and "
                            "size; put its images back, name their folder with --data, or train anew")
