"""What a folder is taken to mean, what is refused, what the look at all images tells, and how a run finds them
again."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from support import datasets, images, processes
from support.folder import open_folder
from support.images import DataError
from support.options import parse, train_parser
from support.run import prepare_run

RNG = np.random.default_rng(0)


# Images, masks and folders to test with

def random_image(size, channels=3):
    """8 bits, (H,W,C), or (H,W) if there is one channel."""
    if channels == 1:
        return RNG.integers(0, 256, size, np.uint8)
    height, width = size
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def random_mask(size, classes=3):
    return RNG.integers(0, classes, size, np.uint8)


GREY = random_image((12, 20), channels=1)
COLOR = random_image((12, 20))
DEEP = RNG.integers(0, 2**16, (12, 20), np.uint16)
MASK = random_mask((12, 20))


def save(path, array, mode=None):
    """A PNG, JPEG or .npy file. Its folder is made. mode: Pillow's name for the kind of picture to convert it to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
        return path
    picture = Image.fromarray(array)
    if mode is not None:
        picture = picture.convert(mode)
    picture.save(path)
    return path


def save_pair(root, split, name, image, mask):
    save(root / split / f"images/{name}.png", image)
    save(root / split / f"masks/{name}.png", mask)


def make_folder(root, pairs=12, size=(16, 24), channels=3, splits=("train",), classes=3):
    for split in splits:
        for i in range(pairs):
            save_pair(root, split, i, random_image(size, channels), random_mask(size, classes))
    return root


def replace(path, suffix, array):
    """Puts another file in the place of the one at `path`."""
    path.unlink()
    save(path.with_suffix(suffix), array)


def draw(masks, *values):
    """The masks of a folder hold nothing but these values."""
    for path in masks.iterdir():
        save(path, RNG.choice(values, (16, 24)).astype(np.uint8))


def describe(root, options="--grid 1x1 --batch-size 1") -> dict:
    """What train.py finds out about the images of a folder. options: of train.py."""
    images.warn_once.cache_clear()
    return datasets.describe(parse(["--dataset", "folder", "--data", str(root), *options.split()], train_parser()))


def assert_refused(root, message, options="--grid 1x1 --batch-size 1"):
    """The folder ends in one line that holds `message`."""
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        describe(root, options)
    assert "\n" not in str(refused.value)


@pytest.fixture
def data(tmp_path):
    """Six pairs of 16x24 pixels, 0.png to 5.png, in colour and with three classes that have names."""
    make_folder(tmp_path / "data", 6)
    (tmp_path / "data/classes.txt").write_text("ground\nwater\n\nhouse\n")
    return tmp_path / "data"


@pytest.fixture
def three_splits(tmp_path):
    """Three pairs each for train, val and test, 0.png to 2.png."""
    return make_folder(tmp_path / "data", 3, splits=("train", "val", "test"))


# Which pairs there are

def count_pairs(splits):
    return [len(dataset) for dataset in splits.values()]


@pytest.mark.parametrize("image, mask", [("a.jpg", "a.png"), ("a.npy", "a.npy"), ("2020/1.PNG", "2020/1.png")])
def test_pairs_are_found_by_name_whatever_the_format_and_in_subfolders(image, mask, three_splits):
    image_path = save(three_splits / "val/images" / image, COLOR)
    mask_path = save(three_splits / "val/masks" / mask, MASK)
    pairs = open_folder(three_splits, seed=0)["val"].pairs
    assert len(pairs) == 4
    assert (image_path, mask_path) in pairs


def test_what_is_left_out_is_named_once(three_splits, capsys):
    (three_splits / "train/images/notes.txt").write_text("of mine")
    (three_splits / "train/images/._0.png").write_text("of a file manager")
    (three_splits / "valid").mkdir()
    (three_splits / ".cache").mkdir()
    images.warn_once.cache_clear()
    for _ in range(2):
        assert count_pairs(open_folder(three_splits, seed=0)) == [3, 3, 3]
    assert capsys.readouterr().out.splitlines() == [
        f"{three_splits}/train/images: files of the kind .txt are left out",
        f"{three_splits}/valid: is left out; what shall be used belongs in train, val or test",
    ]


def test_a_folder_valid_is_taken_for_val(three_splits):
    (three_splits / "val").rename(three_splits / "valid")
    for image, _ in open_folder(three_splits, seed=0)["val"].pairs:
        assert image.parent == three_splits / "valid/images"


def test_a_tenth_of_the_training_pairs_drawn_by_the_seed_takes_the_place_of_a_split(tmp_path, capsys):
    make_folder(tmp_path, 20, splits=("train", "val"))
    images.warn_once.cache_clear()
    splits = open_folder(tmp_path, seed=0)
    assert count_pairs(splits) == [18, 20, 2]
    assert not set(splits["train"].pairs) & set(splits["test"].pairs)
    assert "no test, so 2 of the training pairs" in capsys.readouterr().out
    assert open_folder(tmp_path, seed=0)["test"].pairs == splits["test"].pairs
    assert open_folder(tmp_path, seed=1)["test"].pairs != splits["test"].pairs


# One or two large images

def save_numbered_rows(root, name, height, split="train"):
    """A pair of which every row of the image holds its own number, and of the mask the number modulo 3."""
    rows = np.repeat(np.arange(height, dtype=np.uint16)[:, None], 20, axis=1)
    save(root / split / f"images/{name}.npy", rows)
    save(root / split / f"masks/{name}.npy", (rows % 3).astype(np.uint8))


def rows_of(dataset, item=0) -> list[int]:
    """The numbers of the rows in an item of a data set of such pairs."""
    image, mask = dataset[item]
    assert torch.equal(image[0].int() % 3, mask.int())
    return sorted(set(image.int().flatten().tolist()))


def test_the_rows_of_one_or_two_images_are_shared_out_without_overlap(tmp_path, capsys):
    save_numbered_rows(tmp_path, "a", 200)
    save_numbered_rows(tmp_path, "b", 103)
    splits = open_folder(tmp_path, seed=0)
    assert rows_of(splits["train"]) == list(range(160))
    assert rows_of(splits["val"]) == list(range(160, 180))
    assert rows_of(splits["test"]) == list(range(180, 200))
    assert rows_of(splits["test"], 1) == list(range(92, 103))
    assert "too few images for val and test, so each of these gets a tenth of the rows" in capsys.readouterr().out


def test_a_split_that_has_images_of_its_own_is_not_cut_out(tmp_path):
    save_numbered_rows(tmp_path, "scan", 200)
    save_numbered_rows(tmp_path, "other", 50, split="val")
    splits = open_folder(tmp_path, seed=0)
    assert rows_of(splits["val"]) == list(range(50))
    assert rows_of(splits["test"]) == list(range(180, 200))


# What cannot be used is one line

def delete_all_images(image, mask):
    shutil.rmtree(image.parent)


def delete_the_mask(image, mask):
    mask.unlink()


def rename_the_folder(image, mask):
    image.parent.parent.rename(image.parent.parent.with_name("training"))


def add_an_image_of_the_same_name(image, mask):
    save(image.with_suffix(".jpg"), COLOR)


def clear_the_screen(image, mask):
    image.rename(image.with_name("\x1b[2J.png"))


def cut_off_the_end_of_the_image(image, mask):
    image.write_bytes(image.read_bytes()[:200])


@pytest.mark.parametrize("spoil, message", [
    (delete_all_images, "holds 0 images (.png"),
    (delete_the_mask, "of the same name, which is missing for ['3']"),
    (rename_the_folder, "and 0 masks in its folder masks"),
    (add_an_image_of_the_same_name, "has the same name; keep one of the two"),
    (clear_the_screen, r"'\x1b[2J.png': a name with control characters"),
    (cut_off_the_end_of_the_image, "3.png: cannot be read"),
])
def test_a_file_that_is_missing_or_broken_is_named(spoil, message, data):
    spoil(data / "train/images/3.png", data / "train/masks/3.png")
    assert_refused(data, message)


def with_nan():
    image = np.zeros((16, 24, 3), np.float32)
    image[0, 0, 1] = np.nan
    return image


@pytest.mark.parametrize("kind, suffix, array, message", [
    ("masks", ".png", MASK, "3.png: height, width and channels are (16, 24, 3), but its mask is (12, 20)"),
    ("masks", ".png", np.full((16, 24), 7, np.uint8), "3.png: holds the value 7, but a mask holds the classes 0 to 2"),
    ("masks", ".npy", np.full((16, 24), -1), "holds the value -1"),
    ("images", ".png", random_image((16, 24), channels=1), "3.png: channels and type are (1, 'uint8'), but those of"),
    ("images", ".npy", np.zeros((16, 24, 3), np.uint16), "3.npy: channels and type are (3, 'uint16'), but those of"),
    ("images", ".npy", with_nan(), "3.npy: holds nan or inf; give these pixels 255 in the mask"),
])
def test_an_image_or_a_mask_that_cannot_be_used_is_named(kind, suffix, array, message, data):
    replace(data / f"train/{kind}/3.png", suffix, array)
    assert_refused(data, message)


def test_of_two_files_that_cannot_be_used_the_first_one_is_named(three_splits):
    for name in ("2", "1"):
        (three_splits / f"train/images/{name}.png").write_text("no picture")
    assert_refused(three_splits, "train/images/1.png: cannot be read")


@pytest.mark.parametrize("names", ["a\na\nb\n", "building\n"])
def test_names_of_classes_that_cannot_be_used_are_named(names, data):
    (data / "classes.txt").write_text(names)
    assert_refused(data, "different ones, one a line, the first for the value 0")


SIX_OF_16x24 = 6 * [(16, 24)]


@pytest.mark.parametrize("sizes, options, message", [
    (3 * [(16, 24), (24, 16)], "", "images of several sizes need --batch-size 1 or --crop HxW"),
    (SIX_OF_16x24, "--crop 32", "16x24 pixels are fewer than --crop 32x32; take a smaller crop"),
    (6 * [(8, 8)], "", "2x2 tiles: an image of 8x8 pixels in cells of 8x8 can have 1x1 to 1x1"),
    (SIX_OF_16x24, "--class-weights 1 2", "--class-weights: 2 numbers, but there are 3 classes (class 0, class 1"),
])
def test_sizes_and_options_that_do_not_fit_are_named(sizes, options, message, tmp_path):
    for i, size in enumerate(sizes):
        save_pair(tmp_path / "data", "train", i, random_image(size), random_mask(size))
    assert_refused(tmp_path / "data", message, options)


def test_an_image_with_fewer_cells_than_processes_is_named_before_training(tmp_path):
    make_folder(tmp_path / "data", 8)
    make_folder(tmp_path / "data", 1, size=(2, 3), splits=("val", "test"))
    options = "--depth 1 --width 2 --comm-channels 0 --image-processes 4"
    assert_refused(tmp_path / "data", "0.png: 2x2 tiles: an image of 2x3 pixels", options)


# Masks that are not what they seem

@pytest.mark.parametrize("values, message", [
    (range(16), "the masks hold 16 values, up to 15, but without a DIR/classes.txt with their names classes are 0, 1, "
     "2, ... without a gap, and at most 10; if these are numbered objects"),
    ([0, 100, 200], "the masks hold 5 values, up to 200, but"),
    ([0], "train: the masks know a single class, 0; save the others as 1, 2"),
])
def test_values_that_are_hardly_classes_are_refused(values, message, three_splits):
    draw(three_splits / "train/masks", *values)
    assert_refused(three_splits, message)


def test_many_classes_are_taken_if_they_have_names(data):
    draw(data / "train/masks", *range(40))
    names = [f"kind {i}" for i in range(40)]
    (data / "classes.txt").write_text("\n".join(names))
    assert describe(data)["classes"] == names


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_masks_of_a_split_that_hold_0_and_255_alone_are_refused(split, three_splits):
    draw(three_splits / split / "masks", 0, 255)
    assert_refused(three_splits, f"{split}: the masks know a single class, 0; save the others as 1")


def test_where_255_stands_beside_classes_in_training_a_split_may_hold_0_and_255(three_splits):
    draw(three_splits / "train/masks", 0, 1, 255)
    draw(three_splits / "val/masks", 0, 255)
    assert describe(three_splits)["not_in_val"] == ["class 1"]


def save_indexed(path, *colors):
    picture = Image.fromarray(random_mask((16, 24), 2))
    picture.putpalette(np.array(colors, np.uint8).tobytes())
    picture.save(path)


def test_palettes_that_do_not_agree_are_named(data):
    black, red, blue = (0, 0, 0), (255, 0, 0), (0, 0, 255)
    for name in ("1", "2"):
        save_indexed(data / f"train/masks/{name}.png", black, red)
    describe(data)
    save_indexed(data / "train/masks/4.png", black, blue)
    assert_refused(data, "shows class 1 in the colour [255, 0, 0], but a mask before it in [0, 0, 255]")


# What the look at all images tells

def test_the_look_tells_kind_classes_and_statistics(three_splits, capsys):
    """Half of the pixels of one training image are 255, with 1 in the mask; all others are 0."""
    mask = np.zeros((16, 24), np.uint8)
    for name in ("2", "1", "0"):
        if name == "0":
            mask[:8] = 1
        save_pair(three_splits, "train", name, np.dstack(3 * [255 * mask]), mask)
    known = describe(three_splits)
    assert known["channels"] == 3
    assert known["dtype"] == "uint8"
    assert known["classes"] == ["class 0", "class 1", "class 2"]
    assert "each of the 3 values in the masks is taken for a class; if they number objects" in capsys.readouterr().out
    assert known["class_pixels"] == [1152 - 192, 192, 0]
    np.testing.assert_allclose(known["mean"], 3 * [1 / 6])
    np.testing.assert_allclose(known["std"], 3 * [np.sqrt(5) / 6])


def test_a_channel_that_is_the_same_everywhere_has_a_deviation_of_one(three_splits):
    for path in (three_splits / "train/images").iterdir():
        save(path, np.full((16, 24, 3), 100, np.uint8))
    known = describe(three_splits)
    assert known["mean"] == pytest.approx([100 / 255] * 3)
    assert known["std"] == [1, 1, 1]


@pytest.mark.parametrize("missing", [np.nan, np.inf, -9999, 1e38])
def test_pixels_that_do_not_count_do_not_count_in_the_statistics(missing, three_splits):
    """Beside a mean of 101325, a deviation of 0.09 is kept, too."""
    pixels = []
    for path in sorted(three_splits.glob("*/images/*.png")):
        image = RNG.normal(101325, 0.09, (16, 24)).astype(np.float32)
        mask = random_mask((16, 24))
        if path.is_relative_to(three_splits / "train"):
            pixels.append(image[1:].astype(float))
        image[0] = missing
        mask[0] = 255
        replace(path, ".npy", image)
        save(three_splits / path.parts[-3] / "masks" / path.name, mask)
    known = describe(three_splits)
    np.testing.assert_allclose(known["mean"], np.mean(pixels), rtol=1e-9)
    np.testing.assert_allclose(known["std"], np.std(pixels), rtol=1e-6)


def test_a_class_that_a_split_lacks_is_named(three_splits, capsys):
    draw(three_splits / "val/masks", 0, 3)
    draw(three_splits / "test/masks", 0, 1, 2, 3)
    (three_splits / "classes.txt").write_text("ground\nwater\nhouse\nroad\nsnow\n")
    assert describe(three_splits)["not_in_val"] == ["house", "water"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no mask")]
    train_line, val_line, test_line = lines
    assert train_line.startswith("no mask for train holds road or snow: a class that train lacks cannot be learned")
    assert val_line.startswith("no mask for val holds water or house or snow: ")
    assert test_line.startswith("no mask for test holds snow: ")


def test_balanced_class_weights_are_those_of_the_pixels_of_the_training_masks(three_splits):
    mask = np.zeros((16, 24), np.uint8)
    mask[:2] = 1
    mask[2] = 2
    mask[3] = 255
    for path in (three_splits / "train/masks").iterdir():
        save(path, mask)
    inverse = np.array([1 / 12, 1 / 2, 1])  # of the rows
    weights = describe(three_splits, "--class-weights balanced")["loss_weights"]
    np.testing.assert_allclose(weights, 3 * inverse / inverse.sum())


def test_an_epoch_has_as_many_windows_as_cover_each_image(tmp_path, capsys):
    for i, size in enumerate([(16, 24), (16, 16), (33, 16)]):
        save_pair(tmp_path, "train", i, random_image(size), random_mask(size))
    make_folder(tmp_path, 1, splits=("val", "test"))
    known = describe(tmp_path, "--crop 16 --batch-size 2 --epochs 3 --grid 1x2")
    assert known["windows"] == [2, 1, 3]  # 1.5, 1 and 2.06 windows
    assert known["image_size"] == (16, 16)
    assert "3 for train, 1 for val, 1 for test; 9 steps of training" in capsys.readouterr().out


# A run that goes on has the images that it was begun with

@pytest.fixture
def run(tmp_path, monkeypatch, no_pictures):
    """A run in the folder run, on the grey images in the folder data."""
    monkeypatch.chdir(tmp_path)
    make_folder(Path("data"), 8, channels=1)
    options = "--width 2 --depth 1 --comm-channels 0 --batch-size 8 --epochs 1 --workers 0 --data data --out run"
    train.main(["--dataset", "folder", *options.split()])
    return Path("run")


def make_a_mask_longer():
    path = Path("data/train/masks/3.png")
    path.write_bytes(path.read_bytes() + b"\0")


def give_a_pair_another_name():
    for kind in ("images", "masks"):
        Path(f"data/train/{kind}/7.png").rename(f"data/train/{kind}/77.png")


def move_the_data():
    Path("data").rename("elsewhere")


@pytest.mark.parametrize("change, message", [
    (make_a_mask_longer, "data/train/masks/3.png: this file is not the one that the run was begun with"),
    (give_a_pair_another_name, "data/train/images/7.png: this file is not"),
    (move_the_data, "No such file or directory: "),
])
def test_the_first_file_that_is_missing_or_another_one_is_named(change, message, run, capsys):
    change()
    before = (run / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", "run"])
    assert message in capsys.readouterr().err
    assert (run / "last.pt").read_bytes() == before


def test_data_that_has_moved_is_found_with_data(run, capsys):
    move_the_data()
    train.main(["--resume", "run", "--data", "elsewhere"])
    assert "1 of 1 epochs are done" in capsys.readouterr().out


def test_another_number_of_workers_and_of_processes_for_each_image_goes_with_resume(run, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    config, _, _ = prepare_run("--resume run --image-processes 2 --workers=1 --gpus 2".split(), train_parser())
    assert config["image_processes"] == 2
    assert config["workers"] == 1
    assert config["gpus"] == 2
