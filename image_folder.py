"""Pairs of an image and a mask on disk: a folder of your own, or DeepGlobe's land cover as it is distributed.

    DIR/train/images/NAME.png    DIR/train/masks/NAME.png    and the same in DIR/val and DIR/test; without one of them,
                                                             a tenth of the training pairs, drawn by the seed, stands in
    DIR/classes.txt              names of the classes, one a line; without it they are numbered

Images: PNG or JPEG (grey or colour; transparency is left out), or .npy of shape (H,W) or (H,W,C), which is mapped into
memory, so that only the tile at hand is read. Masks: class indices from 0 on, 255 where pixels shall not count; PNG
(grey or with a palette) or .npy (H,W). Letters as in decompose.py.
What cannot be used raises DataError, whose message is one line: the file, what was expected, the fix.
This file imports no other of the project: copy it.
"""

import functools
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps  # comes with matplotlib, which reads a palette as colours where a mask needs its indices
from torch import Tensor
from torch.utils.data import Dataset

IGNORE = 255
SPLITS = ("train", "val", "test")
PICTURES = (".png", ".jpg", ".jpeg")
UNREADABLE = (".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".npz")
Pair = tuple[Path, Path]  # image, mask
Image.MAX_IMAGE_PIXELS = None  # large images are what this is for


class DataError(ValueError):
    """What is on disk cannot be used: one line that names the file, what was expected, and the fix."""


# One file

def open_picture(path: Path) -> Image.Image:
    if not path.is_file():
        raise DataError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; name a PNG, a JPEG or an .npy")
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            cut = ";16" in str(picture.tile) and not picture.mode.startswith("I")  # Pillow has 16 bits for grey alone
            picture.load()
    except Exception as error:  # a damaged file fails in as many ways as there are places in it
        reason = "no PNG or JPEG" if isinstance(error, Image.UnidentifiedImageError) else str(error) or "broken"
        raise DataError(f"{path}: cannot be read ({reason}); replace it, or do without it") from None
    if cut:
        raise DataError(f"{path}: a PNG of 16 bits in more than one channel, of which 8 would be read; save it as .npy")
    return picture


def open_array(path: Path, dimensions: tuple[int, ...], shape: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c")  # "c": changes, which torch asks to be possible, would not reach the file
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several")
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an array ({error}); save it again with numpy.save") from None
    if array.ndim not in dimensions or 0 in array.shape:
        raise DataError(f"{path}: an array of shape {array.shape} where {shape} was expected")
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8 or not array.dtype.isnative:
        raise DataError(f"{path}: an array of {array.dtype} where numbers were expected; convert it with .astype")
    return array


def read_image(path: Path) -> np.ndarray:
    """(H,W,C) in the type of the file: uint8 or uint16 for pictures, any for .npy, which is mapped and not read."""
    if path.suffix.lower() == ".npy":
        image = open_array(path, (2, 3), "(H,W) or (H,W,C)")
        if image.ndim == 3 and image.shape[2] > 64:
            raise DataError(f"{path}: an array of shape {image.shape} has {image.shape[2]} channels; (H,W,C) was "
                            "expected, so if it is (C,H,W) save array.transpose(1, 2, 0)")
    else:
        picture = ImageOps.exif_transpose(open_picture(path))  # cameras store how they were held
        if picture.mode.startswith("I"):
            image = np.array(picture).astype(np.uint16)
        else:
            image = np.array(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    return image if image.ndim == 3 else image[..., None]


def read_mask(path: Path) -> np.ndarray:
    """(H,W) class indices in the type of the file."""
    if path.suffix.lower() == ".npy":
        mask = open_array(path, (2,), "(H,W)")
    else:
        picture = open_picture(path)
        if picture.format != "PNG":
            raise DataError(f"{path}: a {picture.format} changes the values of a mask; save masks as PNG or .npy")
        if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
            raise DataError(f"{path}: a mask in colour or with transparency ({picture.mode}) where class indices were "
                            "expected; for DeepGlobe take --dataset deepglobe, else save a PNG with one grey value per "
                            "class: 0, 1, 2, ...")
        mask = np.array(picture)
    if mask.dtype.kind == "f":
        raise DataError(f"{path}: a mask of {mask.dtype} where whole numbers were expected; save mask.astype('uint8')")
    return mask


def scale(image: Tensor) -> int:
    """What white is: 255 or 65535 in pictures, 1 in any other type."""
    return torch.iinfo(image.dtype).max if image.dtype in (torch.uint8, torch.uint16) else 1


DEEPGLOBE = {  # class: red, green, blue
    "urban": (0, 1, 1), "agriculture": (1, 1, 0), "rangeland": (1, 0, 1), "forest": (0, 1, 0), "water": (0, 0, 1),
    "barren": (1, 1, 1), "unknown": (0, 0, 0)}


def read_deepglobe_mask(path: Path) -> np.ndarray:
    """(H,W) uint8. Colours are not always pure, so they are cut at 128; unknown (and red, which means nothing) is 255."""
    index = np.full(8, IGNORE, np.uint8)
    for i, (red, green, blue) in enumerate(DEEPGLOBE.values()):
        if red or green or blue:
            index[4 * red + 2 * green + blue] = i
    picture = open_picture(path)
    if picture.mode not in ("RGB", "RGBA", "P"):
        raise DataError(f"{path}: a grey mask ({picture.mode}) where DeepGlobe's colours were expected; for class indices "
                        "take --dataset folder")
    red, green, blue = np.moveaxis(np.array(picture.convert("RGB")) >> 7, 2, 0)
    return index[4 * red + 2 * green + blue]


# Folders

say = functools.cache(print)  # each thing once, however often a folder is opened


def files(folder: Path, ending: str = "") -> dict[str, Path]:
    """The images of a folder by name, without `ending`."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; images belong in DIR/train/images and masks in DIR/train/masks, and "
                        "the same in DIR/val and DIR/test if these are there")
    found = {}
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")
        if path.suffix.lower() in UNREADABLE and not hidden:
            raise DataError(f"{path}: only PNG, JPEG and .npy can be read; convert it, or move it elsewhere")
        if path.suffix.lower() in (*PICTURES, ".npy") and path.stem.endswith(ending) and not hidden:
            name = unicodedata.normalize("NFC", path.stem.removesuffix(ending))  # file systems write accents in two ways
            if name in found:
                raise DataError(f"{path}: {found[name].name} has the same name; keep one of the two")
            found[name] = path
    return found


def match(images: dict[str, Path], masks: dict[str, Path], folder: Path) -> dict[str, Pair]:
    if not images:
        raise DataError(f"{folder}: no image ({', '.join(PICTURES)}, .npy); convert others, such as TIFF, to one of these")
    for name in sorted(images.keys() ^ masks.keys()):
        path, other = (images[name], "mask") if name in images else (masks[name], "image")
        raise DataError(f"{path}: there is no {other} named {name}; the two files of a pair have the same name, so add or "
                        "rename it, or remove this file")
    return {name: (images[name], masks[name]) for name in images}


def find_pairs(root: Path, seed: int) -> dict[str, list[Pair]]:
    """The pairs of each split of a folder of your own."""
    present = [split for split in SPLITS if split == "train" or (root / split).is_dir()]
    return complete({split: list(match(files(root / split / "images"), files(root / split / "masks"),
                                       root / split / "images").values()) for split in present}, root, seed)


def complete(split: dict[str, list[Pair]], root: Path, seed: int) -> dict[str, list[Pair]]:
    """All three splits; one that is missing gets a tenth of the training pairs, at least one, drawn by the seed."""
    pairs = [split["train"][i] for i in np.random.default_rng(seed).permutation(len(split["train"]))]
    missing, tenth = [name for name in SPLITS if name not in split], max(len(pairs) // 10, 1)
    if missing and len(pairs) <= len(missing):
        raise DataError(f"{root}: {len(pairs)} training pairs are too few to take {' and '.join(missing)} from; add some")
    for name in missing:
        split[name], pairs = sorted(pairs[:tenth]), pairs[tenth:]
    if missing:
        say(f"{root}: no {' or '.join(missing)}, so {tenth} of the training pairs each, drawn by the seed")
    return split | {"train": sorted(pairs)}


def find_deepglobe(root: Path, seed: int) -> dict[str, list[Pair]]:
    """The pairs DIR/train/ID_sat.jpg, ID_mask.png, in the split of the literature if that knows all of them."""
    pairs = match(files(root / "train", "_sat"), files(root / "train", "_mask"), root / "train")
    listed = Path(__file__).parent / "experiments/deepglobe_split.txt"
    known = dict(line.split() for line in listed.read_text().splitlines()) if listed.exists() else {}
    split = {name: [pair for identity, pair in pairs.items() if known.get(identity) == name] for name in SPLITS}
    if sum(map(len, split.values())) == len(pairs) and all(split.values()):
        say(f"{root}: {len(pairs)} pairs in the split of the literature")
        return split
    return complete({"train": list(pairs.values())}, root, seed)


# The data set

class ImageFolder(Dataset):
    """Pairs of an image (C,H,W) and a mask (H,W), both as stored, class indices in uint8.

    crop: (height, width) of a window, somewhere else each time; augment: flips, and quarter turns of square images, for
    which a mapped image is read (of a window only the window). Both draw from torch's global generator.
    """

    def __init__(self, pairs: list[Pair], read_mask: Callable = read_mask, crop=None, augment: bool = False):
        self.pairs, self.read_mask, self.crop, self.augment = pairs, read_mask, crop, augment

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = read_image(self.pairs[i][0]), self.read_mask(self.pairs[i][1])
        if self.crop:
            top, left = (torch.randint(side - part + 1, ()).item() for side, part in zip(mask.shape, self.crop))
            image, mask = (x[top:top + self.crop[0], left:left + self.crop[1]] for x in (image, mask))
        if self.augment:
            upside_down, mirrored, turned = torch.randint(2, (3,)).tolist()
            image, mask = (x[::-1] if upside_down else x for x in (image, mask))
            image, mask = (x[:, ::-1] if mirrored else x for x in (image, mask))
            if turned and mask.shape[0] == mask.shape[1]:
                image, mask = image.swapaxes(0, 1), mask.T
            image, mask = image.copy(), mask.copy()  # torch has no negative strides
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask.astype(np.uint8, copy=False))


def open_folder(root: Path, deepglobe: bool, seed: int, crop=None, augment: bool = False) -> dict[str, ImageFolder]:
    """Train, val and test of DIR. Crops and augmentation are for training. DataError."""
    pairs = (find_deepglobe if deepglobe else find_pairs)(root, seed)
    reader = read_deepglobe_mask if deepglobe else read_mask
    return {"train": ImageFolder(pairs["train"], reader, crop, augment),
            "val": ImageFolder(pairs["val"], reader), "test": ImageFolder(pairs["test"], reader)}
