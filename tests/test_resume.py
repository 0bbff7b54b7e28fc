"""A run that is killed and resumed ends as if it had never been interrupted."""

import os

import pytest
import torch
from torch.utils._pytree import tree_leaves

import train
from support import checkpoints

pytestmark = pytest.mark.usefixtures("no_pictures")
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


# Killed

def content_of(out) -> list:
    """All numbers and tensors of last.pt, but for times."""
    state = checkpoints.load(out / "last.pt")
    del state["config"]
    for row in state["rows"]:
        del row["train_seconds"], row["seconds"]
    return tree_leaves(state)


def assert_equal_runs(out, expected):
    for found, other in zip(content_of(out), content_of(expected), strict=True):
        assert torch.equal(found, other) if isinstance(found, torch.Tensor) else found == other


class AtStep:
    """train.train_step, of which one call does something else."""

    def __init__(self, step: int, what):
        self.train_step = train.train_step
        self.steps_left = step
        self.what = what

    def __call__(self, *arguments):
        self.steps_left -= 1
        if self.steps_left == 0:
            return self.what()
        return self.train_step(*arguments)


def interrupt(*arguments):
    raise KeyboardInterrupt


def lose():
    return torch.tensor(torch.nan)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run(OPTIONS, out)
    return out


@pytest.mark.parametrize("step", [2, 5, 15])  # in the first epoch, at the beginning of the second, in the fourth
def test_a_run_that_was_killed_and_resumed_is_the_run_never_interrupted(step, uninterrupted, tmp_path, monkeypatch):
    """What is on disk after a kill between two writes is in test_checkpoints.py."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", AtStep(step, interrupt))
        with pytest.raises(SystemExit):
            run(OPTIONS, out)
    assert epochs_done(out) == (step - 1) // 4
    torch.manual_seed(step)  # another process begins with other random numbers
    resume(out)
    assert_equal_runs(out, uninterrupted)


# Stopped by the user, or by a loss

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


def test_the_last_good_epoch_stays_when_a_loss_is_no_number(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(train, "train_step", AtStep(12, lose))
    said = message_of_failure([*OPTIONS, "--out", str(out)], capsys)
    assert "the loss became nan by step 12 of 20; take a smaller --lr" in said
    assert epochs_done(out) == 2


# Checkpoints that cannot be used

class Code:
    """What makes a folder when it is loaded as Python's pickle loads things."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_checkpoint_of_something_else_is_named_and_code_in_one_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for content in ({"state_dict": {}}, {"config": Code(), "model": {}}):
        torch.save(content, "last.pt")
        before = (tmp_path / "last.pt").read_bytes()
        said = message_of_failure(["--resume", "."], capsys)
        assert "last.pt: is damaged, or no checkpoint of train.py, or holds code, which is not run" in said
        assert (tmp_path / "last.pt").read_bytes() == before
    assert not (tmp_path / "ran").exists()
