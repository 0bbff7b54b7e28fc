"""Several processes, as torchrun starts them, against one that does the same by hand."""

import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset

import train
from decompose import Tiling
from support import checkpoints, processes
from support.loss import IGNORE, loss_from_sums, loss_sums
from support.model import build_from_config
from synthetic import LinesAndCircles

CPU = [torch.device("cpu")]
IMAGES, BATCH = 7, 5  # the last batch has 2 images: too few for three processes
CONFIG = {"channels": 1, "classes": LinesAndCircles.classes, "width": 2, "depth": 2, "dropout": 0.0, "comm_channels": 4,
          "dilations": [1, 2], "recompute": False, "mean": [0.5], "std": [2.0], "amp": False,
          "freeze_batch_norm": 1.0, "image_size": (32, 64), "grid": (2, 2), "overlap": 0}

pytestmark = pytest.mark.usefixtures("no_pictures")


def start(config: dict):
    """The images, the same batches every time, and the network with its optimizer before the first step."""
    data = LinesAndCircles(IMAGES, size=(32, 64), grid=(1, 2))
    batches = BatchSampler(RandomSampler(data, generator=torch.Generator().manual_seed(1)), BATCH, drop_last=False)
    torch.manual_seed(0)
    model = build_from_config(config)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, len(batches), anneal_strategy="linear")
    freeze_after = config["freeze_batch_norm"] * len(batches)
    return data, batches, model, optimizer, schedule, freeze_after


def one_of_many(rank: int, count: int, folder: str, config: dict):
    """Process `rank`: an epoch and an evaluation. Leaves what came out in the file `folder`/`rank`."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # the sums of the loss, else in float32
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    data, batches, model, optimizer, schedule, freeze_after = start(config)
    loader = DataLoader(data, batch_sampler=processes.Shares(batches))
    loss = train.train_epoch(processes.parallel(model), loader, optimizer, schedule, config, CPU, freeze_after)
    measured = train.evaluate(model, DataLoader(Subset(data, range(rank, IMAGES, count))), config, CPU)
    gradients = [weight.grad for weight in model.parameters()]
    torch.save([loss, measured, gradients, model.state_dict()], f"{folder}/{rank}")
    assert processes.from_first(int, rank) == 0
    with pytest.raises(ValueError if rank == 0 else SystemExit):  # the first says why, the others end
        processes.from_first(int, "no number")
    dist.destroy_process_group()


def average(models: list):
    """The running statistics of all become their mean."""
    for name, _ in models[0].named_buffers():
        buffers = [model.get_buffer(name) for model in models]
        mean = torch.stack(buffers).double().mean(dim=0)
        for buffer in buffers:
            buffer.copy_(mean)


def many_by_hand(count: int, config: dict):
    """The same in one process: the same weights, and for every process its own running statistics."""
    data, batches, trained, optimizer, schedule, freeze_after = start(config)
    shared = {id(weight): weight for weight in trained.parameters()}
    models = [copy.deepcopy(trained, dict(shared)).train() for _ in range(count)]
    tiling = Tiling((32, 64), (2, 2), 4)
    losses = []
    for step, batch in enumerate(batches):
        if step == freeze_after:
            average(models)
            for model in models:
                train.set_training_mode(model, frozen=True)
        sums = 0
        for rank, model in enumerate(models):
            images, masks = map(torch.stack, zip(*(data[i] for i in batch[rank::count] or batch[:1])))
            if rank >= len(batch):
                masks[:] = IGNORE
            masks = tiling.split(masks)

            def finish(i, logits, masks=masks):
                return loss_sums(logits, masks[i])

            sums += sum(train.run_tiles(model, images, tiling, CPU, config, finish))
        loss = loss_from_sums(sums)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    average(models)
    trained.load_state_dict(models[0].state_dict())
    measured = train.evaluate(trained, DataLoader(data), config, CPU)
    return [sum(losses) / len(losses), measured, [weight.grad for weight in trained.parameters()], trained.state_dict()]


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_many_processes_learn_and_measure_what_one_does(part, tmp_path, in_float64, count=3):
    config = CONFIG | {"recompute": True, "freeze_batch_norm": part}
    torch.multiprocessing.spawn(one_of_many, (count, str(tmp_path), config), nprocs=count)
    expected = many_by_hand(count, config)
    for rank in range(count):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), expected, rtol=1e-10, atol=1e-10)


OPTIONS = "--width 2 --depth 2 --comm-channels 4 --train-images 64 --epochs 8 --batch-size 8 --dropout 0.1".split()


def torchrun(out, *options) -> subprocess.Popen:
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see the README
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options,
               ROOT / "train.py", *OPTIONS, "--out", out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_one(run: subprocess.Popen, out, epoch: int):
    """Kills one of the two processes after an epoch."""
    while run.poll() is None and not (out / "log.csv").exists() or len((out / "log.csv").read_text().splitlines()) <= epoch:
        time.sleep(0.01)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # one that has just ended
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(run.pid) and b"train.py" in (folder / "cmdline").read_bytes():
                return os.kill(int(folder.name), signal.SIGKILL)


def epochs(out) -> list[int]:
    return [row["epoch"] for row in checkpoints.load(out / "last.pt")["rows"]]


def test_when_a_process_dies_torchrun_goes_on_once_and_the_second_time_all_end_and_one_alone_goes_on(tmp_path):
    out = tmp_path / "run"
    run = torchrun(out, "--max-restarts", "1")
    kill_one(run, out, epoch=1)
    kill_one(run, out, epoch=3)
    killed = time.perf_counter()
    said, complained = run.communicate(timeout=60)
    assert run.returncode != 0 and time.perf_counter() - killed < 60
    assert said.count("process 1 of 2: 2x2 tiles on cpu") == 2 and re.search("[1-3] of 8 epochs are done", said)
    assert complained.count("Traceback") == 1 and "ChildFailedError" in complained  # the only one is torchrun's own
    assert 3 <= len(epochs(out)) < 8
    train.main(["--resume", str(out)])
    assert epochs(out) == [1, 2, 3, 4, 5, 6, 7, 8] and (out / "metrics.json").exists()
