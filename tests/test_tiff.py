"""TIFF, as far as Pillow reads it, against arrays made here. Pillow writes few kinds, so some are written by hand."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_image_folder import COLOR, GREY, MASK, assert_refused, make_folder, replace, save
from test_predict import SMALL, read_picture, run

import train
from support.image_files import DataError, read_image
from support.mask_files import read_mask

LONG = 4  # the type of a tag of 32 bits
FORMAT = {"u": 1, "i": 2, "f": 3}


def write_tiff(path, array, tile=None, deflate=False, order="<", planes=False, color=True):
    """A TIFF of an array (H,W) or (H,W,C) of any type.

    tile: side of the tiles, else all of it is one strip; order: ">" for the high byte first;
    planes: one channel after the other; color: whether the first of several channels are red, green
    and blue.
    """
    height, width = array.shape[:2]
    array = array.reshape(height, width, -1)
    channels = array.shape[2]
    stored = array.astype(array.dtype.newbyteorder(order))
    if tile is not None:
        parts = cut(stored, tile)
    elif planes:
        parts = [stored[..., channel].tobytes() for channel in range(channels)]
    else:
        parts = [stored.tobytes()]
    if deflate:
        parts = [zlib.compress(part) for part in parts]
    sizes = [len(part) for part in parts]
    places = [8 + sum(sizes[:i]) for i in range(len(sizes))]
    tags = {
        256: [width],
        257: [height],
        258: [8 * array.itemsize] * channels,
        259: [8 if deflate else 1],
        262: [2 if channels > 1 and color else 1],
        277: [channels],
        284: [2 if planes else 1],
        339: [FORMAT[array.dtype.kind]] * channels,
    }
    if tile is not None:
        tags |= {322: [tile], 323: [tile], 324: places, 325: sizes}
    else:
        tags |= {273: places, 278: [height], 279: sizes}
    if channels > 3:
        tags[338] = [0] * (channels - 3)
    path.write_bytes(tiff_bytes(order, b"".join(parts), tags))
    return path


def cut(array, tile):
    """The bytes of the tiles of an array (H,W,C), those at its ends filled up with zeros."""
    height, width, channels = array.shape
    parts = []
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            inside = array[top:top + tile, left:left + tile]
            part = np.zeros((tile, tile, channels), array.dtype)
            part[:inside.shape[0], :inside.shape[1]] = inside
            parts.append(part.tobytes())
    return parts


def tiff_bytes(order, pixels, tags):
    """Header, pixels, tags, and then the values of the tags that have several."""
    start = 8 + len(pixels)
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    entries = struct.pack(order + "H", len(tags))
    values_at = start + 2 + 12 * len(tags) + 4
    values = b""
    for tag in sorted(tags):
        count = len(tags[tag])
        content = struct.pack(f"{order}{count}I", *tags[tag])
        if count > 1:
            place = struct.pack(order + "I", values_at + len(values))
            values += content
            content = place
        entries += struct.pack(order + "HHI", tag, LONG, count) + content
    return header + pixels + entries + struct.pack(order + "I", 0) + values


def numbers(kind, *shape):
    return (100 * np.random.default_rng(0).random(shape)).astype(kind)


# Images

@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
def test_grey_numbers_of_any_type_are_those_that_were_saved(kind, tile, order, tmp_path):
    expected = numbers(kind, 20, 40)
    image = read_image(write_tiff(tmp_path / "a.tif", expected, tile, order=order))
    assert image.dtype == kind
    assert np.array_equal(image[..., 0], expected)


@pytest.mark.parametrize("tile, deflate, planes", [(None, False, True), (16, False, False), (16, True, False)])
def test_colours_are_those_that_were_saved(tile, deflate, planes, tmp_path):
    image = read_image(write_tiff(tmp_path / "a.tiff", COLOR, tile, deflate, planes=planes))
    assert image.dtype == np.uint8
    assert np.array_equal(image, COLOR)


@pytest.mark.parametrize("array", [GREY, COLOR, GREY.astype(np.uint16) * 200, GREY.astype(np.float32) / 7])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_compressed_image_is_what_was_saved(compression, array, tmp_path):
    Image.fromarray(array).save(tmp_path / "a.tif", compression=compression)
    image = read_image(tmp_path / "a.tif")
    assert image.dtype == array.dtype
    assert np.array_equal(image.squeeze(), array)


def test_a_smaller_copy_of_the_image_is_no_page_of_its_own(tmp_path):
    smaller = Image.fromarray(GREY[::2, ::2])
    smaller.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(GREY).save(tmp_path / "a.tif", save_all=True, append_images=[smaller])
    with Image.open(tmp_path / "a.tif") as picture:
        assert picture.n_frames == 2
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], GREY)


def test_an_image_of_many_pixels_is_neither_refused_nor_warned_of(tmp_path, recwarn):
    path = write_tiff(tmp_path / "a.tif", GREY)
    content = path.read_bytes()
    for tag in (257, 278):  # the rows of the image, and those of a strip
        claim = struct.pack("<HHII", tag, LONG, 1, 10_000_000)  # of 20 pixels; Pillow by itself refuses 179 million
        content = content.replace(struct.pack("<HHII", tag, LONG, 1, 12), claim)
    path.write_bytes(content)
    # In the words of several versions of Pillow.
    missing_rows = "cannot be read .*(truncated|buffer is not large enough)"
    with pytest.raises(DataError, match=missing_rows):
        read_image(path)
    assert not recwarn


# What Pillow does not read, or reads as something else

def save_pages(path):
    Image.fromarray(GREY).save(path, save_all=True, append_images=[Image.fromarray(GREY)])


def save_four_bands(path):
    write_tiff(path, numbers(np.uint8, 12, 20, 4))


def save_five_bands(path):
    write_tiff(path, numbers(np.uint16, 12, 20, 5), color=False)


def save_colours_of_16_bits(path):
    write_tiff(path, numbers(np.uint16, 12, 20, 3))


def save_planes_of_16_bits(path):
    write_tiff(path, numbers(np.uint16, 12, 20, 3), planes=True)


def save_float64(path):
    write_tiff(path, numbers(np.float64, 12, 20))


def save_signed_bytes(path):
    write_tiff(path, -numbers(np.int8, 12, 20))


def save_compressed_with_the_high_byte_first(path):
    write_tiff(path, numbers(np.float32, 12, 20), deflate=True, order=">")


@pytest.mark.parametrize("save_some, cause", [
    (save_pages, "a TIFF of 2 pages, of which Pillow reads one"),
    (save_four_bands, "a TIFF of 4 bands, of which Pillow reads 3"),
    (save_five_bands, "of a kind that Pillow does not read"),
    (save_colours_of_16_bits, "a TIFF of 3 bands of more than 8 bits"),
    (save_planes_of_16_bits, "a TIFF of 3 bands of more than 8 bits"),
    (save_float64, "of a kind that Pillow does not read"),
    (save_signed_bytes, "signed bytes"),
    (save_compressed_with_the_high_byte_first, "a compressed TIFF with the high byte first"),
])
def test_a_tiff_that_would_not_be_read_as_it_is_is_named_with_the_way_to_an_array(save_some, cause, tmp_path):
    path = tmp_path / "a.tif"
    save_some(path)
    with pytest.raises(DataError) as refused:
        read_image(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert cause in message
    assert f"import numpy, tifffile; numpy.save('{tmp_path / 'a.npy'}', tifffile.imread('{path}'))" in message


def test_a_tiff_that_was_cut_off_is_named(tmp_path, capsys):
    make_folder(tmp_path / "data", 6)
    path = tmp_path / "data/train/images/3.tif"
    Image.fromarray(COLOR).save(path)
    path.with_suffix(".png").unlink()
    path.write_bytes(path.read_bytes()[:300])
    assert_refused(tmp_path / "data", "3.tif: cannot be read", capsys)


# Masks

@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_a_mask_is_the_indices_that_were_saved(kind, tmp_path):
    path = write_tiff(tmp_path / "mask.tif", MASK.astype(kind), tile=16)
    assert np.array_equal(read_mask(path), MASK)


def test_a_mask_that_was_compressed_as_jpeg_is_named(tmp_path):
    Image.fromarray(MASK).save(tmp_path / "mask.tif", compression="jpeg")
    with pytest.raises(DataError, match="JPEG changes the values of a mask"):
        read_mask(tmp_path / "mask.tif")


# To train on, and to predict

def test_a_network_that_has_learned_from_tiffs_writes_png_masks_for_them(tmp_path, no_pictures):
    make_folder(tmp_path / "data", 6)
    for path in sorted(tmp_path.glob("data/train/*/*.png")):
        replace(path, ".tif", read_picture(path))
    train.main([*SMALL, "--dataset", "folder", "--data", str(tmp_path / "data"), "--workers", "0",
                "--out", str(tmp_path / "run")])
    image = save(tmp_path / "new.tif", COLOR)
    assert run(tmp_path / "run/best.pt", image, "--out", tmp_path / "out") == 0
    assert read_picture(tmp_path / "out/new.png").shape == (12, 20)
    assert read_picture(tmp_path / "out/new-overlay.png").shape == (12, 20, 3)
