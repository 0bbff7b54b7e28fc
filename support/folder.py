"""Images and masks in a folder of your own.

    DIR/train/images/NAME.png    DIR/train/masks/NAME.png    and the same in DIR/val (or DIR/valid) and DIR/test
    DIR/classes.txt              names of the classes, one a line; without it they are numbered

Subfolders of images and masks are read, too. Without val or test, a tenth of the training pairs, drawn by the seed,
stands in; or, where there are only one or two, a tenth of their rows at the bottom. Which files can be read tells
images.py. Letters as in decompose.py.
"""

import glob
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from support.images import SUFFIXES, DataError, read_image, read_mask, warn_once
from support.loss import IGNORE

SPLITS = ("train", "val", "test")
TENTHS = {"train": (0, 8), "val": (8, 9), "test": (9, 10)}  # of the rows, where there are too few images
Pair = tuple[Path, Path]  # image, mask


# Finding the pairs

def name_of(path: Path) -> str:
    """The name that an image and its mask share. File systems write accents in two ways; here they are one."""
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def find_files(folder: Path) -> dict[str, Path]:
    """The images or masks in a folder and its subfolders, by their paths in it without the suffix.

    Hidden files are no images, and a line tells of those of other kinds. DataError: two files have the same name, or
    one could clear the screen on which it is printed.
    """
    found = {}
    for relative in sorted(glob.glob("**", root_dir=folder, recursive=True)):  # without what is hidden
        path = folder / relative
        check_printable(relative)
        name = name_of(Path(relative))
        if path.is_dir():
            continue
        if path.suffix.lower() in SUFFIXES:
            if name in found:
                raise DataError(f"{path}: {found[name].name} has the same name; keep one of the two")
            found[name] = path
        else:
            warn_once(f"{folder}: files of the kind {path.suffix} are left out")
    return found


def check_printable(name: str):
    """DataError: a name holds control characters."""
    if re.search(r"[\x00-\x1f\x7f-\x9f]", name):
        raise DataError(f"{name!r}: a name with control characters; rename it")


def pairs_in(folder: Path) -> list[Pair]:
    """The pairs of a split. DataError: there are none, or one of a pair is missing."""
    images = find_files(folder / "images")
    masks = find_files(folder / "masks")
    alone = sorted(images.keys() ^ masks.keys())
    if alone or not images:
        raise DataError(f"{folder}: holds {len(images)} images ({', '.join(SUFFIXES)}) in its folder images, and "
                        f"{len(masks)} masks in its folder masks; each needs a partner of the same name, which is "
                        f"missing for {alone[:5]}")
    return [(images[name], masks[name]) for name in images]


def find_pairs(root: Path) -> dict[str, list[Pair]]:
    """The pairs of each split that has a folder, as train must. A line tells of each folder that is left out."""
    pairs = {}
    for folder in sorted({root / "train", *root.iterdir()}):  # val before valid
        split = folder.name.replace("valid", "val")
        if split in SPLITS and split not in pairs:
            pairs[split] = pairs_in(folder)
        elif folder.is_dir() and not folder.name.startswith("."):
            warn_once(f"{folder}: is left out; what shall be used belongs in train, val or test")
    return pairs


def class_names(root: Path) -> list[str] | None:
    """The lines of DIR/classes.txt, if there is one. DataError: it cannot be used."""
    path = root / "classes.txt"
    if not path.exists():
        return None
    text = path.read_text("utf-8-sig", errors="replace")  # some editors begin a text with an invisible sign
    names = [line.strip() for line in text.splitlines() if line.strip()]
    check_printable("".join(names))
    if len(set(names)) < len(names) or not 2 <= len(names) <= IGNORE:
        raise DataError(f"{path}: holds {len(names)} names; write 2 to {IGNORE} different ones, one a line, the first "
                        "for the value 0")
    return names


# The data set

class ImageFolder(Dataset):
    """Pairs of an image (C,H,W) and a mask (H,W), both in the types of their files. What is mapped stays so.

    tenths: which tenths of the rows of each image belong to this data set; (0, 10): all.
    """

    def __init__(self, pairs: list[Pair], tenths: tuple[int, int] = (0, 10)):
        self.pairs = pairs
        self.tenths = tenths

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = self.read(i)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The image (H,W,C) and the mask (H,W). DataError: they cannot be read, or are not of the same size."""
        image_path, mask_path = self.pairs[i]
        image = read_image(image_path)
        mask = read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            raise DataError(f"{image_path}: height, width and channels are {image.shape}, but its mask is "
                            f"{mask.shape}; height and width must be equal")
        first, last = self.tenths
        rows = slice(len(mask) * first // 10, len(mask) * last // 10)
        return image[rows], mask[rows]


def open_folder(root: Path, seed: int) -> dict[str, ImageFolder]:
    """Train, val and test of DIR. DataError: see `find_files` and `pairs_in`."""
    pairs = find_pairs(root)
    train = pairs["train"]
    missing = [name for name in SPLITS if name not in pairs]
    tenths = {}
    if len(train) <= len(missing):
        for name in ["train", *missing]:
            pairs[name] = train
            tenths[name] = TENTHS[name]
        warn_once(f"{root}: too few images for {' and '.join(missing)}, so each of these gets a tenth of the rows, at "
                  "the bottom of each image, and training the rows above")
    elif missing:
        tenth = max(len(train) // 10, 1)
        np.random.default_rng(seed).shuffle(train)
        for name in missing:
            pairs[name] = train[:tenth]
            del train[:tenth]
        warn_once(f"no {' or '.join(missing)}, so {tenth} of the training pairs, drawn by the seed, take the place of "
                  "each")
    return {name: ImageFolder(pairs[name], tenths.get(name, (0, 10))) for name in SPLITS}
