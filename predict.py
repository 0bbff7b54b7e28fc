"""Segment your own images with a trained network, however large they are.

    python predict.py runs/NAME/best.pt IMAGE... [--out DIR] [--gpus N] [--grid RxQ] [--masks DIR]

Writes the class of every pixel of each image: NAME.png with a palette, so that it is readable by eye and by program, or
for NAME.npy an array NAME.npy, written tile by tile. Writes also NAME-overlay.png, the classes over the image, at most
2048 pixels wide or high. Images are cut into tiles no larger than those of training (or than 256x256, if those are
smaller), and one tile at a time is alive on each device. With --masks, a folder of true masks of the same names, it also
scores them, in metrics.json.
Exit status: 0, all is done; 1, some images could not be, and each is named; 2, none could be.
"""

import argparse
import functools
import sys
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image  # comes with matplotlib

from decompose import DecomposedUNet, Tiling
from support import checkpoints, folders, plots, processes
from support.command import one_line_errors
from support.image_files import (DataError, Extremes, blocks, classes_in, count_pixels, drawn_in_white, is_finite,
                                 range_remark, read_deepglobe_mask, read_image, read_mask, single_class)
from support.loss import IGNORE
from support.image_folder import find_files, name_of
from support.model import load_model
from support.options import Parser, explain, number, pair, show_progress
from support.scores import confusion, mean_iou, pixels_near_seam, remarks, scores
from support.sizes import build_tiling
from train import run_tiles


# One image

def check_image(image: np.ndarray, path: Path, config: dict):
    """DataError: the image (H,W,C) is of another kind than those that the network was trained on."""
    if config["dtype"] is not None and image.dtype != config["dtype"]:
        raise DataError(f"{path}: numbers of {image.dtype}, but the network was trained on {config['dtype']}; bring it to "
                        "the same type and range")
    if image.shape[2] != config["channels"]:
        raise DataError(f"{path}: a {image.shape[2]}-channel image, but the network was trained on "
                        f"{config['channels']}-channel images; convert it")
    check_values(image, path, config)


def check_values(image: np.ndarray, path: Path, config: dict):
    """A line for numbers that are not finite, and for a range that is not that of the training images. DataError: a channel
    has no finite number."""
    channels = image.shape[2]
    extremes = Extremes(channels)
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
    remark = range_remark(extremes.value_range(), config["range"])
    if remark:
        print(f"{path}: {remark}")


@torch.no_grad()
def segment(model: DecomposedUNet, images: torch.Tensor, tiling: Tiling, devices: list, config: dict,
            out: torch.Tensor):
    """Writes the class of each pixel of the images (B,C,H,W) to `out`, (B,H,W) uint8 on the CPU, tile by tile."""
    waiting = deque()  # tiles that a device still computes, while the next one is given work

    def write():
        i, prediction = waiting.popleft()
        top, bottom, left, right = tiling.boxes[i]
        part = out[:, top:bottom, left:right]
        height, width = part.shape[1:]
        part.copy_(prediction[:, :height, :width])  # without the padding at the bottom and right
        show_progress(f"tile {i + 1} of {len(tiling)}")

    def finish(i, logits):
        waiting.append((i, logits.argmax(dim=1).byte()))
        if len(waiting) == len(devices):
            write()

    model.eval()
    config = {**config, "recompute": True}
    run_tiles(model, images, tiling, devices, config, finish)
    while waiting:
        write()


def predict(model: DecomposedUNet, config: dict, image: np.ndarray, path: Path, tiling: Tiling, devices: list,
            out: Path) -> np.ndarray:
    """Writes the mask and the overlay of the image (H,W,C) of the file `path` to the folder `out`. Returns the mask (H,W).

    DataError: they are there already.
    """
    is_array = path.suffix.lower() == ".npy"
    mask_path = out / (path.stem + (".npy" if is_array else ".png"))
    overlay_path = out / f"{path.stem}-overlay.png"
    for written in (mask_path, overlay_path):
        if written.exists():
            raise DataError(f"{written}: is there already; take another --out")

    out.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    with checkpoints.atomic_write(mask_path) as unfinished, checkpoints.atomic_write(overlay_path) as unfinished_overlay:
        if is_array:
            mask = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=image.shape[:2])
        else:
            mask = np.empty(image.shape[:2], np.uint8)
        segment(model, images, tiling, devices, config, out=torch.from_numpy(mask)[None])
        if is_array:
            mask.flush()
        else:
            save_with_palette(mask, config["colors"], unfinished)
        overlay(image, mask, config["colors"]).save(unfinished_overlay, format="PNG")
    return mask


def save_with_palette(mask: np.ndarray, colors: list, path: Path):
    """A PNG that holds class indices and shows colours."""
    picture = Image.fromarray(mask)
    palette = np.rint(255 * np.array(colors)).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    picture.save(path, format="PNG")


def overlay(image: np.ndarray, mask: np.ndarray, colors: list) -> Image.Image:
    """The image (H,W,C), half covered by the colours of its classes (H,W)."""
    step = -(-max(mask.shape) // 2048)
    image = plots.visible(image[::step, ::step].transpose(2, 0, 1))
    covering = np.array(colors, np.float32)[mask[::step, ::step]]
    blend = (image + covering) / 2
    return Image.fromarray(np.rint(255 * blend).astype(np.uint8))


# Its score

def true_mask(masks: Path, path: Path, size: tuple[int, int], config: dict) -> np.ndarray:
    """The mask in the folder `masks` that has the name of the image `path`. DataError: there is none that fits."""
    deepglobe = config["dataset"] == "deepglobe"
    name = name_of(path, "_sat" if deepglobe else "")
    truth_path = find_files(masks, "_mask" if deepglobe else "").get(name)
    if truth_path is None:
        raise DataError(f"{path}: {masks} holds no mask named {name}; add it")
    truth = read_deepglobe_mask(truth_path) if deepglobe else read_mask(truth_path)
    if truth.shape != size:
        raise DataError(f"{truth_path}: {truth.shape[0]}x{truth.shape[1]} pixels, but the image has "
                        f"{size[0]}x{size[1]}; they must be equal")
    pixels = count_pixels(truth, truth_path, len(config["classes"]))
    if not classes_in(pixels):
        raise DataError(f"{truth_path}: no pixel counts; give a mask with a class")
    if drawn_in_white(pixels) and not deepglobe and all_drawn_in_white(masks):
        raise single_class(masks)
    return truth


@functools.cache
def all_drawn_in_white(masks: Path) -> bool:
    """Whether all masks of the folder together hold 0 and 255 alone: one alone may well have nothing else."""
    for path in find_files(masks).values():
        try:
            pixels = count_pixels(read_mask(path), path, IGNORE)
        except DataError:  # it may belong to an image that nobody asks for
            continue
        if classes_in(pixels) - {0}:
            return False
    return True


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
    option("checkpoint", type=Path, help="best.pt of a run of train.py")
    option("images", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG, TIFF or .npy")
    option("--out", type=Path, help="folder to write to (default: a new one, predictions)")
    option("--gpus", type=number(1), help="GPUs to use (default: all there are)")
    option("--grid", type=pair, metavar="RxQ", help="rows x columns of tiles (default: as many as keep them no larger than "
           "in training, or than 256x256)")
    option("--masks", type=Path, metavar="DIR", help="folder of true masks, to score the predictions")
    return parser


def main(arguments: list[str] | None = None):
    parser = make_parser()
    asked = parser.parse_args(arguments)
    for name, count in Counter(path.stem for path in asked.images).items():
        if count > 1:
            parser.error(f"two images are named {name}, and so would be their masks; predict them one after the other")
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
        predict_all(model, config, asked, out, parser)
    finally:
        if asked.out is None:
            folders.remove_if_empty(out)


def predict_all(model: DecomposedUNet, config: dict, asked: argparse.Namespace, out: Path, parser: Parser):
    """Predicts one image after the other, and says in one line why one cannot be. Exit status: see above."""
    devices = processes.find_devices(asked.gpus or torch.cuda.device_count(), "tiles")
    model.to(devices[0])
    counts = {}
    failed = 0
    for path in asked.images:
        try:
            counts[path.name] = predict_and_score(model, config, path, asked, devices, out)
        except (DataError, OSError) as error:
            failed += 1
            reason = explain(error, out) if isinstance(error, OSError) else error
            print(f"{parser.prog}: error: {reason}", file=sys.stderr)
        except (RuntimeError, MemoryError) as error:
            if not processes.is_out_of_memory(error):
                raise
            parser.error(f"{path}: out of memory; take a --grid of more tiles")
    if asked.masks and counts:
        write_scores(counts, config, out)
    if failed < len(asked.images):
        print(f"See {out}")
    if failed:
        sys.exit(1 if failed < len(asked.images) else 2)


def predict_and_score(model: DecomposedUNet, config: dict, path: Path, asked: argparse.Namespace, devices: list,
                      out: Path) -> torch.Tensor | None:
    """The confusion (2,L,L) of the prediction for the image `path`, if there are masks. DataError."""
    started = time.perf_counter()
    image = read_image(path)
    check_image(image, path, config)
    truth = true_mask(asked.masks, path, image.shape[:2], config) if asked.masks else None
    try:
        tiling = build_tiling(config, image.shape[:2], asked.grid)
    except ValueError as error:
        raise DataError(f"{path}: {error}; take another --grid") from None
    mask = predict(model, config, image, path, tiling, devices, out)

    counts = score(mask, truth, tiling, len(config["classes"])) if asked.masks else None
    show_progress("")
    line = f"{path}: {tiling.size[0]}x{tiling.size[1]} pixels in {tiling.grid[0]}x{tiling.grid[1]} tiles"
    line += f", {time.perf_counter() - started:.1f} seconds"
    if counts is not None:
        line += f", mean IoU {mean_iou(counts.sum(dim=0)):.4f}"
    print(line, flush=True)
    return counts


def write_scores(counts: dict[str, torch.Tensor], config: dict, out: Path):
    """metrics.json: the scores of each image, and of the pixels of all. Prints what these do not show."""
    classes = config["classes"]
    scored = {name: scores(count, classes) for name, count in counts.items()}
    scored["all"] = scores(sum(counts.values()), classes)
    checkpoints.write_json(out / "metrics.json", scored)
    for line in remarks(scored["all"], config):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
