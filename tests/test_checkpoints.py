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

def test_a_file_is_on_the_disk_before_it_replaces_another_and_then_its_folder_is(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        order.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source, target):
        order.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    checkpoints.write_json(tmp_path / "metrics.json", {"a": 1})
    assert order == [
        ("fsync", str(tmp_path / ".unfinished-metrics.json")),
        ("replace", str(tmp_path / "metrics.json")),
        ("fsync", str(tmp_path)),
    ]


class DiskThatCannotSync:
    """os.fsync, which fails for folders, or for files."""

    def __init__(self, folders: bool, number: int):
        self.fsync = os.fsync
        self.folders = folders
        self.number = number

    def __call__(self, descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == self.folders:
            raise OSError(self.number, os.strerror(self.number))
        self.fsync(descriptor)


def test_a_file_system_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", DiskThatCannotSync(folders=True, number=errno.EINVAL))
    checkpoints.write_json(tmp_path / "metrics.json", {})
    assert (tmp_path / "metrics.json").read_text() == "{}\n"


@pytest.mark.parametrize("folders, number", [(True, errno.EIO), (False, errno.EIO), (False, errno.EINVAL)])
def test_a_disk_that_fails_is_an_error(folders, number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", DiskThatCannotSync(folders, number))
    with pytest.raises(OSError, match=os.strerror(number)):
        checkpoints.write_json(tmp_path / "metrics.json", {})
    assert not list(tmp_path.glob(".unfinished-*"))


# A kill

CONFIG = {"classes": ["a"]}
SCORES = [0.3, 0.2, 0.5, 0.4, 0.6]  # of the epochs of a run
OTHER_SCORES = [0.1, 0.7, 0.15, 0.65, 0.05]  # of the same epochs, when they are repeated after a kill
WRITES = 1 + 5 * 2 + 3  # last.pt of the beginning, then last.pt and log.csv of each epoch, and best.pt of three epochs


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


def new_run(out) -> Run:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
    return Run(CONFIG, out, model, optimizer, schedule, torch.Generator())


def begin(run: Run):
    """Goes on with what is in the folder of the run, if anything is."""
    path = run.out / "last.pt"
    run.begin(checkpoints.load(path) if path.exists() else None)


def train_epochs(run: Run, scores: list[float]):
    """Trains to the end. After each epoch the only weight of the network is the score of the epoch."""
    for epoch in range(run.epochs_done() + 1, len(scores) + 1):
        score = scores[epoch - 1]
        nn.init.constant_(run.model.weight, score)
        run.end_epoch(epoch, 0.0, {"loss": 0.0, "iou": {"a": score}, "mean_iou": score}, learning_rate=0.1,
                      train_seconds=1.0, seconds_waited=0.0, seconds=1.0)


def assert_best_is_the_best(run: Run):
    """best.pt holds the weight of the epoch with the highest score, and its number."""
    scores = [row["val_mean_iou"] for row in run.rows]
    best = checkpoints.load(run.out / "best.pt")
    assert run.best["mean_iou"] == max(scores)
    assert best["epoch"] == run.best_epoch() == 1 + scores.index(max(scores))
    assert best["model"]["weight"].item() == pytest.approx(max(scores))


def test_a_kill_is_tried_at_every_write_of_a_run(tmp_path, monkeypatch):
    counter = KillAt(0, after=False)
    monkeypatch.setattr(os, "replace", counter)
    run = new_run(tmp_path)
    begin(run)
    train_epochs(run, SCORES)
    assert counter.calls_left == -WRITES
    assert_best_is_the_best(run)


@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("call", range(1, WRITES + 1))
def test_after_a_kill_at_any_file_best_pt_is_that_of_the_best_epoch_though_the_repeated_epoch_ends_otherwise(
        call, after, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", KillAt(call, after))
        with pytest.raises(Killed):
            run = new_run(tmp_path)
            begin(run)
            train_epochs(run, SCORES)

    run = new_run(tmp_path)
    begin(run)
    if run.epochs_done() > 0:
        assert_best_is_the_best(run)
    train_epochs(run, OTHER_SCORES)
    assert_best_is_the_best(run)
    run.load_best()
    assert run.model.weight.item() == pytest.approx(run.best["mean_iou"])


# Checkpoints that do not go together

def finished_run(out) -> Run:
    """Of four epochs, of which the third is the best."""
    run = new_run(out)
    begin(run)
    train_epochs(run, SCORES[:4])
    return run


def test_a_run_without_numbers_in_its_checkpoints_goes_on(tmp_path):
    finished_run(tmp_path)
    for name in ("best.pt", "last.pt"):
        state = checkpoints.load(tmp_path / name)
        if name == "last.pt":
            del state["best"]["epoch"]
        else:
            del state["epoch"]
        checkpoints.save(tmp_path / name, state)

    run = new_run(tmp_path)
    begin(run)
    assert run.best_epoch() == 3
    train_epochs(run, SCORES)
    assert_best_is_the_best(run)


def test_of_epochs_with_equal_scores_the_last_is_the_best(tmp_path):
    run = new_run(tmp_path)
    begin(run)
    train_epochs(run, [0.25, 0.75, 0.75, 0.5])
    assert run.best_epoch() == 3


def test_the_last_epoch_is_the_best_where_the_validation_masks_lack_a_class(tmp_path):
    run = new_run(tmp_path)
    run.config = {**CONFIG, "not_in_val": ["a"]}
    begin(run)
    train_epochs(run, [1.0, 0.75, 0.5])
    assert checkpoints.load(tmp_path / "best.pt")["epoch"] == 3
    run.load_best()
    assert run.model.weight.item() == 0.5


def test_a_best_epoch_that_is_lost_is_named(tmp_path):
    finished_run(tmp_path)
    state = checkpoints.load(tmp_path / "best.pt")
    state["epoch"] = 1
    checkpoints.save(tmp_path / "best.pt", state)
    with pytest.raises(CheckpointError, match="best.pt: holds epoch 1, but the best of the run was epoch 3"):
        begin(new_run(tmp_path))


def test_a_best_epoch_that_is_missing_is_named(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "best.pt").unlink()
    with pytest.raises(CheckpointError, match="best.pt: is missing, but the best of the run was epoch 3; put back"):
        new_run(tmp_path).begin(checkpoints.load(tmp_path / "last.pt"))


def test_a_checkpoint_that_was_copied_in_part_is_damaged(tmp_path):
    checkpoints.save(tmp_path / "whole.pt", {"config": {}, "model": {"weight": torch.zeros(10_000)}})
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in (0, 100, 5000, 20_000, len(whole) - 1):
        (tmp_path / "part.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="part.pt: cannot be loaded, it is damaged"):
            checkpoints.load(tmp_path / "part.pt")
