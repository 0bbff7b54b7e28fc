"""One mask on disk: reading it, and what its numbers tell.

Masks hold class indices from 0 on, and 255 for pixels that shall not count. They are PNG, TIFF or
PGM (grey, with a palette, or with red, green and blue all equal), or .npy of shape (H,W). What
cannot be used raises DataError, as in image_files.py.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image  # comes with matplotlib, which itself would read a palette as colours instead of indices

from support.image_files import DataError, blocks, open_array, open_picture, picture_to_array, pixels_of
from support.loss import IGNORE

MANY_VALUES = 8  # a mask of more different ones is looked at more closely
DEEPGLOBE = {  # class: red, green, blue
    "urban": (0, 1, 1),
    "agriculture": (1, 1, 0),
    "rangeland": (1, 0, 1),
    "forest": (0, 1, 0),
    "water": (0, 0, 1),
    "barren": (1, 1, 1),
    "unknown": (0, 0, 0),
}


# Reading

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
        return pixels_of(picture, picture.mode)
    if picture.mode == "L":
        if ";" in stored and "I" in stored:
            raise DataError(f"{path}: a TIFF in which 0 is white, so that its values are turned round; save it as PNG")
        return pixels_of(picture, "L") // grey_step(stored)
    if picture.mode == "F" or picture.mode.startswith("I"):
        return picture_to_array(picture, stored)
    mask = equal_bands(picture)
    if mask is None:
        raise DataError(f"{path}: a mask in colour or with transparency ({picture.mode}) where class indices were "
                        "expected; for DeepGlobe take --dataset deepglobe, else save a PNG with one grey value per "
                        "class: 0, 1, 2, ...")
    return mask


def grey_step(stored: str) -> int:
    """The step between grey values, which Pillow multiplies in pictures of 2 or 4 bits so that the last one is 255."""
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
    return first.copy()  # Pillow's array cannot be written to, and PyTorch warns of that


def mask_colors(path: Path) -> list[tuple[int, int, int]]:
    """Red, green and blue of each index of a mask with a palette. Empty if it has none, or one that
    shows each index as that grey value."""
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
    """(H,W) uint8. Colours are not always pure, so they are cut at 128; unknown (and red, which
    means nothing) is 255."""
    picture, _ = open_picture(path)
    if picture.mode not in ("RGB", "RGBA", "P"):
        raise DataError(f"{path}: a grey mask ({picture.mode}) where DeepGlobe's colours were expected; for class "
                        "indices take --dataset folder")
    label_of = np.full(8, IGNORE, np.uint8)  # of each of the 8 pure colours, numbered as red, green and blue in binary
    for label, (name, (red, green, blue)) in enumerate(DEEPGLOBE.items()):
        if name != "unknown":
            label_of[4 * red + 2 * green + blue] = label
    bright = pixels_of(picture, "RGB") >> 7  # 0 below 128, else 1
    return label_of[4 * bright[..., 0] + 2 * bright[..., 1] + bright[..., 2]]


# What the numbers tell

def count_pixels(mask: np.ndarray, path: Path, classes: int) -> Counter:
    """How many pixels each value has: class indices, and IGNORE.

    DataError: a value is neither from 0 to classes - 1 nor IGNORE; or `check_regions` refuses the mask.
    """
    pixels = Counter()
    for block in blocks(mask):
        values = block[block != IGNORE]
        pixels[IGNORE] += block.size - values.size
        if values.size == 0:
            continue
        for value in (values.min(), values.max()):
            if not 0 <= value < classes:
                check_regions(mask, path)
                known = ""
                if classes < IGNORE:
                    known = f"there are {classes} classes (of classes.txt, or of the training), so "
                raise DataError(f"{path}: holds the value {value}; {known}a mask holds 0 to {classes - 1}, or {IGNORE} "
                                "for pixels that do not count")
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


def single_class_error(folder: Path) -> DataError:
    """The error to raise where all masks hold 0 alone, or 0 and IGNORE."""
    return DataError(f"{folder}: the masks know a single class, 0; save the others as 1, 2, ... (a pixel of {IGNORE} "
                     "does not count: if it shall be a class, save it as 1)")


def check_regions(mask: np.ndarray, path: Path):
    """DataError: most values of a mask form no regions, but only lines between them, as do the grey
    values that come from interpolation and from JPEG. True classes, of which there may be many,
    form regions."""
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
    they_are_more_than_dots = total > 1.5 * len(lines)  # else it shows each class once, in a pixel of its own
    if most_values_are_lines and most_pixels_are_not and they_are_more_than_dots:
        raise DataError(f"{path}: {len(lines)} of its {len(counts)} different values form lines one pixel wide, as "
                        "after resizing with interpolation, or JPEG; make the masks anew, with nearest neighbour and "
                        "as PNG")


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
