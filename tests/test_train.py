import contextlib
import csv
import io
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train
from support import options
from support.datasets import build_datasets
from support.model import load_model
from unet import UNet

CPU = torch.device("cpu")
SMALL = "--width 2 --depth 2 --comm-channels 4 --train-images 8 --epochs 2 --batch-size 8".split()


def run(out, *options) -> dict:
    """Trains a small network. Returns what metrics.json holds."""
    train.main([*SMALL, *options, "--out", str(out)])
    return read_metrics(out)


def read_metrics(out) -> dict:
    return json.loads((out / "metrics.json").read_text())


# The files of a run

class FinishedRun:
    """A run of a small network: its folder, what metrics.json holds, and what was printed."""

    def __init__(self, out):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.metrics = run(out, "--gpus", "4")
        self.out = out
        self.printed = printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return FinishedRun(tmp_path_factory.mktemp("runs") / "run")


def test_a_run_leaves_its_files(finished):
    names = sorted(path.name for path in finished.out.iterdir())
    assert names == ["best.pt", "curves.png", "last.pt", "log.csv", "metrics.json", "predictions.png"]


def test_the_metrics_of_a_run(finished):
    metrics = finished.metrics
    assert set(metrics) == {
        "config", "parameters", "seconds", "seconds_per_step", "peak_mib", "val", "test"}
    assert metrics["config"]["image_size"] == [64, 64]
    assert set(metrics["test"]["iou"]) == {"background", "line", "circle"}
    assert metrics["seconds"] > 0
    assert metrics["seconds_per_step"] > 0
    assert all(metrics["peak_mib"].values())


def test_the_log_has_a_row_for_each_epoch_and_the_metrics_are_those_of_the_best(finished):
    with open(finished.out / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    best = max(float(row["val_mean_iou"]) for row in rows)
    assert best == finished.metrics["val"]["mean_iou"]


def test_the_best_checkpoint_has_the_scores_of_the_metrics(finished):
    model, config = load_model(finished.out / "best.pt")
    loader = torch.utils.data.DataLoader(build_datasets(config)["test"], batch_size=4)
    scores = train.evaluate(model, loader, config, [CPU])
    assert scores == finished.metrics["test"]


# What is learned

def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, no_pictures):
    one = run(tmp_path / "one", "--seed", "1")
    same = run(tmp_path / "same", "--seed", "1")
    other = run(tmp_path / "other", "--seed", "2")
    assert one["val"] == same["val"]
    assert one["test"] == same["test"]
    assert one["test"] != other["test"]


def test_the_plain_unet_is_a_flag_away(tmp_path, no_pictures):
    run(tmp_path / "plain", "--grid", "1x1", "--comm-channels", "0")
    trained, _ = load_model(tmp_path / "plain/best.pt")
    unet = UNet(in_channels=1, classes=3, width=2, depth=2)
    unet.load_state_dict(trained.state_dict())


LINES = ("--grid 1x2 --image-size 32x64 --depth 2 --width 8 --comm-channels 16 --train-images 320 --epochs 5 "
         "--batch-size 8 --no-amp").split()


def line_iou(out, *options) -> float:
    """How well lines are found, of which each tile sees a part that does not tell whether it is one."""
    train.main([*LINES, *options, "--out", str(out)])
    return read_metrics(out)["test"]["iou"]["line"]


def test_tiles_that_communicate_learn_the_line(tmp_path, no_pictures):
    assert line_iou(tmp_path / "with") > 0.4


def test_tiles_that_do_not_communicate_can_only_guess_the_line(tmp_path, no_pictures):
    assert line_iou(tmp_path / "without", "--comm-channels", "0") < 0.2


# Bad input

@pytest.mark.parametrize("arguments, message", [
    ("--gpus 0", "--gpus: 0 is not from 1"),
    ("--dropout 2", "--dropout: 2 is not from 0 to 0.99"),
    ("--gpus many", "--gpus: invalid number value: 'many'"),
    ("--class-weights 1 nan 1", "--class-weights: nan is not from 0"),
    ("--class-weights 1 1", "--class-weights: 2 numbers, but there are 3 classes"),
    ("--class-weights balanced", "--crop and --class-weights balanced are for --dataset folder"),
    ("--crop 32", "--crop and --class-weights balanced are for --dataset folder"),
    ("--grid 2x0", "--grid: 0 is not from 1"),
    ("--grid 2x3x4", "--grid: invalid pair value: '2x3x4'"),
    ("--data here", "--dataset folder and --data DIR go together; give both, or none of them"),
    ("--dataset folder", "--dataset folder and --data DIR go together"),
    ("--resume nowhere", "No such file or directory: 'nowhere/last.pt'"),
    ("--resume here --workers 1 --epochs=4", "beside it can only stand data, gpus, workers, image_processes"),
    ("--init nowhere.pt", "No such file or directory: 'nowhere.pt'"),
    ("--out README.md/run", "Not a directory: 'README.md/run'"),
    ("--grid 9x1", "9x1 tiles: an image of 64x64 pixels in cells of 8x8 can have 1x1 to 8x8"),
    ("--comm-channels 65", "--comm-channels: the coarse map of this --width and --depth has only 64 channels"),
    ("--image-processes 2", "--image-processes 2: it must divide the number of processes, 1"),
])
def test_bad_input_ends_with_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err


@pytest.mark.parametrize("gpus, grid", [(0, (2, 2)), (4, (2, 2)), (6, (2, 3)), (16, (4, 4))])
def test_default_grids(gpus, grid):
    assert options.default_grid(gpus) == grid


def test_help_loads_no_pytorch_and_tells_defaults():
    command = [sys.executable, "-X", "importtime", ROOT / "train.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "argparse" in done.stderr
    assert "torch" not in done.stderr
    assert "images per step (default: 16)" in " ".join(done.stdout.split())


# Progress

class UnreadLoss:
    def __format__(self, kind):
        raise AssertionError("to read it would wait for the GPU")


@pytest.mark.parametrize("terminal, shown", [
    (False, "step 120 of 300, loss 0.5000, 0:06:00 left\nstep 200 of 300, 0:01:40 left\n"),
    (True, "\r\033[Kstep 120 of 300, loss 0.5000, 0:06:00 left\r\033[Kstep 200 of 300, 0:01:40 left"),
])
def test_progress_is_a_line_every_half_a_minute_in_a_file_and_stays_in_its_line_on_a_terminal(
        terminal, shown, monkeypatch, capsys):
    seconds = [0]
    monkeypatch.setattr(options.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    progress = options.Progress("step", total=300, done=100)
    seconds[0] = 0.1 if terminal else 29
    progress.show(110, UnreadLoss())
    seconds[0] = 40
    progress.show(120, torch.tensor(0.5))
    seconds[0] = 40.1 if terminal else 69
    progress.show(121, UnreadLoss())
    seconds[0] = 100
    progress.show(200)
    assert capsys.readouterr().out == shown


def test_all_commands_load_where_python_has_no_fcntl_and_no_resource():
    """As on Windows."""
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import train, predict, plan"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("batch_size, lr, expected", [
    (1, None, 0.015 / 16),
    (16, None, 0.015),
    (64, None, 0.015),
    (4, 0.1, 0.1),
])
def test_with_fewer_images_in_a_step_the_learning_rate_is_lower_in_proportion(batch_size, lr, expected):
    assert train.peak_learning_rate({"batch_size": batch_size, "lr": lr}) == expected
