"""One image or one mask on disk: reading it, with one line for everything that cannot be read.

Images: PNG, JPEG, TIFF, PPM or PGM (grey or colour; transparency is left out), or .npy of shape (H,W) or (H,W,C), which
is mapped into memory, so that only the tile at hand is read. Masks: class indices from 0 on, and 255 for pixels that
shall not count; PNG, TIFF or PGM (grey, with a palette, or with red, green and blue all equal), or .npy of shape (H,W).
What cannot be used raises DataError. Its message is one line: the file, what was expected, the fix.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps  # comes with matplotlib, which reads a palette as colours where a mask needs its indices
from PIL.ExifTags import Base as Tag
from torch import Tensor

from support.loss import IGNORE

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "TIFF", "PPM")
MANY_VALUES = 8  # a mask of more different ones is looked at more closely
Image.MAX_IMAGE_PIXELS = None  # large images are what this project is for

DEEPGLOBE = {  # class: red, green, blue
    "urban": (0, 1, 1),
    "agriculture": (1, 1, 0),
    "rangeland": (1, 0, 1),
    "forest": (0, 1, 0),
    "water": (0, 0, 1),
    "barren": (1, 1, 1),
    "unknown": (0, 0, 0),
}


class DataError(ValueError):
    """What is on disk cannot be used: one line that names the file, what was expected, and the fix."""


# Reading

def open_picture(path: Path) -> tuple[Image.Image, str]:
    """A picture, and how its pixels are stored in Pillow's words, such as RGB;16B for colours of 16 bits. DataError."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {kind}; name a PNG, a JPEG, a TIFF or an .npy")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.format == "TIFF":
                check_tiff(picture, path)
            if picture.format == "PPM" and picture.tile[0][0] != "raw":
                raise DataError(f"{path}: text, or a largest value other than 255, or more than 8 bits of colour, which "
                                "Pillow scales; save it as PNG or .npy")
            stored = how_stored(picture)
            picture.load()
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        if path.suffix.lower() in (".tif", ".tiff"):
            raise needs_array(path, "no TIFF, or of a kind that Pillow does not read") from None
        raise DataError(f"{path}: cannot be read (no PNG, JPEG or TIFF); replace it, or do without it") from None
    except Exception as error:  # a damaged file fails in as many ways as there are places in it
        raise DataError(f"{path}: cannot be read ({error}); replace it, or do without it") from None
    if ";16" in stored and not picture.mode.startswith("I"):  # Pillow has 16 bits for grey alone
        raise DataError(f"{path}: a PNG of 16 bits in more than one channel, of which 8 would be read; save it as .npy")
    return picture, stored


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
        raise needs_array(path, f"a TIFF of {bands} bands, of which Pillow reads {bands_read}")
    if bands > 1 and max(tags[Tag.BitsPerSample]) > 8:
        raise needs_array(path, f"a TIFF of {bands} bands of more than 8 bits, of which Pillow reads 8")
    signed = 2 in tags.get(Tag.SampleFormat, ())
    if picture.mode in ("La", "LAB") or (picture.mode == "L" and signed):
        raise needs_array(path, "a TIFF of Lab colours, signed bytes or multiplied transparency, which Pillow changes")
    if picture.mode in ("I", "F") and tags.prefix == b"MM" and picture.info["compression"] != "raw":
        raise needs_array(path, "a compressed TIFF with the high byte first, which Pillow turns round")
    if count_pages(picture) > 1:
        raise needs_array(path, f"a TIFF of {count_pages(picture)} pages, of which Pillow reads one")


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


def needs_array(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; make an .npy of it, with the package tifffile: import numpy, tifffile; "
                     f"numpy.save({str(path.with_suffix('.npy'))!r}, tifffile.imread({str(path)!r}))")


def open_array(path: Path, dimensions: tuple[int, ...], shape: str) -> np.ndarray:
    """The array of an .npy file, mapped into memory. dimensions: how many it may have; shape: the same in words."""
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
    """(H,W,C) in the type of the file: uint8 or uint16 for most pictures. An .npy of any type is mapped and not read."""
    if path.suffix.lower() == ".npy":
        image = open_array(path, (2, 3), "(H,W) or (H,W,C)")
        if image.ndim == 3 and image.shape[2] > 64:
            raise DataError(f"{path}: an array of shape {image.shape} has {image.shape[2]} channels; (H,W,C) was "
                            "expected, so if it is (C,H,W) save array.transpose(1, 2, 0)")
    else:
        picture, stored = open_picture(path)
        ImageOps.exif_transpose(picture, in_place=True)  # cameras store how they were held
        image = picture_to_array(picture, stored)
    if image.ndim == 2:
        image = image[..., None]
    return image


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
        return pixels(picture, "F")
    if picture.mode.startswith("I"):
        return pixels(picture, picture.mode).astype(type_of_integers(stored), copy=False)
    if picture.mode in ("1", "L", "LA"):
        return pixels(picture, "L")
    return pixels(picture, "RGB")


def pixels(picture: Image.Image, mode: str) -> np.ndarray:
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


def read_mask(path: Path) -> np.ndarray:
    """(H,W) class indices in the type of the file."""
    if path.suffix.lower() == ".npy":
        mask = array_to_mask(open_array(path, (2, 3), "(H,W)"), path)
    else:
        mask = picture_to_mask(path)
    if mask.dtype.kind == "f":
        raise DataError(f"{path}: a mask of {mask.dtype} where whole numbers were expected; save mask.astype('uint8')")
    return mask


def array_to_mask(array: np.ndarray, path: Path) -> np.ndarray:
    """(H,W) from an array that may have one channel. DataError: it has several."""
    if array.ndim == 2:
        return array
    if array.shape[2] == 1:
        return array[..., 0]
    if array.shape[0] == 1:
        return array[0]
    axis, first = (2, "mask[..., 0]") if array.shape[2] <= array.shape[0] else (0, "mask[0]")
    raise DataError(f"{path}: an array of shape {array.shape} where (H,W) was expected; if it is one-hot, save "
                    f"mask.argmax({axis}).astype('uint8'), or if its channels are all equal, save {first}")


def picture_to_mask(path: Path) -> np.ndarray:
    picture, stored = open_picture(path)
    compression = picture.info.get("compression", "")
    if picture.format in ("JPEG", "MPO") or (picture.format == "TIFF" and "jpeg" in compression):
        raise DataError(f"{path}: JPEG changes the values of a mask; save masks as PNG or .npy")
    if picture.mode in ("1", "P"):
        return pixels(picture, picture.mode)
    if picture.mode == "L":
        if ";" in stored and "I" in stored:
            raise DataError(f"{path}: a TIFF in which 0 is white, so that its values are turned round; save it as PNG")
        return pixels(picture, "L") // grey_step(stored)
    if picture.mode == "F" or picture.mode.startswith("I"):
        return picture_to_array(picture, stored)
    mask = equal_bands(picture)
    if mask is None:
        raise DataError(f"{path}: a mask in colour or with transparency ({picture.mode}) where class indices were "
                        "expected; for DeepGlobe take --dataset deepglobe, else save a PNG with one grey value per "
                        "class: 0, 1, 2, ...")
    return mask


def grey_step(stored: str) -> int:
    """How far Pillow draws apart the grey values of a picture of 2 or 4 bits, so that the last one is 255."""
    if stored.startswith("L;2"):
        return 85
    if stored.startswith("L;4"):
        return 17
    return 1


def equal_bands(picture: Image.Image) -> np.ndarray | None:
    """(H,W), the red, green and blue of a picture if they are all equal and its transparency is everywhere the same."""
    if picture.mode not in ("LA", "RGB", "RGBA"):
        return None
    bands = list(picture.split())
    if picture.mode in ("LA", "RGBA"):
        lowest, highest = bands.pop().getextrema()
        if lowest < highest:
            return None
    first = np.asarray(bands[0])
    for band in bands[1:]:
        if not np.array_equal(first, band):
            return None
    return first


def mask_colors(path: Path) -> list[tuple[int, int, int]]:
    """Red, green and blue of each index of a mask with a palette. Empty for other masks, and if all that it shows are the
    indices as grey values."""
    if path.suffix.lower() == ".npy":
        return []
    picture, _ = open_picture(path)
    if picture.mode != "P":
        return []
    numbers = picture.getpalette()
    colors = list(zip(numbers[0::3], numbers[1::3], numbers[2::3]))
    greys = [(i, i, i) for i in range(len(colors))]
    return [] if colors == greys else colors


def read_deepglobe_mask(path: Path) -> np.ndarray:
    """(H,W) uint8. Colours are not always pure, so they are cut at 128; unknown (and red, which means nothing) is 255."""
    picture, _ = open_picture(path)
    if picture.mode not in ("RGB", "RGBA", "P"):
        raise DataError(f"{path}: a grey mask ({picture.mode}) where DeepGlobe's colours were expected; for class indices "
                        "take --dataset folder")
    label_of = np.full(8, IGNORE, np.uint8)  # of each of the 8 pure colours, numbered as red, green and blue in binary
    for label, (name, (red, green, blue)) in enumerate(DEEPGLOBE.items()):
        if name != "unknown":
            label_of[4 * red + 2 * green + blue] = label
    bright = pixels(picture, "RGB") >> 7  # 0 below 128, else 1
    return label_of[4 * bright[..., 0] + 2 * bright[..., 1] + bright[..., 2]]


# What the numbers mean

def white(image: Tensor) -> int:
    """The value of white: 255 or 65535 in pictures of 8 or 16 bits, 1 in any other type."""
    if image.dtype in (torch.uint8, torch.uint16):
        return torch.iinfo(image.dtype).max
    return 1


def normalise(tile: Tensor, mean: Sequence[float], std: Sequence[float],
              value_range: Sequence[Sequence[float]] | None = None) -> Tensor:
    """A tile (B,C,h,w) as it is stored -> numbers of mean 0 and standard deviation 1 in each channel.

    mean, std: of each channel of the training images, where white is 1. Tiles travel as they are stored, which for a
    photograph is a quarter of the bytes, and are normalised on their device.
    value_range: the smallest and the largest value of each channel of the training images, as they are stored. A number
    that is not finite, or that lies far outside this range, marks a pixel without data, and becomes the mean.
    """
    x = tile.to(torch.get_default_dtype()) / white(tile)
    for channel in range(x.shape[1]):
        values = x[:, channel]
        normalised = (values - mean[channel]) / std[channel]
        if value_range is not None and tile.dtype != torch.uint8:  # in which no value lies far outside
            smallest, largest = value_range
            lowest, highest = far_limits(smallest[channel], largest[channel])
            has_data = (values >= lowest / white(tile)) & (values <= highest / white(tile))
            normalised = normalised.where(has_data, 0)
        x[:, channel] = normalised
    if tile.is_floating_point():
        x.nan_to_num_(nan=0, posinf=0, neginf=0)
    return x


def far_limits(smallest: float, largest: float) -> tuple[float, float]:
    """What lies beyond these is far outside the range of values: farther than they are from each other."""
    width = largest - smallest
    return smallest - width, largest + width


def without_outliers(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest of some values, but not one that is far outside all others.

    values: sorted, and all different.
    """
    smallest, largest = values[0], values[-1]
    if len(values) > 2:
        lowest, highest = far_limits(values[1], values[-1])
        if smallest < lowest:
            smallest = values[1]
        lowest, highest = far_limits(values[0], values[-2])
        if largest > highest:
            largest = values[-2]
    return smallest, largest


class Extremes:
    """The two smallest and the two largest values of each channel of some images, as they are stored.

    dtype: of the images. Of uint8, in which no value lies far outside, only the smallest and the largest are kept.
    """

    def __init__(self, channels: int, dtype: np.dtype):
        self.keep = 1 if dtype == np.uint8 else 2
        self.values = [[] for _ in range(channels)]  # of each channel, sorted

    def add(self, channel: int, values: np.ndarray):
        """values: (n,), finite, and n may be 0."""
        if values.size == 0:
            return
        smallest, largest = values.min(), values.max()
        self.merge(channel, [float(smallest), float(largest)])
        if self.keep == 2:
            inner = values[(values > smallest) & (values < largest)]
            if inner.size > 0:
                self.merge(channel, [float(inner.min()), float(inner.max())])

    def add_all(self, other: "Extremes"):
        for channel, values in enumerate(other.values):
            self.merge(channel, values)

    def merge(self, channel: int, values: list[float]):
        """Keeps the outermost of these values and of those that are known."""
        known = sorted({*self.values[channel], *values})
        self.values[channel] = sorted({*known[:self.keep], *known[-self.keep:]})

    def value_range(self) -> list[list[float]]:
        """The smallest value of each channel, and the largest."""
        smallest = [values[0] for values in self.values]
        largest = [values[-1] for values in self.values]
        return [smallest, largest]


def range_remark(found: Sequence[Sequence[float]], trained: Sequence[Sequence[float]]) -> str | None:
    """A line, if some images have quite other values than the training images: far outside, or in hardly a hundredth of
    their range. Both are ranges as in `Extremes`."""
    narrow = 0
    for channel, (smallest, largest, first, last) in enumerate(zip(*found, *trained)):
        lowest, highest = far_limits(first, last)
        if smallest < lowest or largest > highest:
            return (f"values from {smallest:g} to {largest:g}, but the training images have {first:g} to {last:g} (in "
                    f"channel {channel}); bring them to the same range, unless a value marks pixels without data")
        if largest - smallest < (last - first) / 100:
            narrow += 1
    if narrow == len(found[0]):
        return (f"values from {min(found[0]):g} to {max(found[1]):g}, but the training images have {min(trained[0]):g} "
                f"to {max(trained[1]):g}; bring them to the same range")
    return None


# Checking

def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows at a time, a few million pixels, or fewer of many channels: a mapped array may be larger than the memory."""
    channels = array.shape[2] if array.ndim == 3 else 1
    rows = max(2**24 // (array.shape[1] * max(channels, 4)), 1)
    for top in range(0, len(array), rows):
        yield array[top:top + rows]


def is_finite(values: np.ndarray) -> np.ndarray:
    """Where a float32 can hold the values: not where they are nan, inf or beyond 1e38."""
    return torch.from_numpy(values).float().isfinite().numpy()


def counted_pixels(image: np.ndarray, path: Path, mask: np.ndarray) -> Iterator[np.ndarray]:
    """The pixels of an image that count in its mask, (n,C) in each block. DataError: one holds what no float32 can."""
    top = 0
    for block in blocks(image):
        counts = mask[top:top + len(block)] != IGNORE
        top += len(block)
        pixels = block.reshape(-1, block.shape[2])
        if not counts.all():
            pixels = block[counts]
        if pixels.dtype.kind == "f" and not is_finite(pixels).all():
            raise DataError(f"{path}: holds nan, inf or numbers beyond 1e38; give these pixels {IGNORE} in the mask, so "
                            "that they do not count, or replace them")
        yield pixels


def count_pixels(mask: np.ndarray, path: Path, classes: int) -> Counter:
    """How many pixels each value has: class indices, and IGNORE. DataError: a value is neither of 0 ... classes - 1 nor
    IGNORE; or see `check_regions`."""
    pixels = Counter()
    for block in blocks(mask):
        values = block[block != IGNORE]
        pixels[IGNORE] += block.size - values.size
        if values.size == 0:
            continue
        for value in (values.min(), values.max()):
            if not 0 <= value < classes:
                check_regions(mask, path)
                raise DataError(f"{path}: holds the value {value}; a mask holds 0 to {classes - 1}, or {IGNORE} for pixels "
                                "that do not count")
        numbers = np.bincount(values.astype(np.intp))
        pixels.update(dict(enumerate(numbers.tolist())))
    pixels = +pixels  # those that occur
    if len(pixels) > MANY_VALUES:
        check_regions(mask, path)
    return pixels


def classes_in(pixels: Counter) -> set[int]:
    """The class indices among the values of masks."""
    return set(pixels) - {IGNORE}


def drawn_in_white(pixels: Counter) -> bool:
    """Whether masks hold 0 and 255 alone. Then 255 is rather an object drawn in white than what does not count."""
    return set(pixels) == {0, IGNORE}


def single_class(folder: Path) -> DataError:
    return DataError(f"{folder}: the masks know a single class, 0; save the others as 1, 2, ... (a pixel of {IGNORE} does "
                     "not count: if it shall be a class, save it as 1)")


def check_regions(mask: np.ndarray, path: Path):
    """DataError: most values of a mask form no regions, but only lines between them, as do the grey values that come from
    interpolation and from JPEG. True classes, of which there may be many, form regions."""
    counts_in_lines = Counter()  # of each value, its pixels in lines
    for block in blocks(mask):
        count_values(block[one_pixel_wide(block)], counts_in_lines)
    if len(counts_in_lines) < MANY_VALUES:
        return
    counts = Counter()
    for block in blocks(mask):
        count_values(block, counts)
    lines = []  # the values that form no regions
    total = 0
    for value, count in counts.items():
        if counts_in_lines[value] > count / 2:
            lines.append(value)
            total += count
    most_values_are_lines = len(lines) >= MANY_VALUES and len(lines) > len(counts) / 2
    most_pixels_are_not = total < mask.size / 2  # else it is noise
    if most_values_are_lines and most_pixels_are_not and total > 1.5 * len(lines):
        raise DataError(f"{path}: {len(lines)} of its {len(counts)} different values form lines one pixel wide, as after "
                        "resizing with interpolation, or JPEG; make the masks anew, with nearest neighbour and as PNG")


def count_values(values: np.ndarray, counts: Counter):
    for value, count in zip(*np.unique(values, return_counts=True)):
        counts[int(value)] += int(count)


def one_pixel_wide(mask: np.ndarray) -> np.ndarray:
    """(H,W): True where a pixel differs from both its neighbours, left and right, or above and below."""
    lines = np.zeros(mask.shape, bool)
    differs = mask[1:] != mask[:-1]  # from the row below
    lines[1:-1] |= differs[1:] & differs[:-1]
    differs = mask[:, 1:] != mask[:, :-1]
    lines[:, 1:-1] |= differs[:, 1:] & differs[:, :-1]
    return lines
