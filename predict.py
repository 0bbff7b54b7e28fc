"""Segment your own images with a trained network, however large they are.

    python predict.py runs/NAME/best.pt IMAGE... [--out DIR] [--gpus N] [--grid RxQ] [--masks DIR]

Writes for each image the class of every pixel: NAME.png with a palette, so that it is readable by eye and by program, or
for NAME.npy an array NAME.npy, written tile by tile; and NAME-overlay.png, the classes over the image, at most 2048 pixels
wide or high. Images are cut into tiles no larger than those of training (or than 256x256, if those are smaller), and one
tile at a time is alive per device.
With --masks, a folder of true masks of the same names, it also scores them, in metrics.json.
Exit status: 0, all is done; 1, some images could not be, and each is named; 2, none could be.
"""

import argparse
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image  # comes with matplotlib

import checkpoints
import image_folder
import plots
import processes
import train
from checkpoints import CheckpointError
from data import finite_blocks, indices
from decompose import DecomposedUNet, Tiling
from image_folder import DataError
from metrics import confusion, mean_iou, near_seam, scores
from options import Parser, build_tiling, check_folder, explain, new_folder, number, pair, show_progress


def predict(model: DecomposedUNet, config: dict, image: np.ndarray, path: Path, grid, devices: list,
            out: Path) -> tuple[np.ndarray, Tiling]:
    """Writes the mask and the overlay of the image (H,W,C) of the file `path` to the folder `out`. Returns the mask (H,W)
    and how the image was cut. DataError: it cannot be cut, or understood by this network, or has been done already."""
    if image.dtype != (config["dtype"] or image.dtype):
        raise DataError(f"{path}: numbers of {image.dtype}, but the network was trained on {config['dtype']}; bring it to "
                        "the same type and range")
    if image.shape[2] != config["channels"]:
        raise DataError(f"{path}: a {image.shape[2]}-channel image, but the network was trained on "
                        f"{config['channels']}-channel images; convert it")
    for _ in finite_blocks(image, path):
        pass
    try:
        tiling = build_tiling(config, image.shape[:2], grid)
    except ValueError as error:
        raise DataError(f"{path}: {error}; take another --grid") from None
    mask_path = out / (path.stem + (".npy" if path.suffix.lower() == ".npy" else ".png"))
    overlay_path = out / f"{path.stem}-overlay.png"
    for written in (mask_path, overlay_path):
        if written.exists():
            raise DataError(f"{written}: is there already; take another --out")

    out.mkdir(parents=True, exist_ok=True)
    with checkpoints.whole_file(mask_path) as unfinished, checkpoints.whole_file(overlay_path) as unfinished_overlay:
        if path.suffix.lower() == ".npy":
            mask = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=image.shape[:2])
        else:
            mask = np.empty(image.shape[:2], np.uint8)
        train.segment(model, torch.from_numpy(image).permute(2, 0, 1)[None], tiling, devices, torch.from_numpy(mask)[None])
        if path.suffix.lower() == ".npy":
            mask.flush()
        else:
            picture = Image.fromarray(mask)
            picture.putpalette(np.rint(255 * np.array(config["colors"])).astype(np.uint8).tobytes())
            picture.save(unfinished, format="PNG")
        overlay(image, mask, config["colors"]).save(unfinished_overlay, format="PNG")
    return mask, tiling


def overlay(image: np.ndarray, mask: np.ndarray, colors: list) -> Image.Image:
    """The image (H,W,C), half covered by the colours of its classes (H,W)."""
    step = -(-max(mask.shape) // 2048)
    image, mask = image[::step, ::step], mask[::step, ::step]
    blend = (plots.visible(image.transpose(2, 0, 1)) + np.array(colors, np.float32)[mask]) / 2
    return Image.fromarray(np.rint(255 * blend).astype(np.uint8))


def true_mask(masks: Path, path: Path, size: tuple[int, int], config: dict) -> np.ndarray:
    """The mask in the folder `masks` that has the name of the image `path`. DataError: there is none that fits."""
    deepglobe = config["dataset"] == "deepglobe"
    name = unicodedata.normalize("NFC", path.stem.removesuffix("_sat" if deepglobe else ""))
    truth_path = image_folder.files(masks, "_mask" if deepglobe else "").get(name)
    if truth_path is None:
        raise DataError(f"{path}: {masks} holds no mask named {name}; add it")
    truth = (image_folder.read_deepglobe_mask if deepglobe else image_folder.read_mask)(truth_path)
    if truth.shape != size:
        raise DataError(f"{truth_path}: {truth.shape[0]}x{truth.shape[1]} pixels, but the image has "
                        f"{size[0]}x{size[1]}; they must be equal")
    if not indices(truth, truth_path, len(config["classes"])):
        raise DataError(f"{truth_path}: no pixel counts; give a mask with a class")
    return truth


def score(mask: np.ndarray, truth: np.ndarray, tiling: Tiling, classes: int) -> torch.Tensor:
    """The confusion (2,L,L) of a predicted mask (H,W) with the true one."""
    counts = 0
    for i, (top, bottom, left, right) in enumerate(tiling.boxes):
        parts = [torch.from_numpy(x[top:bottom, left:right])[None] for x in (mask, truth)]
        near = near_seam(tiling, i, torch.device("cpu"))[:parts[0].shape[1], :parts[0].shape[2]]
        counts = counts + confusion(*parts, near, classes)
    return counts


def main(arguments: list[str] | None = None):
    parser = Parser(description="Segment images with a trained network, a tile at a time.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option, unset = parser.add_argument, argparse.SUPPRESS
    option("checkpoint", type=Path, help="best.pt of a run of train.py")
    option("images", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG or .npy")
    option("--out", type=Path, default=unset, help="folder to write to (default: a new one, predictions)")
    option("--gpus", type=number(1), default=unset, help="GPUs to use (default: all there are)")
    option("--grid", type=pair, default=None, metavar="RxQ", help="rows x columns of tiles (default: as many as keep "
           "them no larger than in training, or than 256x256)")
    option("--masks", type=Path, default=None, metavar="DIR", help="folder of true masks, to score the predictions")
    asked = parser.parse_args(arguments)
    out = getattr(asked, "out", None) or new_folder("predictions")
    twice = [name for name, count in Counter(path.stem for path in asked.images).items() if count > 1]
    if twice:
        parser.error(f"two images are named {twice[0]}, and so would be their masks; predict them one after the other")
    try:
        if asked.masks and not asked.masks.is_dir():
            parser.error(f"--masks {asked.masks}: no such folder")
        if asked.masks and (out / "metrics.json").exists():
            parser.error(f"{out / 'metrics.json'}: is there already; take another --out")
        model, config = train.load_model(asked.checkpoint)
        check_folder(out)
    except (CheckpointError, DataError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(explain(error, out))

    devices = processes.find_devices(getattr(asked, "gpus", torch.cuda.device_count()), "tiles")
    model.to(devices[0])
    counts, failed = {}, 0
    for path in asked.images:
        started = time.perf_counter()
        try:
            image = image_folder.read_image(path)
            truth = true_mask(asked.masks, path, image.shape[:2], config) if asked.masks else None
            mask, tiling = predict(model, config, image, path, asked.grid, devices, out)
            if asked.masks:
                counts[path.name] = score(mask, truth, tiling, len(config["classes"]))
        except (RuntimeError, MemoryError) as error:
            if not processes.is_out_of_memory(error):
                raise
            parser.error(f"{path}: out of memory; take a --grid of more tiles")
        except (DataError, OSError) as error:
            failed += 1
            print(f"{parser.prog}: error: {explain(error, out) if isinstance(error, OSError) else error}", file=sys.stderr)
            continue
        show_progress("")
        known = f", mean IoU {mean_iou(counts[path.name].sum(dim=0)):.4f}" if asked.masks else ""
        print(f"{path}: {tiling.size[0]}x{tiling.size[1]} pixels in {tiling.grid[0]}x{tiling.grid[1]} tiles, "
              f"{time.perf_counter() - started:.1f} seconds{known}", flush=True)
    if counts:
        scored = {name: scores(count, config["classes"]) for name, count in counts.items()}
        scored["all"] = scores(sum(counts.values()), config["classes"])
        checkpoints.write_json(out / "metrics.json", scored)
    if failed < len(asked.images):
        print(f"See {out}")
    if failed:
        sys.exit(1 if failed < len(asked.images) else 2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
