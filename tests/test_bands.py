"""One or two large images: train, val and test are rows of the same images, and none sees those of another."""

import json

import numpy as np
import pytest
import torch
from test_image_folder import HUGE, assert_refused, random_image, random_mask, save

import train
from support import plots
from support.datasets import epoch_line
from support.image_files import DataError
from support.image_folder import open_folder
from support.loaders import make_loaders
from support.survey import survey


def save_numbered_rows(root, name, height, width=20, split="train"):
    """A pair of which every row of the image holds its own number, and of the mask the number modulo 3."""
    rows = np.repeat(np.arange(height, dtype=np.uint16)[:, None], width, axis=1)
    save(root / split / f"images/{name}.npy", rows)
    save(root / split / f"masks/{name}.npy", (rows % 3).astype(np.uint8))


def rows_of(dataset, item=0) -> list[int]:
    """The numbers of the rows in an item of a data set of such pairs."""
    image, mask = dataset[item]
    assert torch.equal(image[0].int() % 3, mask.int())
    return sorted(set(image.int().flatten().tolist()))


def open_rows(root, **options):
    return open_folder(root, deepglobe=False, seed=0, **options)


# Which rows are whose

@pytest.mark.parametrize("height, cell, train_rows, val_rows", [
    (200, 8, 168, 16),  # two cells are a little less than a tenth
    (100, 8, 68, 16),  # two cells are more than a tenth
    (1000, 8, 808, 96),  # a tenth, in whole cells
    (1000, 1, 800, 100),
])
def test_the_rows_of_one_image_are_shared_out_without_overlap(height, cell, train_rows, val_rows, tmp_path):
    save_numbered_rows(tmp_path, "scan", height)
    datasets = open_rows(tmp_path, cell=cell)
    assert rows_of(datasets["train"]) == list(range(train_rows))
    assert rows_of(datasets["val"]) == list(range(train_rows, train_rows + val_rows))
    assert rows_of(datasets["test"]) == list(range(train_rows + val_rows, height))


def test_the_rows_of_each_split_are_told(tmp_path, capsys):
    save_numbered_rows(tmp_path, "scan", 200)
    open_rows(tmp_path)
    path = tmp_path / "train/images/scan.npy"
    assert f"{path}: rows 0 to 167 are for train, 168 to 183 for val, 184 to 199 for test" in capsys.readouterr().out


def test_two_images_are_both_cut_each_by_its_own_height(tmp_path):
    save_numbered_rows(tmp_path, "a", 200)
    save_numbered_rows(tmp_path, "b", 100)
    datasets = open_rows(tmp_path)
    assert rows_of(datasets["test"], 0) == list(range(184, 200))
    assert rows_of(datasets["test"], 1) == list(range(84, 100))
    assert rows_of(datasets["train"], 1) == list(range(68))


def test_a_split_that_has_images_of_its_own_is_not_cut_out(tmp_path):
    save_numbered_rows(tmp_path, "scan", 200)
    save_numbered_rows(tmp_path, "other", 50, split="val")
    datasets = open_rows(tmp_path)
    assert rows_of(datasets["train"]) == list(range(184))
    assert rows_of(datasets["val"]) == list(range(50))
    assert rows_of(datasets["test"]) == list(range(184, 200))


def test_three_images_are_not_cut(tmp_path):
    for name in "abc":
        save_numbered_rows(tmp_path, name, 50)
    datasets = open_rows(tmp_path)
    for split in ("train", "val", "test"):
        assert len(datasets[split]) == 1
        assert rows_of(datasets[split]) == list(range(50))


def test_windows_for_training_come_from_all_training_rows_and_from_no_others(tmp_path):
    save_numbered_rows(tmp_path, "a", 200)
    save_numbered_rows(tmp_path, "b", 100)
    dataset = open_rows(tmp_path, crop=(16, 10), augment=True)["train"]
    seen = set()
    for dataset.epoch in range(20):
        for item in range(len(dataset)):
            image, _ = dataset[item]
            assert image.shape[1:] == (16, 10)
            rows = rows_of(dataset, item)
            assert rows == list(range(rows[0], rows[0] + 16))
            seen.update(rows)
            if dataset.items[item] == 1:
                assert rows[-1] < 68
    assert seen == set(range(168))


def test_an_epoch_has_as_many_windows_as_cover_the_training_rows(tmp_path):
    save_numbered_rows(tmp_path, "a", 200)
    save_numbered_rows(tmp_path, "b", 100)
    dataset = open_rows(tmp_path, crop=(16, 10))["train"]
    windows_of_a = 21  # 168 * 20 / (16 * 10)
    windows_of_b = 9  # 68 * 20 / (16 * 10) is 8.5
    assert list(dataset.items) == windows_of_a * [0] + windows_of_b * [1]
    assert epoch_line(dataset).startswith("an epoch learns from 30 windows of 16x10")
    config = {"dataset": "folder", "batch_size": 4, "crop": (16, 10), "workers": 0}
    loaders = make_loaders({"train": dataset, "val": dataset, "test": dataset}, config, torch.Generator())
    assert len(loaders["train"]) == 8


# What the network knows of them

def test_the_statistics_and_the_size_are_those_of_the_training_rows(tmp_path):
    image = random_image((200, 20), channels=1)
    image[168:] = 255
    save(tmp_path / "train/images/scan.npy", image)
    save(tmp_path / "train/masks/scan.npy", random_mask((200, 20)))
    known, sizes = survey(open_rows(tmp_path), None)
    pixels = image[:168] / 255
    np.testing.assert_allclose(known["mean"], [pixels.mean()])
    np.testing.assert_allclose(known["std"], [pixels.std()])
    assert list(sizes["train"]) == [(168, 20)]


def test_a_class_that_is_missing_in_a_band_is_told(tmp_path, capsys):
    mask = random_mask((200, 20))
    mask[168:184] = 0
    save(tmp_path / "train/images/scan.npy", random_image((200, 20)))
    save(tmp_path / "train/masks/scan.npy", mask)
    survey(open_rows(tmp_path), ["ground", "water", "house"])
    said = capsys.readouterr().out
    assert "no mask for val holds water or house" in said
    assert "for test is" not in said


@pytest.mark.parametrize("rows_of_mask", [190, 220])
def test_a_mask_of_another_height_is_named(rows_of_mask, tmp_path):
    save(tmp_path / "train/images/scan.npy", random_image((200, 20)))
    save(tmp_path / "train/masks/scan.npy", random_mask((rows_of_mask, 20)))
    with pytest.raises(DataError, match=f"scan.npy: 200x20 pixels, but its mask scan.npy has {rows_of_mask}x20"):
        open_rows(tmp_path)


def test_a_crop_that_is_higher_than_the_training_rows_is_named(tmp_path, capsys):
    save_numbered_rows(tmp_path / "data", "scan", 100, width=80)
    assert_refused(tmp_path / "data", "68x80 pixels are fewer than --crop 80x80", capsys, "--crop", "80")


def test_a_mapped_image_is_cut_without_being_read(tmp_path):
    """Both files claim 16 GiB and have holes: whoever reads one fails or takes minutes."""
    (tmp_path / "train/images").mkdir(parents=True)
    (tmp_path / "train/masks").mkdir()
    image = np.lib.format.open_memmap(tmp_path / "train/images/scan.npy", "w+", np.uint8, (HUGE, HUGE))
    image[-1, -1] = 7
    image.flush()
    np.lib.format.open_memmap(tmp_path / "train/masks/scan.npy", "w+", np.uint8, (HUGE, HUGE))
    datasets = open_rows(tmp_path, crop=(2**10, 2**11), augment=True)
    image, _ = datasets["test"][0]
    assert image.shape == (1, 13104, HUGE)  # a tenth in whole cells
    assert image[0, -1, -1] == 7
    image, mask = datasets["train"][5]
    assert image.shape == (1, 2**10, 2**11)
    assert mask.shape == (2**10, 2**11)


# A whole run

@pytest.fixture
def drawn(monkeypatch):
    """The pictures that a run would draw."""
    columns = {}

    def keep(path, pictures, *what):
        columns.update(pictures)
        path.touch()

    def draw_nothing(path, *what):
        path.touch()

    monkeypatch.setattr(plots, "draw_curves", draw_nothing)
    monkeypatch.setattr(plots, "draw_predictions", keep)
    return columns


def make_scan(root, size=(160, 96)):
    """A single pair: bright squares of class 1 on a dark ground. Returns image and mask."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 2, (size[0] // 16, size[1] // 16), np.uint8)
    mask = np.kron(squares, np.ones((16, 16), np.uint8))
    image = np.where(mask == 1, 200, 50) + rng.integers(0, 40, size)
    save(root / "train/images/scan.npy", image.astype(np.uint8))
    save(root / "train/masks/scan.npy", mask)
    return image, mask


@pytest.mark.parametrize("options, expected", [
    ("--crop 32 --batch-size 4 --epochs 6 --workers 0", 0.9),
    ("--batch-size 1 --epochs 2", 0),  # these are but two steps
])
def test_a_single_image_trains_and_ends_with_scores(options, expected, tmp_path, drawn, capsys):
    _, mask = make_scan(tmp_path / "data")
    small = "--width 4 --depth 2 --comm-channels 4 --grid 2x2 --dataset folder --data".split()
    train.main([*small, str(tmp_path / "data"), *options.split(), "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["test"]["mean_iou"] > expected
    assert "1 for train, 1 for val, 1 for test" in capsys.readouterr().out
    (true_mask,) = drawn["true mask"]
    assert np.array_equal(true_mask, mask[-16:])
