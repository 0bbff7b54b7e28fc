"""Which batches a loader gives, whoever reads the images."""

import csv
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import conftest
import train
from support import loaders, processes
from support import survey as survey_module
from support.command import one_line_errors
from support.image_files import DataError
from support.image_folder import open_folder
from support.loaders import Loader, make_loaders, number_of_workers, workers_before_training
from support.options import make_parser
from support.run import waiting_line
from support.survey import survey

CONFIG = {"dataset": "folder", "batch_size": 4, "crop": (8, 8), "workers": 0}


@pytest.fixture
def data(tmp_path):
    """A folder of twelve images of noise and their masks."""
    rng = np.random.default_rng(0)
    images = tmp_path / "data/train/images"
    masks = tmp_path / "data/train/masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for i in range(12):
        noise = rng.integers(256, size=(16, 16), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{i}.png")
        Image.fromarray(noise // 128).save(masks / f"{i}.png")
    return tmp_path / "data"


def training_images(data, workers=0, epoch=1) -> list[torch.Tensor]:
    """The images (C,H,W) that a process gets in an epoch, cropped and flipped, in their order."""
    datasets = open_folder(data, deepglobe=False, seed=5, crop=(8, 8), augment=True)
    datasets["train"].epoch = epoch
    order = torch.Generator().manual_seed(5)
    loader = make_loaders(datasets, {**CONFIG, "workers": workers}, order)["train"]
    images = []
    for batch, _ in loader:
        images += batch
    return images


class CtrlC(Dataset):
    """It is sent to the process that reads an item."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # in which Python notices it
        return i


def test_ctrl_c_ends_this_process_and_not_a_worker():
    assert list(Loader(CtrlC(), batch_size=None, num_workers=1)) == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        list(Loader(CtrlC(), batch_size=None, num_workers=0))


@pytest.fixture
def ctrl_c_while_workers_are_started(monkeypatch) -> list:
    """A list to which every loader adds the workers that are there after it."""
    workers = []
    start_workers = loaders.DataLoader.__iter__

    def start(loader):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # in which Python notices it
        batches = start_workers(loader)
        workers.extend(multiprocessing.active_children())
        return batches

    monkeypatch.setattr(loaders.DataLoader, "__iter__", start)
    return workers


def test_ctrl_c_while_workers_are_started_comes_when_all_are_there_and_ends_them(ctrl_c_while_workers_are_started):
    with pytest.raises(KeyboardInterrupt) as caught:  # whose traceback keeps the loader from being deleted
        list(Loader([1, 2], num_workers=2))
    assert caught.tb is not None
    assert len(ctrl_c_while_workers_are_started) == 2
    for worker in ctrl_c_while_workers_are_started:
        assert not worker.is_alive()


def test_ctrl_c_that_is_ignored_stays_ignored(ctrl_c_while_workers_are_started):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell says to what it runs in the background
    try:
        assert len(list(Loader([1, 2]))) == 2
    finally:
        signal.signal(signal.SIGINT, before)


def as_bytes(images) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_crops_and_flips_in_the_same_order(workers, data):
    expected = as_bytes(training_images(data))
    assert len(expected) == 10
    assert as_bytes(training_images(data, workers)) == expected


def test_every_epoch_has_other_crops_and_flips(data):
    first = as_bytes(training_images(data, epoch=1))
    second = as_bytes(training_images(data, epoch=2))
    assert not set(first) & set(second)


def test_two_processes_share_out_the_images_that_one_has(data, monkeypatch):
    expected = as_bytes(training_images(data))
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        monkeypatch.setattr(processes, "rank", lambda: rank)
        seen += as_bytes(training_images(data))
    assert sorted(seen) == sorted(expected)


def test_a_loader_draws_as_much_from_its_generator_with_workers_as_without(data):
    states = []
    for workers in (0, 2):
        datasets = open_folder(data, deepglobe=False, seed=5, crop=(8, 8))
        order = torch.Generator().manual_seed(5)
        for loader in make_loaders(datasets, {**CONFIG, "workers": workers}, order).values():
            list(loader)
        states.append(order.get_state())
    assert torch.equal(states[0], states[1])


def test_a_run_with_workers_is_a_run_without(data, tmp_path, no_pictures):
    options = ["--dataset", "folder", "--data", str(data), "--crop", "8", "--grid", "1x2", "--epochs", "2", "--no-amp"]
    options += "--width 2 --depth 1 --comm-channels 2 --dilations 1 --batch-size 4".split()
    losses = []
    for workers in ("0", "2"):
        out = tmp_path / workers
        train.main(options + ["--workers", workers, "--out", str(out)])
        with open(out / "log.csv") as file:
            rows = list(csv.DictReader(file))
        losses.append([row["train_loss"] for row in rows])
    assert losses[0] == losses[1]


# What a worker cannot read

@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_during_training_is_one_line(workers, data):
    datasets = open_folder(data, deepglobe=False, seed=5)
    image, _ = datasets["train"].pairs[3]
    image.unlink()
    loader = make_loaders(datasets, {**CONFIG, "workers": workers}, torch.Generator())["train"]
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value) == f"{image}: no such file; name a PNG, JPEG, TIFF, PPM, PGM or .npy"


class Dies(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        os._exit(1)


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(DataError, match="take fewer --workers, or 0") as caught:
        list(Loader(Dies(), num_workers=1))
    assert "\n" not in str(caught.value)


# The look at all images

@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_finds_the_same_to_the_last_bit(workers, data):
    folders = open_folder(data, deepglobe=False, seed=5)
    assert survey(folders, None, workers=workers) == survey(folders, None)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_of_two_files_that_cannot_be_used_the_first_one_is_named(workers, data):
    folders = open_folder(data, deepglobe=False, seed=5)
    for i in (4, 2):
        image, _ = folders["train"].pairs[i]
        image.write_text("no picture")
    with pytest.raises(DataError) as caught:
        survey(folders, None, workers=workers)
    reason = "cannot be read (no PNG, JPEG, TIFF, PPM or PGM); replace it, or do without it"
    assert str(caught.value) == f"{image}: {reason}"


def test_grey_images_have_the_same_mean_with_one_thread_and_with_two(tmp_path):
    """Large enough that PyTorch would share out their sum among threads, which changes its rounding."""
    rng = np.random.default_rng(0)
    for i in range(3):
        noise = rng.integers(256, size=(512, 512), dtype=np.uint8)
        for folder, array in (("images", noise), ("masks", noise // 128)):
            (tmp_path / "train" / folder).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "train" / folder / f"{i}.npy", array)
    folders = open_folder(tmp_path, deepglobe=False, seed=5)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(survey(folders, None))
    torch.set_num_threads(1)
    assert found[0] == found[1]


def test_a_worker_that_dies_in_the_look_is_one_line_and_leaves_no_folder(data, tmp_path, monkeypatch, capsys):
    def die(folder, number, classes):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(survey_module, "summarise_pair", die)
    with pytest.raises(SystemExit, match="2"):
        train.main(["--dataset", "folder", "--data", str(data), "--workers", "1", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "take fewer --workers, or 0" in said
    assert not (tmp_path / "run").exists()


def test_the_death_of_a_worker_is_one_line_wherever_it_is_noticed(capsys):
    with pytest.raises(SystemExit, match="2"):
        with one_line_errors(make_parser("")):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "take fewer --workers, or 0" in capsys.readouterr().err


def set_cores(monkeypatch, number: int):
    """A machine of so many cores, and as many workers by default as outside of the tests."""
    monkeypatch.setattr(loaders.os, "cpu_count", lambda: number)
    monkeypatch.setattr(loaders, "MOST_WORKERS", conftest.MOST_WORKERS)


def test_before_training_the_first_process_has_as_many_workers_as_cores_but_not_more_than_images(monkeypatch):
    set_cores(monkeypatch, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # the others wait
    assert workers_before_training({"workers": None}, 100) == 3
    assert workers_before_training({"workers": None}, 2) == 2
    assert workers_before_training({"workers": 7}, 100) == 7
    assert workers_before_training({"workers": 0}, 100) == 0
    set_cores(monkeypatch, 64)
    assert workers_before_training({"workers": None}, 100) == 4


# How many workers

def test_pictures_and_windows_have_workers_and_whole_arrays_and_synthetic_images_have_none(data, monkeypatch):
    set_cores(monkeypatch, 3)
    pictures = open_folder(data, deepglobe=False, seed=0)["train"]
    config = {**CONFIG, "workers": None, "crop": None}
    assert number_of_workers(config, pictures) == 3
    assert number_of_workers({**config, "workers": 7}, pictures) == 7
    assert number_of_workers({**config, "dataset": "synthetic"}, None) == 0
    for i, (image, mask) in enumerate(pictures.pairs):
        array = image.with_suffix(".npy")
        np.save(array, np.zeros((16, 16)))
        pictures.pairs[i] = (array, mask)
    assert number_of_workers(config, pictures) == 0
    assert number_of_workers({**config, "workers": 7}, pictures) == 0
    pictures.crop = (8, 8)
    assert number_of_workers(config, pictures) == 3
    set_cores(monkeypatch, 64)
    assert number_of_workers(config, pictures) == 4


def test_of_arrays_workers_read_the_windows_to_learn_from_and_not_the_whole_ones_to_evaluate(tmp_path):
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
            np.save(tmp_path / split / kind / "0.npy", np.zeros((16, 16), np.uint8))
    folders = open_folder(tmp_path, deepglobe=False, seed=0, crop=(8, 8))
    made = make_loaders(folders, {**CONFIG, "workers": 2}, torch.Generator())
    assert {split: loader.num_workers for split, loader in made.items()} == {"train": 2, "val": 0, "test": 0}


def test_a_window_is_no_view_of_the_image_as_a_worker_would_send_what_lies_between_its_rows(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        for i in range(3):
            np.save(tmp_path / "train" / kind / f"{i}.npy", np.zeros((64, 64), np.uint8))
    image, mask = open_folder(tmp_path, deepglobe=False, seed=0, crop=(8, 8))["train"][0]
    assert image.untyped_storage().nbytes() == mask.untyped_storage().nbytes() == 64


def test_an_error_in_a_worker_is_not_taken_for_its_death():
    class Wrong(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(Loader(Wrong(), num_workers=1))


def test_the_processes_of_a_machine_share_its_cores(data, monkeypatch):
    pictures = open_folder(data, deepglobe=False, seed=0)["train"]
    set_cores(monkeypatch, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert number_of_workers({**CONFIG, "workers": None}, pictures) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert number_of_workers({**CONFIG, "workers": None}, pictures) == 1


# How long training waits

class Clock:
    """In place of time.perf_counter. An image takes 3 seconds, and who uses it takes 1."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Dataset):
    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return 5

    def __getitem__(self, i):
        self.clock.now += 3
        return torch.zeros(1), torch.zeros(1)


def test_the_seconds_that_a_user_waits_are_counted_and_not_those_that_it_works(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    loader = Loader(Slow(clock))
    for _ in range(2):  # every pass counts anew
        for _ in loader:
            clock.now += 1
        assert loader.seconds_waited == 15


def test_a_run_says_how_long_it_waited(data, tmp_path, monkeypatch, no_pictures, capsys):
    def says(share):
        out = tmp_path / str(share)
        monkeypatch.setattr(Loader, "seconds_waited", property(lambda loader: share, lambda loader, value: None))
        train.main(["--dataset", "folder", "--data", str(data), "--width", "2", "--depth", "1", "--comm-channels", "0",
                    "--epochs", "2", "--workers", "0", "--out", str(out)])
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["seconds_waited"] == 2 * share
        assert metrics["train_seconds"] > 0
        return "of its time for images" in capsys.readouterr().out

    assert says(1000.0)
    assert not says(0.0)


def test_the_line_about_waiting_tells_its_share():
    assert waiting_line(3.0, 12.0).startswith("training waited 25 % of its time for images")
