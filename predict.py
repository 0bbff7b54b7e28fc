"""Segment your own images with a trained network, however large they are.

    python predict.py runs/NAME/best.pt IMAGE_OR_FOLDER... [--out DIR] [--gpus N] [--grid RxQ] [--masks DIR]

Writes the class of every pixel of each image: NAME.png with a palette, so that it is readable by
eye and by program, or for NAME.npy an array NAME.npy. Writes also NAME-overlay.png, the classes
over the image, at most 2048 pixels wide or high. With --probabilities, it also writes the
probability of every class, and with --masks it scores the predictions, in metrics.json. From a
folder it takes all images, also those in its subfolders, and --out gets the same subfolders. Images
are cut into tiles as support/sizes.py tells, and one tile at a time is alive on each device.

Exit status: 0, all images are done; 1, some of them failed; 2, all failed, or it could not begin.
Each image that failed is named. From Python: `segment`. Letters as in decompose.py.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from support.options import Parser, Progress, UserError, has_bfloat16, number, one_line_errors, pair, show_progress


def make_parser() -> Parser:
    parser = Parser(description="Segment images with a trained network, a tile at a time.")
    option = parser.add_argument
    option("checkpoint", type=Path, help="best.pt of a run of train.py, or the folder of the run")
    option("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER", help="PNG, JPEG, TIFF, PPM, PGM or .npy, or a "
           "folder, of which all images are taken, also those in its subfolders")
    option("--out", type=Path, metavar="DIR", help="new folder to write to, which gets the subfolders of the images "
           "(default: predictions)")
    option("--gpus", type=number(1), metavar="N", help="GPUs to use (default: all there are)")
    option("--grid", type=pair, metavar="RxQ", help="rows x columns of tiles (default: as many as keep them no larger "
           "than in training; for larger images, up to 256 pixels to a side where those of training are smaller)")
    option("--amp", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (default: where the hardware has it)")
    option("--probabilities", action="store_true", help="write also NAME-probabilities.npy, the probability of each "
           "class at each pixel: float16 of shape (classes, height, width), which must fit into memory (default: no)")
    option("--masks", type=Path, metavar="DIR", help="folder of true masks, to score the predictions; each has the name "
           "of its image and lies in the same subfolder (default: no scores)")
    return parser


if __name__ == "__main__" and "--help" in sys.argv:
    make_parser().parse_args()  # answers before PyTorch is loaded, which takes seconds

import numpy as np
import torch
from PIL import Image  # comes with matplotlib
from torch import Tensor

from decompose import DecomposedUNet, Tiling
from support import plots, processes
from support.checkpoints import atomic_write, write_json
from support.folder import ImageFolder, find_files, name_of, warn_once
from support.images import (DataError, check_values, count_pixels, drawn_in_white, read_header, read_image, read_mask,
                            single_class_error)
from support.loss import IGNORE
from support.model import load_model
from support.run import new_folder
from support.scores import confusion, pixels_near_seam, report, scores
from support.sizes import build_tiling
from train import run_tiles


# One image

def segment(checkpoint: Path | str, array: np.ndarray, probabilities: bool = False):
    """The class of each pixel of an array (H,W) or (H,W,C), as (H,W) uint8: what predict.py writes for such an image.

    checkpoint: best.pt of a run, or the folder of the run. array: numbers of the type and range of the training images.
    probabilities: whether to return also that of each class, (L,H,W) float16.

    A line tells if the numbers are far from those of training. DataError: they are of another type, or of other channels.
    CheckpointError: see `load_model`.
    """
    network = load_network(Path(checkpoint))
    image = np.atleast_3d(np.array(array, order="C"))  # PyTorch knows no negative strides and wants to be able to write
    tiling = build_tiling(network.config, image.shape[:2])
    mask, found = segment_image(network, image, "the array", tiling, probabilities)
    if probabilities:
        return mask, found
    return mask


class Network(NamedTuple):
    """A network, its configuration with what is different here, and the devices on which tiles are computed."""

    model: DecomposedUNet
    config: dict
    devices: list[torch.device]


def load_network(checkpoint: Path, gpus: int | None = None, amp: bool | None = None) -> Network:
    """gpus: how many to use; None: all. amp: whether to compute in bfloat16; None: if this machine has it in hardware."""
    model, config = load_model(checkpoint)
    config["amp"] = has_bfloat16() if amp is None else amp
    config["image_processes"] = 1  # however many trained it
    config["recompute"] = True  # one tile at a time: images may be larger than those of training
    devices = processes.find_devices(gpus or torch.cuda.device_count(), "tiles")
    return Network(model.to(devices[0]), config, devices)


@torch.no_grad()
def segment_image(network: Network, image: np.ndarray, name: Path | str, tiling: Tiling,
                  with_probabilities: bool) -> tuple:
    """An image (H,W,C) -> the class of each pixel, (H,W) uint8, and the probability of each class, (L,H,W) float16.

    with_probabilities: otherwise there are none (None). DataError: the image is of another kind than those of training.
    """
    model, config, devices = network
    kind = image.shape[2], str(image.dtype)
    trained = config["channels"], config["dtype"] or kind[1]
    if kind != trained:
        raise DataError(f"{name}: channels and type are {kind}, but the network was trained on {trained}; bring it to the "
                        "same type and range")
    remark = check_values(image, name, config)
    if remark:
        print(remark)
    progress = Progress(f"{name}, tile", len(tiling))

    def reduce_tile(i: int, logits: Tensor) -> Tensor:
        progress.show(i + 1)
        if with_probabilities:
            return logits.float().softmax(dim=1).half().cpu()
        return logits.argmax(dim=1).byte()

    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    tiles = run_tiles(model, images, tiling, devices, config, reduce_tile)
    found = tiling.stitch(tiles, "cpu")[0].numpy()
    if with_probabilities:
        return found.argmax(axis=0).astype(np.uint8), found  # the class of what is written, also where two are equal
    return found, None


# Finding the images and their true masks

def find_images(named: list[Path], out: Path) -> list:
    """Pairs of a name and the path of an image, for the images that are named and those in folders that are named.

    The name is that of the results: the path of the image in the folder that was named, without the suffix.

    DataError: there is no image, or a folder of masks beside them, or a folder holds `out`.
    """
    images = []
    for path in named:
        if not path.is_dir():
            images.append((name_of(Path(path.name)), path))
            continue
        if out.resolve().is_relative_to(path.resolve()):
            raise DataError(f"--out {out}: is inside {path}, where the masks would be taken for images; name another --out")
        images += find_files(path).items()
    for name, path in images:
        if "masks" in Path(name).parent.parts:
            raise DataError(f"{path}: is in a folder of masks; name the folder of the images alone")
    if not images:
        raise DataError(f"{named[0]}: holds no PNG, JPEG, TIFF, PPM, PGM or .npy, also in its subfolders; name another folder")
    return images


def find_truths(images: list, masks: Path, classes: int) -> dict[str, Path]:
    """The files in the folder `masks` by their names. images: as `find_images` returns them.

    DataError: the mask of one of these images is missing or cannot be used, or all of them together hold 0 and 255 alone.
    """
    found = find_files(masks)
    pixels = Counter()
    for name, image in images:
        if name not in found:
            raise DataError(f"{image}: {masks} holds no mask named {name}; add it")
        pixels.update(count_pixels(read_mask(found[name]), found[name], classes))
    if drawn_in_white(pixels):
        raise single_class_error(masks)
    return found


# Writing

def write(content: np.ndarray | Image.Image, path: Path):
    """Writes an array or a picture. DataError: the file is there already."""
    if path.exists():
        raise DataError(f"{path}: is there already; rename one of the two images")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            content.save(file, "PNG")


# Scoring

def score(mask: np.ndarray, truth: np.ndarray, tiling: Tiling, classes: int) -> Tensor:
    """The confusion (2,L,L) of a predicted mask (H,W) with the true one, counted tile by tile."""
    both = torch.from_numpy(np.stack([mask, truth]))
    counts = 0
    for i, (predicted, true) in enumerate(tiling.split(both, overlap=False, fill=IGNORE)):
        near_seam = pixels_near_seam(tiling, i, both.device)
        counts += confusion(predicted, true, near_seam, classes)
    return counts


def write_scores(counts: dict[str, Tensor], classes: list[str], path: Path):
    """Writes and prints the scores of each image, and of the pixels of all."""
    together = scores(sum(counts.values()), classes)
    each = {name: scores(count, classes) for name, count in counts.items()}
    write_json(path, {"all": together, "images": each})
    print("\nIoU of all these images together:")
    for line in report(together):
        print(line)


# The command

def predict_image(network: Network, name: str, path: Path, truth_path: Path | None, asked: argparse.Namespace):
    """Writes the files of one image, which are named `name`. asked: the options.

    Returns the confusion (2,L,L) with the true mask, or None if there is none. DataError: one of the two cannot be used.
    """
    config = network.config
    if truth_path:
        image, truth = ImageFolder([(path, truth_path)]).read(0)
    else:
        image = read_image(path)
    turned, _ = read_header(path)
    if turned:
        warn_once("images are turned as their EXIF data says, and so are their masks")
    tiling = build_tiling(config, image.shape[:2], asked.grid)
    mask, probabilities = segment_image(network, image, path, tiling, asked.probabilities)
    counts = None
    if truth_path:
        counts = score(mask, truth.astype(np.uint8), tiling, len(config["classes"]))
    if asked.probabilities:
        write(probabilities, asked.out / f"{name}-probabilities.npy")
    write(plots.overlay(image, mask, config["colors"]), asked.out / f"{name}-overlay.png")
    if path.suffix.lower() == ".npy":
        write(mask, asked.out / f"{name}.npy")
    else:
        write(plots.with_palette(mask, config["colors"]), asked.out / f"{name}.png")
    show_progress("")
    print(f"{path} is done, number of tiles: {len(tiling)}", flush=True)
    return counts


def predict_all(asked: argparse.Namespace, prog: str):
    """Predicts one image after the other, and says in one line why one cannot be. Ends the program if one cannot.

    prog: its name. UserError, OSError: it cannot begin.
    """
    network = load_network(asked.checkpoint, asked.gpus, asked.amp)
    classes = network.config["classes"]
    images = find_images(asked.images, asked.out or Path("predictions"))
    truths = {}
    if asked.masks:
        truths = find_truths(images, asked.masks, len(classes))
    if asked.out:
        asked.out.mkdir(parents=True)  # FileExistsError: nothing is to be overwritten
    else:
        asked.out = new_folder("predictions")
    counts = {}
    try:
        for name, path in images:
            try:
                counts[name] = predict_image(network, name, path, truths.get(name), asked)
            except BrokenPipeError:
                raise
            except Exception as error:  # whatever is wrong with one image, the others are done
                reason = error if isinstance(error, UserError) else f"{path}: {error}"
                if processes.is_out_of_memory(error):
                    reason = f"{path}: out of memory; take a --grid of more tiles"
                show_progress("")
                print(f"{prog}: error: {reason}", file=sys.stderr)
    finally:  # also after Ctrl-C
        if truths and counts:
            write_scores(counts, classes, asked.out / "metrics.json")
        print(f"{len(counts)} of {len(images)} images are done, see {asked.out}")
    if len(counts) < len(images):
        sys.exit(1 if counts else 2)


def main(arguments: list[str] | None = None):
    parser = make_parser()
    asked = parser.parse_args(arguments)
    with one_line_errors(parser):
        predict_all(asked, parser.prog)


if __name__ == "__main__":
    main()
