"""In which batches the images come, and who reads them: worker processes, so that the training step need not wait.

Which image is in which batch, and how it is cropped and flipped, depends on the seed, the epoch and
the image alone. The number of workers and the number of processes change nothing.
"""

import math
import os
import signal
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from support import processes
from support.loss import IGNORE

MOST_WORKERS = 4  # by default: each holds a few batches in memory
LONGEST_TMPDIR = 70  # characters; in a longer one workers cannot make their sockets, and would be waited for for ever


class Augmented(Dataset):
    """The images to learn from. Item (epoch, i, counts) is window i of that epoch, whoever reads it, and when.

    windows: how many of each image an epoch has. crop: (height, width) of a window, somewhere else
    each time; None: whole images. augment: flips, and quarter turns of square ones. Of a mapped
    image, only the window is read. Of an item that does not count, no pixel of the mask does.
    """

    def __init__(self, images: Dataset, windows: list[int], crop: tuple[int, int] | None, augment: bool, seed: int):
        self.images = images
        self.crop = crop
        self.augment = augment
        self.seed = seed
        self.items = np.repeat(np.arange(len(windows)), windows).tolist()  # the number of the image of each window

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: tuple[int, int, bool]) -> tuple[Tensor, Tensor]:
        epoch, i, counts = item
        image, mask = self.images[self.items[i]]
        if not counts:
            mask = torch.full(mask.shape, IGNORE, dtype=torch.uint8)
        if self.crop is None and not self.augment:  # what is mapped is not read
            return image, mask
        rng = np.random.default_rng((self.seed, epoch, i))
        height, width = self.crop or mask.shape
        top = rng.integers(mask.shape[0] - height + 1)
        left = rng.integers(mask.shape[1] - width + 1)
        turns, mirrored = 0, False
        if self.augment:
            turns, mirrored = rng.integers(4), rng.integers(2)
            if height != width:
                turns *= 2  # half turns only
        window = np.s_[..., top:top + height, left:left + width]
        return turn(image[window], turns, mirrored), turn(mask[window], turns, mirrored)


def turn(x: Tensor, turns: int, mirrored: bool) -> Tensor:
    """An image or mask (...,H,W) after so many quarter turns, and mirrored or not. By numpy, as torch cannot flip 16
    bits."""
    array = np.rot90(x.numpy(), turns, axes=(-2, -1))
    if mirrored:
        array = array[..., ::-1]
    # A copy, as torch has no negative strides, and a worker would send all that a window is a part of.
    return torch.from_numpy(array.copy())


class Batches(Sampler):
    """The share of one group of processes in every batch of an epoch, as a list of items for `Augmented`: the images
    group, group + groups, ... of the batch. The batches are those of a single process, so a run can go on with any
    number.

    All processes must make the same number of steps, or they would wait for each other for ever. The last batch may
    have fewer images than there are groups. Then the groups that are left without one get its first image, which
    counts in their running statistics, but not in the loss.
    """

    def __init__(self, images: int, batch_size: int, seed: int):
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 1

    def set_epoch(self, epoch: int):
        """Each epoch has another order, other crops and other flips."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images).tolist()
        for start in range(0, self.images, self.batch_size):
            batch = order[start:start + self.batch_size]
            share = [(self.epoch, i, True) for i in batch[processes.group_rank()::processes.number_of_groups()]]
            yield share or [(self.epoch, batch[0], False)]


def make_loaders(datasets: dict[str, Dataset], config: dict) -> dict[str, DataLoader]:
    """The batches of each split, for this process and the others of its group.

    Call `loaders["train"].batch_sampler.set_epoch` before each epoch. Images to evaluate are read without workers: so
    of an array that is mapped into memory, only the tile at hand is read.
    """
    synthetic = config["dataset"] == "synthetic"
    windows = config.get("windows", [1] * len(datasets["train"]))
    augment = config["augment"] and not synthetic
    train = Augmented(datasets["train"], windows, config["crop"], augment, config["seed"])
    batches = Batches(len(train), config["batch_size"], config["seed"])
    workers = number_of_workers(config)
    loaders = {
        "train": DataLoader(
            train,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,  # they are kept from epoch to epoch
            collate_fn=collate,
            generator=torch.Generator(),  # or it would draw from that of dropout, with workers less often
        ),
    }
    for split in ("val", "test"):
        images = datasets[split]
        mine = range(processes.group_rank(), len(images), processes.number_of_groups())
        batch_size = config["batch_size"] if synthetic else 1  # images to evaluate may have several sizes
        loaders[split] = DataLoader(images, batch_size, sampler=mine, collate_fn=collate)
    return loaders


def start(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader. Its workers inherit that Ctrl-C means nothing: they leave it to the process that
    trains."""
    if getattr(loader, "num_workers", 0) == 0:  # a list of batches will do, too
        return iter(loader)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGINT, before)


def number_of_workers(config: dict) -> int:
    """How many worker processes read the images to learn from: as --workers says, or by default one for each CPU core
    of this process, but at most MOST_WORKERS. 0 for synthetic images, which are made in no time.
    """
    if config["dataset"] == "synthetic" or len(tempfile.gettempdir()) > LONGEST_TMPDIR:
        return 0
    if config["workers"] is not None:
        return config["workers"]
    cores = os.cpu_count() // processes.local_world_size()
    return min(max(cores, 1), MOST_WORKERS)


def collate(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A batch of images and one of masks, in uint8. Of a batch of one, an image that is mapped into memory is not
    read."""
    if len(pairs) == 1:
        image, mask = pairs[0]
        return [image[None], mask[None].byte()]
    images, masks = default_collate(pairs)
    return [images, masks.byte()]
