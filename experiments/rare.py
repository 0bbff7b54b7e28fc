"""Does a network find an object of 0.2 % of the pixels? With and without --class-weights balanced.

    OMP_NUM_THREADS=1 python -m experiments.rare                    # two minutes of one core
    python -m experiments.rare --quick                              # seconds

Each image of 96x96 pixels is noise with a rectangle of 4x5 pixels that is a little brighter. An
object counts as found if its IoU over all test images is more than 0.5. Writes rare-epochsN.md to
runs/rare.
"""

from pathlib import Path

import numpy as np
from PIL import Image  # comes with matplotlib

from experiments.common import file_name, make_folder, make_parser, save_table, trained
from support.options import number

WEIGHTS = {"all the same": [], "balanced": ["--class-weights", "balanced"]}
IMAGES = {"train": 32, "val": 8, "test": 8}


def draw_rare(folder: Path):
    """Images and masks (0, and 1 for the object) as train.py reads them."""
    rng = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = rng.random((96, 96)) / 2
            mask = np.zeros((96, 96), np.uint8)
            top, left = rng.integers(0, 92, 2)
            mask[top:top + 4, left:left + 5] = 1
            image += 0.3 * mask
            Image.fromarray((255 * image).astype(np.uint8)).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{i}.png")


def score_of_object(folder: Path, seed: int, epochs: int, weights: str) -> float:
    """IoU of the object on the test images. The network is trained now, unless it has been trained before."""
    options = ["--dataset", "folder", "--data", str(folder / "data"), "--batch-size", "4", "--workers", "0"]
    options += ["--epochs", str(epochs), "--seed", str(seed)]
    metrics = trained(folder / f"{file_name(weights)}-epochs{epochs}-seed{seed}", options + WEIGHTS[weights])
    return metrics["test"]["iou"]["class 1"]


def main(arguments: list[str] | None = None):
    parser = make_parser("Trains on images with a rare object, with and without weights of the classes.")
    parser.add_argument("--epochs", type=number(1), default=6, help="of each run")
    asked = parser.parse_args(arguments)
    epochs = 1 if asked.quick else asked.epochs
    folder = make_folder("rare", asked.quick)
    draw_rare(folder / "data")

    table = []
    for weights in WEIGHTS:
        found = 0
        shown = []
        for seed in asked.seeds:
            score = score_of_object(folder, seed, epochs, weights)
            shown.append(f"{score:.2f}")
            if score > 0.5:
                found += 1
        table.append([weights, epochs, f"{found} of {len(shown)}", ", ".join(shown)])
    save_table(folder / f"rare-epochs{epochs}.md", ["class weights", "epochs", "found", "IoU of the object"], table)


if __name__ == "__main__":
    main()
