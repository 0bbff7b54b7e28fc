import contextlib
import csv
import io
import json

import pytest
import torch

import train
from support import checkpoints, options
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
        "config", "parameters", "seconds", "seconds_per_step", "train_seconds", "seconds_waited", "peak_mib", "val",
        "test", "loss_of_training_images"}
    assert metrics["config"]["image_size"] == [64, 64]
    assert metrics["config"]["grid"] == [2, 2]
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


def test_a_run_prints_its_tiles_and_its_scores(finished):
    assert "2x2 tiles on" in finished.printed
    assert "test IoU" in finished.printed
    iou = finished.metrics["test"]["iou"]["circle"]
    assert f"{iou:.4f}" in finished.printed


def test_the_best_checkpoint_has_the_scores_of_the_metrics(finished):
    model, config = load_model(finished.out / "best.pt")
    loader = torch.utils.data.DataLoader(build_datasets(config)["test"], batch_size=4)
    scores = train.evaluate(model, loader, config, [CPU])
    assert scores == finished.metrics["test"]


def test_the_metrics_count_the_parameters(finished):
    model, _ = load_model(finished.out / "last.pt")
    count = sum(weight.numel() for weight in model.parameters())
    assert count == finished.metrics["parameters"]


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


LINES = ("--grid 1x2 --image-size 32x64 --depth 2 --width 8 --comm-channels 16 --train-images 320 --epochs 3 "
         "--batch-size 8").split()


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
    ("--gpus 0", "--gpus: '0' is not a whole number from 1 to 1048576"),
    ("--gpus many", "--gpus: 'many'"),
    ("--epochs 2.5", "--epochs: '2.5' is not a whole number of at least 0"),
    ("--dropout x", "--dropout: 'x' is not a number of at least 0"),
    ("--class-weights many", "--class-weights: 'many' is not a number of at least 0, nor the word balanced"),
    ("--gpus 5 --grid 2x2", "--gpus 5, but --grid 2x2 has only 4 tiles"),
    ("--grid 0x2", "--grid: '0x2' is not two whole numbers from 1 to 1048576, as in 2x3"),
    ("--grid 2", "--grid: '2'"),
    ("--grid 100000x100000", "take at most 1048576 tiles"),
    ("--image-size 99999999", "'99999999x99999999' is not two whole numbers from 1 to 1048576"),
    ("--batch-size 10000000000000000000000", "is not a whole number from 1 to 1048576"),
    ("--train-images 99999999999999999999", "is not a whole number from 1 to 2147483648"),
    ("--data here", "--data here: say also what is in it"),
    ("--dataset folder", "say also where it is, --data DIR"),
    ("--dataset folder --data . --out ./test", "is inside --data"),
    ("--resume nowhere", "nowhere: this folder holds no last.pt"),
    ("--resume " + 300 * "x", "File name too long"),
    ("--out README.md/run", "is a file, or you may not write there"),
    ("--grid 2x2x2", "--grid: '2x2x2'"),
    ("--grid 9x1", "9 rows of tiles: an image of 64x64 pixels in cells of 8x8 can have 1 to 8"),
    ("--comm-channels 65", "--comm-channels 65, but the coarse map of --width 8 and --depth 3 has only 64 channels"),
    ("--overlap 5", "an overlap of 5 pixels: it must be a multiple of the cell, 8"),
    ("--image-size 16", "--image-size 16x16: synthetic images must hold two tiles of 32x32"),
    ("--train-images 17 --grid 8x8", "a tile is a single cell, and a process has a batch of a single image"),
    ("--seed 18446744073709551616",
     "--seed: '18446744073709551616' is not a whole number from 0 to 9223372036854775807"),
    ("--depth 20000", "--depth: '20000' is not a whole number from 1 to 12"),
    ("--width 100000000", "--width: '100000000'"),
    ("--lr nan", "--lr: 'nan'"),
    ("--dropout 1", "--dropout 1.0: take less than 1"),
    ("--dataset cats", "--dataset: invalid choice: 'cats'"),
    ("--epochs", "--epochs: expected one argument"),
])
def test_bad_input_ends_with_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err


def test_a_folder_that_holds_something_is_not_written_to(tmp_path, capsys):
    (tmp_path / "best.pt").write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        train.main(["--out", str(tmp_path)])
    assert "this folder is not empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "best.pt"]
    assert (tmp_path / "best.pt").read_text() == "precious"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "best.pt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), checkpoints.atomic_write(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"


@pytest.mark.parametrize("gpus, grid", [
    (0, (2, 2)),
    (1, (2, 2)),
    (4, (2, 2)),
    (5, (2, 5)),
    (6, (3, 4)),
    (8, (4, 4)),
    (16, (4, 4)),
])
def test_default_grids(gpus, grid):
    assert options.default_grid(gpus) == grid


@pytest.mark.parametrize("gpus", [1, 4, 5, 6, 8, 16])
def test_a_default_grid_has_as_many_tiles_for_every_gpu(gpus):
    rows, columns = options.default_grid(gpus)
    assert rows * columns % gpus == 0
