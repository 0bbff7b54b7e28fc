"""The last two pictures of docs/results.md, from the real tensors of a trained network.

    python -m experiments.idea RUN        # RUN: a folder that train.py made, with communication

problem.png: what the network is given, what it must find, and how little of it one tile sees.
idea.png: one image on its way through the network. Both are written to experiments/. Takes seconds.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from decompose import Tiling, keep_logits
from experiments.common import HERE
from support import plots
from support.datasets import build_datasets
from support.model import load_model
from support.sizes import build_tiling
from train import run_tiles

GAP = 3  # white pixels between tiles that are apart


def move_apart(picture: np.ndarray, tiling: Tiling, gap: int) -> np.ma.MaskedArray:
    """A picture (H,W) with so many pixels between its tiles."""
    height, width = tiling.size
    rows, columns = tiling.grid
    canvas = np.full((height + gap * (rows - 1), width + gap * (columns - 1)), np.nan)
    for i, (top, bottom, left, right) in enumerate(tiling.boxes):
        tile = picture[top:bottom, left:right]
        top += gap * (i // columns)
        left += gap * (i % columns)
        canvas[top:top + tile.shape[0], left:left + tile.shape[1]] = tile
    return np.ma.masked_invalid(canvas)


def show_map(axes, picture: np.ndarray, cmap: str):
    """A picture (H,W), some pixels of which may be missing, without a frame."""
    axes.imshow(picture, cmap=cmap, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


# problem.png

def draw_problem(path: Path, image: torch.Tensor, mask: torch.Tensor, tiling: Tiling, colors: list):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(7.2, 2.7), layout="constrained")
    plots.show(left, image, [], colors)
    left.set_title("the image", fontsize=10)
    plots.show(middle, mask, [], colors)
    middle.set_title("the mask to find", fontsize=10)
    show_map(right, move_apart(image[0].numpy(), tiling, GAP), "gray")
    right.set_title("what each GPU gets to see", fontsize=10)
    plots.save(figure, path)


# idea.png

class Recorder:
    """A forward hook of the communication network: keeps the map that goes in and the one that comes out, (K,h,w)."""

    def __call__(self, comm_net, inputs, output):
        self.sent = inputs[0][0]
        self.received = output[0]


def draw_idea(path: Path, model, config: dict, image: torch.Tensor, tiling: Tiling):
    recorder = Recorder()
    model.comm_net.register_forward_hook(recorder)
    with torch.no_grad():
        logits = run_tiles(model, image[None], tiling, [torch.device("cpu")], config, keep_logits)
    mask = tiling.stitch(logits)[0].argmax(dim=0)
    channel = recorder.received.flatten(1).std(dim=1).argmax()  # the liveliest of the K
    sent = recorder.sent[channel].numpy()
    received = recorder.received[channel].numpy()

    image_in_tiles = move_apart(image[0].numpy(), tiling, GAP)
    sent_in_tiles = move_apart(sent, tiling.coarse, 1)
    received_in_tiles = move_apart(received, tiling.coarse, 1)
    maps = [  # title, picture, colour map, the step that follows
        ("image in tiles,\none per GPU", image_in_tiles, "gray", "encode"),
        ("coarse map of each tile\n(1 of its K channels)", sent_in_tiles, "viridis", "stitch"),
        ("stitched: the global\ncoarse map", sent, "viridis", "communicate"),
        ("after the\ncommunication network", received, "magma", "give back"),
        ("each tile gets its part\nback, and decodes it", received_in_tiles, "magma", "decode"),
    ]
    figure, panels = plt.subplots(1, 6, figsize=(13, 2.8), layout="constrained")
    for axes, (title, picture, cmap, step) in zip(panels, maps):
        show_map(axes, picture, cmap)
        axes.set_title(title, fontsize=10)
        draw_arrow(axes, step)
    plots.show(panels[-1], mask, tiling.boxes, config["colors"])
    panels[-1].set_title("the mask, stitched", fontsize=10)
    plots.save(figure, path)


def draw_arrow(axes, step: str):
    """An arrow to the next picture, and below it the name of the step."""
    arrow = {"arrowstyle": "->"}
    axes.annotate("", xy=(1.16, 0.5), xytext=(1.01, 0.5), xycoords="axes fraction", arrowprops=arrow)
    axes.text(1.1, -0.06, step, transform=axes.transAxes, ha="center", va="top", fontsize=10, style="italic")


def main(run: str):
    model, config = load_model(Path(run, "best.pt"))
    config["amp"] = False  # numpy, which draws the maps, knows no bfloat16
    image, mask = build_datasets(config)["test"][3]
    tiling = build_tiling(config, mask.shape)
    draw_problem(HERE / "problem.png", image, mask, tiling, config["colors"])
    draw_idea(HERE / "idea.png", model, config, image, tiling)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "best.pt").exists():
        sys.exit("give the folder of a run of train.py, one that holds best.pt: python -m experiments.idea runs/NAME")
    main(sys.argv[1])
