"""Segment your own images with a trained network, however large they are.

    python predict.py runs/NAME/best.pt IMAGE_OR_FOLDER... [--out DIR] [--gpus N] [--grid RxQ] [--masks DIR]

Writes the class of every pixel of each image: NAME.png with a palette, so that it is readable by
eye and by program, or for NAME.npy an array NAME.npy. Writes also NAME-overlay.png, the classes
over the image, at most 2048 pixels wide or high. With --probabilities, it also writes the
probability of every class, and with --masks it scores the predictions, in metrics.json. From a
folder it takes all images, also those in its subfolders, and --out gets the same subfolders. Images
are cut into tiles as support/sizes.py tells, and one tile at a time is alive on each device.

Exit status: 0, all images are done; 1, some of them failed; 2, none is done, or it could not begin.
Each image that failed is named. From Python: `segment`. Letters as in decompose.py.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from support.options import Parser, Progress, UserError, has_bfloat16, number, one_line_errors, pair, show_progress


def make_parser() -> Parser:
    parser = Parser(description="Segment images with a trained network, a tile at a time.")
    option = parser.add_argument
    option("checkpoint", type=Path, help="best.pt of a run of train.py, or the folder of the run")
    option("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER", help="PNG, JPEG, TIFF, PPM, PGM or .npy, or a "
           "folder, of which all images are taken, also those in its subfolders")
    option("--out", type=Path, metavar="DIR", help="new folder to write to, which gets the subfolders of the images "
           "(default: predictions, or predictions-2, ...)")
    option("--gpus", type=number(1), metavar="N", help="GPUs to use (default: all there are)")
    option("--grid", type=pair, metavar="RxQ", help="rows x columns of tiles (default: as many as keep them no larger "
           "than in training; for larger images, up to 256 pixels to a side where those of training are smaller)")
    option("--amp", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (default: where the hardware has "
           "it)")
    option("--probabilities", action="store_true", help="write also NAME-probabilities.npy, the probability of each "
           "class at each pixel: float16 of shape (classes, height, width), which must fit into memory (default: no)")
    option("--masks", type=Path, metavar="DIR", help="folder of true masks, to score the predictions; each has the "
           "name of its image and lies in the same subfolder (default: no scores)")
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
from support.folder import ImageFolder, find_files, name_of
from support.images import (DataError, check_values, count_pixels, drawn_in_white, read_image, read_mask,
                            single_class_error)
from support.loss import IGNORE
from support.model import load_model
from support.run import new_folder
from support.scores import confusion, pixels_near_seam, print_scores, scores
from support.sizes import build_tiling
from train import run_tiles


# One image

def segment(checkpoint: Path | str, array: np.ndarray, probabilities: bool = False) -> np.ndarray:
    """The class of each pixel of an array (H,W) or (H,W,C), as (H,W) uint8: what predict.py writes for such an image.

    checkpoint: best.pt of a run, or the folder of the run. array: numbers of the type and range of the training images.
    probabilities: whether to return instead the probability of each class, (L,H,W) float16.

    A line tells if the numbers are far from those of training. DataError: they are of another type, or of other
    channels. CheckpointError: see `load_model`.
    """
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model, config = load_network(Path(checkpoint), device)
    image = np.atleast_3d(np.array(array, order="C"))  # PyTorch knows no negative strides and wants to be able to write
    return segment_image(model, config, [device], image, "the array", probabilities)


def load_network(checkpoint: Path, device: torch.device, amp: bool | None = None) -> tuple[DecomposedUNet, dict]:
    """The network of a checkpoint, on a device, and its configuration, with what differs when it predicts.

    amp: whether to compute in bfloat16; None: if this machine has it in hardware.
    """
    model, config = load_model(checkpoint)
    config["amp"] = has_bfloat16() if amp is None else amp
    config["recompute"] = True  # one tile at a time: images may be larger than those of training
    return model.to(device), config


@torch.no_grad()
def segment_image(model: DecomposedUNet, config: dict, devices: list, image: np.ndarray, name: Path | str,
                  probabilities: bool, grid: tuple[int, int] | None = None) -> np.ndarray:
    """An image (H,W,C) -> the class of each pixel, (H,W) uint8, or the probability of each class, (L,H,W) float16.

    name: of the image, for what is printed. grid: of its tiles; None: see `build_tiling`.
    DataError: the image is of another kind than those of training. ValueError: it cannot be cut.
    """
    kind = image.shape[2], str(image.dtype)
    trained = config["channels"], config["dtype"] or kind[1]
    if kind != trained:
        raise DataError(f"{name}: channels and type are {kind}, but the network was trained on {trained}; bring it to "
                        "the same type and range")
    remark = check_values(image, name, config)
    if remark:
        print(remark)
    tiling = build_tiling(config, image.shape[:2], grid)
    progress = Progress(f"{name}, tile", len(tiling))

    def reduce_tile(i: int, logits: Tensor) -> Tensor:
        progress.show(i + 1)
        if probabilities:
            return logits.float().softmax(dim=1).half().cpu()
        return logits.argmax(dim=1).byte()

    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    tiles = run_tiles(model, images, tiling, devices, config, reduce_tile)
    return tiling.stitch(tiles, "cpu")[0].numpy()


# Finding the images and their true masks

def find_images(named: list[Path], out: Path) -> list:
    """Pairs of a name and the path of an image, for the images that are named and those in folders that are named.

    The name is that of the results: the path of the image in the folder that was named, without the suffix.

    DataError: one does not exist, or a folder holds `out`; see also `find_files`.
    """
    images = []
    for path in named:
        if not path.exists():
            raise DataError(f"{path}: there is no such image or folder")
        if not path.is_dir():
            images.append((name_of(Path(path.name)), path))
            continue
        if out.resolve().is_relative_to(path.resolve()):
            raise DataError(f"--out {out}: is inside {path}, where the masks would be taken for images; name another "
                            "--out")
        images += find_files(path).items()
    return images


def find_truths(images: list, masks: Path, classes: int) -> dict[str, Path]:
    """The files in the folder `masks` by their names. images: as `find_images` returns them.

    DataError: the mask of one of these images is missing or cannot be used, or all of them together hold 0 and 255
    alone.
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

def write(content: np.ndarray | Image.Image, name: str):
    """Writes an array or a picture to the file of this name. DataError: it is there already."""
    path = Path(name)
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
    print_scores(together)


# The command

def predict_image(model: DecomposedUNet, config: dict, devices: list, name: str, path: Path, truth_path: Path | None,
                  asked: argparse.Namespace) -> Tensor | None:
    """Writes the files of one image, which are named `name`. asked: the options.

    Returns the confusion (2,L,L) with the true mask, or None if there is none. DataError: one of the two cannot be
    used.
    """
    if truth_path:
        image, truth = ImageFolder([(path, truth_path)]).read(0)
    else:
        image = read_image(path)
    mask = segment_image(model, config, devices, image, path, asked.probabilities, asked.grid)
    out = asked.out / name
    if asked.probabilities:
        write(mask, f"{out}-probabilities.npy")
        mask = mask.argmax(axis=0).astype(np.uint8)
    write(plots.overlay(image, mask, config["colors"]), f"{out}-overlay.png")
    if path.suffix.lower() == ".npy":
        write(mask, f"{out}.npy")
    else:
        write(plots.with_palette(mask, config["colors"]), f"{out}.png")
    show_progress("")
    print(f"{path} is done", flush=True)
    if truth_path:
        tiling = build_tiling(config, mask.shape, asked.grid)
        return score(mask, truth.astype(np.uint8), tiling, len(config["classes"]))


def predict_all(asked: argparse.Namespace):
    """Predicts one image after the other, and says in one line why one cannot be. Ends the program if one cannot.

    UserError, OSError: it cannot begin.
    """
    devices = processes.find_devices(asked.gpus or torch.cuda.device_count(), "tiles")
    model, config = load_network(asked.checkpoint, devices[0], asked.amp)
    images = find_images(asked.images, asked.out or Path("predictions"))
    truths = {}
    if asked.masks:
        truths = find_truths(images, asked.masks, len(config["classes"]))
    if asked.out:
        asked.out.mkdir(parents=True)  # FileExistsError: nothing is to be overwritten
    else:
        asked.out = new_folder("predictions")
    counts = {}
    try:
        for name, path in images:
            try:
                counts[name] = predict_image(model, config, devices, name, path, truths.get(name), asked)
            except BrokenPipeError:  # nobody reads what is printed any more
                raise
            except Exception as error:  # whatever is wrong with one image, the others are done
                reason = str(error) or repr(error)
                if not isinstance(error, UserError):  # which names the image itself
                    reason = f"{path}: {reason}"
                show_progress("")
                print(f"error: {reason}", file=sys.stderr)
    finally:  # also after Ctrl-C
        if truths and counts:
            write_scores(counts, config["classes"], asked.out / "metrics.json")
        print(f"{len(counts)} of {len(images)} images are done, see {asked.out}")
    if not counts:
        sys.exit(2)
    if len(counts) < len(images):
        sys.exit(1)


def main(arguments: list[str] | None = None):
    parser = make_parser()
    asked = parser.parse_args(arguments)
    with one_line_errors(parser):
        predict_all(asked)


if __name__ == "__main__":
    main()
