"""Pairs of an image and a mask in a folder of your own, or in DeepGlobe's as it is distributed.

    DIR/train/images/NAME.png    DIR/train/masks/NAME.png    and the same in DIR/val (or DIR/valid, DIR/validation) and
                                                             DIR/test
    DIR/classes.txt              names of the classes, one a line; without it they are numbered

Without val or test, a tenth of the training pairs, drawn by the seed, stands in; or, where there
are only one or two, a tenth of their rows. Which files can be read tell image_files.py and
mask_files.py. Letters as in decompose.py.
"""

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from support.image_files import PICTURES, DataError, is_turned, read_image
from support.mask_files import DEEPGLOBE, read_deepglobe_mask, read_mask
from support.loss import IGNORE

SPLITS = ("train", "val", "test")
UNREADABLE = (".bmp", ".gif", ".webp", ".jp2", ".npz")
SPLIT_OF_THE_LITERATURE = Path(__file__).parent.parent / "experiments/deepglobe_split.txt"
Pair = tuple[Path, Path]  # image, mask
Rows = tuple[int, int]  # top, bottom: the part of an image that belongs to a split


# Finding the pairs

@functools.cache
def say_once(line: str):
    """Each line once, however often a folder is opened."""
    print(line)


def find_files(folder: Path, ending: str = "") -> dict[str, Path]:
    """The images of a folder by their names, without `ending`.

    DataError: there is no such folder, a file is of a kind that cannot be read, or two files have the same name.
    """
    if not folder.is_dir():
        missing = folder
        while not missing.parent.is_dir():
            missing = missing.parent
        raise DataError(f"{missing}: no such folder; images belong in DIR/train/images and masks in DIR/train/masks, "
                        "and the same in DIR/val and DIR/test if these are there")
    found = {}
    left_out = Counter()
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or path.is_dir():
            continue
        if suffix in UNREADABLE:
            raise DataError(f"{path}: only PNG, JPEG, TIFF, PPM, PGM and .npy can be read; convert it, or move it "
                            "elsewhere")
        if suffix not in (*PICTURES, ".npy"):
            left_out[suffix or "without a suffix"] += 1
            continue
        if not path.stem.endswith(ending):
            continue
        name = name_of(path, ending)
        if name in found:
            raise DataError(f"{path}: {found[name].name} has the same name; keep one of the two")
        found[name] = path
    if left_out:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.items())
        say_once(f"{folder}: files are left out as their kind is unknown ({kinds}); if they belong to it, convert them")
    return found


def say_subfolders(folder: Path):
    """A line for each folder among the images or masks of a split, as it is not looked into."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            say_once(f"{path}: a folder among images or masks is left out; move its files up, beside it")


def name_of(path: Path, ending: str) -> str:
    """The name that an image and its mask share. File systems write accents in two ways; here they are one."""
    return unicodedata.normalize("NFC", path.stem.removesuffix(ending))


def match(images: dict[str, Path], masks: dict[str, Path], folder: Path) -> dict[str, Pair]:
    """The pairs by their names. DataError: there are none, or one of a pair is missing."""
    if not images:
        raise DataError(f"{folder}: no image ({', '.join(PICTURES)}, .npy); convert others to one of these")
    unmatched = sorted(images.keys() ^ masks.keys())
    if unmatched:
        name = unmatched[0]
        if name in images:
            path, other = images[name], "mask"
        else:
            path, other = masks[name], "image"
        raise DataError(f"{path}: there is no {other} named {name}; the two files of a pair have the same name, so add "
                        "or rename it, or remove this file")
    return {name: (images[name], masks[name]) for name in images}


def find_pairs(root: Path, seed: int) -> dict[str, list[Pair]]:
    """The pairs of each split of a folder of your own."""
    split = {}
    folders = []
    for name in SPLITS:
        folder = root / name
        if name == "val":
            folder = validation_folder(root)
        folders.append(folder)
        if name == "train" or folder.is_dir():
            pairs = match(find_files(folder / "images"), find_files(folder / "masks"), folder / "images")
            split[name] = list(pairs.values())
            say_subfolders(folder / "images")
            say_subfolders(folder / "masks")
    for path in sorted(root.iterdir()):
        if path.is_dir() and path not in folders and not path.name.startswith("."):
            say_once(f"{path}: is left out; what shall be used belongs in train, val or test")
    return complete(split, root, seed)


def validation_folder(root: Path) -> Path:
    """DIR/val, or what other programs call it."""
    for name in ("val", "valid", "validation"):
        if (root / name).is_dir():
            if name != "val":
                say_once(f"{root}: {name} is taken as val")
            return root / name
    return root / "val"


def find_deepglobe(root: Path, seed: int) -> dict[str, list[Pair]]:
    """The pairs DIR/train/ID_sat.jpg, ID_mask.png, in the split of the literature if that knows all of them."""
    folder = root / "train"
    images = find_files(folder, "_sat")
    if not images:
        raise DataError(f"{folder}: no image named ID_sat.jpg (and its mask ID_mask.png), as DeepGlobe is distributed; "
                        "for images of your own take --dataset folder")
    pairs = match(images, find_files(folder, "_mask"), folder)
    known = {}
    for line in SPLIT_OF_THE_LITERATURE.read_text().splitlines():
        identity, name = line.split()
        known[identity] = name
    if pairs.keys() <= known.keys():
        split = {name: [] for name in SPLITS}
        for identity, pair in pairs.items():
            split[known[identity]].append(pair)
        if all(split.values()):
            say_once(f"{root}: {len(pairs)} pairs in the split of the literature")
            return split
    return complete({"train": list(pairs.values())}, root, seed)


def complete(split: dict[str, list[Pair]], root: Path, seed: int) -> dict[str, list[Pair]]:
    """All three splits. One that is missing gets a tenth of the training pairs, at least one, drawn by the seed.

    If there are too few for that, it gets all of them, and `open_folder` gives each split rows of its own.
    """
    missing = [name for name in SPLITS if name not in split]
    if not missing:
        return split
    total = len(split["train"])
    if total <= len(missing):
        return split | dict.fromkeys(missing, split["train"])
    order = np.random.default_rng(seed).permutation(total)
    pairs = [split["train"][i] for i in order]
    tenth = max(total // 10, 1)
    for name in missing:
        split[name] = sorted(pairs[:tenth])
        pairs = pairs[tenth:]
    split["train"] = sorted(pairs)
    say_once(f"{root}: no {' or '.join(missing)}, so {tenth} of the training pairs, drawn by the seed, take the place "
             "of each")
    return split


def class_names(root: Path, deepglobe: bool) -> list[str] | None:
    """DeepGlobe's, or the lines of DIR/classes.txt, or None. DataError: this file cannot be used."""
    if deepglobe:
        return list(DEEPGLOBE)
    path = root / "classes.txt"
    if not path.exists():
        return None
    try:
        lines = path.read_text("utf-8-sig").splitlines()  # some editors begin a text with an invisible sign
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save it as text, one name a line") from None
    names = [line.strip() for line in lines if line.strip()]
    different = len(set(names))
    if different < len(names) or not 2 <= len(names) <= IGNORE:
        raise DataError(f"{path}: holds {len(names)} names, {different} of them different; 2 to {IGNORE} different "
                        "ones were expected, one a line")
    return names


# The data set

class ImageFolder(Dataset):
    """Pairs of an image (C,H,W) and a mask (H,W), both as stored, class indices in uint8.

    crop: (height, width) of a window, somewhere else in each epoch. augment: flips, and quarter
    turns of square images; for that a mapped image is read, or of a window only the window. What is
    drawn for item i depends on `seed`, on `epoch` and on i alone, so it does not matter which
    process reads it, or when.
    rows: of each pair those that belong to this data set; None: all. There is one item for each
    pair, but for a pair of which only some rows belong to it, as many windows as it takes to cover
    them.
    """

    def __init__(self, pairs: list[Pair], read_mask: Callable = read_mask, crop: tuple[int, int] | None = None,
                 augment: bool = False, seed: int = 0, rows: list[Rows] | None = None):
        self.pairs = pairs
        self.read_mask = read_mask
        self.crop = crop
        self.augment = augment
        self.seed = seed
        self.rows = rows
        self.epoch = 0
        self.items = range(len(pairs))  # the number of the pair that each item is of
        if rows is not None and crop is not None:
            self.items = self.windows()

    def windows(self) -> list[int]:
        items = []
        for number in range(len(self.pairs)):
            image, _ = self.read(number)
            height, width = image.shape[:2]
            windows = math.ceil(height * width / math.prod(self.crop))
            items += [number] * windows
        return items

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The image (H,W,C) and the mask (H,W) of a pair, without the rows of other splits. What is mapped stays so."""
        image_path, mask_path = self.pairs[number]
        image = read_image(image_path)
        mask = self.read_mask(mask_path)
        if self.rows is not None:
            top, bottom = self.rows[number]
            image = image[top:bottom]
            mask = mask[top:bottom]
        return image, mask

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = self.read(self.items[i])
        rng = np.random.default_rng((self.seed, self.epoch, i))
        if self.crop is not None:
            height, width = self.crop
            top = rng.integers(mask.shape[0] - height + 1)
            left = rng.integers(mask.shape[1] - width + 1)
            image = image[top:top + height, left:left + width]
            mask = mask[top:top + height, left:left + width]
        if self.augment:
            image, mask = flip_and_turn(image, mask, rng)
        elif self.crop is not None:
            image, mask = image.copy(), mask.copy()  # a worker would send all between its first and its last pixel
        mask = mask.astype(np.uint8, copy=False)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)


def flip_and_turn(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H,W,C) and its mask (H,W), both upside down, mirrored and turned, each with a chance of one half."""
    upside_down, mirrored, turned = rng.integers(2, size=3)
    if upside_down:
        image, mask = image[::-1], mask[::-1]
    if mirrored:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if turned and mask.shape[0] == mask.shape[1]:
        image, mask = image.swapaxes(0, 1), mask.T
    return image.copy(), mask.copy()  # torch has no negative strides


def open_folder(root: Path, deepglobe: bool, seed: int, crop: tuple[int, int] | None = None,
                augment: bool = False, cell: int = 8) -> dict[str, ImageFolder]:
    """Train, val and test of DIR. Crops and augmentation are for training. DataError: see `find_files` and `match`.

    cell: pixels of a cell, of which a band of an image has at least two.
    """
    if deepglobe:
        pairs, reader = find_deepglobe(root, seed), read_deepglobe_mask
    else:
        pairs, reader = find_pairs(root, seed), read_mask
    rows = dict.fromkeys(SPLITS)
    sharing = [name for name in SPLITS if pairs[name] == pairs["train"]]  # those to which `complete` gave all pairs
    if len(sharing) > 1:
        rows |= cut_into_bands(pairs["train"], sharing, cell, reader)
    return {
        "train": ImageFolder(pairs["train"], reader, crop, augment, seed, rows["train"]),
        "val": ImageFolder(pairs["val"], reader, rows=rows["val"]),
        "test": ImageFolder(pairs["test"], reader, rows=rows["test"]),
    }


def check_same_size(image: np.ndarray, image_path: Path, mask: np.ndarray, mask_path: Path):
    """DataError: an image (H,W,C) and its mask are not of the same size."""
    height, width = image.shape[:2]
    if (height, width) != mask.shape:
        hint = ""
        if image.shape[1:] == mask.shape:
            hint = "; if the array is (C,H,W), save array.transpose(1, 2, 0)"
        elif is_turned(image_path):
            hint = "; the image is turned as its EXIF data says, so turn the mask, too"
        raise DataError(f"{image_path}: {height}x{width} pixels, but its mask {mask_path.name} has "
                        f"{mask.shape[0]}x{mask.shape[1]}; they must be equal{hint}")


def cut_into_bands(pairs: list[Pair], splits: list[str], cell: int, read_mask: Callable) -> dict[str, list[Rows]]:
    """The rows that belong to each of the splits, "train" and those that have to share its images.

    Train has the upper ones, the others a tenth each at the bottom, or two cells if that is more.
    DataError: this would be more than half of an image; or its mask is of another size.
    """
    rows = {name: [] for name in splits}
    others = splits[1:]
    for path, mask_path in pairs:
        image = read_image(path)
        check_same_size(image, path, read_mask(mask_path), mask_path)
        height = len(image)
        band = max(height // 10 // cell, 2) * cell
        bottom = height - band * len(others)
        if bottom < height / 2:
            raise DataError(f"{path}: its {height} rows are too few to cut {' and '.join(others)} out of it, {band} "
                            "rows each; add training pairs, or take a smaller --depth")
        rows["train"].append((0, bottom))
        told = f"rows 0 to {bottom - 1} are for train"
        for name in others:
            top, bottom = bottom, bottom + band
            rows[name].append((top, bottom))
            told += f", {top} to {bottom - 1} for {name}"
        say_once(f"{path}: {told}, as there are too few images for each to have its own")
    return rows
