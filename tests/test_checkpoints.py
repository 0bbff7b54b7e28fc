"""What is on the disk after a kill or a power cut at any instant."""

import errno
import os

import pytest
import torch
from torch import nn

from support import checkpoints
from support.checkpoints import CheckpointError
from support.run import Run

# A power cut

def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    order = []

    def note_fsync(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def note_replace(source, target):
        order.append(str(target))

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    checkpoints.write_json(tmp_path / "metrics.json", {"a": 1})
    assert order == [str(tmp_path / ".unfinished.json"), str(tmp_path / "metrics.json")]


def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "metrics.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        checkpoints.write_json(path, {})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# A kill

CONFIG = {"classes": ["a"]}
SCORES = [0.3, 0.2, 0.5, 0.4, 0.6]  # of the epochs of a run
OTHER_SCORES = [0.1, 0.7, 0.15, 0.65, 0.05]  # of the same epochs, when they are repeated after a kill
WRITES = 1 + 5 * 3  # last.pt of the beginning, then last.pt, best.pt and log.csv of each epoch


class Killed(BaseException):
    """As nothing that the program could handle."""


class KillAt:
    """os.replace, which ends the process at one of its calls, before or after the file is replaced."""

    def __init__(self, call: int, after: bool):
        self.replace = os.replace
        self.calls_left = call
        self.after = after

    def __call__(self, source, target):
        self.calls_left -= 1
        if self.calls_left == 0 and not self.after:
            raise Killed
        self.replace(source, target)
        if self.calls_left == 0:
            raise Killed


def begin(out, config=CONFIG) -> Run:
    """A run that goes on with what is in its folder, if anything is."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
    run = Run(config, out, model, optimizer, schedule)
    path = out / "last.pt"
    run.begin(checkpoints.load(path) if path.exists() else {})
    return run


def train_epochs(run: Run, scores: list[float]):
    """Trains to the end. After each epoch the only weight of the network is the score of the epoch."""
    for score in scores[len(run.rows):]:
        nn.init.constant_(run.model.weight, score)
        run.end_epoch(0.0, {"loss": 0.0, "iou": {"a": score}, "mean_iou": score}, learning_rate=0.1,
                      train_seconds=1.0, seconds=1.0)


def assert_best_is_the_best(run: Run):
    """best.pt holds the weight of the epoch with the highest score, and its number."""
    scores = [row["val_mean_iou"] for row in run.rows]
    best = checkpoints.load(run.out / "best.pt")
    assert run.best["mean_iou"] == max(scores)
    assert best["epoch"] == run.best["epoch"] == 1 + scores.index(max(scores))
    assert best["model"]["weight"].item() == pytest.approx(max(scores))


@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("call", range(1, WRITES + 1))
def test_after_a_kill_at_any_file_best_pt_is_that_of_the_best_epoch_though_the_repeated_epoch_ends_otherwise(
        call, after, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", KillAt(call, after))
        with pytest.raises(Killed):
            train_epochs(begin(tmp_path), SCORES)

    run = begin(tmp_path)
    if run.rows:
        assert_best_is_the_best(run)
    train_epochs(run, OTHER_SCORES)
    assert_best_is_the_best(run)
    run.load_best()
    assert run.model.weight.item() == pytest.approx(run.best["mean_iou"])


# Which epoch is the best

def test_of_epochs_with_equal_scores_the_last_is_the_best(tmp_path):
    run = begin(tmp_path)
    train_epochs(run, [0.25, 0.75, 0.75, 0.5])
    assert run.best["epoch"] == 3


def test_the_last_epoch_is_the_best_where_the_validation_masks_lack_a_class(tmp_path):
    run = begin(tmp_path, {**CONFIG, "not_in_val": ["a"]})
    train_epochs(run, [1.0, 0.75, 0.5])
    assert checkpoints.load(tmp_path / "best.pt")["epoch"] == 3
    run.load_best()
    assert run.model.weight.item() == 0.5


def test_a_checkpoint_that_was_copied_in_part_is_damaged(tmp_path):
    path = tmp_path / "part.pt"
    checkpoints.save(path, {"config": {}, "model": {"weight": torch.zeros(10_000)}})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="part.pt: is damaged"):
        checkpoints.load(path)
