"""Every experiment runs, in its smoke version, and the numbers that its table rests on are right."""

import json
from collections import Counter

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
from support.images import read_image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the experiments run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Smoke runs

@pytest.mark.parametrize("script, written, told", [
    (comm_channels, "comm_channels.md", "| 2 | 8 | "),
    (deepglobe, "deepglobe.md", "| 0.6680 |"),
    (generalise, "generalise.md", "| with communication | 256x256 | 8x8 |"),
    (lakes, "lakes.md", "| with communication |"),
    (memory, "memory.md", "| 128x128 |"),
    (norm, "norm.md", "| areas | 2 |"),
    (qualitative, "qualitative.md", "| same network, no exchange |"),
    (reach, "reach_1x8.md", "| plain U-Net, depth 5 | - |"),
])
def test_a_quick_run_writes_its_table_and_trains_nothing_twice(script, written, told, folder, monkeypatch, no_pictures):
    script.main(["--quick"])
    (table,) = folder.rglob(written)
    text = table.read_text()
    assert told in text
    monkeypatch.setattr(train, "main", None)  # another training would fail
    script.main(["--quick"])
    assert table.read_text() == text


def test_two_processes_are_compared_with_one(folder, monkeypatch):
    """tests/test_sharing.py starts real processes."""
    def seconds_per_step(processes, options, out):
        return 0.6 / processes

    monkeypatch.setattr(distributed, "seconds_per_step", seconds_per_step)
    distributed.main(["--quick"])
    table = (folder / "runs/distributed-quick/distributed.md").read_text()
    assert "| images | 0.600 (0.600 to 0.600) | 0.300 (0.300 to 0.300) | 2.000 (2.000 to 2.000) |" in table


@pytest.mark.parametrize("script, name", [
    (animation, "animation.gif"),
    (pixel, "pixel.png"),
])
def test_a_quick_run_draws_its_picture(script, name, folder, monkeypatch, no_pictures):
    monkeypatch.setattr(animation, "MOVE", (1.0,))  # fewer frames
    script.main(["--quick"])
    (picture,) = folder.rglob(name)
    assert 10_000 < picture.stat().st_size < 300_000


# What the tables and pictures rest on

def test_the_network_without_exchange_is_the_network_of_a_tile_alone():
    net = CommNet(3).eval()
    alone = qualitative.Alone(3).eval()
    alone.load_state_dict(net.state_dict())
    maps = torch.rand(1, 3, 8, 8)
    last = alone(maps)[..., 4:, 4:]
    torch.testing.assert_close(last, net(maps[..., 4:, 4:]))


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
    *_, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    peaks = {row["model"]: row["peak_mib"] for row in rows}
    assert list(peaks) == list(benchmark.CONTESTANTS)
    assert peaks["recompute"] < peaks["decomposed"]
    assert peaks["decomposed"] == pytest.approx(peaks["plain U-Net"], rel=0.2)
    for row in rows:
        assert row["predicted_mib"] == pytest.approx(row["peak_mib"], rel=0.05, abs=0.1)
    assert (folder / "runs/benchmark-quick/benchmark.png").exists()


# The folders

def test_a_pixel_of_the_earth_has_the_class_of_its_cells_or_does_not_count():
    cells = np.zeros((3, 12), np.uint8)  # three by three for each pixel
    cells[:, 9:] = 1
    mask = lakes.classes_of_pixels(cells, (1, 4))
    assert mask.tolist() == [[0, 0, 0, 1]]
    cells[1, 4] = 2
    mask = lakes.classes_of_pixels(cells, (1, 4))
    assert mask.tolist() == [[0, 255, 0, 1]]


def test_the_earth_is_cut_into_images_by_bands_of_longitude(tmp_path):
    picture = np.arange(2 * 14 * 3, dtype=np.uint8).reshape(2, 14, 3)
    mask = np.ones((2, 14), np.uint8)
    mask[:, 6:8] = 0  # without land: is left out
    lakes.save_images(tmp_path, picture, mask, side=2)
    assert len(list(tmp_path.rglob("images/*"))) == 6
    assert (tmp_path / "val/images/0-04.png").exists()
    saved = read_image(tmp_path / "test/images/0-05.png")
    assert np.array_equal(saved, picture[:, 10:12])


IMPURE = [  # a colour of each class, and two of unknown pixels
    (0, 128, 255),
    (255, 255, 127),
    (130, 0, 130),
    (9, 130, 9),
    (0, 0, 128),
    (128, 128, 128),
    (0, 9, 127),
    (255, 0, 0),
]


def save_as_deepglobe(folder, name: str, colors: np.ndarray):
    """A pair of DIR, in which DeepGlobe has its images."""
    (folder / "DIR/train").mkdir(parents=True)
    picture = Image.fromarray(colors)
    picture.save(folder / f"DIR/train/{name}_sat.jpg")
    picture.save(folder / f"DIR/train/{name}_mask.png")


def test_deepglobe_becomes_a_folder_of_indices_in_the_split_of_the_literature(folder):
    lines = (deepglobe.HERE / "deepglobe_split.txt").read_text().splitlines()
    splits = Counter()
    for line in lines:
        name, split = line.split()
        splits[split] += 1
    assert splits == {"train": 454, "val": 207, "test": 142}
    save_as_deepglobe(folder, name, np.array([IMPURE], np.uint8))
    deepglobe.main(["--convert", "DIR", "OUT"])
    assert (folder / "OUT/classes.txt").read_text() == "urban\nagriculture\nrangeland\nforest\nwater\nbarren\n"
    mask = np.array(Image.open(folder / f"OUT/{split}/masks/{name}.png"))
    assert mask.tolist() == [[0, 1, 2, 3, 4, 5, 255, 255]]
    assert (folder / f"OUT/{split}/images/{name}.jpg").exists()


def test_a_folder_of_deepglobe_appears_as_a_whole_or_not_at_all(folder, capsys):
    save_as_deepglobe(folder, "1", np.zeros((8, 8), np.uint8))
    with pytest.raises(SystemExit, match="2"):
        deepglobe.main(["--convert", "DIR", "OUT"])
    assert "1_mask.png: no mask in DeepGlobe's colours" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["DIR"]
