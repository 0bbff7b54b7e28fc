"""Every format against arrays made here, and what a folder is taken to mean."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import train
from support import image_files, image_folder
from support.image_folder import ImageFolder
from support.survey import survey

RNG = np.random.default_rng(0)
GREY, COLOR = RNG.integers(0, 256, (12, 20), np.uint8), RNG.integers(0, 256, (12, 20, 3), np.uint8)
DEEP = RNG.integers(0, 2**16, (12, 20), np.uint16)
MASK = RNG.integers(0, 3, (12, 20), np.uint8)


def save(path, array, mode=None):
    """A PNG, JPEG or .npy file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        picture = Image.fromarray(array)
        (picture.convert(mode) if mode else picture).save(path)
    return path


def save_deep_color(path):
    """A black PNG of 16x24 pixels with 16 bits for each of red, green and blue, which Pillow cannot write."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(bytes(16 * (1 + 24 * 6)))) + chunk(b"IEND", b""))


def make_folder(root, pairs=12, size=(16, 24), channels=3, splits=("train",), classes=3):
    for split in splits:
        for i in range(pairs):
            save(root / split / f"images/{i}.png", RNG.integers(0, 256, (*size, channels), np.uint8).squeeze())
            save(root / split / f"masks/{i}.png", RNG.integers(0, classes, size, np.uint8))
    return root


def make_deepglobe(root, names, size=(24, 32)):
    """DeepGlobe's layout, with colours that are not pure; returns the masks as indices."""
    masks, colors = {}, 255 * np.array(list(image_files.DEEPGLOBE.values()))
    for name in names:
        index = RNG.integers(0, 7, size)
        masks[name] = np.where(index == 6, 255, index)
        wobble = RNG.integers(-100, 101, (*size, 3))
        save(root / f"train/{name}_mask.png", np.clip(colors[index] + wobble, 0, 255).astype(np.uint8))
        save(root / f"train/{name}_sat.jpg", RNG.integers(0, 256, (*size, 3), np.uint8))
    return masks


# One file

@pytest.mark.parametrize("name, array, mode, expected", [
    ("grey.png", GREY, None, GREY[..., None]), ("color.png", COLOR, None, COLOR), ("deep.png", DEEP, None, DEEP[..., None]),
    ("alpha.png", np.dstack([COLOR, GREY]), None, COLOR), ("grey alpha.png", GREY, "LA", GREY[..., None]),
    ("palette.png", GREY, "P", np.dstack([GREY] * 3)), ("flat.npy", DEEP, None, DEEP[..., None]),
    ("channels.npy", RNG.random((12, 20, 5)), None, None), ("two.npy", GREY > 99, None, (GREY > 99)[..., None])])
def test_an_image_is_what_was_saved(name, array, mode, expected, tmp_path):
    image = image_files.read_image(save(tmp_path / name, array, mode))
    expected = array if expected is None else expected
    assert image.dtype == expected.dtype and np.array_equal(image, expected)


def test_a_jpeg_is_close_to_what_was_saved(tmp_path):
    smooth = np.add.outer(np.arange(32), 2 * np.arange(48)).astype(np.uint8)
    for name, array in (("grey.jpg", smooth), ("color.JPEG", np.dstack([smooth] * 3))):
        image = image_files.read_image(save(tmp_path / name, array))
        assert image.shape == (*smooth.shape, 3 if array.ndim == 3 else 1)
        assert abs(image.astype(int) - array.reshape(image.shape)).mean() < 3


@pytest.mark.parametrize("name, mode", [("mask.png", None), ("mask.png", "P"), ("mask.npy", None)])
@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_a_mask_is_the_indices_that_were_saved(name, mode, kind, tmp_path):
    array = MASK if name.endswith("png") else MASK.astype(kind)
    assert np.array_equal(image_files.read_mask(save(tmp_path / name, array, mode)), MASK)


def test_what_cameras_and_file_managers_do_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    (tmp_path / "a").mkdir()
    Image.fromarray(GREY).save(tmp_path / "a/turned.PNG", exif=exif)
    (tmp_path / "a/._turned.png").write_text("of a file manager")
    save(tmp_path / "a/array.npy", GREY).rename(tmp_path / "a/array.NPY")
    found = image_folder.find_files(tmp_path / "a")
    assert set(found) == {"turned", "array"}
    assert np.array_equal(image_files.read_image(found["turned"])[..., 0], GREY[::-1, ::-1])
    assert np.array_equal(image_files.read_image(found["array"])[..., 0], GREY)


def test_the_palette_of_a_mask_is_not_its_classes(tmp_path):
    picture = Image.fromarray(MASK)
    picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    picture.save(tmp_path / "mask.png")
    assert np.array_equal(image_files.read_mask(tmp_path / "mask.png"), MASK)


def test_deepglobe_colours_are_cut_at_128_and_unknown_does_not_count(tmp_path):
    masks = make_deepglobe(tmp_path, ["1"])
    assert np.array_equal(image_files.read_deepglobe_mask(tmp_path / "train/1_mask.png"), masks["1"])
    red = save(tmp_path / "red.png", np.full((2, 2, 3), (200, 90, 90), np.uint8))
    assert (image_files.read_deepglobe_mask(red) == 255).all()
    with pytest.raises(image_files.DataError, match="for class indices take --dataset folder"):
        image_files.read_deepglobe_mask(save(tmp_path / "grey.png", MASK))


def test_an_array_is_mapped_and_read_where_it_is_touched(tmp_path):
    """The one image of the folder claims 16 GiB, in a file with holes: whoever reads it whole fails or takes minutes."""
    image = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (2**17, 2**17))
    image[-64:, -64:] = 7
    image.flush()
    mask = np.lib.format.open_memmap(tmp_path / "b.npy", "w+", np.uint8, (2**17, 2**17))
    del mask
    image, mask = ImageFolder([(tmp_path / "a.npy", tmp_path / "b.npy")])[0]
    assert image.shape == (1, 2**17, 2**17) and image.dtype == torch.uint8
    assert (image[..., -32:, -32:] == 7).all() and image[..., :32, :32].sum() == 0
    cropped, _ = ImageFolder([(tmp_path / "a.npy", tmp_path / "b.npy")], crop=(32, 48), augment=True)[0]
    assert cropped.shape == (1, 32, 48)


# A folder

def test_pairs_are_found_by_name_whatever_the_format(tmp_path):
    save(tmp_path / "train/images/a.jpg", COLOR), save(tmp_path / "train/masks/a.png", MASK)
    save(tmp_path / "train/images/b.npy", COLOR), save(tmp_path / "train/masks/b.npy", MASK)
    (tmp_path / "train/images/notes.txt").write_text("not an image")
    make_folder(tmp_path, 1, splits=("val", "test"))
    split = image_folder.find_pairs(tmp_path, seed=0)
    assert [(i.name, m.name) for i, m in split["train"]] == [("a.jpg", "a.png"), ("b.npy", "b.npy")]
    assert len(split["val"]) == len(split["test"]) == 1


def test_without_val_and_test_the_seed_splits_the_training_pairs(tmp_path, capsys):
    make_folder(tmp_path, 20, splits=("train", "val"))
    one, same, other = (image_folder.find_pairs(tmp_path, seed) for seed in (0, 0, 1))
    assert one == same and one["test"] != other["test"]
    assert {name: len(pairs) for name, pairs in one.items()} == {"train": 18, "val": 20, "test": 2}
    assert not set(one["train"]) & set(one["test"])
    assert "no test, so 2 of the training pairs" in capsys.readouterr().out


def test_deepglobe_uses_the_split_of_the_literature_where_it_knows_all_images(tmp_path, capsys):
    listed = dict(line.split() for line in image_folder.SPLIT_OF_THE_LITERATURE.read_text().splitlines())
    assert [list(listed.values()).count(name) for name in image_folder.SPLITS] == [454, 207, 142]
    names = [name for split in image_folder.SPLITS for name in [n for n, s in listed.items() if s == split][:2]]
    make_deepglobe(tmp_path / "known", names)
    split = image_folder.find_deepglobe(tmp_path / "known", seed=0)
    assert {name: [pair[0].name.split("_")[0] for pair in pairs] for name, pairs in split.items()} == {
        split: sorted(n for n in names if listed[n] == split) for split in image_folder.SPLITS}
    assert "split of the literature" in capsys.readouterr().out
    make_deepglobe(tmp_path / "unknown", [*names, "stranger"])
    assert {name: len(pairs) for name, pairs in image_folder.find_deepglobe(tmp_path / "unknown", 0).items()} == {
        "train": 5, "val": 1, "test": 1}


def test_crops_and_turns_keep_image_and_mask_together(tmp_path):
    save(tmp_path / "a.png", GREY), save(tmp_path / "b.png", GREY // 100)
    seen = set()
    for size in ((8, 8), (6, 10)):
        data = ImageFolder([(tmp_path / "a.png", tmp_path / "b.png")], crop=size, augment=True)
        for _ in range(40):
            image, mask = data[0]
            assert image.shape == (1, *size) and torch.equal(image[0] // 100, mask)
            seen.add(image.numpy().tobytes())
    assert len(seen) > 60
    whole = ImageFolder([(tmp_path / "a.png", tmp_path / "b.png")], augment=True)
    assert {whole[0][0].numpy().tobytes() for _ in range(40)} == {
        array.tobytes() for array in (GREY, GREY[::-1], GREY[:, ::-1], GREY[::-1, ::-1])}


# One look at all of it

def folders(root, **options):
    return {split: ImageFolder(pairs, **options) for split, pairs in image_folder.find_pairs(root, seed=0).items()}


def test_the_survey_tells_channels_classes_sizes_and_the_statistics_of_the_training_images(tmp_path):
    make_folder(tmp_path, 3), make_folder(tmp_path, 2, size=(20, 16), splits=("val", "test"))
    known, sizes = survey(folders(tmp_path), None)
    images = np.concatenate([np.array(Image.open(path)).reshape(-1, 3) for path in (tmp_path / "train/images").iterdir()])
    assert known["channels"] == 3 and known["classes"] == ["class 0", "class 1", "class 2"] and list(sizes) == [(16, 24)]
    np.testing.assert_allclose(known["mean"], images.mean(axis=0) / 255)
    np.testing.assert_allclose(known["std"], images.std(axis=0) / 255)


def replace(path, suffix, array):
    path.unlink()
    save(path.with_suffix(suffix), array)


def every(kind, change):
    return lambda image, mask: [change(i, path) for i, path in enumerate(sorted(image.parents[1].glob(f"{kind}/*")))]


def names(content):
    return lambda image, mask: (image.parents[2] / "classes.txt").write_bytes(content)


FAULTS = [  # what is done to an image, its mask or their folder, and what must be said of it
    (every("images", lambda i, path: path.unlink()), "no image (.png, .jpg, .jpeg, .npy)"),
    (lambda image, mask: mask.unlink(), "3.png: there is no mask named 3"),
    (lambda image, mask: image.unlink(), "3.png: there is no image named 3"),
    (lambda image, mask: mask.parent.rename(mask.parents[1] / "mask"), "train/masks: no such folder"),
    (lambda image, mask: save(image.with_suffix(".jpg"), COLOR), "has the same name; keep one of the two"),
    (lambda image, mask: save(mask, MASK), "3.png: 16x24 pixels, but its mask 3.png has 12x20"),
    (lambda image, mask: image.write_bytes(image.read_bytes()[:200]), "3.png: cannot be read"),
    (lambda image, mask: image.write_text("I am a picture"), "3.png: cannot be read (no PNG or JPEG)"),
    (lambda image, mask: mask.write_bytes(b""), "3.png: cannot be read"),
    (lambda image, mask: save(mask, np.full((16, 24), 7, np.uint8)), "3.png: holds the value 7; a mask holds 0 to 2, or 255"),
    (lambda image, mask: save(mask, np.zeros((16, 24, 3), np.uint8)),
     "3.png: a mask in colour or with transparency (RGB) where class indices were expected; for DeepGlobe take --dataset deepglobe"),
    (lambda image, mask: replace(mask, ".jpg", np.zeros((16, 24), np.uint8)), "a JPEG changes the values of a mask"),
    (lambda image, mask: replace(mask, ".npy", np.zeros((16, 24))), "a mask of float64 where whole numbers were expected"),
    (lambda image, mask: replace(mask, ".npy", np.full((16, 24), -1)), "holds the value -1"),
    (lambda image, mask: save(image, np.zeros((16, 24), np.uint8)), "1-channel uint8, but 0.png is 3-channel uint8"),
    (lambda image, mask: save(image, np.zeros((16, 24), np.uint16)), "1-channel uint16"),
    (lambda image, mask: save_deep_color(image), "a PNG of 16 bits in more than one channel"),
    (lambda image, mask: replace(image, ".npy", np.zeros((3, 16, 124), np.uint8)), "save array.transpose(1, 2, 0)"),
    (lambda image, mask: replace(image, ".npy", np.zeros(24, np.uint8)), "(H,W) or (H,W,C) was expected"),
    (lambda image, mask: replace(image, ".npy", np.array([{}])), "3.npy: cannot be read as an array"),
    (lambda image, mask: replace(image, ".npy", np.zeros((16, 24), "c16")), "numbers were expected"),
    (lambda image, mask: replace(image, ".npy", np.zeros((16, 24), "g")), "numbers were expected"),
    (lambda image, mask: image.rename(image.with_suffix(".tif")), "3.tif: only PNG, JPEG and .npy can be read"),
    (lambda image, mask: image.rename(image.with_suffix(".npy")), "3.npy: cannot be read as an array"),
    (every("images", lambda i, path: replace(path, ".npy", np.full((16, 24), [0.0, np.nan][i == 3]))), "holds nan, inf"),
    (every("images", lambda i, path: replace(path, ".npy", np.full((16, 24), 1e39))), "holds nan, inf or numbers beyond"),
    (lambda image, mask: replace(image, ".npy", np.zeros((3, 16, 24), np.uint8)), "save array.transpose(1, 2, 0)"),
    (every("masks", lambda i, path: save(path, np.pad([[0]], ((0, 15), (0, 23)), constant_values=255).astype(np.uint8))),
     "know a single class"),
    (every("masks", lambda i, path: save(path, np.full((16, 24), 255, np.uint8))), "no pixel of the masks for train counts"),
    (every("masks", lambda i, path: save(path, np.full((16, 24), [0, 100, 200][i % 3], np.uint8))),
     "the masks go up to 200, but 1 does not occur; number the classes 0, 1, 2, ... without a gap"),
    (names(b"a\na\nb\n"), "classes.txt: holds 3 names, 2 of them different"),
    (names(b"\xff\xfe\xfa"), "classes.txt: cannot be read")]


@pytest.mark.parametrize("spoil, message", FAULTS)
def test_what_cannot_be_used_is_named_in_one_line(spoil, message, tmp_path, capsys):
    make_folder(tmp_path / "data", 6)
    if "single class" not in message and "without a gap" not in message:
        (tmp_path / "data/classes.txt").write_text("ground\nwater\n\nhouse\n")
    spoil(*(tmp_path / f"data/train/{kind}/3.png" for kind in ("images", "masks")))
    refused(["--dataset", "folder", "--data", str(tmp_path / "data")], message, tmp_path, capsys)


def refused(arguments, message, tmp_path, capsys):
    """train.py says one line that holds `message`, ends with status 2, and writes nothing."""
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sizes, options, message", [
    ([], "", "data/train/images: no such folder"),
    ([(16, 24)], "", "1 training pairs are too few to take val and test from"),
    ([(16, 24), (24, 16)] * 3, "", "images of several sizes need --batch-size 1 or --crop HxW"),
    ([(16, 24)] * 6, "--crop 32", "16x24 pixels are fewer than --crop 32x32; take a smaller crop"),
    ([(8, 8)] * 6, "", "2 rows of tiles: an image of 8x8 pixels in cells of 8x8 can have 1 to 1"),
    ([(16, 16)] * 6, "--crop 8 --grid 2x2", "--crop: --grid 2x2 --overlap 0 --depth 3: 2 rows of tiles"),
    ([(16, 24)] * 6, "--image-size 64", "--image-size is for --dataset synthetic"),
    ([(16, 24)] * 6, "--dataset deepglobe", "data/train: no image")])
def test_sizes_and_options_that_do_not_fit_are_named_in_one_line(sizes, options, message, tmp_path, capsys):
    for i, size in enumerate(sizes):
        make_folder(tmp_path / f"{i}", 1, size=size)
        for kind in ("images", "masks"):
            (tmp_path / f"data/train/{kind}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{i}/train/{kind}/0.png").rename(tmp_path / f"data/train/{kind}/{i}.png")
    refused(["--dataset", "folder", "--data", str(tmp_path / "data"), *options.split()], message, tmp_path, capsys)
