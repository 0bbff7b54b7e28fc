import csv
import json
import subprocess
import sys

import pytest
import torch
from conftest import CONFIG, CPU, ROOT, random_batch

import train
from decompose import Tiling
from support import options
from support.datasets import build_datasets
from support.loss import loss_from_sums, loss_sums
from support.model import build_from_config, load_model
from unet import UNet

SMALL = "--width 2 --depth 2 --comm-channels 4 --train-images 8 --epochs 2 --batch-size 8".split()


def run(out, *options) -> dict:
    """Trains a small network. Returns what metrics.json holds."""
    train.main([*SMALL, *options, "--out", str(out)])
    return json.loads((out / "metrics.json").read_text())


def test_a_run_leaves_its_files_and_the_scores_of_its_best_epoch(tmp_path):
    out = tmp_path / "run"
    metrics = run(out, "--gpus", "4")
    names = {path.name for path in out.iterdir()}
    assert names == {"best.pt", "curves.png", "last.pt", "log.csv", "metrics.json", "predictions.png"}
    assert set(metrics) == {"config", "parameters", "seconds", "seconds_per_step", "peak_mib", "val", "test"}

    with open(out / "log.csv") as file:
        first, second = csv.DictReader(file)
    best = max(float(first["val_mean_iou"]), float(second["val_mean_iou"]))
    assert best == metrics["val"]["mean_iou"]

    model, config = load_model(out / "best.pt")
    loader = torch.utils.data.DataLoader(build_datasets(config)["test"], batch_size=4)
    assert train.evaluate(model, loader, config, [CPU]) == metrics["test"]


# What is learned

def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, no_pictures):
    one = run(tmp_path / "one", "--seed", "1")
    same = run(tmp_path / "same", "--seed", "1")
    other = run(tmp_path / "other", "--seed", "2")
    assert one["test"] == same["test"]
    assert one["test"] != other["test"]


def test_with_one_tile_and_without_communication_it_is_the_plain_unet_and_filled_pixels_do_not_count():
    """An image of 30x29 is filled up to 32x32, and then normalised with a mean of 0.5 and a deviation of 2."""
    weights = [0.2, 1.0, 1.8]
    config = {**CONFIG, "comm_channels": 0, "image_size": (30, 29), "grid": (1, 1), "loss_weights": weights}
    model = build_from_config(config)
    model.eval()
    unet = UNet(in_channels=1, classes=3, width=4, depth=2)
    unet.load_state_dict(model.state_dict())
    unet.eval()
    images, masks = random_batch(2, (30, 29))
    filled = torch.nn.functional.pad(images, (0, 3, 0, 2))
    logits = unet((filled - 0.5) / 2)
    sums = loss_sums(logits[..., :30, :29], masks)
    expected = loss_from_sums(sums, weights)
    tiling = Tiling((30, 29), (1, 1), 4)
    loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
    torch.testing.assert_close(loss, expected)
    scores = train.evaluate(model, [(images, masks)], config, [CPU])
    assert scores["loss"] == pytest.approx(expected.item())


LINES = "--grid 1x2 --image-size 32x64 --width 8 --train-images 320 --epochs 5 --no-amp".split()


@pytest.mark.parametrize("channels, at_least, at_most", [("16", 0.4, 1), ("0", 0, 0.2)])
def test_tiles_learn_the_line_if_and_only_if_they_communicate(channels, at_least, at_most, tmp_path, no_pictures):
    """Each tile sees a part of it that does not tell whether it is one, and without communication can only guess."""
    metrics = run(tmp_path / "run", *LINES, "--comm-channels", channels)
    assert at_least <= metrics["test"]["iou"]["line"] <= at_most


@pytest.mark.parametrize("option, images, expected", [
    (None, 64, 0.015),
    (None, 16, 0.015),
    (None, 4, 0.015 / 4),
    (0.1, 4, 0.1),
])
def test_with_fewer_images_in_a_step_the_learning_rate_is_lower_in_proportion_unless_it_is_given(
        option, images, expected):
    assert train.peak_learning_rate({"lr": option, "batch_size": images}) == expected


# Bad input

@pytest.mark.parametrize("arguments, message", [
    ("--gpus 0", "--gpus: 0 is not from 1"),
    ("--dropout 2", "--dropout: 2 is not from 0 to 0.99"),
    ("--gpus many", "--gpus: invalid number value: 'many'"),
    ("--class-weights 1 nan 1", "--class-weights: nan is not from 0"),
    ("--class-weights 1 1", "--class-weights: 2 numbers, but there are 3 classes"),
    ("--class-weights 0 0 0", "give one for each, not all 0, or balanced"),
    ("--depth 30", "--depth: 30 is not from 1 to 12"),
    ("--dataset folder --data here --out here/run", "--out here/run: is inside --data"),
    ("--class-weights balanced", "--crop and --class-weights balanced are for --dataset folder"),
    ("--crop 32", "--crop and --class-weights balanced are for --dataset folder"),
    ("--grid 2x0", "--grid: 0 is not from 1"),
    ("--grid 2x3x4", "--grid: invalid pair value: '2x3x4'"),
    ("--data here", "--dataset folder and --data DIR go together; give both, or none of them"),
    ("--dataset folder", "--dataset folder and --data DIR go together"),
    ("--resume nowhere", "No such file or directory: 'nowhere/last.pt'"),
    ("--resume here --workers 1 --epochs=4", "beside it can only stand --data, --gpus, --workers, --image-processes"),
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

class Clock:
    """time.perf_counter, of which a test says what it shows."""

    seconds = 0

    def __call__(self) -> float:
        return self.seconds


class UnreadLoss:
    def __format__(self, kind):
        raise AssertionError("to read it would wait for the GPU")


@pytest.mark.parametrize("terminal, pause, shown", [
    (False, 29, "step 120 of 300, loss 0.5000, 0:06:00 left\nstep 200 of 300, 0:01:40 left\n"),
    (True, 0.1, "\r\033[Kstep 120 of 300, loss 0.5000, 0:06:00 left\r\033[Kstep 200 of 300, 0:01:40 left"),
])
def test_progress_is_a_line_every_half_a_minute_in_a_file_and_stays_in_its_line_on_a_terminal(
        terminal, pause, shown, monkeypatch, capsys):
    def isatty():
        return terminal

    clock = Clock()
    monkeypatch.setattr(options.time, "perf_counter", clock)
    monkeypatch.setattr(sys.stdout, "isatty", isatty, raising=False)
    progress = options.Progress("step", total=300, done=100)
    clock.seconds = pause
    progress.show(110, UnreadLoss())
    clock.seconds = 40
    progress.show(120, torch.tensor(0.5))
    clock.seconds = 40 + pause
    progress.show(121, UnreadLoss())
    clock.seconds = 100
    progress.show(200)
    assert capsys.readouterr().out == shown


def test_all_commands_load_where_python_has_no_fcntl_and_no_resource():
    """As on Windows."""
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import train, predict, plan"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
