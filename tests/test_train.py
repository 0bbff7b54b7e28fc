import csv
import json

import pytest
import torch

import train
from support import checkpoints, options
from support.datasets import build_datasets
from support.model import load_model
from unet import UNet

CPU = torch.device("cpu")
SMALL = "--width 2 --depth 2 --comm-channels 4 --train-images 8 --epochs 2 --batch-size 4".split()


# Runs

def run(*arguments) -> dict:
    train.main([*SMALL, *map(str, arguments)])
    return json.loads((arguments[arguments.index("--out") + 1] / "metrics.json").read_text())


def test_a_run_leaves_its_files_and_they_say_the_same(tmp_path, capsys):
    out = tmp_path / "run"
    metrics = run("--gpus", 4, "--out", out)
    assert sorted(path.name for path in out.iterdir()) == [
        "best.pt", "curves.png", "last.pt", "log.csv", "metrics.json", "predictions.png"]
    assert set(metrics) == {"config", "parameters", "seconds", "seconds_per_step", "peak_mib", "val", "test",
                            "loss_of_training_images"}
    assert metrics["config"]["image_size"] == [64, 64] and metrics["config"]["grid"] == [2, 2]
    assert set(metrics["test"]["iou"]) == {"background", "line", "circle"}
    assert metrics["seconds"] > 0 and metrics["seconds_per_step"] > 0 and all(metrics["peak_mib"].values())
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert max(float(row["val_mean_iou"]) for row in rows) == metrics["val"]["mean_iou"]
    said = capsys.readouterr().out
    assert "2x2 tiles on" in said and "test IoU" in said and f"{metrics['test']['iou']['circle']:.4f}" in said

    model, config = load_model(out / "best.pt")
    data = torch.utils.data.DataLoader(build_datasets(config)["test"], 4)
    again = train.evaluate(model, data, config, [CPU])
    assert again == metrics["test"]
    assert metrics["parameters"] == sum(weight.numel() for weight in load_model(out / "last.pt")[0].parameters())


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    one, two, other = (run("--out", tmp_path / name, "--seed", seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert one["val"] == two["val"] and one["test"] == two["test"]
    assert one["test"] != other["test"]


def test_the_plain_unet_is_a_flag_away(tmp_path):
    run("--grid", "1x1", "--comm-channels", 0, "--out", tmp_path / "plain")
    UNet(1, 3, 2, 2).load_state_dict(load_model(tmp_path / "plain/best.pt")[0].state_dict())


def line_iou(out, *options) -> float:
    small = "--grid 1x2 --image-size 32x64 --depth 2 --width 8 --comm-channels 16 --train-images 320 --epochs 3 --batch-size 8"
    train.main([*small.split(), "--out", str(out), *options])
    return json.loads((out / "metrics.json").read_text())["test"]["iou"]["line"]


def test_tiles_that_communicate_learn_the_line_and_tiles_that_do_not_can_only_guess(tmp_path, no_pictures):
    assert line_iou(tmp_path / "with") > 0.4
    assert line_iou(tmp_path / "without", "--comm-channels", "0") < 0.2


# Bad input

@pytest.mark.parametrize("arguments, message", [
    ("--gpus 0", "--gpus: '0' is not a number of 1 to 1048576"),
    ("--gpus many", "--gpus: 'many'"),
    ("--gpus 5 --grid 2x2", "--gpus 5, but --grid 2x2 has only 4 tiles"),
    ("--grid 0x2", "--grid: '0x2' is not two numbers of 1 to 1048576, as in 2x3"),
    ("--grid 2", "--grid: '2'"),
    ("--grid 100000x100000", "take at most 1048576 tiles"),
    ("--image-size 99999999", "'99999999x99999999' is not two numbers of 1 to 1048576"),
    ("--batch-size 10000000000000000000000", "is not a number of 1 to 1048576"),
    ("--train-images 99999999999999999999", "is not a number of 1 to 2147483648"),
    ("--data here", "--data here: say also what is in it"),
    ("--dataset folder", "say also where it is, --data DIR"),
    ("--dataset folder --data . --out ./test", "is inside --data"),
    ("--resume nowhere", "--resume nowhere: holds no last.pt"),
    (f"--resume {300 * 'x'}", "File name too long"),
    ("--out README.md/run", "is a file or closed to you"),
    ("--grid 2x2x2", "--grid: '2x2x2'"),
    ("--grid 9x1", "9 rows of tiles: an image of 64x64 pixels in cells of 8x8 can have 1 to 8"),
    ("--comm-channels 65", "--comm-channels 65, but the coarse map of --width 8 and --depth 3 has only 64 channels"),
    ("--overlap 5", "an overlap of 5 pixels: it must be a multiple of the cell, 8"),
    ("--image-size 16", "--image-size 16x16: synthetic images must hold two tiles of 32x32"),
    ("--train-images 17 --grid 8x8", "a tile is a single cell, and a process has a batch of a single image"),
    ("--seed 18446744073709551616", "--seed: '18446744073709551616' is not a number of 0 to 9223372036854775807"),
    ("--depth 20000", "--depth: '20000' is not a number of 1 to 12"),
    ("--width 100000000", "--width: '100000000'"),
    ("--lr nan", "--lr: 'nan'"),
    ("--dropout 1", "--dropout 1.0: take less than 1"),
    ("--dataset cats", "--dataset: invalid choice: 'cats'"),
    ("--epochs", "--epochs: expected one argument")])
def test_bad_input_ends_with_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_a_folder_that_holds_something_is_not_written_to(tmp_path, capsys):
    (tmp_path / "best.pt").write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        train.main(["--out", str(tmp_path)])
    assert "this folder is not empty" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "best.pt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), checkpoints.atomic_write(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"


@pytest.mark.parametrize("gpus, grid", [(0, (2, 2)), (1, (2, 2)), (4, (2, 2)), (5, (2, 5)), (6, (3, 4)), (8, (4, 4)), (16, (4, 4))])
def test_default_grids(gpus, grid):
    assert options.default_grid(gpus) == grid
    assert grid[0] * grid[1] % max(gpus, 1) == 0
