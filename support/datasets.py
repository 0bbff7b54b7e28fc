"""Which images there are, and what the network has to know of them."""

import math
from pathlib import Path

from torch.utils.data import Dataset

from support.identity import read_contents, times_of
from support.image_files import DataError
from support.image_folder import SPLITS, ImageFolder, class_names, open_folder
from support.loaders import workers_before_training
from support.loss import balanced_weights
from support.sizes import check_sizes, check_smallest, smallest
from support.survey import survey
from synthetic import LinesAndCircles

FEW_STEPS = 100  # fewer are often too few


def build_datasets(config: dict) -> dict[str, Dataset]:
    """Train, val and test, as --dataset says.

    Of the synthetic images, val and test have an eighth of the training images each. Their discs
    are kept apart by tiles of about 32x32 pixels, whatever the network's grid is, so that all
    models see the same images.
    """
    seed = config["seed"]
    if config["dataset"] != "synthetic":
        deepglobe = config["dataset"] == "deepglobe"
        cell = 2 ** config["depth"]
        return open_folder(Path(config["data"]), deepglobe, seed, config["crop"], config["augment"], cell)
    height, width = config["image_size"]
    rows = max(height // 32, 1)
    columns = max(width // 32, 1)
    count = config["train_images"]
    datasets = {}
    for split in SPLITS:
        length = count if split == "train" else max(count // 8, 1)
        datasets[split] = LinesAndCircles(length, (height, width), (rows, columns), split, seed)
    return datasets


def describe(config: dict) -> dict:
    """What the data add to the configuration: channels, dtype (None: any), classes, colors, mean,
    std, image_size and loss_weights. Images from files also add smallest_image, and file_times and
    file_contents, with which `check_unchanged` finds out later whether they are the same.

    Every image is read once, so that a broken file is found here and not in the third hour.
    DataError: an image or a mask cannot be used, or they do not go together or with the options.
    """
    if config["dataset"] == "synthetic":
        return describe_synthetic(config)
    datasets = build_datasets(config)
    names = class_names(Path(config["data"]), config["dataset"] == "deepglobe")
    times = times_of(datasets)  # before they are read, so that a change in between will be noticed
    images = sum(len(dataset.pairs) for dataset in datasets.values())
    known, sizes = survey(datasets, names, workers_before_training(config, images))
    known["file_times"] = times
    known["smallest_image"] = smallest(config, sizes)
    check_smallest(config | known)
    known["image_size"] = check_sizes(config, sizes["train"], len(datasets["train"]))
    classes = known["classes"]
    if config["class_weights"] == ["balanced"]:
        known["loss_weights"] = balanced_weights(known["class_pixels"])
    else:
        known["loss_weights"] = given_weights(config, classes)
    train, val, test = (len(datasets[split].pairs) for split in SPLITS)
    print(f"{len(classes)} classes ({', '.join(classes)}), {known['channels']}-channel images: {train} for train, "
          f"{val} for val, {test} for test")
    if datasets["train"].rows is not None:
        print(epoch_line(datasets["train"]))
    steps = config["epochs"] * math.ceil(len(datasets["train"]) / config["batch_size"])
    if 0 < steps < FEW_STEPS:
        print(f"{steps} steps of training are few: take more --epochs or a smaller --batch-size")
    return known


def epoch_line(train: ImageFolder) -> str:
    """A line that tells what an epoch is, if the training images are few and large."""
    if train.crop is None:
        return "an epoch learns from each training image once; with --crop HxW, from as many windows as cover it"
    height, width = train.crop
    return f"an epoch learns from {len(train)} windows of {height}x{width}, as many as cover the training rows"


def check_unchanged(config: dict):
    """DataError: the images of a run that goes on are not those that it was begun with.

    Sets file_times, as they may have moved; and in runs that were begun before files had checksums,
    all that is missing.
    """
    if config["dataset"] == "synthetic":
        return
    if "file_contents" not in config:
        check_alike(config)
        return
    check_smallest(config)
    datasets = build_datasets(config)
    names = class_names(Path(config["data"]), config["dataset"] == "deepglobe")
    if names is not None and names != config["classes"]:
        raise DataError(f"{config['data']}: the classes were {', '.join(config['classes'])} and are "
                        f"{', '.join(names)}; make classes.txt what it was, or remove it if there was none")
    times = times_of(datasets)
    if times == config["file_times"]:
        return
    files = 2 * sum(len(dataset.pairs) for dataset in datasets.values())
    contents = read_contents(datasets, workers_before_training(config, files))
    if contents != config["file_contents"]:
        raise changed_error(config)
    config["file_times"] = times


def check_alike(config: dict):
    """Compares what all images tell with what they told when an older version began the run. DataError: they differ.

    Means and deviations may differ: they once depended on the number of threads, and on pixels that do not count.
    """
    found = describe(config)
    for name in ("channels", "dtype", "classes", "image_size"):
        if found[name] != config[name]:
            raise changed_error(config)
    print(f"{config['data']}: an older version began the run and kept no checksums of its images; make sure that they "
          "are the same")
    for name in ("file_times", "file_contents", "smallest_image", "not_in_val"):
        config[name] = found[name]


def changed_error(config: dict) -> DataError:
    """The error to raise where the images are others."""
    return DataError(f"{config['data']}: the images are not those of the run, as a file was changed, renamed, added or "
                     "removed; put them back, name their folder with --data, or train anew")


def describe_synthetic(config: dict) -> dict:
    height, width = config["image_size"]
    try:
        data = build_datasets(config)["train"]
    except ValueError:
        raise DataError(f"--image-size {height}x{width}: synthetic images must hold two tiles of 32x32; take 64 or "
                        "more for one side, 32 or more for the other") from None
    size = check_sizes(config, {(height, width): "--image-size"}, len(data))
    return {
        "channels": data.channels,
        "dtype": None,
        "classes": data.classes,
        "colors": data.colors,
        "mean": [0.0],
        "std": [1.0],
        "image_size": size,
        "loss_weights": given_weights(config, data.classes),
    }


def given_weights(config: dict, classes: list[str]) -> list[float] | None:
    """The numbers of --class-weights. DataError: there is not one for each class."""
    weights = config["class_weights"]
    if weights is not None and len(weights) != len(classes):
        raise DataError(f"--class-weights: {len(weights)} numbers, but there are {len(classes)} classes "
                        f"({', '.join(classes)}); give one for each, or balanced")
    return weights
