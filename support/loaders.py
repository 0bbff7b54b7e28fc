"""In which batches the images come, and who reads them: worker processes, so that the training step need not wait.

Which image is in which batch, and how it is cropped and flipped, depends on the seed, the epoch and
the image alone. The number of workers and the number of processes change nothing.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, default_collate

from support import processes
from support.image_files import DataError
from support.loss import IGNORE

MOST_WORKERS = 4  # by default: each holds a few batches in memory
WORKER_DIED = ("a process that reads images has died, perhaps because the memory, or its shared part in /dev/shm, is "
               "full; take fewer --workers, or 0")


class Loader(DataLoader):
    """PyTorch's loader, which also measures how long its user waits.

    seconds_waited: for the batches of the last pass, or of the current one so far.
    DataError: an image cannot be read, or a worker has died.
    """

    seconds_waited = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.seconds_waited = 0.0
        started = time.perf_counter()
        batches = None
        try:
            with ctrl_c_waits():
                batches = super().__iter__()  # starts the workers
            batch = next_batch(batches)
            while batch is not None:
                self.seconds_waited += time.perf_counter() - started
                yield batch
                started = time.perf_counter()
                batch = next_batch(batches)
        finally:
            if batches is not None and self.num_workers > 0:
                batches._shutdown_workers()  # else, after an error, PyTorch would wait long for the garbage collector


@contextmanager
def ctrl_c_waits():
    """Inside, Ctrl-C waits until the block has ended, and to processes that are forked here it means nothing.

    So it does not end a worker, whose death would be taken for another error, nor does Python lose
    it while it starts one.
    """
    pressed = []

    def wait(*signal_and_frame):
        pressed.append(True)

    before = signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def next_batch(batches: Iterator) -> tuple[Tensor, Tensor] | None:
    """The next batch, or None after the last one. DataError as above."""
    try:
        return next(batches, None)
    except DataError as error:
        *_, last_line = str(error).splitlines()  # before it, PyTorch puts the traceback of the worker
        raise DataError(last_line.removeprefix("support.image_files.DataError: ")) from None
    except RuntimeError as error:
        if not is_death_of_a_worker(error):
            raise
        raise DataError(WORKER_DIED) from None


def is_death_of_a_worker(error: Exception) -> bool:
    """PyTorch raises it wherever the program is at that moment, so perhaps in the middle of a
    training step. An error that it caught in a worker, and raises again here, is another thing."""
    return "DataLoader worker" in str(error) and "Caught" not in str(error)


def make_loaders(datasets: dict[str, Dataset], config: dict, order: torch.Generator) -> dict[str, Loader]:
    """The batches of each split, for this process and the others of its group. order: shuffles the training images."""
    batch_size = config["batch_size"]
    options = {"generator": order, "collate_fn": collate}
    shuffled = RandomSampler(datasets["train"], generator=order)
    shares = processes.Shares(BatchSampler(shuffled, batch_size, drop_last=False))
    workers = number_of_workers(config, datasets["train"])
    loaders = {"train": Loader(datasets["train"], batch_sampler=shares, num_workers=workers, **options)}
    if config["dataset"] != "synthetic":
        batch_size = 1  # images to evaluate may have several sizes
    for split in ("val", "test"):
        images = datasets[split]
        mine = Subset(images, range(processes.group(), len(images), processes.groups()))
        workers = number_of_workers(config, images)
        loaders[split] = Loader(mine, batch_size, num_workers=workers, **options)
    return loaders


def number_of_workers(config: dict, dataset: Dataset) -> int:
    """How many worker processes read the images of a data set.

    0 for whole arrays, of which only the tile at hand is read as long as no worker reads them.
    Otherwise what --workers says. Without --workers, 0 for synthetic images, which are made in no
    time; and for pictures, and for windows of arrays, one for each CPU core of this process, but at
    most MOST_WORKERS.
    """
    if config["dataset"] != "synthetic":
        first_image, _ = dataset.pairs[0]
        if first_image.suffix.lower() == ".npy" and dataset.crop is None:
            return 0
    if config["workers"] is not None:
        return config["workers"]
    if config["dataset"] == "synthetic":
        return 0
    return min(max(os.cpu_count() // processes.local_world_size(), 1), MOST_WORKERS)


def workers_before_training(config: dict, files: int) -> int:
    """How many processes look at the files before training, while the GPUs wait. files: how many
    files there are, or pairs.

    As many as --workers says; by default one for each CPU core, but at most MOST_WORKERS.
    """
    workers = config["workers"]
    if workers is None:
        workers = min(os.cpu_count(), MOST_WORKERS)
    return min(workers, files)


def collate(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A batch of images and one of masks. A batch of one is a view: an image that is mapped into memory is not read."""
    if len(pairs) == 1:
        image, mask = pairs[0]
        return [image[None], mask[None]]
    return default_collate(pairs)


def mask_out_fillers(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of training images, in which fillers do not count.

    All processes must make the same number of steps, or they would wait for each other for ever. So
    where a batch has fewer images than there are groups of processes, the groups that are left
    without one get a filler (see Shares in processes.py). Here all of its mask becomes IGNORE.
    """
    images_left = len(loader.dataset)
    for images, masks in loader:
        if processes.group() >= images_left:
            masks = torch.full_like(masks, IGNORE)
        images_left -= loader.batch_sampler.batches.batch_size
        yield images, masks
