"""Which images predict.py is to segment, and the files that it writes for each.

    python predict.py CHECKPOINT scans/2020 scans/2021 --out DIR

    scans/2020/tile.png  ->  DIR/2020/tile.png, DIR/2020/tile-overlay.png
    scans/2021/tile.png  ->  DIR/2021/tile.png, DIR/2021/tile-overlay.png

So --out gets the subfolders that the images have, relative to the innermost folder that holds all that was named.
"""

import functools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image  # comes with matplotlib
from torch import Tensor

from decompose import Box
from support import plots
from support.checkpoints import atomic_write
from support.image_files import PICTURES, DataError, blocks
from support.image_folder import UNREADABLE, find_files, name_of
from support.loss import IGNORE
from support.mask_files import (classes_in, count_pixels, drawn_in_white, read_deepglobe_mask, read_mask,
                                single_class_error)
from support.values import Extremes, is_finite, range_line

IMAGE_ENDING, MASK_ENDING = "_sat", "_mask"  # of the names of DeepGlobe's files


@dataclass
class Job:
    """One image to segment.

    image: its file. relative: its path from the folder that holds all that was named. name: the
    name that its true mask also has. written: the files to write, by what they hold. truth: the
    file of its true mask, if there is one.
    """

    image: Path
    relative: Path
    name: str
    written: dict[str, Path]
    truth: Path | None = None


# Finding the images

def find_jobs(named: list[Path], out: Path, deepglobe: bool, probabilities: bool) -> list[Job]:
    """A job for each image that was named, and for each in a folder that was named or in one of its subfolders.

    An image that was named twice has one job. probabilities: whether they are to be written.
    DataError: a folder holds no image, or it holds `out`; or two images would be written to the same file.
    """
    images = []
    folders = []
    for path in named:
        if path.is_dir():
            check_outside(out, path)
            images += images_in(path, deepglobe)
            folders.append(os.path.abspath(path))
        else:
            images.append(path)
            folders.append(os.path.dirname(os.path.abspath(path)))
    common = os.path.commonpath(folders)
    jobs = {}
    for image in images:
        relative = Path(os.path.relpath(os.path.abspath(image), common))
        name = name_of(relative, IMAGE_ENDING if deepglobe else "")
        jobs[relative] = Job(image, relative, name, files_to_write(out, relative, probabilities))
    check_different(jobs.values())
    return list(jobs.values())


def images_in(folder: Path, deepglobe: bool) -> list[Path]:
    """The images in a folder and its subfolders, without hidden files and without the masks of a data set."""
    images = []
    left_out = []
    masks = set()  # folders
    for path in sorted(files_below(folder)):
        around = folder_of_masks(path.relative_to(folder))
        if around and (folder / around).with_name("images").is_dir():
            masks.add(folder / around)
        elif path.suffix.lower() in (*PICTURES, ".npy", *UNREADABLE):  # one that cannot be read is named in its turn
            images.append(path)
        else:
            left_out.append(path)
    for path in sorted(masks):
        print(f"{path}: left out, as it lies beside images")
    if not images:
        raise DataError(f"{folder}: no image ({', '.join(PICTURES)}, .npy) in it or its subfolders; name another")
    if left_out:
        print(f"{folder}: files of other kinds are left out ({len(left_out)}, the first is {left_out[0].name})")
    if deepglobe:
        without_masks = [path for path in images if path.stem.endswith(IMAGE_ENDING)]
        return without_masks or images
    return images


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, without hidden ones. Links to folders are followed, but only where they
    lead to a folder that is not found otherwise."""
    found = []
    folders, links = [folder], []
    seen = set()  # the folders themselves, wherever a link to them may be
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        true_path = os.path.realpath(place)
        if true_path in seen:
            continue
        seen.add(true_path)
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                found.append(path)
            elif path.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    return found


def folder_of_masks(path: Path) -> Path | None:
    """The folder named masks that a path leads through, if there is one."""
    for parent in path.parents:
        if parent.name == "masks":
            return parent
    return None


def check_outside(out: Path, folder: Path):
    """DataError: the folder to write to is inside a folder of images."""
    inner = Path(os.path.abspath(out))
    outer = Path(os.path.abspath(folder))
    if outer == inner or outer in inner.parents:
        raise DataError(f"--out {out}: is inside {folder}, where the masks would be taken for images; name another "
                        "--out")


def files_to_write(out: Path, relative: Path, probabilities: bool) -> dict[str, Path]:
    """The files for the image with this relative path, by what they hold. The mask of an array is an array."""
    folder = out / relative.parent
    suffix = ".npy" if relative.suffix.lower() == ".npy" else ".png"
    files = {
        "mask": folder / f"{relative.stem}{suffix}",
        "overlay": folder / f"{relative.stem}-overlay.png",
    }
    if probabilities:
        files["probabilities"] = folder / f"{relative.stem}-probabilities.npy"
    return files


def check_different(jobs: Iterable[Job]):
    """DataError: two images would be written to the same file."""
    image_of = {}
    for job in jobs:
        for path in job.written.values():
            if path in image_of:
                raise DataError(f"{image_of[path]} and {job.image} would both be written to {path}; predict them one "
                                "after the other, each with its own --out")
            image_of[path] = job.image


# Finding their true masks

def find_truths(jobs: list[Job], masks: Path, deepglobe: bool):
    """Gives each job its true mask, if there is one: at the same place below the folder `masks`, or else right in it.

    DataError: two images would have the same mask.
    """
    ending = MASK_ENDING if deepglobe else ""
    listed = {masks: find_files(masks, ending)}  # the masks of each folder, by their names
    image_of = {}
    for job in jobs:
        folder = masks / job.relative.parent
        if folder not in listed:
            listed[folder] = {}
            if folder.is_dir():
                listed[folder] = find_files(folder, ending)
        truth = listed[folder].get(job.name) or listed[masks].get(job.name)
        if truth in image_of:
            raise DataError(f"{image_of[truth]} and {job.image} would both be scored by {truth}; give --masks the same "
                            "subfolders as the images, or name fewer images")
        if truth is not None:
            image_of[truth] = job.image
        job.truth = truth


# Checking

def check_image(image: np.ndarray, path: Path, config: dict):
    """DataError: the image (H,W,C) is of another kind than those that the network was trained on."""
    if config["dtype"] is not None and image.dtype != config["dtype"]:
        raise DataError(f"{path}: numbers of {image.dtype}, but the network was trained on {config['dtype']}; bring it "
                        "to the same type and range")
    if image.shape[2] != config["channels"]:
        raise DataError(f"{path}: a {image.shape[2]}-channel image, but the network was trained on "
                        f"{config['channels']}-channel images; convert it")
    check_values(image, path, config)


def check_values(image: np.ndarray, path: Path, config: dict):
    """A line for numbers that are not finite, and for a range that is not that of the training
    images. DataError: a channel has no finite number."""
    channels = image.shape[2]
    extremes = Extremes(channels, image.dtype)
    lost = 0
    for block in blocks(image):
        for channel in range(channels):
            values = block[..., channel].flatten()
            if values.dtype.kind == "f":
                finite = values[is_finite(values)]
                lost += values.size - finite.size
                values = finite
            extremes.add(channel, values)
    if not all(extremes.values):
        raise DataError(f"{path}: holds nan, inf or numbers beyond 1e38 alone, at least in one channel; replace them")
    if lost:
        print(f"{path}: {lost} numbers are nan, inf or beyond 1e38; they are taken as the mean of the training images")
    if config.get("range") is None:  # of synthetic images, or an older checkpoint
        return
    remark = range_line(extremes.value_range(), config["range"])
    if remark:
        print(f"{path}: {remark}")


def read_truth(path: Path, size: tuple[int, int], config: dict) -> np.ndarray:
    """The true mask of an image of a size (H,W). DataError: it does not fit."""
    deepglobe = config["dataset"] == "deepglobe"
    truth = read_deepglobe_mask(path) if deepglobe else read_mask(path)
    if truth.shape != size:
        raise DataError(f"{path}: {truth.shape[0]}x{truth.shape[1]} pixels, but the image has {size[0]}x{size[1]}; "
                        "they must be equal")
    pixels = count_pixels(truth, path, len(config["classes"]))
    if not classes_in(pixels):
        raise DataError(f"{path}: no pixel counts; give a mask with a class")
    if drawn_in_white(pixels) and not deepglobe and all_drawn_in_white(path.parent):
        raise single_class_error(path.parent)
    return truth


@functools.cache
def all_drawn_in_white(folder: Path) -> bool:
    """Whether all masks of a folder together hold 0 and 255 alone: one alone may well have nothing else."""
    for path in find_files(folder).values():
        try:
            pixels = count_pixels(read_mask(path), path, IGNORE)
        except DataError:  # which is named when its turn comes
            continue
        if classes_in(pixels) - {0}:
            return False
    return True


# Writing

@contextmanager
def all_or_none(files: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Gives the block other paths to write to. Only when it has ended well do these files go to the right ones.

    DataError: one is there already.
    """
    for path in files.values():
        if path.exists():
            raise DataError(f"{path}: is there already; take another --out")
    with ExitStack() as stack:
        unfinished = {}
        for name, path in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished[name] = stack.enter_context(atomic_write(path))
        yield unfinished


def check_space(image: Path, folder: Path, needed: int):
    """DataError: the disk of a folder has no space for so many bytes of mapped files. To notice
    that only while they are written would be too late, as it ends the program."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{image}: {folder} needs {needed / 2**20:.1f} MiB for it, but the disk has only "
                        f"{free / 2**20:.1f}; make space, or name another --out")


def create_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file, mapped into memory: what is written to the array goes to the file, and need
    not stay in memory."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def write_tile(tile: Tensor, box: Box, whole: Tensor):
    """Writes a tile (...,h,w) to its box of the whole (...,H,W), without its padding at the bottom and right."""
    top, bottom, left, right = box
    part = whole[..., top:bottom, left:right]
    height, width = part.shape[-2:]
    part.copy_(tile[..., :height, :width])


def round_probabilities(probabilities: Tensor, classes: Tensor) -> Tensor:
    """Probabilities (B,L,h,w) in float32, and the most likely classes (B,h,w) -> the probabilities in float16.

    Rounding can make the largest two equal. Then the most likely class gets the next larger
    float16. So the largest probability in what is returned is always that of `classes`.
    """
    rounded = probabilities.half()
    classes = classes[:, None]
    own = rounded.gather(1, classes)
    largest_other = rounded.scatter(1, classes, 0).amax(dim=1, keepdim=True)
    next_larger = (largest_other.view(torch.int16) + 1).view(torch.float16)  # its bits count upwards
    return rounded.scatter(1, classes, own.maximum(next_larger))


def save_with_palette(mask: np.ndarray, colors: list, path: Path):
    """A PNG that holds class indices and shows colours."""
    picture = Image.fromarray(mask)
    palette = np.rint(255 * np.array(colors)).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    picture.save(path, format="PNG")


def save_overlay(image: np.ndarray, mask: np.ndarray, colors: list, path: Path):
    """A PNG of the image (H,W,C), half covered by the colours of its classes (H,W); at most 2048 pixels on a side."""
    step = plots.thinning(mask.shape, 2048)
    image = plots.visible(image[::step, ::step].transpose(2, 0, 1))
    covering = np.array(colors, np.float32)[mask[::step, ::step]]
    blend = np.rint(255 * (image + covering) / 2).astype(np.uint8)
    Image.fromarray(blend).save(path, format="PNG")
