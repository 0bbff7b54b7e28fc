"""One image or one mask of every kind, against arrays made here, and what their numbers mean."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_folder import COLOR, DEEP, GREY, MASK, RNG, random_mask, save

from support import images
from support.images import DataError, check_values, merge, normalise, read_image, read_mask, statistics

LONG = 4  # the type of a tag of 32 bits
FORMAT = {"u": 1, "i": 2, "f": 3}


# Files that Pillow cannot write

# Of a single pixel: grey of 2 bits, and colours of 16 bits
GREY_OF_2_BITS = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000100000001020000000070ce83f40000000a49444154789c6370000000"
    "4200412937f4ef0000000049454e44ae426082"
)
COLOURS_OF_16_BITS = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000000f49444154789c6360606462"
    "66610500002a00101acc8c240000000049454e44ae426082"
)


def write_tiff(path, array, deflate=False, order="<", more=b"", tags=None):
    """A TIFF of an array (H,W) or (H,W,C) of any type, in one strip.

    order: ">" for the high byte first; more: what follows the pixels; tags: those that shall be others.
    """
    height, width = array.shape[:2]
    channels = array.size // (height * width)
    pixels = array.astype(array.dtype.newbyteorder(order)).tobytes()
    if deflate:
        pixels = zlib.compress(pixels)
    all_tags = {
        256: [width],
        257: [height],
        258: [8 * array.itemsize] * channels,
        259: [8 if deflate else 1],
        262: [2 if channels > 1 else 1],
        273: [8],
        277: [channels],
        278: [height],
        279: [len(pixels)],
        339: [FORMAT[array.dtype.kind]] * channels,
    }
    if channels > 3:
        all_tags[338] = [0] * (channels - 3)
    path.write_bytes(tiff_bytes(order, pixels + more, all_tags | (tags or {})))
    return path


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


def save_turned(path, array, orientation):
    """A picture of which a camera says how it was held."""
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    Image.fromarray(array).save(path, exif=exif)
    return path


# Images

@pytest.mark.parametrize("name, array", [
    ("grey.png", GREY),
    ("deep.png", DEEP),
    ("two values.npy", GREY > 99),
    ("high byte first.npy", DEEP.astype(">u2")),
    ("color.png", COLOR),
    ("color.ppm", COLOR),
    ("channels.npy", RNG.random((12, 20, 100))),
])
def test_an_image_is_what_was_saved_and_has_channels(name, array, tmp_path):
    image = read_image(save(tmp_path / name, array))
    assert image.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(torch.from_numpy(image), array.reshape(12, 20, -1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("kind, largest", [
    (np.uint8, 255),
    (np.uint16, 65535),
    (np.int16, -32768),
    (np.int32, -2**31),
    (np.float32, -1e30),
])
def test_a_grey_tiff_of_any_type_is_what_was_saved_or_refused(kind, largest, deflate, order, tmp_path):
    expected = numbers(kind, 32, 48)
    expected[0, 0] = largest
    path = write_tiff(tmp_path / "a.tif", expected, deflate, order)
    if order == ">" and kind not in (np.uint8, np.uint16):
        with pytest.raises(DataError, match="a.tif: cannot be read"):
            read_image(path)
    else:
        assert np.array_equal(read_image(path)[..., 0], expected)


@pytest.mark.parametrize("compression, array", [
    ("tiff_lzw", COLOR),
    ("tiff_adobe_deflate", DEEP),
])
def test_a_compressed_tiff_is_what_was_saved(compression, array, tmp_path):
    Image.fromarray(array).save(tmp_path / "a.tif", compression=compression)
    image = read_image(tmp_path / "a.tif")
    assert image.dtype == array.dtype
    assert np.array_equal(image.squeeze(), array)


@pytest.mark.parametrize("name, mode", [
    ("grey.jpg", "L"),
    ("color.JPEG", "RGB"),
    ("for print.jpg", "CMYK"),
    ("aerial.tif", "RGB"),
])
def test_a_jpeg_is_close_to_what_was_saved(name, mode, tmp_path):
    smooth = np.tile(np.arange(48, dtype=np.uint8), (32, 1))  # without edges, which a JPEG blurs
    Image.fromarray(smooth).convert(mode).save(tmp_path / name, compression="jpeg")
    image = read_image(tmp_path / name)
    assert image.shape == (32, 48, 1 if mode == "L" else 3)
    assert np.abs(image - smooth[..., None].astype(int)).mean() < 3


def save_colours_with(alpha, path):
    save(path, np.dstack([COLOR, alpha]))


def save_a_palette_with(alpha, path):
    Image.fromarray(GREY).convert("P").save(path, transparency=np.resize(alpha, 256).tobytes())


@pytest.mark.parametrize("save_with, expected", [
    (save_colours_with, COLOR),
    (save_a_palette_with, np.dstack([GREY, GREY, GREY])),
])
def test_a_band_of_transparency_is_left_out_only_if_it_is_the_same_everywhere(save_with, expected, tmp_path):
    save_with(np.full_like(GREY, 200), tmp_path / "constant.png")
    assert np.array_equal(read_image(tmp_path / "constant.png"), expected)
    save_with(RNG.permutation(GREY), tmp_path / "varying.png")
    with pytest.raises(DataError, match="varying.png: .*its last band, transparency or infrared, is not the same"):
        read_image(tmp_path / "varying.png")


@pytest.mark.parametrize("orientation, expected", [(1, MASK), (3, MASK[::-1, ::-1]), (6, np.rot90(MASK, -1))])
def test_an_image_and_its_mask_are_turned_alike_and_a_line_tells_it(orientation, expected, tmp_path, capsys):
    images.warn_once.cache_clear()
    path = save_turned(tmp_path / "turned.png", MASK, orientation)
    assert np.array_equal(read_image(path)[..., 0], expected)
    assert np.array_equal(read_mask(path), expected)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["images and masks are turned as their EXIF data says"] * (orientation != 1)


# Masks

@pytest.mark.parametrize("name, saved", [
    ("mask.png", MASK),
    ("mask.tif", MASK),
    ("mask.png", np.dstack([MASK, MASK, MASK])),
    ("mask.npy", MASK[..., None]),
    ("mask.npy", MASK.astype(">i4")),
])
def test_a_mask_is_the_indices_that_were_saved(name, saved, tmp_path):
    mask = read_mask(save(tmp_path / name, saved))
    assert mask.shape == MASK.shape
    assert np.array_equal(mask, MASK)


@pytest.mark.parametrize("bits, classes", [(1, 2), (4, 16), (8, 200)])
def test_a_mask_with_a_palette_is_its_indices(bits, classes, tmp_path):
    mask = random_mask((12, 21), classes)
    picture = Image.fromarray(mask)
    picture.putpalette([200, 10, 10] * classes)
    picture.save(tmp_path / "mask.png", bits=bits)
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)


def save_as_jpeg(path):
    Image.fromarray(MASK).save(path, format="JPEG")


def save_as_several_jpegs(path):
    picture = Image.fromarray(MASK)
    picture.save(path, format="MPO", save_all=True, append_images=[picture])


def save_as_jpeg_in_a_tiff(path):
    Image.fromarray(MASK).save(path, format="TIFF", compression="jpeg")


@pytest.mark.parametrize("save_some", [save_as_jpeg, save_as_several_jpegs, save_as_jpeg_in_a_tiff])
def test_a_mask_in_a_jpeg_is_refused_but_an_image_is_not(save_some, tmp_path):
    save_some(tmp_path / "mask.jpg")
    assert read_image(tmp_path / "mask.jpg").shape == (12, 20, 1)
    with pytest.raises(DataError, match="mask.jpg: cannot be read .JPEG has changed the numbers of this mask"):
        read_mask(tmp_path / "mask.jpg")


@pytest.mark.parametrize("name, mask, message", [
    ("a.npy", MASK.astype(float), "a mask of shape .12, 20. and type float64, where whole numbers"),
    ("a.npy", np.eye(3)[MASK].astype(np.uint8), "of a one-hot mask mask.argmax.axis=2"),
    ("a.png", COLOR, "a mask of shape .12, 20, 3. and type uint8"),
    ("a.png", np.dstack([MASK, MASK, MASK, GREY]), "its last band, transparency or infrared"),
])
def test_a_mask_of_another_kind_is_refused(name, mask, message, tmp_path):
    path = save(tmp_path / name, mask)
    with pytest.raises(DataError, match=f"{name}: .*{message}"):
        read_mask(path)


@pytest.mark.parametrize("value, classes", [(255, 3), (254, 255)])
def test_pixels_are_counted(value, classes):
    mask = np.array([[0, 0, 1], [1, 0, value]])
    assert images.count_pixels(mask, "a.png", classes) == {0: 3, 1: 2, value: 1}


@pytest.mark.parametrize("value", [3, 256, -1])
def test_a_pixel_that_is_no_class_is_refused(value):
    with pytest.raises(DataError, match=f"a.png: holds the value {value}, but a mask holds the classes 0 to 2"):
        images.count_pixels(np.array([[0, value]]), "a.png", 3)


# What is not read, or only in part, or as something else

def save_text(path):
    path.write_text("I am a picture")


def save_a_half(path):
    save(path.with_suffix(".png"), COLOR)
    path.write_bytes(path.with_suffix(".png").read_bytes()[:300])


def save_a_broken_exif_tag(path):
    Image.fromarray(GREY).save(path, format="PNG", exif=b"Exif\0\0nonsense")


def save_grey_of_2_bits(path):
    path.write_bytes(GREY_OF_2_BITS)


def save_colours_of_16_bits(path):
    path.write_bytes(COLOURS_OF_16_BITS)


def save_a_pgm_of_another_white(path):
    path.write_bytes(b"P5 4 1 2\n\0\1\2\1")


def save_a_pgm_of_16_bits(path):
    Image.fromarray(DEEP).save(path, format="PPM")


def save_an_animation(path):
    picture = Image.fromarray(GREY)
    picture.save(path, format="PNG", save_all=True, append_images=[Image.fromarray(GREY + 1)])


@pytest.mark.parametrize("save_some", [
    save_text,
    save_a_half,
    save_a_broken_exif_tag,
    save_grey_of_2_bits,
    save_colours_of_16_bits,
    save_a_pgm_of_another_white,
    save_a_pgm_of_16_bits,
    save_an_animation,
])
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_a_picture_that_would_not_be_read_as_it_is_is_refused_in_one_line(read, save_some, tmp_path):
    save_some(tmp_path / "a.pgm")
    with pytest.raises(DataError) as refused:
        read(tmp_path / "a.pgm")
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'a.pgm'}: cannot be read (")
    assert "replace it, or save it as .npy" in message
    assert "\n" not in message


@pytest.mark.parametrize("array, message", [
    (np.zeros(24), "an array of float64 and shape .24,."),
    (np.array([{}]), "Python objects"),
    (np.zeros((2, 2), complex), "an array of complex128"),
])
def test_an_array_that_is_no_image_is_refused(array, message, tmp_path):
    with pytest.raises(DataError, match=f"a.npy: cannot be read .*{message}"):
        read_image(save(tmp_path / "a.npy", array))


def save_pages(path):
    Image.fromarray(GREY).save(path, save_all=True, append_images=[Image.fromarray(GREY)])


def save_four_bands(path):
    write_tiff(path, numbers(np.uint8, 12, 20, 4))


def save_deep_colours(path):
    write_tiff(path, numbers(np.uint16, 12, 20, 3))


def save_unsigned_32_bits(path):
    """Pillow would make the largest numbers negative."""
    write_tiff(path, numbers(np.uint32, 12, 20))


def save_signed_bytes(path):
    write_tiff(path, -numbers(np.int8, 12, 20))


def save_white_as_0(path):
    write_tiff(path, GREY, tags={262: [0]})


def save_a_stack_of_imagej(path):
    """One directory, of the first plane alone."""
    plane = numbers(np.uint8, 32, 32)
    write_tiff(path, plane, more=plane.tobytes())


def save_turned_upright(path):
    """Without compression, Pillow reads rows of the wrong length."""
    save_turned(path, GREY, orientation=6)


def save_a_volume(path):
    """As tifffile writes it: one directory, with a depth."""
    write_tiff(path, numbers(np.uint8, 24, 20), deflate=True, tags={257: [12], 32997: [2]})


def save_without_its_last_strip(path):
    """As GDAL leaves it out where all of it is 0."""
    write_tiff(path, numbers(np.uint8, 16, 32), tags={278: [8], 273: [8, 0], 279: [256, 0]})


NOT_ONE_PLANE = "a TIFF of several planes, with gaps, turned, or of bytes with a sign"


def test_a_tiff_of_1_bit_and_one_with_much_beside_its_pixels_are_read(tmp_path):
    Image.new("1", (13, 7), 1).save(tmp_path / "a.tif")
    assert (read_mask(tmp_path / "a.tif") == np.ones((7, 13), bool)).all()
    Image.new("L", (24, 24), 5).save(tmp_path / "b.tif", icc_profile=b"p" * 600)
    assert (read_mask(tmp_path / "b.tif") == np.full((24, 24), 5)).all()


@pytest.mark.parametrize("save_some, cause", [
    (save_four_bands, "the kind RGB:RGBX"),
    (save_deep_colours, "the kind RGB:RGB;16L"),
    (save_unsigned_32_bits, "the kind I:I;32N"),
    (save_white_as_0, "the kind L:L;I"),
    (save_pages, "a TIFF of several planes"),
    (save_signed_bytes, NOT_ONE_PLANE),
    (save_turned_upright, NOT_ONE_PLANE),
    (save_a_stack_of_imagej, NOT_ONE_PLANE),
    (save_a_volume, NOT_ONE_PLANE),
    (save_without_its_last_strip, NOT_ONE_PLANE),
])
def test_a_tiff_that_is_not_one_plane_whole_is_refused(save_some, cause, tmp_path):
    save_some(tmp_path / "a.tif")
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=f"a.tif: cannot be read .*{cause}"):
            read(tmp_path / "a.tif")


def test_an_image_of_many_pixels_is_neither_refused_nor_warned_of(tmp_path, recwarn):
    many = [10_000_000]  # rows of 20 pixels; Pillow by itself refuses 179 million
    path = write_tiff(tmp_path / "a.tif", GREY, tags={257: many, 278: many, 279: [200_000_000]})
    with pytest.raises(DataError, match="cannot be read .*(truncated|buffer is not large enough)"):
        read_image(path)
    assert not recwarn


# What the numbers of an image mean

@pytest.mark.parametrize("kind, white", [(torch.uint8, 255), (torch.uint16, 65535), (torch.float32, 1)])
def test_every_channel_is_normalised_by_its_own_numbers_and_white_is_one(kind, white):
    image = torch.tensor([0, 51, 255]).view(1, 3, 1, 1).to(kind)
    x = normalise(image, [0.5, 0.2, 250 / white], [0.5, 0.1, 2 / white])
    torch.testing.assert_close(x.flatten(), torch.tensor([-1, min(10 * 51 / white - 2, 10), 2.5]))


@pytest.mark.parametrize("number, expected", [
    (6.0, 1), (23.9, 9.95), (25.0, 10), (-9999.0, -10), (1e38, 10), (np.inf, 10), (-np.inf, -10), (np.nan, 0),
])
def test_a_number_is_brought_to_at_most_10_deviations_and_nan_to_the_mean(number, expected):
    x = normalise(torch.full((1, 1, 1, 1), number), [4.0], [2.0])
    assert x.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind, white", [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1), (np.int16, 1)])
def test_mean_and_variance_are_those_of_the_pixels_that_count(kind, white, monkeypatch):
    image = (1000 * RNG.random((30, 20, 2))).astype(kind)
    mask = np.where(RNG.random((30, 20)) < 0.3, 255, 0)
    expected = image[mask == 0].astype(float) / white
    monkeypatch.setattr(images, "BLOCK", 100)  # so that there are several
    parts = [statistics(image[:10], mask[:10]), statistics(image[10:], mask[10:])]
    count, mean, variance = merge(parts)
    assert count.tolist() == 2 * [len(expected)]
    np.testing.assert_allclose(mean, expected.mean(axis=0))
    np.testing.assert_allclose(variance, expected.var(axis=0))


@pytest.mark.parametrize("row, expected", [
    ([np.nan, np.inf, 2, 4], [[2], [3], [1]]),
    ([np.nan], [[0], [0], [0]]),
])
def test_nan_and_inf_are_left_out_of_the_statistics(row, expected):
    assert statistics(np.array([row])[..., None]).tolist() == expected


TRAINED = {"dtype": "float32", "mean": [120.0, 100.0], "std": [60.0, 50.0]}


def scene(seed=0):
    return np.random.default_rng(seed).normal(TRAINED["mean"], TRAINED["std"], (40, 40, 2)).astype(np.float32)


def brighter():
    image = scene()
    image[:20] += 500
    return image


def without_data():
    image = scene()
    image[:3, :, 1] = np.nan
    return image


OTHER_UNITS = "bring the numbers to the same units"


@pytest.mark.parametrize("image, said", [
    (scene(), None),
    (brighter(), None),
    (np.full_like(scene(), 255), None),
    (without_data(), "nan is taken as the mean of the training images, inf as 10 deviations"),
    (scene() * 0.05, OTHER_UNITS),
    ((scene() - TRAINED["mean"]) * 11 + TRAINED["mean"], OTHER_UNITS),
    (scene() * 257, OTHER_UNITS),
    (scene() / 255, OTHER_UNITS),
    (scene() + [0, 1000], OTHER_UNITS),
])
def test_an_image_in_other_units_than_those_of_training_is_told(image, said):
    line = check_values(image, "a.npy", TRAINED)
    if said is None:
        assert line is None
    else:
        assert line.startswith("a.npy: ") and line.endswith(said)
        assert "\n" not in line


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_large_numbers_are_not_rounded_before_the_mean_is_subtracted(dtype):
    numbers = 100_000_000 + np.arange(10)
    image = torch.from_numpy(numbers.astype(dtype)).view(1, 1, 1, 10)
    x = normalise(image, [100_000_000.0], [2.0])
    torch.testing.assert_close(x.flatten(), torch.arange(10) / 2)
