"""Which images there are, what the network has to know of them, and in which batches they come."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, default_collate

from support import processes
from support.image_files import DataError
from support.image_folder import class_names, open_folder
from support.loss import IGNORE
from support.sizes import check_sizes
from support.survey import survey
from synthetic import LinesAndCircles


def build_datasets(config: dict) -> dict[str, Dataset]:
    """Train, val and test, as --dataset says.

    Of the synthetic images, val and test have an eighth of the training images each. Their discs are kept apart by tiles
    of about 32x32 pixels, whatever the network's grid is, so that all models see the same images.
    """
    if config["dataset"] != "synthetic":
        return open_folder(Path(config["data"]), config["dataset"] == "deepglobe", config["seed"], config["crop"],
                           config["augment"])
    height, width = config["image_size"]
    grid = max(height // 32, 1), max(width // 32, 1)
    count = config["train_images"]
    lengths = {"train": count, "val": max(count // 8, 1), "test": max(count // 8, 1)}
    datasets = {}
    for split, length in lengths.items():
        datasets[split] = LinesAndCircles(length, (height, width), grid, split, config["seed"])
    return datasets


def describe(config: dict, progress: Callable) -> dict:
    """What the data add to the configuration: channels, dtype (None: any), classes, colors, mean, std and image_size.

    Every image is read once, so that a broken file is found here and not in the third hour. DataError.
    """
    if config["dataset"] == "synthetic":
        return describe_synthetic(config)
    datasets = build_datasets(config)
    names = class_names(Path(config["data"]), config["dataset"] == "deepglobe")
    known, sizes = survey(datasets, names, progress)
    counts = ", ".join(f"{len(dataset)} for {split}" for split, dataset in datasets.items())
    print(f"{len(known['classes'])} classes ({', '.join(known['classes'])}), {known['channels']}-channel images: {counts}")
    return known | {"image_size": check_sizes(config, sizes, len(datasets["train"]))}


def describe_synthetic(config: dict) -> dict:
    height, width = config["image_size"]
    try:
        data = build_datasets(config)["train"]
    except ValueError:
        raise DataError(f"--image-size {height}x{width}: synthetic images must hold two tiles of 32x32; take 64 or more "
                        "for one side, 32 or more for the other") from None
    return {
        "channels": data.channels,
        "dtype": None,
        "classes": data.classes,
        "colors": data.colors,
        "mean": [0.0],
        "std": [1.0],
        "image_size": check_sizes(config, {config["image_size"]: "--image-size"}, len(data)),
    }


def make_loaders(datasets: dict[str, Dataset], config: dict, order: torch.Generator) -> dict[str, DataLoader]:
    """The batches of each split, for this process. order: shuffles the training images."""
    train = datasets["train"]
    shuffled = BatchSampler(RandomSampler(train, generator=order), config["batch_size"], drop_last=False)
    loaders = {"train": DataLoader(train, batch_sampler=processes.Shares(shuffled), generator=order, collate_fn=collate)}
    batch_size = config["batch_size"] if config["dataset"] == "synthetic" else 1  # others may have several sizes
    for split in ("val", "test"):
        mine = range(processes.rank(), len(datasets[split]), processes.world_size())
        loaders[split] = DataLoader(Subset(datasets[split], mine), batch_size, generator=order, collate_fn=collate)
    return loaders


def collate(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A batch of images and one of masks. A batch of one is a view: an image that is mapped into memory is not read."""
    if len(pairs) == 1:
        image, mask = pairs[0]
        return [image[None], mask[None]]
    return default_collate(pairs)


def ignore_surplus_images(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of training images. Where a batch has fewer images than there are processes, those without an image of
    their own take part with an image that does not count: all of its mask is IGNORE."""
    images_left = len(loader.dataset)
    for images, masks in loader:
        if processes.rank() >= images_left:
            masks = torch.full_like(masks, IGNORE)
        images_left -= loader.batch_sampler.batches.batch_size
        yield images, masks
