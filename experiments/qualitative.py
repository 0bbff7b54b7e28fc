"""Figures 5 and 6 of the poster: what does the communication network do? Three models on the same test images.

    python -m experiments.qualitative [options of train.py]

Trains each model with three seeds (nine runs; one that is there already is not repeated), prints a
table of test IoU and draws qualitative.png: image, true mask, and the masks of the three models with the first seed.
--quick: one seed and a few steps, in seconds. Runs, table and picture go to runs/qualitative or runs/qualitative-quick;
the picture of the README is the first, copied here.
"""

import sys
from pathlib import Path

import torch

import plots
import train
from experiments.common import MODELS, QUICK, mean_and_spread, trained
from options import build_tiling


def main(arguments: list[str]):
    quick = "--quick" in arguments
    options, seeds = (QUICK, [0]) if quick else (arguments, [0, 1, 2])
    folder = Path("runs/qualitative-quick" if quick else "runs/qualitative")

    table, columns, boxes = [], {}, None
    for name, flags in MODELS.items():
        runs = {seed: folder / f"{name.split()[0]}-seed{seed}" for seed in seeds}
        metrics = [trained(out, [*options, *flags, "--seed", str(seed)]) for seed, out in runs.items()]
        scores = [mean_and_spread([run["test"]["iou"][label] for run in metrics]) for label in metrics[0]["test"]["iou"]]
        mean = mean_and_spread([run["test"]["mean_iou"] for run in metrics])
        table.append(f"| {name} | {' | '.join(scores)} | {mean} | {metrics[0]['parameters']:,} |")

        checkpoint = runs[seeds[0]] / "best.pt"
        model, config = train.load_model(checkpoint)
        data = train.build_datasets(config)["test"]
        pictures = train.predict_some(model, data, config, [torch.device("cpu")])
        columns["image"], columns["true mask"] = pictures["image"], pictures["true mask"]
        columns[name.replace(" ", "\n", 1)] = pictures["prediction"]
        boxes = boxes or [build_tiling(config, mask.shape).boxes for mask in pictures["true mask"]]  # of the first model

    names = " | ".join(f"IoU {label}" for label in metrics[0]["test"]["iou"])
    lines = [f"| model | {names} | mean IoU | parameters |", "|---" * (names.count("|") + 4) + "|", *table]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    plots.draw_predictions(folder / "qualitative.png", columns, boxes, config["classes"], config["colors"])


if __name__ == "__main__":
    main(sys.argv[1:])
