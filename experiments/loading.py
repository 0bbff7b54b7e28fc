"""How long does training wait for images? Seconds and waiting with 0, 1 and 2 worker processes that read pictures.

    python -m experiments.loading              # 3 minutes on two cores
    python -m experiments.loading --quick      # seconds

The images are 16 PNGs of 2448x2448 pixels with the content of photographs: smooth, with a little
noise, compressed as JPEG before. Of each a window of 512x512 is learned from, four in a step, for
three epochs. Writes loading.md to runs/loading.
"""

import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image  # comes with matplotlib

import train
from experiments.common import make_folder, make_parser, save_table
from support.datasets import describe
from support.options import make_parser as make_train_parser
from support.options import parse


# The images

def photograph(side: int, rng: np.random.Generator) -> Image.Image:
    """Clouds of colour with a little noise, as a JPEG of quality 90 keeps them."""
    coarse = rng.integers(256, size=(side // 32, side // 32, 3), dtype=np.uint8)
    clouds = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    noisy = clouds + rng.normal(0, 6, clouds.shape)
    picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=90)
    return Image.open(jpeg).convert("RGB")


def make_images(folder: Path, count: int, side: int):
    """Pairs of a photograph and a mask that tells where it is bright."""
    rng = np.random.default_rng(0)
    images = folder / "train/images"
    masks = folder / "train/masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for i in range(count):
        picture = photograph(side, rng)
        picture.save(images / f"{i}.png")
        bright = np.asarray(picture.convert("L")) > 128
        Image.fromarray(bright.astype(np.uint8)).save(masks / f"{i}.png")


# What is measured

def measure(folder: Path, data: Path, options: list[str], workers: int) -> list[str]:
    """A row of the table: workers, seconds of the look at all images, seconds per step, share of waiting."""
    out = folder / f"workers{workers}"
    options = options + ["--dataset", "folder", "--data", str(data), "--workers", str(workers), "--out", str(out)]
    config = parse(options, make_train_parser(""))
    started = time.perf_counter()
    describe(config)
    look = time.perf_counter() - started

    shutil.rmtree(out, ignore_errors=True)
    train.main(options)
    metrics = json.loads((out / "metrics.json").read_text())
    share = metrics["seconds_waited"] / metrics["train_seconds"]
    return [str(workers), f"{look:.1f}", f"{metrics['seconds_per_step']:.2f}", f"{100 * share:.0f} %"]


def main(arguments: list[str] | None = None):
    asked = make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    folder = make_folder("loading", asked.quick)
    count, side, crop, epochs = (16, 2448, "512", "3")
    if asked.quick:
        count, side, crop, epochs = (4, 64, "32", "1")
    data = folder / "images"
    if not data.exists():
        make_images(data, count, side)
    options = ["--crop", crop, "--batch-size", "4", "--epochs", epochs]
    rows = []
    for workers in (0, 1, 2):
        rows.append(measure(folder, data, options, workers))
    header = ["workers", "look at all images, seconds", "seconds per step", "of these waiting"]
    save_table(folder / "loading.md", header, rows)
    print((folder / "loading.md").read_text())


if __name__ == "__main__":
    main()
