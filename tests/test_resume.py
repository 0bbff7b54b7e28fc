"""A run that is killed and resumed ends as if it had never been interrupted.

    KILLS=100 python -m pytest tests/test_resume.py          # as many kills at random instants as you like; default 3
"""

import csv
import io
import multiprocessing
import os
import random
import resource
import time
from multiprocessing.pool import ThreadPool

import pytest
import torch
from test_image_folder import make_folder

import train
from support import checkpoints, command, processes

pytestmark = pytest.mark.usefixtures("no_pictures")
KILLS = int(os.environ.get("KILLS", 3))
EPOCHS = 5  # of 4 steps
OPTIONS = ("--width 2 --depth 2 --comm-channels 4 --dropout 0.2 --train-images 32 --batch-size 8 --seed 3 "
           f"--epochs {EPOCHS}").split()
ONE_EPOCH = [*OPTIONS, "--epochs", "1"]


def run(options, out):
    train.main([*options, "--out", str(out)])


def resume(out):
    train.main(["--resume", str(out)])


def message_of_failure(options, capsys) -> str:
    """The one line with which train.py ends, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(options)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    return said


def epochs_done(out) -> int:
    return len(checkpoints.load(out / "last.pt")["rows"])


def assert_nothing_unfinished(out):
    for path in out.iterdir():
        assert not checkpoints.is_unfinished(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of one epoch. No test may change it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    run(ONE_EPOCH, out)
    return out


# Killed

def tensors_of(out) -> list:
    """The weights of both checkpoints, and the other tensors of last.pt that the next step depends on."""
    best = checkpoints.load(out / "best.pt")
    last = checkpoints.load(out / "last.pt")
    tensors = list(best["model"].values()) + list(last["model"].values())
    for state in last["optimizer"]["state"].values():
        tensors += state.values()
    tensors.append(last["order"])
    tensors += last["random"]
    return tensors


def steps_of(out) -> int:
    return checkpoints.load(out / "last.pt")["schedule"]["last_epoch"]


def log_without_times(out) -> list:
    rows = []
    with open(out / "log.csv") as file:
        for row in csv.DictReader(file):
            del row["train_seconds"], row["seconds_waited"], row["seconds"]
            rows.append(row)
    return rows


def assert_equal_runs(out, expected):
    for tensor, other in zip(tensors_of(out), tensors_of(expected), strict=True):
        assert torch.equal(tensor, other)
    assert steps_of(out) == steps_of(expected)
    assert log_without_times(out) == log_without_times(expected)


def epochs_logged(out) -> int:
    if not (out / "log.csv").exists():
        return 0
    lines = (out / "log.csv").read_text().splitlines()
    return max(len(lines) - 1, 0)  # the first line is the heading


def run_and_kill(plan):
    """plan: the folder of the run, the epoch after which to kill it, and how many seconds after that."""
    out, epoch, delay = plan
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(OPTIONS, out))
    process.start()
    while process.is_alive():
        if epochs_logged(out) >= epoch and (out / "last.pt").exists():
            break
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return out


def plan_kills(folder, seconds) -> list:
    """The first few kills are one in each epoch, and all others are anywhere. seconds: that an epoch takes."""
    plans = []
    for kill in range(KILLS):
        chance = random.Random(kill)
        epoch = kill + 1 if kill < EPOCHS - 1 else chance.randrange(EPOCHS)
        delay = chance.uniform(0, seconds)
        plans.append((folder / str(kill), epoch, delay))
    return plans


def test_a_run_killed_at_any_instant_and_resumed_is_the_run_never_interrupted(tmp_path):
    started = time.perf_counter()
    run(OPTIONS, tmp_path / "uninterrupted")
    seconds = (time.perf_counter() - started) / EPOCHS
    plans = plan_kills(tmp_path, seconds)
    unfinished = 0
    with ThreadPool(2) as pool:
        for out in pool.imap(run_and_kill, plans):
            done = epochs_done(out)
            print(f"kill {out.name}: after {done} epochs")
            if done < EPOCHS:
                unfinished += 1
            resume(out)
            assert_equal_runs(out, tmp_path / "uninterrupted")
            assert_nothing_unfinished(out)
    assert unfinished >= 2  # the others had come to their end


# Stopped by the user, by a loss, by a full disk

def interrupt(*arguments):
    raise KeyboardInterrupt


def test_an_output_that_nobody_reads_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def print_to_nobody(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(train, "train_epoch", print_to_nobody)
    monkeypatch.setattr(command, "close_output", lambda: None)  # pytest reads it
    with pytest.raises(SystemExit, match="2"):
        run(ONE_EPOCH, tmp_path / "run")
    said = capsys.readouterr().err
    assert "nobody reads what this prints any more, so it stops" in said
    assert said.endswith(f"; go on with: python train.py --resume {tmp_path / 'run'}\n")


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupt)
        with pytest.raises(SystemExit) as stopped:
            run(ONE_EPOCH, out)
    assert stopped.value.code == 130
    assert f"python train.py --resume {out}" in capsys.readouterr().err
    resume(out)
    assert "0 of 1 epochs are done" in capsys.readouterr().out
    assert (out / "metrics.json").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_learning_rate(tmp_path, capsys):
    out = tmp_path / "run"
    said = message_of_failure([*OPTIONS, "--lr", "1e30", "--out", str(out)], capsys)
    assert "at step" in said
    assert "of epoch 1: the likely cause is --lr 1e+30" in said
    assert not (out / "best.pt").exists()


class BreakingLoss:
    """batch_loss, which returns nan when it is called for the third time in the third epoch."""

    def __init__(self, batch_loss):
        self.batch_loss = batch_loss
        self.calls = 0

    def __call__(self, *arguments):
        loss = self.batch_loss(*arguments)
        self.calls += 1
        if self.calls == 4 + 4 + 3:
            loss = loss * torch.nan
        return loss


def test_the_last_good_epoch_stays_when_a_loss_is_no_number(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(train, "batch_loss", BreakingLoss(train.batch_loss))
    said = message_of_failure([*OPTIONS, "--out", str(out)], capsys)
    assert "the loss became nan at step 3 of epoch 3" in said
    assert epochs_done(out) == 2
    for weight in checkpoints.load(out / "last.pt")["model"].values():
        assert weight.isfinite().all()


class DiskThatFillsUp:
    """checkpoints.save, which fails from the fourth time on, as no file may then grow beyond 20 kB."""

    def __init__(self, save):
        self.save = save
        self.calls = 0

    def __call__(self, path, state):
        self.calls += 1
        if self.calls < 4:
            self.save(path, state)
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
        try:
            self.save(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", DiskThatFillsUp(checkpoints.save))
        said = message_of_failure([*OPTIONS, "--epochs", "2", "--out", str(out)], capsys)
    assert "File too large" in said
    assert epochs_done(out) == 1
    assert_nothing_unfinished(out)
    resume(out)
    assert epochs_done(out) == 2


# Checkpoints that cannot be used

def bytes_of_a_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"config": {}, "model": torch.zeros(100)}, buffer)
    return buffer.getvalue()


def half(content: bytes) -> bytes:
    return content[:len(content) // 2]


def assert_named_and_untouched(out, message, capsys):
    before = {path: path.read_bytes() for path in out.iterdir()}
    said = message_of_failure(["--resume", str(out)], capsys)
    assert str(out) in said
    assert message in said
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_without_a_checkpoint_is_named(tmp_path, capsys):
    assert_named_and_untouched(tmp_path, "holds no last.pt", capsys)


@pytest.mark.parametrize("content", [half(bytes_of_a_checkpoint()), b"", b"hello"], ids=["truncated", "empty", "text"])
def test_a_damaged_checkpoint_is_named(content, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes(content)
    assert_named_and_untouched(tmp_path, "damaged", capsys)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2]], ids=["of another program", "a list"])
def test_a_file_that_is_no_checkpoint_is_named(content, tmp_path, capsys):
    torch.save(content, tmp_path / "last.pt")
    assert_named_and_untouched(tmp_path, "holds no config", capsys)


class Code:
    """What makes a folder when it is loaded as Python's pickle loads things."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    torch.save({"config": Code(), "model": {}}, out / "last.pt")
    assert_named_and_untouched(out, "holds code, which is not run", capsys)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry, message", [
    ("config", "another version of train.py"),
    ("model", "another version of train.py"),
    ("optimizer", "what it holds does not go together"),
])
def test_an_entry_that_holds_nothing_is_named(entry, message, finished, tmp_path, capsys):
    state = checkpoints.load(finished / "last.pt")
    state[entry] = {}
    checkpoints.save(tmp_path / "last.pt", state)
    assert message in message_of_failure(["--resume", str(tmp_path)], capsys)


@pytest.mark.parametrize("option, value, message", [
    ("width", 4, "its weights do not fit its configuration"),
    ("train_images", 99, "the images have changed"),
])
def test_options_that_do_not_fit_the_checkpoint_are_named(option, value, message, finished, tmp_path, capsys):
    state = checkpoints.load(finished / "last.pt")
    state["config"][option] = value
    checkpoints.save(tmp_path / "last.pt", state)
    assert message in message_of_failure(["--resume", str(tmp_path)], capsys)


# Which run goes on

def test_resume_goes_alone(tmp_path, capsys):
    said = message_of_failure(["--resume", str(tmp_path), "--epochs", "3"], capsys)
    assert "give it alone" in said


@pytest.fixture
def torchrun_can_restart(monkeypatch):
    monkeypatch.setattr(processes, "CAN_RESTART", True)


def test_a_restart_goes_on_with_the_run_that_it_was(torchrun_can_restart, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".unfinished-last.pt").touch()  # what a power cut left of a first try
    run(ONE_EPOCH, out)
    assert "epoch  train loss" in capsys.readouterr().out
    run(ONE_EPOCH, out)
    assert "1 of 1 epochs are done" in capsys.readouterr().out


def test_a_restart_goes_on_with_no_other_run(torchrun_can_restart, finished, capsys):
    others = ["--seed", "4", "--lr", "0.1"]
    said = message_of_failure([*ONE_EPOCH, *others, "--out", str(finished)], capsys)
    assert "holds a run with another lr, another seed" in said


def test_a_restart_needs_to_know_its_folder(torchrun_can_restart, capsys):
    assert "give --out" in message_of_failure(OPTIONS, capsys)


def test_a_restart_needs_new_addresses(torchrun_can_restart, finished, monkeypatch, capsys):
    monkeypatch.setattr(processes, "KEEPS_ADDRESSES", True)
    said = message_of_failure([*ONE_EPOCH, "--out", str(finished)], capsys)
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said


def test_without_epochs_the_network_is_only_evaluated(tmp_path):
    run([*OPTIONS, "--epochs", "0"], tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"best.pt", "last.pt", "metrics.json", "predictions.png"}


def test_a_run_on_images_of_your_own_that_an_older_version_began_goes_on(tmp_path):
    make_folder(tmp_path / "data", 12)
    options = "--width 2 --depth 2 --comm-channels 4 --batch-size 4 --epochs 1 --dataset folder --data".split()
    run([*options, str(tmp_path / "data")], tmp_path / "run")
    state = checkpoints.load(tmp_path / "run/last.pt")
    config = state["config"]
    for name in ("range", "class_pixels", "not_in_val"):
        del config[name]
    config["mean"] = [0.5, 0.5, 0.5]  # pixels that do not count were among those of older versions
    config["epochs"] = 2  # of three steps
    state["schedule"]["total_steps"] = 6
    checkpoints.save(tmp_path / "run/last.pt", state)
    resume(tmp_path / "run")
    assert epochs_done(tmp_path / "run") == 2
    assert checkpoints.load(tmp_path / "run/last.pt")["config"]["mean"] == [0.5, 0.5, 0.5]
