"""Which images there are, what the network has to know of them, and in which batches they come."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, default_collate

from support import processes
from support.image_files import DataError
from support.image_folder import SPLITS, class_names, open_folder
from support.loss import IGNORE
from support.sizes import check_sizes
from support.survey import survey
from synthetic import LinesAndCircles


def build_datasets(config: dict) -> dict[str, Dataset]:
    """Train, val and test, as --dataset says.

    Of the synthetic images, val and test have an eighth of the training images each. Their discs are kept apart by tiles
    of about 32x32 pixels, whatever the network's grid is, so that all models see the same images.
    """
    seed = config["seed"]
    if config["dataset"] != "synthetic":
        deepglobe = config["dataset"] == "deepglobe"
        return open_folder(Path(config["data"]), deepglobe, seed, config["crop"], config["augment"])
    height, width = config["image_size"]
    rows = max(height // 32, 1)
    columns = max(width // 32, 1)
    count = config["train_images"]
    datasets = {}
    for split in SPLITS:
        length = count if split == "train" else max(count // 8, 1)
        datasets[split] = LinesAndCircles(length, (height, width), (rows, columns), split, seed)
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
    known["image_size"] = check_sizes(config, sizes, len(datasets["train"]))
    classes = known["classes"]
    train, val, test = (len(datasets[split]) for split in SPLITS)
    print(f"{len(classes)} classes ({', '.join(classes)}), {known['channels']}-channel images: {train} for train, {val} for "
          f"val, {test} for test")
    return known


def describe_synthetic(config: dict) -> dict:
    height, width = config["image_size"]
    try:
        data = build_datasets(config)["train"]
    except ValueError:
        raise DataError(f"--image-size {height}x{width}: synthetic images must hold two tiles of 32x32; take 64 or more "
                        "for one side, 32 or more for the other") from None
    size = check_sizes(config, {(height, width): "--image-size"}, len(data))
    return {
        "channels": data.channels,
        "dtype": None,
        "classes": data.classes,
        "colors": data.colors,
        "mean": [0.0],
        "std": [1.0],
        "image_size": size,
    }


def make_loaders(datasets: dict[str, Dataset], config: dict, order: torch.Generator) -> dict[str, DataLoader]:
    """The batches of each split, for this process. order: shuffles the training images."""
    batch_size = config["batch_size"]
    shuffled = RandomSampler(datasets["train"], generator=order)
    shares = processes.Shares(BatchSampler(shuffled, batch_size, drop_last=False))
    loaders = {"train": DataLoader(datasets["train"], batch_sampler=shares, generator=order, collate_fn=collate)}
    if config["dataset"] != "synthetic":
        batch_size = 1  # images to evaluate may have several sizes
    for split in ("val", "test"):
        images = datasets[split]
        mine = Subset(images, range(processes.rank(), len(images), processes.world_size()))
        loaders[split] = DataLoader(mine, batch_size, generator=order, collate_fn=collate)
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
