"""What processes have and how they end. What they compute is in test_sharing.py."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train
from decompose import Tiling
from support import checkpoints, processes

pytestmark = pytest.mark.usefixtures("no_pictures")


# Which GPUs are whose

@pytest.mark.parametrize("local_rank, asked, expected, said", [
    (0, 2, ["cuda:0", "cuda:1"], "tiles on cuda:0, cuda:1\n"),
    (1, 2, ["cuda:2", "cuda:3"], "tiles on cuda:2, cuda:3\n"),
    (1, 3, ["cuda:2", "cuda:3"], "tiles on cuda:2, cuda:3 (3 GPUs asked for, 2 found)\n"),
])
def test_each_process_of_a_machine_has_gpus_of_its_own(local_rank, asked, expected, said, monkeypatch, capsys):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    devices = processes.find_devices(asked, "tiles")
    assert devices == [torch.device(name) for name in expected]
    assert capsys.readouterr().out == said
    assert current == devices[:1]


def test_the_tiles_of_a_process_take_turns_on_its_gpus(monkeypatch):
    monkeypatch.setattr(processes, "image_processes", 2)  # this one has tiles 0 and 2
    assert train.place(Tiling((8, 8), (2, 2)), ["cuda:0", "cuda:1"]) == {0: "cuda:0", 2: "cuda:1"}


# How they begin and end

OPTIONS = ("--width 2 --depth 2 --comm-channels 4 --train-images 32 --epochs 30 --batch-size 8 --dropout 0.1 "
           "--image-processes 2").split()


def start_torchrun(out) -> subprocess.Popen:
    """Two processes of train.py that share each image."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train.py")] + OPTIONS + ["--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_epoch(run: subprocess.Popen, out, epoch: int):
    """Until log.csv has a row of this epoch, or all have ended."""
    log = out / "log.csv"
    while run.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > epoch:  # the first line is the header
            return
        time.sleep(0.01)


def test_ctrl_c_ends_all_and_one_alone_goes_on(tmp_path):
    out = tmp_path / "run"
    run = start_torchrun(out)
    wait_for_epoch(run, out, 2)
    os.killpg(run.pid, signal.SIGINT)  # to all of them at once, as a terminal does
    said, complained = run.communicate(timeout=60)
    assert said.count("process 1 of 2: 2x2 tiles on cpu") == 1
    assert said.count("batch norm keeps") == 1  # the rest is told by one process alone
    assert f"stopped; go on with: python train.py --resume {out}" in complained

    state = checkpoints.load(out / "last.pt")
    done = len(state["rows"])
    assert 2 <= done < 30
    state["config"]["epochs"] = done + 1  # one more is enough
    checkpoints.save(out / "last.pt", state)
    train.main(["--resume", str(out), "--image-processes", "1"])
    assert (out / "metrics.json").exists()


def test_processes_that_cannot_be_joined_are_refused_and_not_trained_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SystemExit, match="2"):
        train.main(["--out", str(tmp_path / "run")])
    assert "there are other processes, but they cannot be joined" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
