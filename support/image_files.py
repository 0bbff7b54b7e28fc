"""One image on disk: reading it, with one line for everything that cannot be read.

Images are PNG, JPEG, TIFF, PPM or PGM (grey or colour; transparency is left out), or .npy of shape
(H,W) or (H,W,C), which is mapped into memory, so that only the tile at hand is read. What cannot be
used raises DataError. Its message is one line: the file, what was expected, the fix. Letters as in
decompose.py.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps  # comes with matplotlib
from PIL.ExifTags import Base as Tag

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "TIFF", "PPM")
Image.MAX_IMAGE_PIXELS = None  # large images are what this project is for


class DataError(ValueError):
    """What is on disk cannot be used: one line that names the file, what was expected, and the fix."""


# Reading

def open_picture(path: Path) -> tuple[Image.Image, str]:
    """A picture, and how its pixels are stored in Pillow's words, such as RGB;16B for colours of 16 bits.

    DataError: it cannot be read, or Pillow would read only a part of it, or other numbers than it holds.
    """
    check_file(path)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.format == "TIFF":
                check_tiff(picture, path)
            if picture.format == "PPM" and picture.tile[0][0] != "raw":
                raise DataError(f"{path}: Pillow changes the numbers of such a PPM or PGM (it is text, its largest "
                                "value is not 255, or its colours have more than 8 bits); save it as PNG or .npy")
            stored = how_stored(picture)
            picture.load()
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        if path.suffix.lower() in (".tif", ".tiff"):
            raise needs_array_error(path, "no TIFF, or of a kind that Pillow does not read") from None
        raise DataError(f"{path}: cannot be read (no PNG, JPEG, TIFF, PPM or PGM); replace it, or do without "
                        "it") from None
    except Exception as error:  # a damaged file fails in as many ways as there are places in it
        raise DataError(f"{path}: cannot be read ({error}); replace it, or do without it") from None
    if ";16" in stored and not picture.mode.startswith("I"):  # Pillow has 16 bits for grey alone
        raise DataError(f"{path}: a PNG of 16 bits in more than one channel, of which 8 would be read; save it as .npy")
    return picture, stored


def check_file(path: Path):
    """DataError: it is no file."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {kind}; name a PNG, JPEG, TIFF, PPM, PGM or .npy")


def how_stored(picture: Image.Image) -> str:
    """See `open_picture`. To be asked before the pixels are loaded."""
    arguments = picture.tile[0][-1]  # of the decoder: the kind of pixels, or that and more
    return arguments if isinstance(arguments, str) else arguments[0]


def check_tiff(picture: Image.Image, path: Path):
    """DataError: Pillow would read only a part of a TIFF, or other numbers than it holds."""
    tags = picture.tag_v2
    bands = tags.get(Tag.SamplesPerPixel, 1)
    bands_read = len(picture.getbands())
    if bands > bands_read:
        raise needs_array_error(path, f"a TIFF of {bands} bands, of which Pillow reads {bands_read}")
    if bands > 1 and max(tags[Tag.BitsPerSample]) > 8:
        raise needs_array_error(path, f"a TIFF of {bands} bands of more than 8 bits, of which Pillow reads 8")
    signed = 2 in tags.get(Tag.SampleFormat, ())
    if picture.mode in ("La", "LAB") or (picture.mode == "L" and signed):
        raise needs_array_error(path, "a TIFF of Lab colours, of signed bytes or of premultiplied transparency, whose "
                                "numbers Pillow changes")
    if picture.mode in ("I", "F") and tags.prefix == b"MM" and picture.info["compression"] != "raw":
        raise needs_array_error(path, "a compressed TIFF with the high byte first, whose bytes Pillow swaps")
    if count_pages(picture) > 1:
        raise needs_array_error(path, f"a TIFF of {count_pages(picture)} pages, of which Pillow reads one")


def count_pages(picture: Image.Image) -> int:
    """The pages of a TIFF, without those that hold the first one again, but smaller, or its transparency."""
    smaller, transparency = 1, 4
    pages = 1
    for page in range(1, picture.n_frames):
        picture.seek(page)
        if not picture.tag_v2.get(Tag.NewSubfileType, 0) & (smaller | transparency):
            pages += 1
    picture.seek(0)
    return pages


def needs_array_error(path: Path, what: str) -> DataError:
    """The error to raise where a file is of a kind that Pillow does not read as it is."""
    return DataError(f"{path}: {what}; make an .npy of it, with the package tifffile: import numpy, tifffile; "
                     f"numpy.save({str(path.with_suffix('.npy'))!r}, tifffile.imread({str(path)!r}))")


def open_array(path: Path, dimensions: tuple[int, ...], shape: str) -> np.ndarray:
    """The array of an .npy file, mapped into memory. dimensions: how many it may have; shape: the same in words."""
    check_file(path)
    try:
        array = np.load(path, mmap_mode="c")  # "c": changes, which torch asks to be possible, would not reach the file
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several")
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an array ({error}); save it again with numpy.save") from None
    if array.ndim not in dimensions or 0 in array.shape:
        raise DataError(f"{path}: an array of shape {array.shape} where {shape} was expected")
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise DataError(f"{path}: an array of {array.dtype} where numbers were expected; convert it with .astype")
    native = array.dtype.newbyteorder("=")
    return array.astype(native, copy=False)  # PyTorch knows no other byte order: such an array is read as a whole


def read_image(path: Path) -> np.ndarray:
    """(H,W,C) in the type of the file: uint8 or uint16 for most pictures. An .npy of any type is
    mapped and not read."""
    if path.suffix.lower() == ".npy":
        image = open_array(path, (2, 3), "(H,W) or (H,W,C)")
        if image.ndim == 3 and image.shape[2] > 64:
            raise DataError(f"{path}: an array of shape {image.shape} has {image.shape[2]} channels; (H,W,C) was "
                            "expected, so if it is (C,H,W) save array.transpose(1, 2, 0)")
    else:
        picture, stored = open_picture(path)
        ImageOps.exif_transpose(picture, in_place=True)  # see is_turned
        image = picture_to_array(picture, stored)
    if image.ndim == 2:
        image = image[..., None]
    return image


def is_turned(path: Path) -> bool:
    """Whether `read_image` turns or mirrors the picture, as its camera stored in it (EXIF) how it was held."""
    if path.suffix.lower() == ".npy":
        return False
    with Image.open(path, formats=FORMATS) as picture:
        if picture.format == "PNG" and "exif" not in picture.info:  # Pillow would read all of it to be sure
            return False
        return picture.getexif().get(Tag.Orientation, 1) in range(2, 9)


def has_transparency(path: Path) -> bool:
    """Whether `read_image` leaves out a band of the picture that is not everywhere the same, as it is transparency."""
    if path.suffix.lower() == ".npy":
        return False
    with Image.open(path, formats=FORMATS) as picture:
        if picture.mode not in ("LA", "PA", "RGBA"):
            return False
        lowest, highest = picture.getchannel("A").getextrema()
    return lowest < highest


def picture_to_array(picture: Image.Image, stored: str) -> np.ndarray:
    """(H,W) or (H,W,3) in the type of the file. stored: see `open_picture`."""
    if picture.mode == "F":
        return pixels_of(picture, "F")
    if picture.mode.startswith("I"):
        return pixels_of(picture, picture.mode).astype(type_of_integers(stored), copy=False)
    if picture.mode in ("1", "L", "LA"):
        return pixels_of(picture, "L")
    return pixels_of(picture, "RGB")


def pixels_of(picture: Image.Image, mode: str) -> np.ndarray:
    """(H,W) or (H,W,C), what a picture holds after conversion to a mode of Pillow.

    Some rows at a time: to convert it, and to hand it over to NumPy, Pillow makes copies of what it is asked for.
    """
    width, height = picture.size
    rows = max(2**18 // width, 1)
    array = None
    for top in range(0, height, rows):
        part = picture.crop((0, top, width, min(top + rows, height)))
        if part.mode != mode:
            part = part.convert(mode)
        part = np.asarray(part)
        if array is None:
            array = np.empty((height, *part.shape[1:]), part.dtype.newbyteorder("="))
        array[top:top + rows] = part
    return array


def type_of_integers(stored: str) -> type:
    """The type of the numbers of more than 8 bits in a file; Pillow has a single one for them, of 32 bits."""
    if "32" in stored:
        return np.int32 if "S" in stored else np.uint32
    return np.int16 if "S" in stored else np.uint16


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows at a time, a few million pixels, or fewer of many channels: a mapped array may be
    larger than the memory."""
    channels = array.shape[2] if array.ndim == 3 else 1
    rows = max(2**24 // (array.shape[1] * max(channels, 4)), 1)
    for top in range(0, len(array), rows):
        yield array[top:top + rows]
