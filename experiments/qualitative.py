"""Figures 5 and 6 of the poster: what does the communication network do? Three models on the same test images.

    python -m experiments.qualitative [options of train.py]

Trains each model with three seeds (nine runs; one that is there already is not repeated), prints a
table of test IoU and draws qualitative.png: image, true mask, and the masks of the three models
with the first seed. --quick: one seed and a few steps, in seconds. Runs, table and picture go to
runs/qualitative or runs/qualitative-quick; the picture of the README is the first, copied here.
"""

import sys
from pathlib import Path

import torch

from experiments.common import MODELS, QUICK, make_folder, mean_and_spread, save_table, trained
from support import plots
from support.datasets import build_datasets
from support.model import load_model
from train import predict_some


def train_all(name: str, folder: Path, options: list[str], seeds: list[int]) -> list[dict]:
    """The metrics of a model with each seed."""
    metrics = []
    for seed in seeds:
        out = run_folder(folder, name, seed)
        metrics.append(trained(out, options + MODELS[name] + ["--seed", str(seed)]))
    return metrics


def run_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.split()[0]}-seed{seed}"


def save_scores(path: Path, metrics: dict[str, list[dict]]):
    """metrics: those of each model with each seed."""
    table = []
    for name, runs in metrics.items():
        classes = list(runs[0]["test"]["iou"])
        cells = [name]
        for label in classes:
            cells.append(mean_and_spread([run["test"]["iou"][label] for run in runs]))
        cells.append(mean_and_spread([run["test"]["mean_iou"] for run in runs]))
        cells.append(f"{runs[0]['parameters']:,}")
        table.append(cells)
    save_table(path, ["model"] + [f"IoU {label}" for label in classes] + ["mean IoU", "parameters"], table)


def draw(path: Path, checkpoints: dict[str, Path]):
    """Test images, their masks, and the masks that each model predicts. All show the tiles of the first model.

    checkpoints: the file of each model.
    """
    columns = {}
    boxes = []
    for name, checkpoint in checkpoints.items():
        model, config = load_model(checkpoint)
        dataset = build_datasets(config)["test"]
        pictures, tiles = predict_some(model, dataset, config, [torch.device("cpu")])
        columns["image"] = pictures["image"]
        columns["true mask"] = pictures["true mask"]
        columns[name.replace(" ", "\n", 1)] = pictures["prediction"]
        if not boxes:
            boxes = tiles
    plots.draw_predictions(path, columns, boxes, config["classes"], config["colors"])


def main(arguments: list[str]):
    quick = "--quick" in arguments
    options, seeds = arguments, [0, 1, 2]
    if quick:
        options, seeds = QUICK, [0]

    folder = make_folder("qualitative", quick)
    metrics, checkpoints = {}, {}
    for name in MODELS:
        metrics[name] = train_all(name, folder, options, seeds)
        checkpoints[name] = run_folder(folder, name, seeds[0]) / "best.pt"
    save_scores(folder / "table.md", metrics)
    draw(folder / "qualitative.png", checkpoints)


if __name__ == "__main__":
    main(sys.argv[1:])
