"""One image or one mask on disk: reading it, and what its numbers mean.

Images are PNG, JPEG, TIFF, PPM or PGM, or .npy of shape (H,W) or (H,W,C), which is mapped into
memory, so that only the tile at hand is read. Masks are the same but for JPEG, and hold class
indices from 0 on, and 255 for pixels that do not count. Pictures are read if they are of a kind that
Pillow is known to read as it is. All else raises DataError, with one line: the file, what is wrong,
the fix. Letters as in decompose.py.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps  # comes with matplotlib, which itself would read a palette as colours
from torch import Tensor

from support.loss import IGNORE
from support.options import UserError, show_progress

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
READ_EXACTLY = {  # in the words of Pillow: the mode of a picture, and how the file stores its pixels
    "PNG": "1:1 L:L LA:LA RGB:RGB RGBA:RGBA P:P P:P;1 P:P;2 P:P;4 I;16:I;16B",
    "JPEG": "L:L RGB:RGB CMYK:CMYK CMYK:CMYK;I",
    "MPO": "L:L RGB:RGB",  # a JPEG with other pictures behind it, as phones make them
    "TIFF": "1:1 L:L LA:LA RGB:RGB RGBA:RGBA P:P I;16:I;16 I;16:I;16N I;16B:I;16B I;16B:I;16N I:I;16S I:I;32S "
            "F:F;32F",
    "PPM": "L:L RGB:RGB",
}
ORIENTATION = 0x0112  # in the data of a camera (EXIF): how it was held
WHITE = {"uint8": 255, "uint16": 65535}  # in other types it is 1
FAR = 10  # standard deviations from the mean
BLOCK = 2**20  # numbers that are looked at together
Image.MAX_IMAGE_PIXELS = None  # large images are what this project is for


class DataError(UserError):
    """What is on disk cannot be used: one line that names the file, what is wrong, and the fix."""


@functools.cache
def warn_once(line: str):
    """Prints each line once, however many files it is about."""
    show_progress("")
    print(line)


# Reading

def read_image(path: Path) -> np.ndarray:
    """(H,W,C) in the type of the file, but 16 bits with a sign become 32 bits. An .npy is mapped and not read."""
    image = read(path, is_mask=False)
    return image.reshape(*image.shape[:2], -1)


def read_mask(path: Path) -> np.ndarray:
    """(H,W) class indices in the type of the file."""
    mask = read(path, is_mask=True)
    channels = mask.reshape(*mask.shape[:2], -1)
    if mask.dtype.kind == "f" or (channels[..., 1:] != channels[..., :1]).any():
        raise DataError(f"{path}: a mask of shape {mask.shape} and type {mask.dtype}, where whole numbers (H,W) were "
                        "expected, the class indices; of a mask in colour save the number of each colour, of a one-hot "
                        "mask mask.argmax(axis=2), each as .astype('uint8') (docs/own-images.md)")
    return channels[..., 0]


def read(path: Path, is_mask: bool) -> np.ndarray:
    """(H,W) or (H,W,C); the indices of a mask with a palette, but the colours of an image with one."""
    try:
        if path.suffix.lower() == ".npy":
            array = open_array(path)
        else:
            array = read_picture(path, is_mask)
    except Exception as error:  # a damaged file fails in as many ways as there are places in it
        raise DataError(f"{path}: cannot be read ({error}); replace it, or save it as .npy: numpy.save('NAME.npy', "
                        "array), where a TIFF gives array = tifffile.imread('NAME.tif')") from None
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # PyTorch knows no other order of bytes


def open_array(path: Path) -> np.ndarray:
    """The array of an .npy file, mapped into memory. ValueError: it is no image."""
    array = np.load(path, mmap_mode="c")  # "c": changes, which torch asks to be possible, would not reach the file
    if array.ndim not in (2, 3) or array.size == 0 or not np.can_cast(array.dtype, np.float64):
        raise ValueError(f"an array of {array.dtype} and shape {array.shape}, but (H,W) or (H,W,C) numbers of at most "
                         "64 bits were expected")
    return array


def read_picture(path: Path, is_mask: bool) -> np.ndarray:
    """The numbers of a picture, turned as its camera says that it was held (EXIF).

    ValueError: Pillow would not read all of it as it is, or it is a mask that was saved as JPEG.
    """
    with Image.open(path, formats=["PNG", "JPEG", "TIFF", "PPM"]) as picture:
        check_kind(picture, is_mask)
        if picture.format == "TIFF" and not is_one_plane(picture, path.stat().st_size):
            raise ValueError("a TIFF of several planes, with gaps, turned, or of bytes with a sign")
        picture.load()
        if picture.getexif().get(ORIENTATION, 1) != 1:
            warn_once("images and masks are turned as their EXIF data says")
            ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "CMYK":
        picture = picture.convert("RGB")
    if picture.mode == "P" and not is_mask:
        picture = picture.convert("RGBA")
    array = np.array(picture)
    if picture.mode not in ("LA", "RGBA"):
        return array
    if array[..., -1].min() < array[..., -1].max():
        raise ValueError("its last band, transparency or infrared, is not the same everywhere and would be lost")
    return array[..., :-1]


def check_kind(picture: Image.Image, is_mask: bool):
    """ValueError: Pillow is not known to read such a picture as it is, or it is a mask in JPEG."""
    decoder, _, _, arguments = picture.tile[0]
    stored = arguments if isinstance(arguments, str) else arguments[0]
    kind = f"{picture.mode}:{stored}"
    known = READ_EXACTLY.get(picture.format, "")
    is_animated = picture.format == "PNG" and getattr(picture, "n_frames", 1) > 1
    if kind not in known.split() or decoder.startswith("ppm") or is_animated:  # "ppm" changes the numbers
        raise ValueError(f"it is not known that a {picture.format} of the kind {kind} is read as it is")
    if is_mask and "jpeg" in (decoder, picture.info.get("compression")):  # the latter inside a TIFF
        raise ValueError("JPEG has changed the numbers of this mask; save it again from where it was made, as PNG")


def is_one_plane(tiff: Image.Image, bytes_of_file: int) -> bool:
    """Whether a TIFF is one plane and whole, and Pillow reads its numbers and their order rightly."""
    tags = tiff.tag_v2.named()
    columns = tags.get("TileWidth", tiff.width)
    rows = tags.get("TileLength", tags.get("RowsPerStrip", tiff.height))
    parts = math.ceil(tiff.width / columns) * math.ceil(tiff.height / rows)
    sizes = tags.get("TileByteCounts", tags.get("StripByteCounts"))
    is_whole = len(sizes) == parts and 0 not in sizes  # 0: GDAL leaves out a part in which nothing is
    # ImageJ writes the planes of a stack one behind the other, uncompressed, but lists the parts of the first alone.
    rest = bytes_of_file - sum(sizes)
    is_stack = tiff.info["compression"] == "raw" and rest >= max(sum(sizes), 1024)
    is_volume = tiff.n_frames > 1 or tags.get("ImageDepth", 1) > 1
    has_signed_bytes = tiff.mode == "L" and 2 in tags.get("SampleFormat", ())
    is_turned = tags.get("Orientation", 1) != 1
    return is_whole and not (is_stack or is_volume or has_signed_bytes or is_turned)


def read_palette(path: Path) -> list[list[int]]:
    """Red, green and blue of each index of an indexed mask; none for other masks."""
    palette = []
    if path.suffix.lower() != ".npy":
        with Image.open(path) as picture:
            if picture.mode == "P":
                palette = picture.getpalette()
    return np.reshape(palette, (-1, 3)).tolist()


# What the numbers of an image mean

def white(image: np.ndarray | Tensor) -> int:
    """The value of white: 255 or 65535 in pictures of 8 or 16 bits, 1 in any other type."""
    kind = str(image.dtype).removeprefix("torch.")
    return WHITE.get(kind, 1)


def normalise(tile: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A tile (B,C,h,w) as it is stored -> numbers of mean 0 and standard deviation 1 in each channel.

    mean, std: of each channel of the training images, where white is 1. Tiles travel as they are
    stored, which for a photograph is a quarter of the bytes, and are normalised on their device. No
    number outweighs all others: nan becomes 0, and what is more than 10 deviations away, such as
    -9999 where nothing was measured, becomes 10 or -10.
    """
    exact = torch.get_default_dtype()
    if tile.element_size() > 2:
        exact = torch.float64  # as float32 would round large numbers before the mean is subtracted
    x = tile.to(exact) / white(tile)
    for channel in range(x.shape[1]):
        x[:, channel].sub_(mean[channel]).div_(std[channel])
    return x.nan_to_num_(nan=0).clamp_(-FAR, FAR).to(torch.get_default_dtype())


def statistics(image: np.ndarray, mask: np.ndarray | int = 0) -> np.ndarray:
    """(3,C): how many numbers each channel of an image (H,W,C) has, their mean and their variance, where white is 1.

    Pixels that do not count in the mask (H,W) are left out, and so are nan and inf.
    """
    mask = np.broadcast_to(mask, image.shape[:2])
    blocks = image.size // BLOCK + 1  # some rows each: a mapped array may be larger than the memory
    found = np.zeros((blocks, 3, image.shape[2]))
    for i, (pixels, labels) in enumerate(zip(np.array_split(image, blocks), np.array_split(mask, blocks))):
        for channel in range(image.shape[2]):
            x = pixels[..., channel][labels != IGNORE].astype(np.float64)
            x = x[np.isfinite(x)] / white(image)
            if x.size > 0:
                found[i, :, channel] = x.size, x.mean(), x.var()
    return merge(found)


def merge(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The statistics (3,C) of some blocks, or of some images -> those of all their pixels.

    The variance of all is the mean of the variances plus the variance of the means. (The mean of the squares less the
    square of the mean would lose a deviation of 0.1 beside a mean of 100,000.)
    """
    counts, means, variances = np.stack(parts, axis=1)
    count = counts.sum(axis=0)
    weights = counts / np.maximum(count, 1)
    mean = (weights * means).sum(axis=0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(axis=0)
    return np.stack([count, mean, variance])


def check_values(image: np.ndarray, name: Path | str, config: dict) -> str | None:
    """A line if the numbers of an image (H,W,C) are not such as the network was trained on, else None.

    They are not if a channel holds nan or inf; if its mean is more than 10 deviations of training away,
    as with 0 to 255 instead of 0 to 1; or if all deviations are under a tenth, as with 0 to 1 instead
    of 0 to 255, or one is over ten times, but not 0, as in a picture of nothing but water. config: of
    the network; its dtype is None after training on synthetic images, which any finite numbers may
    follow.
    """
    count, mean, variance = statistics(image)
    mean = np.where(count > 0, mean, config["mean"])
    away = np.max(np.abs(mean - config["mean"]) / config["std"])
    spread = np.max(np.sqrt(variance) / config["std"])
    is_far = away > FAR or spread > FAR or 1e-6 < spread < 1 / FAR  # less is rounding
    if is_far and config["dtype"] is not None:
        return (f"{name}: numbers far from those of training: means are up to {away:.3g} deviations of training away, "
                f"and deviations at most {spread:.3g} times as large; bring the numbers to the same units")
    if count.sum() < image.size:
        return f"{name}: holds nan or inf; nan is taken as the mean of the training images, inf as 10 deviations"
    return None


# What the numbers of a mask mean

def count_pixels(mask: np.ndarray, path: Path, classes: int) -> Counter:
    """How many pixels each value has: class indices, and IGNORE. DataError: another value than these."""
    pixels = Counter()
    for row in mask:
        values, counts = np.unique(row, return_counts=True)
        pixels.update(dict(zip(values.tolist(), counts.tolist())))
    wrong = pixels.keys() - {*range(classes), IGNORE}
    if wrong:
        raise DataError(f"{path}: holds the value {max(wrong)}, but a mask holds the classes 0 to {classes - 1}, and "
                        f"{IGNORE} where nothing counts; are these colours, numbered objects, or values between "
                        "those of classes, which JPEG and interpolation make? Or is a name missing in classes.txt?")
    return pixels


def drawn_in_white(pixels: Counter) -> bool:
    """Whether masks hold 0 and 255 alone. Then 255 is rather an object drawn in white than what does not count."""
    return set(pixels) == {0, IGNORE}


def single_class_error(folder: Path | str) -> DataError:
    """The error to raise where all masks hold 0 alone, or 0 and IGNORE."""
    return DataError(f"{folder}: the masks know a single class, 0; save the others as 1, 2, ... (a pixel of {IGNORE} "
                     "does not count: if it shall be a class, save it as 1)")
