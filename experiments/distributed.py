"""What do two processes cost? The training step of one process with two threads against two processes with one each.

    python -m experiments.benchmark --distributed            # two minutes on two CPU cores
    python -m experiments.benchmark --distributed --quick    # the two processes only, in seconds

The network and the images are the defaults of train.py: 64x64 pixels in 2x2 tiles, 16 images in a batch, of which each
process takes its share; Gloo on the CPU. The two take turns. In the same processes, every step is made once more without
a word to the others: the difference is the time of the exchange, waiting for the slower one included. The bytes are those
that each process hands over to be added. Writes runs/distributed/distributed.csv and prints its rows.
"""

import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import checkpoints
import train
from data import describe
from options import build_tiling, make_parser, parse, show_progress

CORES, CPU = 2, [torch.device("cpu")]


def work(rank: int, count: int, folder: str, config: dict, steps: int):
    """Process `rank`: steps with and without the exchange, in turn. The first one writes what it measured to `folder`."""
    torch.set_num_threads(CORES // count)
    alone = train.Run(config, config["train_images"], CPU[0])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    run, sent, all_reduce = train.Run(config, config["train_images"], CPU[0]), [0], dist.all_reduce
    run.parallel.register_comm_hook(None, allreduce_hook)  # what it does anyway, but where it can be seen

    def counted(tensor, *options, **more):
        sent[0] += tensor.nbytes
        return all_reduce(tensor, *options, **more)

    data = train.build_datasets(config)["train"]
    batch = [torch.stack(x) for x in zip(*(data[i] for i in range(config["batch_size"])[rank::count]))]

    def step(run) -> float:
        dist.barrier()
        begun = time.perf_counter()
        run.optimizer.zero_grad()
        train.batch_loss(run.parallel, *batch, build_tiling(config, batch[1].shape[-2:]), CPU).backward()
        run.optimizer.step()
        return time.perf_counter() - begun

    times = []
    for _ in range(steps + 2):  # the first two warm up
        sent[0] = 0
        with mock.patch("torch.distributed.all_reduce", counted):
            together = step(run)
        with mock.patch("processes.add", lambda sums: sums):
            times.append((together, step(alone)))
    together, apart = map(statistics.median, zip(*times[2:]))
    if rank == 0:
        weights, seconds = sum(weight.nbytes for weight in run.model.parameters()), together if count > 1 else apart
        torch.save({"processes": count, "images_per_second": round(config["batch_size"] / seconds, 1),
                    "exchange_share": round(1 - apart / together, 3), "bytes_sent": sent[0],
                    "bytes_of_weights": weights}, f"{folder}/result")
    dist.destroy_process_group()


def main(quick: bool):
    config = parse(["--train-images", "16", *(["--width", "2", "--comm-channels", "4"] if quick else [])], make_parser(""))
    config |= describe(config, show_progress)
    folder = Path("runs/distributed-quick" if quick else "runs/distributed")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for round_ in range(1 if quick else 3):
        for count in (2,) if quick else (1, 2):
            with tempfile.TemporaryDirectory() as meeting:
                torch.multiprocessing.spawn(work, (count, meeting, config, 3 if quick else 30), nprocs=count)
                rows.append({"round": round_} | torch.load(f"{meeting}/result", weights_only=True))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            checkpoints.write_log(folder / "distributed.csv", rows)
