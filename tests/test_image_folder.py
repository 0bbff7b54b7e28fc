"""Every format against arrays made here, and what a folder is taken to mean."""

import io
import json
import re
import struct
import tracemalloc
import zlib
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import train
from support import datasets, image_files, image_folder, mask_files, values
from support.image_folder import ImageFolder
from support.options import make_parser, parse
from support.survey import Statistics, find_outlier, survey
from support.values import Extremes

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


def png_chunk(name, data):
    length = struct.pack(">I", len(data))
    checksum = struct.pack(">I", zlib.crc32(name + data))
    return length + name + data + checksum


def write_png(path, size, bits, kind, rows):
    """A PNG of a kind that Pillow cannot write. kind: 0, grey, or 2, colour. rows: each begins with
    the byte of its filter."""
    height, width = size
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))


def save_grey_png(path, mask, bits):
    """A grey PNG of 2 or 4 bits."""
    rows = b""
    for values in mask:
        row = "".join(f"{value:0{bits}b}" for value in values)
        row += "0" * (-len(row) % 8)
        rows += b"\0" + int(row, 2).to_bytes(len(row) // 8, "big")
    write_png(path, mask.shape, bits, kind=0, rows=rows)


def save_pair(root, split, name, image, mask):
    save(root / split / f"images/{name}.png", image)
    save(root / split / f"masks/{name}.png", mask)


def make_folder(root, pairs=12, size=(16, 24), channels=3, splits=("train",), classes=3):
    for split in splits:
        for i in range(pairs):
            image = random_image(size, channels)
            mask = random_mask(size, classes)
            save_pair(root, split, i, image, mask)
    return root


def make_deepglobe(root, names, size=(24, 32)):
    """DeepGlobe's layout, with colours that are not pure. Returns the masks as indices, where unknown is 255."""
    colors = 255 * np.array(list(mask_files.DEEPGLOBE.values()))
    masks = {}
    for name in names:
        index = RNG.integers(0, 7, size)
        masks[name] = np.where(index == 6, 255, index)
        wobble = RNG.integers(-100, 101, (size[0], size[1], 3))
        impure = np.clip(colors[index] + wobble, 0, 255)
        save(root / f"train/{name}_mask.png", impure.astype(np.uint8))
        save(root / f"train/{name}_sat.jpg", random_image(size))
    return masks


# One image

@pytest.mark.parametrize("name, array", [
    ("grey.png", GREY),
    ("grey.pgm", GREY),
    ("deep.png", DEEP),
    ("deep.pgm", DEEP),
    ("flat.npy", DEEP),
    ("two values.npy", GREY > 99),
    ("high byte first.npy", DEEP.astype(">u2")),
    ("high byte first.npy", RNG.random((12, 20)).astype(">f4")),
])
def test_an_image_without_channels_is_what_was_saved_and_has_one(name, array, tmp_path):
    image = image_files.read_image(save(tmp_path / name, array))
    assert image.dtype == array.dtype.newbyteorder("=")
    assert torch.from_numpy(image).shape == (12, 20, 1)
    assert np.array_equal(image, array[..., None])


@pytest.mark.parametrize("name, array", [
    ("color.png", COLOR),
    ("color.ppm", COLOR),
    ("channels.npy", RNG.random((12, 20, 5))),
])
def test_an_image_with_channels_is_what_was_saved(name, array, tmp_path):
    image = image_files.read_image(save(tmp_path / name, array))
    assert image.dtype == array.dtype
    assert np.array_equal(image, array)


def test_the_transparency_of_a_colour_image_is_left_out(tmp_path):
    path = save(tmp_path / "alpha.png", np.dstack([COLOR, GREY]))
    image = image_files.read_image(path)
    assert image.dtype == np.uint8
    assert np.array_equal(image, COLOR)


def test_the_transparency_of_a_grey_image_is_left_out(tmp_path):
    path = save(tmp_path / "grey alpha.png", GREY, mode="LA")
    image = image_files.read_image(path)
    assert image.dtype == np.uint8
    assert np.array_equal(image, GREY[..., None])


def test_an_image_with_a_palette_is_read_as_its_colours(tmp_path):
    path = save(tmp_path / "palette.png", GREY, mode="P")
    image = image_files.read_image(path)
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.dstack([GREY, GREY, GREY]))


def smooth_image():
    """(H,W) without the sharp edges that a JPEG blurs."""
    return np.add.outer(np.arange(32), 2 * np.arange(48)).astype(np.uint8)


def assert_close_on_average(image, expected):
    assert image.shape == expected.shape
    assert abs(image.astype(int) - expected).mean() < 3


def test_a_grey_jpeg_is_close_to_what_was_saved(tmp_path):
    smooth = smooth_image()
    image = image_files.read_image(save(tmp_path / "grey.jpg", smooth))
    assert_close_on_average(image, smooth[..., None])


def test_a_colour_jpeg_is_close_to_what_was_saved(tmp_path):
    smooth = smooth_image()
    color = np.dstack([smooth, smooth, smooth])
    image = image_files.read_image(save(tmp_path / "color.JPEG", color))
    assert_close_on_average(image, color)


def test_an_image_that_was_taken_upside_down_is_turned_back(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # what a camera writes that was held upside down
    Image.fromarray(GREY).save(tmp_path / "turned.png", exif=exif)
    image = image_files.read_image(tmp_path / "turned.png")
    assert np.array_equal(image[..., 0], GREY[::-1, ::-1])


def save_turned(path, orientation):
    """An image of 16x24 pixels, of which a camera says how it was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(random_image((16, 24))).save(path, exif=exif)


def test_that_an_image_is_turned_is_said_once(tmp_path, capsys):
    make_folder(tmp_path, 6)
    for i in (2, 4):
        save_turned(tmp_path / f"train/images/{i}.png", orientation=3)  # upside down
    survey_of(tmp_path)
    said = capsys.readouterr().out
    assert said.count("is turned as its EXIF data says") == 1
    assert "2.png: is turned" in said or "4.png: is turned" in said  # one of them may be drawn for val


def test_where_a_turned_image_has_not_the_size_of_its_mask_it_is_said_why(tmp_path):
    make_folder(tmp_path, 6)
    save_turned(tmp_path / "train/images/2.png", orientation=6)  # upright
    message = "2.png: 24x16 pixels, but its mask 2.png has 16x24; they must be equal; the image is turned as its EXIF"
    with pytest.raises(image_files.DataError, match=message):
        survey_of(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_picture_takes_little_more_memory_than_its_array(mode, tmp_path):
    row = random_image((1, 1500))
    path = save(tmp_path / "large.png", np.repeat(row, 1000, axis=0), mode)
    tracemalloc.start()  # of arrays and bytes; what Pillow decodes into is not seen
    image = image_files.read_image(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with Image.open(path) as picture:
        expected = np.array(picture).reshape(1000, 1500, -1)[..., :3]
    assert np.array_equal(image, expected)
    assert image.nbytes <= peak < 1.8 * image.nbytes


@pytest.mark.parametrize("array", [GREY, COLOR, DEEP])
def test_a_picture_that_needs_no_change_is_not_copied(array, tmp_path, monkeypatch):
    array = np.concatenate([array] * 2000)
    path = save(tmp_path / "image.png", array)
    monkeypatch.setattr(Image.Image, "copy", None)  # Pillow's own turning and converting would call it
    image = image_files.read_image(path)
    assert np.array_equal(image.squeeze(), array)


# One mask

@pytest.mark.parametrize("channels", [
    [MASK, MASK, MASK],
    [MASK, MASK, MASK, np.full_like(MASK, 255)],
    [MASK, MASK, MASK, np.zeros_like(MASK)],
])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_mask_with_red_green_and_blue_all_equal_is_grey(suffix, channels, tmp_path):
    path = save(tmp_path / f"mask{suffix}", np.dstack(channels))
    assert np.array_equal(mask_files.read_mask(path), MASK)


def test_a_grey_mask_with_the_same_transparency_everywhere_is_grey(tmp_path):
    path = save(tmp_path / "mask.png", MASK, "LA")
    assert np.array_equal(mask_files.read_mask(path), MASK)


@pytest.mark.parametrize("shape", [(12, 20, 1), (1, 12, 20)])
def test_a_mask_in_an_array_of_one_channel_has_none(shape, tmp_path):
    path = save(tmp_path / "mask.npy", MASK.reshape(shape))
    assert np.array_equal(mask_files.read_mask(path), MASK)


@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize("bits, classes", [(2, 4), (4, 16)])
def test_a_mask_of_few_bits_is_the_indices_that_were_saved(bits, classes, palette, tmp_path):
    mask = random_mask((12, 21), classes)
    if palette:
        picture = Image.fromarray(mask)
        picture.putpalette([200, 10, 10] * classes)
        picture.save(tmp_path / "mask.png", bits=bits)
    else:
        save_grey_png(tmp_path / "mask.png", mask, bits)
    assert np.array_equal(mask_files.read_mask(tmp_path / "mask.png"), mask)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_mask_of_one_bit_is_0_and_1(suffix, tmp_path):
    path = save(tmp_path / f"mask{suffix}", MASK > 0)
    assert np.array_equal(mask_files.read_mask(path), MASK > 0)


@pytest.mark.parametrize("mode", [None, "P"])
def test_a_png_mask_is_the_indices_that_were_saved(mode, tmp_path):
    path = save(tmp_path / "mask.png", MASK, mode)
    assert np.array_equal(mask_files.read_mask(path), MASK)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, ">i4"])
def test_a_mask_in_an_array_is_the_indices_that_were_saved(kind, tmp_path):
    path = save(tmp_path / "mask.npy", MASK.astype(kind))
    assert np.array_equal(mask_files.read_mask(path), MASK)


def test_a_mask_in_a_jpeg_of_several_pictures_is_named(tmp_path):
    picture = Image.fromarray(MASK)
    picture.save(tmp_path / "mask.jpg", format="MPO", save_all=True, append_images=[picture])
    with pytest.raises(image_files.DataError, match="JPEG changes the values of a mask"):
        mask_files.read_mask(tmp_path / "mask.jpg")


def test_the_palette_of_a_mask_is_not_its_classes(tmp_path):
    picture = Image.fromarray(MASK)
    picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    picture.save(tmp_path / "mask.png")
    assert np.array_equal(mask_files.read_mask(tmp_path / "mask.png"), MASK)


def test_deepglobe_colours_are_cut_at_128(tmp_path):
    masks = make_deepglobe(tmp_path, ["1"])
    mask = mask_files.read_deepglobe_mask(tmp_path / "train/1_mask.png")
    assert np.array_equal(mask, masks["1"])


def test_a_colour_that_deepglobe_does_not_know_does_not_count(tmp_path):
    red = np.full((2, 2, 3), (200, 90, 90), np.uint8)
    mask = mask_files.read_deepglobe_mask(save(tmp_path / "red.png", red))
    assert (mask == 255).all()


def test_a_grey_mask_is_none_of_deepglobe(tmp_path):
    path = save(tmp_path / "grey.png", MASK)
    with pytest.raises(image_files.DataError, match="for class indices take --dataset folder"):
        mask_files.read_deepglobe_mask(path)


# Arrays larger than the memory

HUGE = 2**17  # a square of as many rows and columns of bytes is 16 GiB


@pytest.fixture
def huge_pair(tmp_path):
    """An image and a mask that claim 16 GiB each, in files with holes: whoever reads one fails or takes minutes."""
    image = np.lib.format.open_memmap(tmp_path / "image.npy", "w+", np.uint8, (HUGE, HUGE))
    image[-64:, -64:] = 7
    image.flush()
    np.lib.format.open_memmap(tmp_path / "mask.npy", "w+", np.uint8, (HUGE, HUGE))
    return tmp_path / "image.npy", tmp_path / "mask.npy"


def test_an_array_is_mapped_and_read_where_it_is_touched(huge_pair):
    image, _ = ImageFolder([huge_pair])[0]
    assert image.shape == (1, HUGE, HUGE)
    assert image.dtype == torch.uint8
    assert (image[..., -32:, -32:] == 7).all()
    assert (image[..., :32, :32] == 0).all()


def test_a_crop_of_an_array_is_all_that_is_read(huge_pair):
    image, mask = ImageFolder([huge_pair], crop=(32, 48), augment=True)[0]
    assert image.shape == (1, 32, 48)
    assert mask.shape == (32, 48)


@pytest.mark.parametrize("channels", [1, 4, 50])
def test_an_array_is_looked_at_in_blocks_whatever_its_channels(channels):
    row = np.zeros((1, 2**12, channels), np.uint8)
    image = np.broadcast_to(row, (2**12, 2**12, channels))
    rows = 0
    for block in image_files.blocks(image):
        assert block.size <= 2**24
        rows += len(block)
    assert rows == 2**12


# A folder

def test_pairs_are_found_by_name_whatever_the_format(tmp_path):
    save(tmp_path / "train/images/a.jpg", COLOR)
    save(tmp_path / "train/masks/a.png", MASK)
    save(tmp_path / "train/images/a2.jfif", COLOR)
    save(tmp_path / "train/masks/a2.pgm", MASK)
    save(tmp_path / "train/images/b.npy", COLOR)
    save(tmp_path / "train/masks/b.npy", MASK)
    (tmp_path / "train/images/notes.txt").write_text("not an image")
    make_folder(tmp_path, 1, splits=("val", "test"))
    split = image_folder.find_pairs(tmp_path, seed=0)
    found = []
    for image, mask in split["train"]:
        found.append((image.name, mask.name))
    assert found == [("a.jpg", "a.png"), ("a2.jfif", "a2.pgm"), ("b.npy", "b.npy")]
    assert len(split["val"]) == 1
    assert len(split["test"]) == 1


def test_the_ending_of_a_file_may_be_in_capitals(tmp_path):
    save(tmp_path / "a.npy", GREY).rename(tmp_path / "a.NPY")
    save(tmp_path / "b.png", GREY).rename(tmp_path / "b.PNG")
    found = image_folder.find_files(tmp_path)
    assert set(found) == {"a", "b"}
    for path in found.values():
        image = image_files.read_image(path)
        assert np.array_equal(image[..., 0], GREY)


def test_the_hidden_files_of_a_file_manager_are_no_images(tmp_path):
    save(tmp_path / "a.png", GREY)
    (tmp_path / "._a.png").write_text("of a file manager")
    found = image_folder.find_files(tmp_path)
    assert set(found) == {"a"}


def said_by(find, *arguments):
    """The lines that it prints."""
    image_folder.say_once.cache_clear()
    printed = io.StringIO()
    with redirect_stdout(printed):
        find(*arguments)
    return printed.getvalue().splitlines()


def test_files_of_unknown_kinds_and_folders_among_the_images_are_left_out_and_named(tmp_path):
    for name in ("a.png", "b.xcf", "c.xcf", "notes"):
        (tmp_path / name).touch()
    (tmp_path / "more.png").mkdir()
    lines = said_by(image_folder.say_subfolders, tmp_path) + said_by(image_folder.find_files, tmp_path)
    assert lines == [
        f"{tmp_path}/more.png: a folder among images or masks is left out; move its files up, beside it",
        f"{tmp_path}: files are left out as their kind is unknown (2 .xcf, 1 without a suffix); if they belong to it, "
        "convert them",
    ]


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_a_folder_of_validation_pairs_has_three_names(name, tmp_path):
    make_folder(tmp_path, 3, splits=(name, "train", "test"))
    assert said_by(image_folder.find_pairs, tmp_path, 0) == [f"{tmp_path}: {name} is taken as val"]
    split = image_folder.find_pairs(tmp_path, seed=0)
    assert count_pairs(split) == {"train": 3, "val": 3, "test": 3}
    for image, mask in split["val"]:
        assert image.parent == tmp_path / name / "images"


def test_a_folder_that_is_no_split_is_left_out_and_named(tmp_path):
    make_folder(tmp_path, 1, splits=("train", "val", "valid", "test"))
    (tmp_path / ".cache").mkdir()
    lines = said_by(image_folder.find_pairs, tmp_path, 0)
    assert lines == [f"{tmp_path}/valid: is left out; what shall be used belongs in train, val or test"]


def count_pairs(split):
    return {name: len(pairs) for name, pairs in split.items()}


def test_without_a_test_folder_a_tenth_of_the_training_pairs_is_taken(tmp_path, capsys):
    make_folder(tmp_path, 20, splits=("train", "val"))
    split = image_folder.find_pairs(tmp_path, seed=0)
    assert count_pairs(split) == {"train": 18, "val": 20, "test": 2}
    assert not set(split["train"]) & set(split["test"])
    assert "no test, so 2 of the training pairs" in capsys.readouterr().out


def test_the_seed_draws_the_training_pairs_that_are_taken(tmp_path):
    make_folder(tmp_path, 20, splits=("train", "val"))
    split = image_folder.find_pairs(tmp_path, seed=0)
    same = image_folder.find_pairs(tmp_path, seed=0)
    other = image_folder.find_pairs(tmp_path, seed=1)
    assert split == same
    assert split["test"] != other["test"]


def split_of_the_literature():
    """The names of the images in each split."""
    names = {"train": [], "val": [], "test": []}
    for line in image_folder.SPLIT_OF_THE_LITERATURE.read_text().splitlines():
        name, split = line.split()
        names[split].append(name)
    return names


def test_the_split_of_the_literature_has_454_207_and_142_images():
    assert count_pairs(split_of_the_literature()) == {"train": 454, "val": 207, "test": 142}


@pytest.fixture
def two_of_each_split():
    """The names of two images of each split of the literature."""
    chosen = {}
    for split, names in split_of_the_literature().items():
        chosen[split] = sorted(names[:2])
    return chosen


def test_deepglobe_uses_the_split_of_the_literature_where_it_knows_all_images(two_of_each_split, tmp_path, capsys):
    for names in two_of_each_split.values():
        make_deepglobe(tmp_path, names)
    found = {}
    for split, pairs in image_folder.find_deepglobe(tmp_path, seed=0).items():
        found[split] = [image.name.removesuffix("_sat.jpg") for image, _ in pairs]
    assert found == two_of_each_split
    assert "split of the literature" in capsys.readouterr().out


def test_deepglobe_draws_its_split_where_an_image_is_unknown(two_of_each_split, tmp_path):
    for names in two_of_each_split.values():
        make_deepglobe(tmp_path, names)
    make_deepglobe(tmp_path, ["stranger"])
    split = image_folder.find_deepglobe(tmp_path, seed=0)
    assert count_pairs(split) == {"train": 5, "val": 1, "test": 1}


@pytest.fixture
def matching_pair(tmp_path):
    """An image and a mask that holds the hundreds of the image's values, so that one can be told from the other."""
    image = save(tmp_path / "image.png", GREY)
    mask = save(tmp_path / "mask.png", GREY // 100)
    return image, mask


def test_crops_and_turns_keep_image_and_mask_together(matching_pair):
    different = set()
    for size in ((8, 8), (6, 10)):
        data = ImageFolder([matching_pair], crop=size, augment=True)
        for data.epoch in range(40):
            image, mask = data[0]
            assert image[0].shape == size
            assert torch.equal(image[0] // 100, mask)
            different.add(image.numpy().tobytes())
    assert len(different) > 60


def test_a_whole_image_is_flipped_in_all_four_ways(matching_pair):
    data = ImageFolder([matching_pair], augment=True)
    seen = set()
    for data.epoch in range(40):
        image, _ = data[0]
        seen.add(image.numpy().tobytes())
    upside_down = GREY[::-1]
    mirrored = GREY[:, ::-1]
    both = GREY[::-1, ::-1]
    assert seen == {GREY.tobytes(), upside_down.tobytes(), mirrored.tobytes(), both.tobytes()}


# One look at all of it

@pytest.fixture
def surveyed(tmp_path):
    """Three training images, others of another size, and what the survey tells of them."""
    make_folder(tmp_path, 3)
    make_folder(tmp_path, 2, size=(20, 16), splits=("val", "test"))
    folders = image_folder.open_folder(tmp_path, deepglobe=False, seed=0)
    return survey(folders, None)


def test_the_survey_tells_channels_and_classes_and_the_sizes_of_each_split(surveyed):
    known, sizes = surveyed
    assert known["channels"] == 3
    assert known["classes"] == ["class 0", "class 1", "class 2"]
    assert list(sizes["train"]) == [(16, 24)]
    assert list(sizes["val"]) == list(sizes["test"]) == [(20, 16)]


def test_the_survey_tells_the_statistics_of_the_training_images(surveyed, tmp_path):
    known, _ = surveyed
    pixels = []
    for path in (tmp_path / "train/images").iterdir():
        image = np.array(Image.open(path))
        pixels.append(image.reshape(-1, 3))
    pixels = np.concatenate(pixels) / 255
    np.testing.assert_allclose(known["mean"], pixels.mean(axis=0))
    np.testing.assert_allclose(known["std"], pixels.std(axis=0))


# What cannot be used is named in one line

def assert_refused(folder, message, capsys, *options):
    """train.py says one line that holds `message`, ends with status 2, and writes nothing."""
    run = folder.with_name("run")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--dataset", "folder", "--data", str(folder), *options, "--out", str(run)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert message in said
    assert not run.exists()


@pytest.fixture
def folder(tmp_path):
    """Six pairs of 16x24 pixels, 0.png to 5.png, in colour and with three classes that have names."""
    make_folder(tmp_path / "data", 6)
    (tmp_path / "data/classes.txt").write_text("ground\nwater\n\nhouse\n")
    return tmp_path / "data"


@pytest.fixture
def folder_without_names(folder):
    """The same, but nothing says how many classes there are."""
    (folder / "classes.txt").unlink()
    return folder


def replace(path, suffix, array):
    """Puts another file in the place of the one at `path`."""
    path.unlink()
    save(path.with_suffix(suffix), array)


def zeros(*shape, kind=np.uint8):
    return np.zeros(shape, kind)


ONE_RED_PIXEL = zeros(16, 24, 3)
ONE_RED_PIXEL[7, 7, 0] = 1
ONE_CLEAR_PIXEL = zeros(16, 24, 4)
ONE_CLEAR_PIXEL[7, 7, 3] = 1
IN_COLOUR = ("3.png: a mask in colour or with transparency (RGB) where class indices were expected; "
             "for DeepGlobe take --dataset deepglobe")


@pytest.mark.parametrize("suffix, mask, message", [
    (".png", MASK, "3.png: 16x24 pixels, but its mask 3.png has 12x20"),
    (".png", np.full((16, 24), 7, np.uint8), "3.png: holds the value 7; there are 3 classes (of classes.txt, or of the "
     "training), so a mask holds 0 to 2, or 255"),
    (".png", ONE_RED_PIXEL, IN_COLOUR),
    (".png", ONE_CLEAR_PIXEL, "3.png: a mask in colour or with transparency (RGBA)"),
    (".npy", zeros(16, 24, 3), "shape (16, 24, 3) where (H,W) was expected; if it is one-hot, save mask.argmax(2)"),
    (".npy", zeros(3, 16, 24), "shape (3, 16, 24) where (H,W) was expected; if it is one-hot, save mask.argmax(0)"),
    (".jpg", zeros(16, 24), "JPEG changes the values of a mask"),
    (".npy", zeros(16, 24, kind=float), "a mask of float64 where whole numbers were expected"),
    (".npy", np.full((16, 24), -1), "holds the value -1"),
])
def test_a_mask_that_cannot_be_used_is_named(suffix, mask, message, folder, capsys):
    replace(folder / "train/masks/3.png", suffix, mask)
    assert_refused(folder, message, capsys)


@pytest.mark.parametrize("suffix, image, message", [
    (".png", zeros(16, 24), "1-channel uint8, but 0.png is 3-channel uint8"),
    (".png", zeros(16, 24, kind=np.uint16), "1-channel uint16"),
    (".npy", zeros(3, 16, 124), "save array.transpose(1, 2, 0)"),
    (".npy", zeros(3, 16, 24), "save array.transpose(1, 2, 0)"),
    (".npy", zeros(24), "(H,W) or (H,W,C) was expected"),
    (".npy", np.array([{}]), "3.npy: cannot be read as an array"),
    (".npy", zeros(16, 24, kind=complex), "numbers were expected"),
    (".npy", zeros(16, 24, kind=np.longdouble), "numbers were expected"),
])
def test_an_image_that_cannot_be_used_is_named(suffix, image, message, folder, capsys):
    replace(folder / "train/images/3.png", suffix, image)
    assert_refused(folder, message, capsys)


@pytest.mark.parametrize("content", [b"P5 4 1 2\n\0\1\2\1", b"P2 4 1 255\n0 1 2 1", b"P6 1 1 65535\n123456"])
def test_a_pgm_whose_values_pillow_changes_is_named(content, tmp_path):
    (tmp_path / "mask.pgm").write_bytes(content)
    message = "Pillow changes the numbers of such a PPM or PGM .*; save it as PNG or .npy"
    with pytest.raises(image_files.DataError, match=message):
        mask_files.read_mask(tmp_path / "mask.pgm")


# Each of these does something to an image, its mask or their folder.

def delete_all_images(image, mask):
    for path in sorted(image.parent.iterdir()):
        path.unlink()


def delete_the_mask(image, mask):
    mask.unlink()


def delete_the_image(image, mask):
    image.unlink()


def rename_the_folder_of_the_masks(image, mask):
    mask.parent.rename(mask.parent.with_name("mask"))


def add_an_image_of_the_same_name(image, mask):
    save(image.with_suffix(".jpg"), COLOR)


def cut_off_the_end_of_the_image(image, mask):
    image.write_bytes(image.read_bytes()[:200])


def write_text_in_the_place_of_the_image(image, mask):
    image.write_text("I am a picture")


def empty_the_mask(image, mask):
    mask.write_bytes(b"")


def save_colours_of_16_bits(image, mask):
    """A black PNG of 16x24 pixels with 16 bits for each of red, green and blue, which Pillow cannot write."""
    bytes_per_row = 1 + 24 * 3 * 2  # a row begins with a byte that names its filter
    write_png(image, (16, 24), bits=16, kind=2, rows=bytes(16 * bytes_per_row))


def call_the_image_a_bitmap(image, mask):
    image.rename(image.with_suffix(".bmp"))


def call_the_image_an_array(image, mask):
    image.rename(image.with_suffix(".npy"))


@pytest.mark.parametrize("spoil, message", [
    (delete_all_images, "no image (.png, .jpg, .jpeg, .jfif, .tif, .tiff, .ppm, .pgm, .npy)"),
    (delete_the_mask, "3.png: there is no mask named 3"),
    (delete_the_image, "3.png: there is no image named 3"),
    (rename_the_folder_of_the_masks, "train/masks: no such folder"),
    (add_an_image_of_the_same_name, "has the same name; keep one of the two"),
    (cut_off_the_end_of_the_image, "3.png: cannot be read"),
    (write_text_in_the_place_of_the_image, "3.png: cannot be read (no PNG, JPEG, TIFF, PPM or PGM)"),
    (empty_the_mask, "3.png: cannot be read"),
    (save_colours_of_16_bits, "a PNG of 16 bits in more than one channel"),
    (call_the_image_a_bitmap, "3.bmp: only PNG, JPEG, TIFF, PPM, PGM and .npy can be read"),
    (call_the_image_an_array, "3.npy: cannot be read as an array"),
])
def test_a_file_that_is_missing_or_broken_is_named(spoil, message, folder, capsys):
    spoil(folder / "train/images/3.png", folder / "train/masks/3.png")
    assert_refused(folder, message, capsys)


@pytest.mark.parametrize("value, message", [
    (np.nan, "holds nan, inf"),
    (1e39, "holds nan, inf or numbers beyond"),
])
def test_a_number_that_no_network_can_use_is_named(value, message, folder, capsys):
    for path in sorted((folder / "train/images").iterdir()):
        replace(path, ".npy", zeros(16, 24, kind=float))
    save(folder / "train/images/3.npy", np.full((16, 24), value))
    assert_refused(folder, message, capsys)


def test_masks_of_which_no_pixel_counts_are_named(folder, capsys):
    for path in (folder / "train/masks").iterdir():
        save(path, np.full((16, 24), 255, np.uint8))
    assert_refused(folder, "no pixel of the masks for train counts, all are 255; add a mask with a class\n", capsys)


def test_masks_of_a_single_class_are_named(folder_without_names, capsys):
    mask = np.full((16, 24), 255, np.uint8)
    mask[0, 0] = 0
    for path in (folder_without_names / "train/masks").iterdir():
        save(path, mask)
    assert_refused(folder_without_names, "know a single class", capsys)


# Pixels without data

def make_arrays(root, missing, counts):
    """Float images of two channels whose first row holds `missing`. counts: whether the masks count that row."""
    pixels = []
    for split in ("train", "val", "test"):
        for name in ("a", "b", "c"):
            image = RNG.random((16, 24, 2)) + [0, 5]
            mask = random_mask((16, 24))
            image[0] = missing
            if not counts:
                mask[0] = 255
            save(root / f"{split}/images/{name}.npy", image.astype(np.float32))
            save(root / f"{split}/masks/{name}.png", mask)
            if split == "train":
                pixels.append(image[1:].reshape(-1, 2))
    return np.concatenate(pixels)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -9999, 1e38])
def test_pixels_that_do_not_count_do_not_count_in_the_statistics(missing, tmp_path, capsys):
    pixels = make_arrays(tmp_path, missing, counts=False)
    known, _ = survey_of(tmp_path)
    np.testing.assert_allclose(known["mean"], pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(known["std"], pixels.std(axis=0), rtol=1e-6)
    np.testing.assert_allclose(known["range"], [pixels.min(axis=0), pixels.max(axis=0)], rtol=1e-6)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", [-9999, 65535])
def test_a_value_that_counts_and_is_far_outside_all_others_is_named_once(missing, tmp_path, capsys):
    make_arrays(tmp_path, missing, counts=True)
    survey_of(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(rf"train: {missing} in channel 0 is far outside all other values, \S+ to 0\.9", line)


def test_a_split_with_quite_other_values_than_training_is_named(tmp_path, capsys):
    make_arrays(tmp_path, [0.5, 5.5], counts=True)
    save(tmp_path / "val/images/a.npy", np.full((16, 24, 2), 255, np.float32))
    survey_of(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("val: values from ") and " to 255, but the training images have " in line


@pytest.mark.parametrize("missing", [np.nan, -9999])
def test_training_and_scores_are_those_without_missing_data_whatever_marks_it(missing, tmp_path, no_pictures):
    scores = []
    for name, value in (("a", missing), ("b", 1e30)):
        RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
        make_arrays(tmp_path / name, value, counts=False)
        options = "--width 2 --depth 1 --comm-channels 0 --epochs 1 --batch-size 2 --dataset folder --data".split()
        train.main([*options, str(tmp_path / name), "--out", str(tmp_path / f"run {name}")])
        metrics = json.loads((tmp_path / f"run {name}/metrics.json").read_text())
        scores.append((metrics["val"], metrics["test"]))
    assert scores[0] == scores[1]


# An object drawn in white, and classes that a split lacks

def draw(folder, *values):
    """The masks of a folder hold nothing but these values."""
    for path in folder.iterdir():
        save(path, RNG.choice(values, (16, 24)).astype(np.uint8))


def survey_of(root, names=None):
    return survey(image_folder.open_folder(root, deepglobe=False, seed=0), names)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_masks_of_a_split_that_hold_0_and_255_alone_are_refused(split, tmp_path):
    make_folder(tmp_path, 3, splits=("train", "val", "test"))
    draw(tmp_path / split / "masks", 0, 255)
    message = f"{split}/masks: the masks know a single class, 0; save the others as 1"
    with pytest.raises(image_files.DataError, match=message):
        survey_of(tmp_path)


@pytest.mark.parametrize("others, is_told", [([0, 1], True), ([0, 1, 255], False)])
def test_a_mask_of_0_and_255_is_told_if_no_other_holds_255(others, is_told, tmp_path, capsys):
    make_folder(tmp_path, 6, splits=("train", "val", "test"))
    for split in ("train", "val", "test"):
        draw(tmp_path / split / "masks", *others)
    save(tmp_path / "train/masks/3.png", RNG.choice([0, 255], (16, 24)).astype(np.uint8))
    survey_of(tmp_path)
    said = "3.png: holds 0 and 255 alone, and 255 does not count; if it is an object, save it as 1"
    assert (said in capsys.readouterr().out) == is_told


def test_a_single_mask_of_0_and_255_is_fine_even_if_it_is_all_of_a_split_that_is_drawn(tmp_path):
    make_folder(tmp_path, 12)
    (image, mask), = image_folder.find_pairs(tmp_path, seed=0)["val"]
    save(mask, RNG.choice([0, 255], (16, 24)).astype(np.uint8))
    known, _ = survey_of(tmp_path)
    assert known["not_in_val"] == ["class 1", "class 2"]


@pytest.fixture
def lacking(tmp_path):
    """Masks with classes 0, 1, 2 for train, 0, 3 for val, and 0, 1, 2, 3 for test; and the names of five classes."""
    make_folder(tmp_path, 3, splits=("train", "val", "test"))
    draw(tmp_path / "val/masks", 0, 3)
    draw(tmp_path / "test/masks", 0, 1, 2, 3)
    return tmp_path, ["ground", "water", "house", "road", "snow"]


def test_a_class_that_a_split_lacks_is_named_once(lacking, capsys):
    survey_of(*lacking)
    train, val, never = capsys.readouterr().out.splitlines()
    assert train.startswith("no mask for train holds road, so it cannot be learned")
    assert val.startswith("no mask for val holds water or house, so val cannot tell")
    assert never.startswith("no mask holds snow, although")


def test_the_survey_tells_the_pixels_of_each_class_in_training_and_what_val_lacks(lacking):
    root, names = lacking
    known, _ = survey_of(root, names)
    masks = np.concatenate([np.array(Image.open(path)) for path in (root / "train/masks").iterdir()])
    assert known["class_pixels"] == [(masks == label).sum() for label in range(5)]
    assert known["not_in_val"] == ["water", "house"]


def test_nothing_is_said_where_every_split_has_every_class(tmp_path, capsys):
    make_folder(tmp_path, 3, splits=("train", "val", "test"))
    survey_of(tmp_path)
    assert capsys.readouterr().out == ""


def test_that_deepglobe_has_no_pixel_of_unknown_is_not_said(tmp_path, capsys):
    make_deepglobe(tmp_path, ["a", "b", "c"])
    folders = image_folder.open_folder(tmp_path, deepglobe=True, seed=0)
    known, _ = survey(folders, list(mask_files.DEEPGLOBE))
    assert known["class_pixels"][6] == 0
    assert "unknown" not in capsys.readouterr().out


def test_a_gap_between_the_numbers_of_the_classes_is_named(folder_without_names, capsys):
    values = [0, 100, 200, 0, 100, 200]
    for i, value in enumerate(values):
        save(folder_without_names / f"train/masks/{i}.png", np.full((16, 24), value, np.uint8))
    message = ("train/masks: the masks hold the values 0 100 200 (and perhaps 255, which does not count), but 1 does "
               "not occur; number the classes 0, 1, 2, ... without a gap")
    assert_refused(folder_without_names, message, capsys)
    for kind, size in (("images", (16, 24, 3)), ("masks", (16, 24))):
        save(folder_without_names / f"test/{kind}/0.png", np.zeros(size, np.uint8))
    assert_refused(folder_without_names, message, capsys)  # it is not the fault of the masks that were read last


# Masks that are not what they seem

YY, XX = np.mgrid[:96, :96]
DISC = 255 * ((YY - 40) ** 2 + (XX - 50) ** 2 < 30 ** 2).astype(np.uint8)


def resized(size, how):
    def resize(mask):
        return Image.fromarray(mask).resize(size, how)
    return resize


def blurred(mask):
    return Image.fromarray(mask).filter(ImageFilter.GaussianBlur(4))


def as_jpeg(mask):
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "JPEG", quality=80)
    return Image.open(content)


@pytest.mark.parametrize("object_value", [255, 120])
@pytest.mark.parametrize("classes", [2, 255])
@pytest.mark.parametrize("spoil", [
    resized((60, 60), Image.BILINEAR),
    resized((150, 200), Image.BICUBIC),
    resized((300, 300), Image.LANCZOS),
    blurred,
    as_jpeg,
])
def test_a_mask_with_the_values_of_interpolation_or_jpeg_is_named(spoil, classes, object_value, tmp_path):
    mask = np.minimum(DISC, object_value)
    spoilt = np.array(spoil(mask))
    message = "different values form lines one pixel wide, as after resizing with"
    with pytest.raises(image_files.DataError, match=message):
        mask_files.count_pixels(spoilt, tmp_path / "mask.png", classes)


def regions(classes):
    """(300,300): of each pixel the nearest of 600 points, which belong to classes drawn at random."""
    points = RNG.integers(0, 300, (600, 2))
    rows, columns = np.mgrid[:300, :300]
    nearest = np.full((300, 300), np.inf)
    mask = np.zeros((300, 300), np.uint8)
    for y, x in points:
        distance = (rows - y) ** 2 + (columns - x) ** 2
        closer = distance < nearest
        nearest[closer] = distance[closer]
        mask[closer] = RNG.integers(0, classes)
    return mask


def regions_on_a_background(classes):
    mask = regions(classes)
    mask[20:, 40:] = 0
    return mask


def all_classes_in_the_first_row(classes):
    mask = np.zeros((64, 200), np.uint8)
    mask[0, :classes] = np.arange(classes)
    return mask


def noise(classes):
    return RNG.integers(0, classes, (64, 64))


def stripes(classes):
    return np.arange(64 * 64).reshape(64, 64) % classes


@pytest.mark.parametrize("make", [regions, regions_on_a_background, all_classes_in_the_first_row, noise, stripes])
def test_a_mask_of_150_classes_is_taken(make, tmp_path):
    for mask in (make(150), make(150)[::3, ::3]):  # every third pixel, as after resizing with nearest neighbour
        found = mask_files.classes_in(mask_files.count_pixels(mask, tmp_path / "mask.png", 150))
        assert found == set(np.unique(mask).tolist())


BLACK, RED, BLUE = (0, 0, 0), (255, 0, 0), (0, 0, 255)


def save_indexed(path, mask, *colors):
    picture = Image.fromarray(mask)
    picture.putpalette(np.array(colors, np.uint8).tobytes())
    picture.save(path)


def add_a_fourth_channel(folder, channel):
    for path in sorted((folder / "train/images").iterdir()):
        with Image.open(path) as picture:
            color = np.array(picture)
        save(path, np.dstack([color, channel]))


def survey_folder(folder):
    survey(image_folder.open_folder(folder, deepglobe=False, seed=0), ["ground", "water", "house"])


def test_a_fourth_channel_that_is_left_out_as_transparency_is_named(folder):
    add_a_fourth_channel(folder, random_image((16, 24), channels=1))
    *_, line = said_by(survey_folder, folder)
    assert ".png: its last channel is taken for transparency and left out, also in other images; if it is" in line


def test_the_same_transparency_everywhere_needs_no_word(folder):
    add_a_fourth_channel(folder, np.full((16, 24), 255, np.uint8))
    *_, line = said_by(survey_folder, folder)
    assert "no val or test" in line


def test_palettes_that_do_not_agree_are_named(folder, capsys):
    mask = random_mask((16, 24), 2)
    save_indexed(folder / "train/masks/1.png", mask, BLACK, RED)
    save_indexed(folder / "train/masks/4.png", mask, BLACK, BLUE)
    message = "4.png: shows class 1 in the colour (0, 0, 255), but 1.png in (255, 0, 0); give all masks one palette"
    assert_refused(folder, message, capsys)


def test_palettes_need_only_agree_in_what_occurs(folder):
    mask = random_mask((16, 24), 2)
    save_indexed(folder / "train/masks/1.png", mask, BLACK, RED)
    save_indexed(folder / "train/masks/2.png", mask, BLACK, RED, BLUE)
    save_indexed(folder / "train/masks/3.png", zeros(16, 24), BLACK, BLUE)
    save(folder / "train/masks/4.png", mask, mode="P")  # a palette of the grey values themselves
    folders = image_folder.open_folder(folder, deepglobe=False, seed=0)
    known, _ = survey(folders, ["ground", "water", "house"])
    assert known["classes"] == ["ground", "water", "house"]


@pytest.mark.parametrize("content, message", [
    (b"a\na\nb\n", "classes.txt: holds 3 names, 2 of them different"),
    (b"\xff\xfe\xfa", "classes.txt: cannot be read"),
])
def test_names_of_classes_that_cannot_be_used_are_named(content, message, folder, capsys):
    (folder / "classes.txt").write_bytes(content)
    assert_refused(folder, message, capsys)


# The weights of the classes

def train_weighted(root, out, *weights):
    """What metrics.json says of a run with these weights and no epoch."""
    options = "--width 2 --depth 1 --comm-channels 0 --epochs 0 --batch-size 2 --dataset folder --data".split()
    train.main([*options, str(root), "--class-weights", *weights, "--out", str(out)])
    return json.loads((out / "metrics.json").read_text())


def test_balanced_class_weights_are_those_of_the_pixels_of_the_training_masks(tmp_path, no_pictures):
    make_folder(tmp_path / "data", 3, splits=("train", "val", "test"))
    for path in (tmp_path / "data/train/masks").iterdir():
        mask = np.zeros((16, 24), np.uint8)
        mask[:2] = 1
        mask[2] = 2
        mask[3] = 255
        save(path, mask)
    balanced = train_weighted(tmp_path / "data", tmp_path / "balanced", "balanced")
    inverse = np.array([1 / 12, 1 / 2, 1])  # of the rows
    np.testing.assert_allclose(balanced["config"]["loss_weights"], 3 * inverse / inverse.sum())
    given = train_weighted(tmp_path / "data", tmp_path / "given", "1", "6", "12")
    assert given["config"]["loss_weights"] == [1, 6, 12]
    assert given["val"]["loss"] == pytest.approx(balanced["val"]["loss"])
    plain = train_weighted(tmp_path / "data", tmp_path / "plain", "1", "1", "1")
    assert plain["val"]["loss"] != pytest.approx(balanced["val"]["loss"])
    assert plain["val"]["iou"] == balanced["val"]["iou"]
    assert plain["loss_of_training_images"] != balanced["loss_of_training_images"]


SIX_OF_16x24 = 6 * [(16, 24)]
SIX_OF_TWO_SIZES = 3 * [(16, 24), (24, 16)]


@pytest.mark.parametrize("sizes, options, message", [
    ([], "", "data: no such folder"),
    ([(16, 24)], "", "0.png: its 16 rows are too few to cut val and test out of it, 16 rows each; add training pairs"),
    (SIX_OF_TWO_SIZES, "", "images of several sizes need --batch-size 1 or --crop HxW"),
    (SIX_OF_16x24, "--crop 32", "16x24 pixels are fewer than --crop 32x32; take a smaller crop"),
    (6 * [(8, 8)], "", "2 rows of tiles: an image of 8x8 pixels in cells of 8x8 can have 1 to 1"),
    (6 * [(16, 16)], "--crop 8 --grid 2x2", "--crop: --grid 2x2 --overlap 0 --depth 3: 2 rows of tiles"),
    (SIX_OF_16x24, "--image-size 64", "--image-size is for --dataset synthetic"),
    (SIX_OF_16x24, "--dataset deepglobe", "data/train: no image"),
    (SIX_OF_16x24, "--class-weights 1 2", "--class-weights: 2 numbers, but there are 3 classes (class 0, class 1"),
    (SIX_OF_16x24, "--class-weights balanced 2", "--class-weights balanced 2.0: give balanced alone, or a number"),
    (SIX_OF_16x24, "--class-weights 0 0 0", "--class-weights 0.0 0.0 0.0: give balanced alone, or a number for each"),
    (SIX_OF_16x24, "--class-weights 1 -1 1", "'-1' is not a number of at least 0, nor the word balanced"),
])
def test_sizes_and_options_that_do_not_fit_are_named(sizes, options, message, tmp_path, capsys):
    for i, size in enumerate(sizes):
        save_pair(tmp_path / "data", "train", i, random_image(size), random_mask(size))
    assert_refused(tmp_path / "data", message, capsys, *options.split())


@pytest.mark.parametrize("epochs, line", [
    (0, ""),
    (3, "6 steps of training are few: take more --epochs or a smaller --batch-size"),
    (49, "98 steps of training are few"),
    (50, ""),
])
def test_a_training_of_few_steps_is_told(epochs, line, tmp_path, capsys):
    for split, count in (("train", 7), ("val", 1), ("test", 1)):
        for i in range(count):
            save_pair(tmp_path, split, i, random_image((16, 16)), random_mask((16, 16)))
    options = f"--dataset folder --data {tmp_path} --batch-size 4 --epochs {epochs}"
    datasets.describe(parse(options.split(), make_parser("")))
    said = capsys.readouterr().out
    assert line in said
    assert ("steps of training" in said) == bool(line)


def test_a_folder_that_is_not_deepglobe_is_told_of_its_layout(tmp_path, capsys):
    save_pair(tmp_path / "data", "train", "a", random_image((16, 16)), random_mask((16, 16)))
    message = "data/train: no image named ID_sat.jpg (and its mask ID_mask.png), as DeepGlobe is distributed"
    assert_refused(tmp_path / "data", message, capsys, "--dataset", "deepglobe")


@pytest.mark.parametrize("value", range(0, 256, 5))
def test_a_channel_that_is_the_same_everywhere_has_a_deviation_of_one(value):
    statistics = Statistics()
    statistics.add(np.full((1000, 1), value, np.uint8))
    mean, std = statistics.mean_and_std()
    assert mean == [pytest.approx(value / 255)]
    assert std == [1.0]


@pytest.mark.parametrize("dtype, named", [(np.uint8, False), (np.uint16, True)])
def test_a_value_far_outside_all_others_is_named_but_not_in_images_of_8_bits(dtype, named):
    dark = Extremes(1, dtype)
    dark.add(0, np.arange(10, dtype=dtype))
    both = Extremes(1, dtype)
    both.add(0, np.array([3, 255], dtype))
    both.add_all(dark)
    assert (find_outlier(both) is not None) == named
