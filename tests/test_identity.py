"""A run goes on with the images that it was begun with, wherever they are now, and with no others."""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_image_folder import make_folder, random_image, save
from test_resume import message_of_failure

import train
from support import checkpoints, datasets, identity, processes
from support.command import prepare_run
from support.image_files import DataError
from support.image_folder import open_folder
from support.options import make_parser
from support.sizes import smallest

pytestmark = pytest.mark.usefixtures("no_pictures")
TINY = "--width 2 --depth 1 --comm-channels 0 --batch-size 8 --epochs 1 --workers 0 --dataset folder --data".split()
CHANGED = "the images are not those of the run, as a file was changed, renamed, added or removed"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with grey images in data, and a run on them in run. No test may change it."""
    place = tmp_path_factory.mktemp("begun")
    make_folder(place / "data", 8, channels=1)
    train.main([*TINY, str(place / "data"), "--out", str(place / "run")])
    return place


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
    """A copy that may be changed. Its files have the times of the last change of the original."""
    shutil.copytree(begun, tmp_path / "place")
    change_checkpoint(tmp_path / "place", data=str(tmp_path / "place/data"))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def change_checkpoint(place, without=(), **changes):
    state = checkpoints.load(place / "run/last.pt")
    for name in without:
        del state["config"][name]
    state["config"].update(changes)
    checkpoints.save(place / "run/last.pt", state)


def config_of(place) -> dict:
    return checkpoints.load(place / "run/last.pt")["config"]


def never(*arguments):
    raise AssertionError("this was not to be called")


# The same images

def test_nothing_is_read_where_sizes_and_times_of_all_files_are_those_of_before(place, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "survey", never)
    monkeypatch.setattr(identity, "checksum", never)
    train.main(["--resume", "run"])
    assert "1 of 1 epochs are done" in capsys.readouterr().out


def touch_all(place):
    for path in (place / "data").rglob("*.png"):
        os.utime(path, (1e9, 1e9))


def test_files_with_new_times_and_the_same_content_are_read_once_and_found_the_same(place, monkeypatch):
    touch_all(place)
    before = config_of(place)
    monkeypatch.setattr(datasets, "survey", never)
    train.main(["--resume", "run"])
    config = dict(before)
    datasets.check_unchanged(config)
    assert config["file_times"] != before["file_times"]
    assert config["mean"] == before["mean"]
    monkeypatch.setattr(identity, "checksum", never)
    datasets.check_unchanged(config)


def test_a_run_keeps_its_numbers_whatever_is_rounded_now(place):
    """As in a run that was begun with another number of threads."""
    change_checkpoint(place, mean=[0.25], std=[0.125])
    train.main(["--resume", "run"])
    assert checkpoints.load(place / "run/last.pt")["config"]["mean"] == [0.25]


def test_a_run_that_was_begun_before_files_had_checksums_goes_on(place):
    mean = config_of(place)["mean"]
    change_checkpoint(place, without=["file_times", "file_contents"], mean=[mean[0] + 1e-15])
    config = config_of(place)
    datasets.check_unchanged(config)
    assert config["mean"] == [mean[0] + 1e-15]
    assert {"file_times", "file_contents"} < config.keys()
    train.main(["--resume", "run"])


# Others

def change_one_pixel(place):
    path = place / "data/train/images/3.png"
    image = np.array(Image.open(path))
    image[5, 7] ^= 1
    save(path, image)


def change_one_pixel_of_a_mask(place):
    path = place / "data/train/masks/3.png"
    mask = np.array(Image.open(path))
    mask[5, 7] = (mask[5, 7] + 1) % 3
    save(path, mask)


def give_a_pair_another_name(place):
    for kind in ("images", "masks"):
        path = place / f"data/train/{kind}/7.png"
        path.rename(path.with_name("77.png"))


def exchange_two_images(place):
    folder = place / "data/train/images"
    (folder / "3.png").rename(folder / "aside.png")
    (folder / "4.png").rename(folder / "3.png")
    (folder / "aside.png").rename(folder / "4.png")


def add_a_pair(place):
    save(place / "data/train/images/8.png", random_image((16, 24), channels=1))
    save(place / "data/train/masks/8.png", np.zeros((16, 24), np.uint8))


def remove_a_pair(place):
    for kind in ("images", "masks"):
        (place / f"data/train/{kind}/3.png").unlink()


ALL_CHANGES = [change_one_pixel, change_one_pixel_of_a_mask, give_a_pair_another_name, exchange_two_images, add_a_pair,
               remove_a_pair]


@pytest.mark.parametrize("change", ALL_CHANGES)
def test_other_images_are_one_line(change, place, capsys):
    change(place)
    before = (place / "run/last.pt").read_bytes()
    assert f"{place / 'data'}: {CHANGED}" in message_of_failure(["--resume", "run"], capsys)
    assert (place / "run/last.pt").read_bytes() == before


def test_other_names_of_classes_are_one_line(place, capsys):
    (place / "data/classes.txt").write_text("sky\nsea\nland\n")
    said = message_of_failure(["--resume", "run"], capsys)
    assert "the classes were class 0, class 1, class 2 and are sky, sea, land; make classes.txt what it was" in said


def test_other_images_of_an_older_run_are_one_line(place, capsys):
    change_checkpoint(place, without=["file_times", "file_contents"], dtype="uint16")
    assert CHANGED in message_of_failure(["--resume", "run"], capsys)


def test_of_an_older_run_it_is_said_that_its_images_are_not_known_for_sure(place, capsys):
    change_checkpoint(place, without=["file_times", "file_contents"])
    change_one_pixel(place)
    train.main(["--resume", "run"])
    assert "make sure that they are the same" in capsys.readouterr().out


# What goes with --resume

def test_data_that_has_moved_is_found_with_data(place, capsys):
    (place / "data").rename(place / "elsewhere")
    said = message_of_failure(["--resume", "run"], capsys)
    message = "no such folder; give --data with the folder in which the images of run lie now"
    assert f"--data {place / 'data'}: {message}" in said
    train.main(["--resume", "run", "--data", "elsewhere"])
    config = json.loads((place / "run/metrics.json").read_text())["config"]
    assert config["data"] == str(place / "elsewhere")


def test_a_copy_of_the_data_is_found_and_other_data_is_one_line(place, capsys):
    shutil.copytree(place / "data", place / "copy", copy_function=shutil.copy)  # with new times
    train.main(["--resume", "run", "--data=copy"])
    change_one_pixel(place)
    said = message_of_failure(["--resume", "run", "--data", "data"], capsys)
    assert f"{place / 'data'}: {CHANGED}" in said


def test_another_number_of_workers_and_of_processes_for_each_image_goes_with_resume(place, monkeypatch):
    parser = make_parser("")
    parser.add_argument("--resume")
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    monkeypatch.setattr(processes, "gpus_each", lambda: 3)
    config, _, _ = prepare_run(["--resume", "run", "--image-processes", "2", "--workers=1"], parser)
    assert config["image_processes"] == 2
    assert config["workers"] == 1
    assert config["gpus"] == 2  # of the four tiles, each of the two processes has two


@pytest.mark.parametrize("options, message", [
    ("--epochs 3", "give it alone, or with --data, --workers, --image-processes, but without --epochs"),
    ("--workers 0 --lr=1", "but without --lr"),
    ("--workers -1", "--workers: '-1' is not a whole number from 0 to 1048576"),
    ("--image-processes 5", "--image-processes 5, but --grid 2x2 has only 4 tiles: take fewer processes"),
    ("--image-processes 2", "the number of processes is 1, which is not a multiple of it"),
    ("--data nowhere", "nowhere: no such folder; give --data with"),
])
def test_what_does_not_go_with_resume_is_one_line(options, message, place, capsys):
    before = (place / "run/last.pt").read_bytes()
    assert message in message_of_failure(["--resume", "run", *options.split()], capsys)
    assert (place / "run/last.pt").read_bytes() == before


def test_a_run_on_synthetic_images_takes_no_data(tmp_path, capsys):
    options = "--width 2 --depth 1 --comm-channels 0 --train-images 8 --epochs 0 --out".split()
    train.main(options + [str(tmp_path / "run")])
    said = message_of_failure(["--resume", str(tmp_path / "run"), "--data", str(tmp_path)], capsys)
    assert "the images of this run are synthetic; leave --data out" in said


# The smallest image

def test_an_image_with_fewer_cells_than_processes_is_one_line_before_training(place, monkeypatch, capsys):
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    for split in ("val", "test"):
        make_folder(place / "data", 1, size=(2, 3), channels=1, splits=[split])
    options = [*TINY, str(place / "data"), "--out", "new", "--image-processes"]
    said = message_of_failure([*options, "4"], capsys)
    assert "0.png: 2x3 pixels, 2 cells of 2x2, cannot be cut into a tile for each" in said
    assert "of --image-processes 4; take at most 2" in said
    assert not (place / "new").exists()


def test_the_smallest_image_is_that_with_the_fewest_cells_of_all_that_are_cut():
    sizes = {"train": {(8, 8): Path("a.png")}, "val": {(4, 6): Path("b.png"), (3, 9): Path("c.png")}}
    assert smallest({"depth": 1, "crop": None}, sizes) == ("b.png", 4, 6)
    assert smallest({"depth": 1, "crop": (2, 4)}, sizes) == ("--crop", 2, 4)
    assert smallest({"depth": 2, "crop": None}, sizes) == ("b.png", 4, 6)  # 1 x 2 cells of 4x4; c.png is 1 x 3


def test_the_smallest_image_is_compared_with_another_number_of_processes_when_a_run_goes_on(place, monkeypatch, capsys):
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    change_checkpoint(place, smallest_image=("tiny.png", 2, 3))
    said = message_of_failure(["--resume", "run", "--image-processes", "4"], capsys)
    assert "tiny.png: 2x3 pixels, 2 cells of 2x2" in said


# What stands for the files

def test_a_checksum_is_that_of_all_bytes(tmp_path):
    content = np.random.default_rng(0).bytes(2**24 + 5)
    (tmp_path / "file").write_bytes(content)
    assert identity.checksum(tmp_path / "file") == zlib.crc32(content)


def test_any_number_of_workers_reads_the_same_as_the_look_at_all_images(place):
    folders = open_folder(place / "data", deepglobe=False, seed=0)
    expected = config_of(place)["file_contents"]
    for workers in (0, 2):
        assert identity.read_contents(folders, workers) == expected


def test_what_is_kept_is_small(place):
    config = config_of(place)
    assert len(config["file_times"]) == len(config["file_contents"]) == 64


def test_a_run_does_not_go_on_with_so_many_processes_that_batch_norm_sees_a_single_number(tmp_path, monkeypatch):
    """A tile of 32x32 pixels is a single cell at depth 5, and each of four processes would have one
    image of a batch."""
    options = "--width 2 --depth 5 --comm-channels 0 --train-images 4 --batch-size 4 --epochs 1 --freeze-batch-norm 1"
    train.main(options.split() + ["--out", str(tmp_path / "run")])

    def four():
        return 4

    parser = make_parser("")
    parser.add_argument("--resume")
    monkeypatch.setattr(processes, "world_size", four)
    with pytest.raises(DataError, match="a tile is a single cell, and a process has a batch of a single image"):
        prepare_run(["--resume", str(tmp_path / "run")], parser)
