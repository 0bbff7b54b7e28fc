"""Segment your own images with a trained network, however large they are.

    python predict.py runs/NAME/best.pt IMAGE_OR_FOLDER... [--out DIR] [--gpus N] [--grid RxQ] [--masks DIR]

Writes the class of every pixel of each image: NAME.png with a palette, so that it is readable by
eye and by program, or for NAME.npy an array NAME.npy, written tile by tile. Writes also
NAME-overlay.png, the classes over the image, at most 2048 pixels wide or high. Images are cut into
tiles no larger than those of training. If these are small, an image larger than those of training
is cut into tiles of up to 256 pixels to a side. One tile at a time is alive on each device. From a
folder, predict.py takes all images, also those in its subfolders, and --out gets the same
subfolders. With --probabilities, it also writes the probability of every class. With --masks, a
folder of true masks of the same names, it also scores the predictions, in metrics.json. Exit
status: 0, all images are done; 1, some of them failed; 2, all failed, or it could not begin or go
on. Each image that failed is named.
"""

import argparse
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

from decompose import DecomposedUNet, Tiling
from support import folders, processes
from support.checkpoints import write_json
from support.command import close_output, one_line_errors
from support.image_files import DataError, is_turned, read_image
from support.image_folder import say_once
from support.model import load_model
from support.options import Parser, explain, number, pair, show_progress
from support.predictions import (Job, all_or_none, check_image, check_space, create_array, find_jobs, find_truths,
                                 read_truth, round_probabilities, save_overlay, save_with_palette, write_tile)
from support.scores import confusion, mean_iou, pixels_near_seam, remarks, scores
from support.sizes import build_tiling
from train import run_tiles


# One image

@torch.no_grad()
def segment(model: DecomposedUNet, images: torch.Tensor, tiling: Tiling, devices: list, config: dict,
            out: torch.Tensor, probabilities: torch.Tensor | None = None, progress: str = ""):
    """Writes the class of each pixel of the images (B,C,H,W) to `out`, (B,H,W) uint8 on the CPU, tile by tile.

    probabilities: (B,L,H,W) float16 on the CPU, to which that of each class is written, or None.
    progress: what to show in front of the number of the tile.
    """
    waiting = deque()  # tiles that a device still computes, while the next one is given work

    def write():
        i, predicted, rounded = waiting.popleft()
        write_tile(predicted, tiling.boxes[i], out)
        if rounded is not None:
            write_tile(rounded, tiling.boxes[i], probabilities)
        show_progress(f"{progress}tile {i + 1} of {len(tiling)}")

    def finish(i, logits):
        predicted = logits.argmax(dim=1)
        rounded = None
        if probabilities is not None:
            rounded = round_probabilities(logits.float().softmax(dim=1), predicted)
        waiting.append((i, predicted.byte(), rounded))
        if len(waiting) == len(devices):
            write()

    model.eval()
    config = {**config, "recompute": True}
    run_tiles(model, images, tiling, devices, config, finish)
    while waiting:
        write()


def predict(model: DecomposedUNet, config: dict, image: np.ndarray, job: Job, tiling: Tiling, devices: list,
            progress: str) -> np.ndarray:
    """Writes the files of a job, whose image is (H,W,C). Returns the mask (H,W). DataError: they are there already."""
    size = image.shape[:2]
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    is_array = job.written["mask"].suffix == ".npy"
    bytes_of_a_pixel = 0  # in arrays
    if is_array:
        bytes_of_a_pixel += 1
    if "probabilities" in job.written:
        bytes_of_a_pixel += 2 * len(config["classes"])
    with all_or_none(job.written) as unfinished:
        check_space(job.image, job.written["mask"].parent, bytes_of_a_pixel * size[0] * size[1])
        if is_array:
            mask = create_array(unfinished["mask"], np.uint8, size)
        else:
            mask = np.empty(size, np.uint8)
        probabilities = None
        if "probabilities" in unfinished:
            shape = (len(config["classes"]), *size)
            probabilities = torch.from_numpy(create_array(unfinished["probabilities"], np.float16, shape))[None]
        segment(model, images, tiling, devices, config, torch.from_numpy(mask)[None], probabilities, progress)
        if not is_array:
            save_with_palette(mask, config["colors"], unfinished["mask"])
        save_overlay(image, mask, config["colors"], unfinished["overlay"])
    return mask


# Its score

def score(mask: np.ndarray, truth: np.ndarray, tiling: Tiling, classes: int) -> torch.Tensor:
    """The confusion (2,L,L) of a predicted mask (H,W) with the true one, counted tile by tile."""
    counts = torch.zeros(2, classes, classes, dtype=torch.long)
    for i, (top, bottom, left, right) in enumerate(tiling.boxes):
        predicted = torch.from_numpy(mask[top:bottom, left:right])[None]
        true = torch.from_numpy(truth[top:bottom, left:right])[None]
        height, width = predicted.shape[1:]
        near_seam = pixels_near_seam(tiling, i, torch.device("cpu"))[:height, :width]
        counts += confusion(predicted, true, near_seam, classes)
    return counts


# The command

def make_parser() -> Parser:
    parser = Parser(description="Segment images with a trained network, a tile at a time.")
    option = parser.add_argument
    option("checkpoint", type=Path, help="best.pt of a run of train.py, or the folder of the run")
    option("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER", help="PNG, JPEG, TIFF or .npy, or a folder, of "
           "which all images are taken, also those in its subfolders")
    option("--out", type=Path, metavar="DIR", help="folder to write to, which gets the subfolders of the images "
           "(default: a new one, predictions)")
    option("--gpus", type=number(1), metavar="N", help="GPUs to use (default: all there are)")
    option("--grid", type=pair, metavar="RxQ", help="rows x columns of tiles (default: as many as keep them no larger "
           "than in training; for larger images, up to 256 pixels to a side where those of training are smaller)")
    option("--probabilities", action="store_true", help="write also NAME-probabilities.npy, the probability of each "
           "class at each pixel: float16 of shape (classes, height, width) (default: no)")
    option("--masks", type=Path, metavar="DIR", help="folder of true masks, to score the predictions; "
           "each has the name of its image, and lies in the same subfolder or right in DIR (default: no scores)")
    return parser


def main(arguments: list[str] | None = None):
    parser = make_parser()
    asked = parser.parse_args(arguments)
    if asked.masks and not asked.masks.is_dir():
        parser.error(f"--masks {asked.masks}: no such folder")
    if asked.masks and asked.out and (asked.out / "metrics.json").exists():
        parser.error(f"{asked.out / 'metrics.json'}: is there already; take another --out")
    with one_line_errors(parser):
        model, config = load_model(asked.checkpoint)
        config["image_processes"] = 1  # however many trained it
        folders.check_folder(asked.out or Path("predictions"))
        out = asked.out or folders.new_folder("predictions")
    try:
        with one_line_errors(parser):
            jobs = find_jobs(asked.images, out, config["dataset"] == "deepglobe", asked.probabilities)
            if asked.masks:
                find_truths(jobs, asked.masks, config["dataset"] == "deepglobe")
        predict_all(model, config, jobs, asked, out, parser)
    except BrokenPipeError:
        close_output()
        parser.error("nobody reads what this prints any more, so it stops")
    finally:
        if asked.out is None:
            folders.remove_if_empty(out)


def predict_all(model: DecomposedUNet, config: dict, jobs: list[Job], asked: argparse.Namespace, out: Path,
                parser: Parser):
    """Predicts one image after the other, and says in one line why one cannot be. Exit status: see above."""
    devices = processes.find_devices(asked.gpus or torch.cuda.device_count(), "tiles")
    model.to(devices[0])
    counts = {}
    failed = 0
    try:
        for position, job in enumerate(jobs, start=1):
            progress = f"image {position} of {len(jobs)}, "
            reason = None
            try:
                counts[job.relative.as_posix()] = predict_and_score(model, config, job, asked, devices, progress)
            except DataError as error:
                reason = str(error)
            except BrokenPipeError:
                raise
            except OSError as error:
                reason = f"{job.image}: {explain(error, out)}"
            except (RuntimeError, MemoryError) as error:
                if not processes.is_out_of_memory(error):
                    raise
                reason = f"{job.image}: out of memory; take a --grid of more tiles"
            if reason is not None:
                failed += 1
                show_progress("")
                print(f"{parser.prog}: error: {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        where = f", which are in {out}" if counts else ""
        parser.exit(130, f"\nstopped after {len(counts)} of {len(jobs)} images{where}\n")
    finally:  # also after Ctrl-C
        if asked.masks and counts:
            write_scores(counts, len(jobs), config, out)
    if failed < len(jobs):
        print(f"See {out}")
    if failed:
        sys.exit(1 if failed < len(jobs) else 2)


def predict_and_score(model: DecomposedUNet, config: dict, job: Job, asked: argparse.Namespace, devices: list,
                      progress: str) -> torch.Tensor | None:
    """Predicts one image and prints a line. Returns the confusion (2,L,L) if there are masks, else None.

    DataError: the image or its mask cannot be used.
    """
    started = time.perf_counter()
    if asked.masks and job.truth is None:
        raise DataError(f"{job.image}: {asked.masks} holds no mask named {job.name}; add it")
    image = read_image(job.image)
    if is_turned(job.image):
        say_once("images are turned as their EXIF data says, and so are their masks")
    check_image(image, job.image, config)
    truth = read_truth(job.truth, image.shape[:2], config) if asked.masks else None
    try:
        tiling = build_tiling(config, image.shape[:2], asked.grid)
    except ValueError as error:
        raise DataError(f"{job.image}: {error}; take another --grid") from None
    mask = predict(model, config, image, job, tiling, devices, progress)

    counts = score(mask, truth, tiling, len(config["classes"])) if asked.masks else None
    show_progress("")
    line = f"{job.image}: {tiling.size[0]}x{tiling.size[1]} pixels in {tiling.grid[0]}x{tiling.grid[1]} tiles"
    line += f", {time.perf_counter() - started:.1f} seconds"
    if counts is not None:
        line += f", mean IoU {mean_iou(counts.sum(dim=0)):.4f}"
    print(line, flush=True)
    return counts


def write_scores(counts: dict[str, torch.Tensor], images: int, config: dict, out: Path):
    """metrics.json: the scores of each image, and of the pixels of all. Prints what these do not show.

    images: how many were to be predicted.
    """
    classes = config["classes"]
    scored = {name: scores(count, classes) for name, count in counts.items()}
    scored["all"] = scores(sum(counts.values()), classes)
    write_json(out / "metrics.json", scored)
    print(f"mean IoU of all together {scored['all']['mean_iou']:.4f}")
    if len(counts) < images:
        print(f"{out / 'metrics.json'} holds the scores of {len(counts)} of {images} images")
    for line in remarks(scored["all"], config):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
