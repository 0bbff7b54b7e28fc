"""Which images there are, and what the network has to know of them."""

import math
from pathlib import Path

from torch.utils.data import Dataset

from support.folder import SPLITS, ImageFolder, class_names, open_folder, survey
from support.images import DataError
from support.loss import balanced_weights
from support.sizes import check_sizes, check_tiling
from synthetic import LinesAndCircles

FEW_STEPS = 100  # fewer are often too few


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
    """What the data add to the configuration: channels, dtype (None: any), classes, colors, mean, std, image_size and
    loss_weights; those of a folder also class_pixels, not_in_val, windows (how many of each training image an epoch
    has) and files (see `sizes_of_files`).

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
    if weights is not None and (len(weights) != len(classes) or not any(weights)):
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


def describe_folder(config: dict) -> dict:
    root = Path(config["data"])
    datasets = build_datasets(config)
    known, looks = survey(datasets, class_names(root))
    known["files"] = sizes_of_files(root, datasets)
    sizes = {look.size: look.image.name for look in looks["train"]}
    known["image_size"] = check_sizes(config, sizes)
    for look in looks["val"] + looks["test"]:
        check_tiling(config | known, look.size, look.image.name)
    known["windows"] = []
    for look in looks["train"]:
        window = math.prod(config["crop"] or look.size)
        known["windows"].append(math.ceil(math.prod(look.size) / window))

    counts = [f"{len(dataset)} for {split}" for split, dataset in datasets.items()]
    classes = known["classes"]
    print(f"{len(classes)} classes ({', '.join(classes)}), {known['channels']}-channel images: {', '.join(counts)}")
    batches = math.ceil(sum(known["windows"]) / config["batch_size"])
    steps = config["epochs"] * batches
    if 0 < steps < FEW_STEPS:
        print(f"{steps} steps of training are few: take more --epochs or a smaller --batch-size")
    return known


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
            raise DataError(f"{root / name}: this file is not the one that the run was begun with, by its name and size; "
                            "put its images back, name their folder with --data, or train anew")
