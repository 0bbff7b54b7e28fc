"""Every experiment runs, in its smoke version, and the numbers that its table rests on are right."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import plan
import train
from comm_net import CommNet
from experiments import (animation, benchmark, comm_channels, deepglobe, distributed, generalise, lakes, memory, norm,
                         pixel, qualitative, reach, simulation)
from support import checkpoints, processes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the experiments run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Smoke runs

@pytest.mark.parametrize("script, written, told", [
    (comm_channels, "comm_channels", "| 2 | 8 | "),
    (deepglobe, "deepglobe", "| 0.6680 |"),
    (generalise, "generalise", "| with communication | 256x256 | 8x8 |"),
    (lakes, "lakes", "| with communication |"),
    (memory, "memory", "| 128x128 |"),
    (norm, "norm", "| areas | 2 |"),
    (qualitative, "qualitative", "| same network, no exchange |"),
    (reach, "reach_1x8", "| plain U-Net, depth 5 | - |"),
])
def test_a_quick_run_writes_its_table_and_trains_nothing_twice(script, written, told, folder, monkeypatch, no_pictures):
    script.main(["--quick"])
    name = script.__name__.split(".")[1]
    table = folder / f"runs/{name}-quick/{written}.md"
    text = table.read_text()
    assert told in text
    monkeypatch.setattr(train, "main", None)  # another training would fail
    script.main(["--quick"])
    assert table.read_text() == text


def test_two_processes_are_compared_with_one(folder, monkeypatch):
    """tests/test_sharing.py starts real processes."""
    def train_in_no_time(command, check, env):
        out = Path(command[-1])
        out.mkdir()
        seconds = 0.6 / int(command[command.index("--nproc-per-node") + 1])
        checkpoints.write_json(out / "metrics.json", {"seconds_per_step": seconds})

    monkeypatch.setattr(subprocess, "run", train_in_no_time)
    distributed.main(["--quick"])
    *_, last = (folder / "runs/distributed-quick/distributed.md").read_text().splitlines()
    assert last.startswith("| images | 0.600 ") and "| 2.000 " in last


@pytest.mark.parametrize("script, name", [(animation, "animation.gif"), (pixel, "pixel.png")])
def test_a_quick_run_draws_its_picture(script, name, folder, monkeypatch, no_pictures):
    monkeypatch.setattr(animation, "MOVE", (1.0,))  # fewer frames
    script.main(["--quick"])
    (picture,) = folder.rglob(name)
    assert 10_000 < picture.stat().st_size < 300_000


# What the tables and pictures rest on

def test_the_network_without_exchange_has_the_same_parameters_and_no_exchange():
    net = CommNet(3, dropout=0.0).eval()
    alone = qualitative.Alone(3, dropout=0.0).eval()
    alone.load_state_dict(net.state_dict())
    before, after = torch.rand(2, 1, 3, 8, 8)
    after[..., 4:, 4:] = before[..., 4:, 4:]  # the last tile is the same
    assert not torch.equal(net(before)[..., 4:, 4:], net(after)[..., 4:, 4:])
    assert torch.equal(alone(before)[..., 4:, 4:], alone(after)[..., 4:, 4:])


def test_a_step_on_paper_is_made_of_counted_operations(folder):
    of_tile, of_comm_net = simulation.count_operations()
    in_one_layer = 2 * 64 * 64 * 25 * 64 * 64  # 5x5 convolutions of 64 channels on 64x64 cells
    assert of_comm_net == 3 * 3 * in_one_layer  # three layers; forwards, and backwards to inputs and to weights
    config = simulation.configure(side=2048, gpus=1)
    with FlopCounterMode(display=False) as counted:
        plan.fake_step(config)
    assert counted.get_total_flops() == 4 * (of_tile + of_comm_net)


# The benchmark

def test_the_benchmark_ends_with_a_line_of_json(folder, capsys):
    benchmark.main(["--quick"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    peaks = {row["model"]: row["peak_mib"] for row in rows}
    assert list(peaks) == list(benchmark.CONTESTANTS)
    assert peaks["recompute"] < peaks["decomposed"]
    assert peaks["decomposed"] == pytest.approx(peaks["plain U-Net"], rel=0.2)
    for row in rows:
        assert row["predicted_mib"] == pytest.approx(row["peak_mib"], rel=0.05, abs=0.1)
    assert (folder / "runs/benchmark-quick/benchmark.png").exists()


def test_a_contestant_that_does_not_fit_is_out_of_memory(folder, monkeypatch, capsys):
    def half_a_mib():
        return 0.5 / 2**10

    monkeypatch.setattr(processes, "memory_gib", half_a_mib)
    benchmark.main(["--quick", "--only", "bf16"])
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith("64x64  decomposed, bf16 ") and told[1].endswith("out of memory")
    assert told[3].startswith("64x64  recompute, bf16 ") and told[3].endswith("predicted      0.3 MiB")


# The folders

def test_a_pixel_of_the_earth_has_the_class_of_its_cells_or_does_not_count():
    cells = np.zeros((6, 24), np.uint8)
    cells[:, 12:] = 1
    mask = lakes.classes_of_pixels(cells, (2, 8))  # three by three cells for each pixel
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
    cells[1, 3] = 2
    mask = lakes.classes_of_pixels(cells, (2, 8))
    assert mask.tolist() == [[0, 255, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_the_earth_is_cut_into_images_by_bands_of_longitude(tmp_path):
    picture = np.arange(2 * 14 * 3, dtype=np.uint8).reshape(2, 14, 3)
    mask = np.ones((2, 14), np.uint8)
    mask[:, 6:8] = 0  # without land: is left out
    lakes.save_images(tmp_path, picture, mask, side=2)
    found = sorted(path.parts[-3] + path.stem for path in tmp_path.rglob("images/*"))
    assert found == ["test0-05", "train0-00", "train0-01", "train0-02", "train0-06", "val0-04"]
    assert np.array_equal(np.array(Image.open(tmp_path / "test/images/0-05.png")), picture[:, 10:12])


def test_deepglobe_becomes_a_folder_of_indices_in_the_split_of_the_literature(folder):
    lines = (deepglobe.HERE / "deepglobe_split.txt").read_text().splitlines()
    split_of = dict(line.split() for line in lines)
    assert Counter(split_of.values()) == {"train": 454, "val": 207, "test": 142}
    name, split = lines[-1].split()
    rng = np.random.default_rng(0)
    indices = rng.integers(7, size=(24, 32))  # 6 stands for unknown
    colors = 255 * np.array([*deepglobe.CLASSES.values(), (0, 0, 0)])
    impure = colors[indices] + rng.integers(-100, 101, (24, 32, 3))
    (folder / "DIR/train").mkdir(parents=True)
    Image.fromarray(impure.clip(0, 255).astype(np.uint8)).save(folder / f"DIR/train/{name}_mask.png")
    Image.new("RGB", (32, 24)).save(folder / f"DIR/train/{name}_sat.jpg")
    deepglobe.main(["--convert", "DIR", "OUT"])
    assert (folder / "OUT/classes.txt").read_text().split() == list(deepglobe.CLASSES)
    found = np.array(Image.open(folder / f"OUT/{split}/masks/{name}.png"))
    assert np.array_equal(found, np.where(indices == 6, 255, indices))
    assert (folder / f"OUT/{split}/images/{name}.jpg").exists()


def test_a_folder_of_deepglobe_appears_as_a_whole_or_not_at_all(folder, capsys):
    grey = Image.new("L", (8, 8))
    (folder / "DIR/train").mkdir(parents=True)
    for name in ("1_sat.jpg", "1_mask.png"):
        grey.save(folder / "DIR/train" / name)
    with pytest.raises(SystemExit, match="2"):
        deepglobe.main(["--convert", "DIR", "OUT"])
    assert "1_mask.png: no mask in DeepGlobe's colours" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["DIR"]
