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
from conftest import CONFIG, CPU, ROOT, gradients_of
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset

import train
from decompose import Tiling
from support import checkpoints, processes
from support.command import one_line_errors
from support.loss import IGNORE, loss_from_sums, loss_sums
from support.model import build_from_config
from support.options import make_parser
from synthetic import LinesAndCircles

pytestmark = pytest.mark.usefixtures("no_pictures")


# An epoch of three processes

COUNT = 3  # processes
IMAGES, BATCH = 7, 5  # the last batch has 2 images: too few for three processes
SIZE = (32, 64)
PARTS = [1.0, 0.5]  # of the steps, after which batch norm is frozen: never, and after the first of the two


class Training:
    """The images, the same batches every time, and the network with its optimizer before the first step."""

    def __init__(self, part: float):
        torch.manual_seed(0)
        self.config = {**CONFIG, "width": 2, "comm_channels": 4, "recompute": True, "image_size": SIZE, "grid": (2, 2),
                       "overlap": 0, "batch_size": BATCH}
        self.data = LinesAndCircles(IMAGES, SIZE, (1, 2))
        order = torch.Generator().manual_seed(1)
        self.batches = BatchSampler(RandomSampler(self.data, generator=order), BATCH, drop_last=False)
        self.model = build_from_config(self.config)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.01, len(self.batches),
                                                            anneal_strategy="linear")
        self.freeze_after = part * len(self.batches)

    def loader(self):
        """The batches, or of many processes the shares of this one."""
        return DataLoader(self.data, batch_sampler=processes.Shares(self.batches))

    def result(self, loss: float, images) -> list:
        """What is compared. loss: the mean of the epoch; images: those that this process evaluates."""
        scores = train.evaluate(self.model, DataLoader(images), self.config, [CPU])
        losses = train.compare_modes(self.model, self.loader(), self.config, [CPU], frozen=True)
        return [loss, scores, losses, gradients_of(self.model), self.model.state_dict()]


def train_as_one_of_many(rank: int, part: float) -> list:
    """An epoch and an evaluation of process `rank`, with what train.py uses."""
    training = Training(part)
    parallel = processes.parallel(training.model)
    loss = train.train_epoch(parallel, training.loader(), training.optimizer, training.schedule, training.config, [CPU],
                             training.freeze_after)
    share = Subset(training.data, range(rank, IMAGES, COUNT))
    return training.result(loss, share)


def one_of_many(rank: int, folder: str):
    """Process `rank`. Leaves what came out in files of `folder`, and at the end what the first process told it."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # the sums of the loss, else in float32
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=COUNT)
    for part in PARTS:
        torch.save(train_as_one_of_many(rank, part), f"{folder}/{part}-{rank}")
    told = [processes.from_first(int, rank)]
    try:
        processes.from_first(int, "no number")
    except ValueError:
        told.append("ValueError")
    except SystemExit:
        told.append("SystemExit")
    torch.save(told, f"{folder}/told-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of_processes(tmp_path_factory):
    """The folder of what the processes have left. It takes longer to start them than to train."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(one_of_many, (str(folder),), nprocs=COUNT, start_method="forkserver")
    return folder


def average(models: list):
    """The running statistics of all become their mean."""
    for name, _ in models[0].named_buffers():
        buffers = [model.get_buffer(name) for model in models]
        mean = torch.stack(buffers).double().mean(dim=0)
        for buffer in buffers:
            buffer.copy_(mean)


def copies_with_the_same_weights(model) -> list:
    """Models that share their weights with this one, each with running statistics of its own."""
    copies = []
    for _ in range(COUNT):
        not_copied = {id(weight): weight for weight in model.parameters()}
        copies.append(copy.deepcopy(model, not_copied).train())
    return copies


def share_of_batch(data, batch: list[int], rank: int):
    """Images and masks of a process. One that is left without an image has one that does not count."""
    mine = batch[rank::COUNT]
    if not mine:
        mine = batch[:1]
    images = torch.stack([data[i][0] for i in mine])
    masks = torch.stack([data[i][1] for i in mine])
    if rank >= len(batch):
        masks[:] = IGNORE
    return images, masks


def sums_by_hand(model, images, masks, config):
    """The sums of the loss over all tiles."""
    tiling = Tiling(SIZE, (2, 2), cell=4)
    mask_tiles = tiling.split(masks)

    def finish(i, logits):
        return loss_sums(logits, mask_tiles[i])

    return sum(train.run_tiles(model, images, tiling, [CPU], config, finish))


def train_by_hand(part: float) -> list:
    """The same in one process: the same weights, and for every process its own running statistics."""
    training = Training(part)
    models = copies_with_the_same_weights(training.model)
    losses = []
    for step, batch in enumerate(training.batches):
        if step == training.freeze_after:
            average(models)
            for model in models:
                train.set_training_mode(model, frozen=True)
        sums = 0
        for rank, model in enumerate(models):
            images, masks = share_of_batch(training.data, batch, rank)
            sums += sums_by_hand(model, images, masks, training.config)
        loss = loss_from_sums(sums)
        training.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        training.schedule.step()
        losses.append(loss.item())
    average(models)
    training.model.load_state_dict(models[0].state_dict())
    return training.result(sum(losses) / len(losses), training.data)


@pytest.mark.parametrize("part", PARTS)
def test_many_processes_learn_and_measure_what_one_does(part, results_of_processes, in_float64):
    expected = train_by_hand(part)
    for rank in range(COUNT):
        result = torch.load(results_of_processes / f"{part}-{rank}")
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_what_the_first_process_finds_is_told_to_all_and_if_it_fails_the_others_end(results_of_processes):
    assert torch.load(results_of_processes / "told-0") == [0, "ValueError"]  # the first says why
    for rank in (1, 2):
        assert torch.load(results_of_processes / f"told-{rank}") == [0, "SystemExit"]


# Which GPUs are whose

@pytest.mark.parametrize("local_rank, asked, expected, said", [
    (0, 2, ["cuda:0", "cuda:1"], "tiles on cuda:0, cuda:1\n"),
    (1, 2, ["cuda:2", "cuda:3"], "tiles on cuda:2, cuda:3\n"),
    (1, 1, ["cuda:1"], "tiles on cuda:1\n"),
    (1, 3, ["cuda:2", "cuda:3"], "tiles on cuda:2, cuda:3 (3 GPUs asked for, 2 found)\n"),
])
def test_each_process_of_a_machine_has_gpus_of_its_own(local_rank, asked, expected, said, monkeypatch, capsys):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "LOCAL_RANK", local_rank)
    devices = processes.find_devices(asked, "tiles")
    assert [str(device) for device in devices] == expected
    assert capsys.readouterr().out == said
    assert current == devices[:1]


# How one ends

def test_a_process_that_ends_with_an_error_does_not_wait_for_the_others(monkeypatch):
    statuses = []
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", statuses.append)
    with pytest.raises(SystemExit):
        with processes.together():
            sys.exit(2)
    assert statuses == [2]


# A process that dies

@pytest.mark.parametrize("out, go_on", [
    (None, "nothing is lost"),
    (Path("empty"), "nothing is lost"),
    (Path("run"), "go on with: python train.py --resume run"),
])
def test_what_is_said_when_another_process_has_ended(out, go_on, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/last.pt").touch()
    monkeypatch.setattr(processes, "is_lost", lambda error: True)
    with pytest.raises(SystemExit, match="2"):
        with one_line_errors(make_parser(""), {}, out):
            raise RuntimeError("Connection closed by peer")
    assert capsys.readouterr().err.endswith(f"process 0: another one has ended, so this one stops; {go_on}\n")


OPTIONS = ("--width 2 --depth 2 --comm-channels 4 --train-images 32 --epochs 8 --batch-size 8 --dropout 0.1 "
           "--image-processes 2").split()


def start_torchrun(out) -> subprocess.Popen:
    """Two processes of train.py that share each image. torchrun starts them again once."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += "--standalone --nproc-per-node 2 --max-restarts 1".split()
    command += [str(ROOT / "train.py")] + OPTIONS + ["--out", str(out)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see the README
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def wait_for_epoch(run: subprocess.Popen, out, epoch: int):
    """Until log.csv has a row of this epoch, or all have ended."""
    log = out / "log.csv"
    while run.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > epoch:  # the first line is the header
            return
        time.sleep(0.01)


def kill_one_process(run: subprocess.Popen):
    """Kills one of those that torchrun has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # one that has just ended
            _, _, after_name = (folder / "stat").read_text().rpartition(")")
            parent = after_name.split()[1]
            if parent == str(run.pid) and b"train.py" in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
                return


def epochs_done(out) -> list[int]:
    return [row["epoch"] for row in checkpoints.load(out / "last.pt")["rows"]]


def test_all_go_on_when_one_has_died_and_ctrl_c_ends_all_and_one_alone_goes_on(tmp_path):
    out = tmp_path / "run"
    run = start_torchrun(out)
    wait_for_epoch(run, out, 1)
    kill_one_process(run)
    wait_for_epoch(run, out, 3)
    os.killpg(run.pid, signal.SIGINT)  # to all of them at once, as a terminal does
    said, complained = run.communicate(timeout=60)
    assert said.count("process 1 of 2: 2x2 tiles on cpu") == 2
    assert re.search("[1-3] of 8 epochs are done", said)
    assert complained.count(f"stopped; go on with: torchrun ... train.py --resume {out}") == 1
    assert 3 <= len(epochs_done(out)) < 8

    train.main(["--resume", str(out), "--image-processes", "1"])
    assert epochs_done(out) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (out / "metrics.json").exists()
