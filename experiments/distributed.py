"""What do two processes cost? The training step of one process with two threads against two processes with one each.

    python -m experiments.benchmark --distributed            # six minutes on two CPU cores
    python -m experiments.benchmark --distributed --quick    # two processes that share images, in seconds

First they share out batches: the network and the images are the defaults of train.py, 64x64 pixels
in 2x2 tiles, 16 images in a batch. Then they share one image of 512x512 pixels in 2x2 tiles, with
--image-processes 2, width 16 and depth 4. Gloo on the CPU. The two take turns. In the same
processes, every step is made once more without a word to the others: the difference is the time of
the exchange, waiting for the slower one included. The bytes are those that each process hands over
to be added. Writes runs/distributed/distributed.csv and prints its rows.
"""

import statistics
import tempfile
import time
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from experiments.common import make_folder
from support import checkpoints, processes
from support.datasets import build_datasets, describe
from support.model import build_from_config
from support.options import make_parser, parse
from support.sizes import build_tiling

CORES = 2
CPU = [torch.device("cpu")]


class Trainer:
    """A network and its optimizer, as train.py makes them. Made before the processes know each other, it is alone."""

    def __init__(self, config: dict):
        torch.manual_seed(config["seed"])
        self.config = config
        self.model = build_from_config(config)
        self.parallel = processes.parallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)

    def step(self, images: Tensor, masks: Tensor) -> float:
        """Makes a training step, as soon as all processes are here. Returns its seconds."""
        dist.barrier()
        started = time.perf_counter()
        self.optimizer.zero_grad()
        tiling = build_tiling(self.config, masks.shape[-2:])
        loss = train.batch_loss(self.parallel, images, masks, tiling, CPU, self.config)
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - started


class CountedAllReduce:
    """Does what torch.distributed.all_reduce does, and adds up the bytes that this process hands over."""

    def __init__(self):
        self.all_reduce = dist.all_reduce
        self.bytes = 0

    def __call__(self, tensor: Tensor, *options, **more):
        self.bytes += tensor.nbytes
        return self.all_reduce(tensor, *options, **more)


def keep_to_oneself(sums: Tensor) -> Tensor:
    """In place of all_reduce_sum and sum_over_group: nothing is added up over processes."""
    return sums


def share_of_batch(config: dict) -> tuple[Tensor, Tensor]:
    """The images and masks of a batch that this process learns from, alone or with the others of its group."""
    dataset = build_datasets(config)["train"]
    images, masks = [], []
    for i in range(processes.group(), config["batch_size"], processes.groups()):
        image, mask = dataset[i]
        images.append(image)
        masks.append(mask)
    return torch.stack(images), torch.stack(masks)


def work(rank: int, count: int, folder: str, config: dict, steps: int):
    """Process `rank`: steps with and without the exchange, in turn. The first one saves its result in `folder`."""
    torch.set_num_threads(CORES // count)
    alone = Trainer(config)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    processes.share_images(config["image_processes"])
    together = Trainer(config)
    together.parallel.register_comm_hook(None, allreduce_hook)  # what it does anyway, but where it can be seen
    images, masks = share_of_batch(config)

    seconds_together, seconds_alone = [], []
    for _ in range(steps + 2):
        counted = CountedAllReduce()
        with mock.patch("torch.distributed.all_reduce", counted):
            seconds_together.append(together.step(images, masks))
        with mock.patch("support.processes.all_reduce_sum", keep_to_oneself):
            with mock.patch("support.processes.sum_over_group", keep_to_oneself):
                seconds_alone.append(alone.step(images, masks))
    if rank == 0:
        with_exchange = statistics.median(seconds_together[2:])  # the first two warm up
        without_exchange = statistics.median(seconds_alone[2:])
        seconds = with_exchange if count > 1 else without_exchange
        result = {
            "processes": count,
            "processes_of_an_image": config["image_processes"],
            "images_per_second": round(config["batch_size"] / seconds, 2),
            "exchange_share": round(1 - without_exchange / with_exchange, 3),
            "bytes_sent": counted.bytes,
            "bytes_of_weights": sum(weight.nbytes for weight in together.model.parameters()),
        }
        torch.save(result, f"{folder}/result")
    dist.destroy_process_group()


def measure(count: int, config: dict, steps: int) -> dict:
    """What `work` measures in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(work, (count, folder, config, steps), nprocs=count,
                                              start_method="forkserver")
        return torch.load(f"{folder}/result", weights_only=True)


def main(quick: bool):
    rounds, steps = 3, 30
    large = ["--image-size", "512", "--batch-size", "1", "--width", "16", "--depth", "4", "--grid", "2x2", "--no-amp"]
    contests = [(1, []), (2, []), (1, large), (2, large + ["--image-processes", "2"])]
    if quick:
        small = ["--width", "2", "--comm-channels", "4", "--grid", "2x2", "--no-amp"]
        rounds, steps = 1, 3
        contests = [(2, small + ["--image-processes", "2"])]

    folder = make_folder("distributed", quick)
    rows = []
    for i in range(rounds):
        for count, options in contests:
            config = parse(options + ["--train-images", "16"], make_parser(""))
            config.update(describe(config))
            row = {"round": i}
            row.update(measure(count, config, steps))
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            checkpoints.write_log(folder / "distributed.csv", rows)
