"""The two pictures at the top of the README, from the real tensors of a trained network.

    python -m experiments.idea RUN        # RUN: a folder that train.py made, with communication

problem.png: what the network is given, what it must find, and how little of it one tile sees. idea.png: one image on
its way through the network. Takes seconds.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import plots
import train
from decompose import Tiling
from experiments.common import HERE
from options import build_tiling

GAP = 3  # white pixels between tiles that are apart


def apart(picture, tiling: Tiling, gap: int) -> np.ma.MaskedArray:
    """A picture (H,W) with its tiles moved apart."""
    rows, columns = tiling.grid
    canvas = np.full((tiling.size[0] + gap * (rows - 1), tiling.size[1] + gap * (columns - 1)), np.nan)
    for i, (top, bottom, left, right) in enumerate(tiling.boxes):
        down, across = gap * (i // columns), gap * (i % columns)
        canvas[top + down:bottom + down, left + across:right + across] = picture[top:bottom, left:right]
    return np.ma.masked_invalid(canvas)


def draw_problem(path: Path, image, mask, tiling: Tiling, colors: list):
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.7), layout="constrained")
    plots.show(axes[0], image, [], colors)
    plots.show(axes[1], mask, [], colors)
    axes[2].imshow(apart(image[0].numpy(), tiling, GAP), cmap="gray")
    axes[2].set(xticks=[], yticks=[])
    axes[2].spines[:].set_visible(False)
    for axis, title in zip(axes, ("the image", "the mask to find", "what each GPU gets to see")):
        axis.set_title(title, fontsize=10)
    plots.save(figure, path)


def draw_idea(path: Path, model, image, tiling: Tiling, colors: list):
    devices = [torch.device("cpu")] * len(tiling)
    maps = {}
    model.comm_net.register_forward_hook(lambda _, inputs, output: maps.update(sent=inputs[0][0], received=output[0]))
    with torch.no_grad():
        mask = tiling.stitch(model(tiling.split(image[None]), tiling, devices))[0].argmax(dim=0)
    channel = maps["received"].flatten(1).std(dim=1).argmax()  # the liveliest of the K
    sent, received = (maps[name][channel].numpy() for name in ("sent", "received"))

    panels = [("image in tiles,\none per GPU", apart(image[0].numpy(), tiling, GAP), "gray"),
              ("coarse map of each tile\n(1 of its K channels)", apart(sent, tiling.coarse, 1), "viridis"),
              ("stitched: the global\ncoarse map", sent, "viridis"),
              ("after the\ncommunication network", received, "magma"),
              ("each tile gets its part\nback, and decodes it", apart(received, tiling.coarse, 1), "magma"),
              ("the mask, stitched", mask, None)]
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 2.8), layout="constrained")
    for axis, (title, picture, cmap) in zip(axes, panels):
        if cmap is None:
            plots.show(axis, picture, tiling.boxes, colors)
        else:
            axis.imshow(picture, cmap=cmap, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axis.set_title(title, fontsize=10)
    for axis, step in zip(axes, ("encode", "gather", "communicate", "scatter", "decode")):
        axis.annotate("", xy=(1.16, 0.5), xytext=(1.01, 0.5), xycoords="axes fraction", arrowprops={"arrowstyle": "->"})
        axis.text(1.1, -0.06, step, transform=axis.transAxes, ha="center", va="top", fontsize=10, style="italic")
    plots.save(figure, path)


def main(run: str):
    model, config = train.load_model(Path(run) / "best.pt")
    image, mask = train.build_datasets(config)["test"][3]
    tiling = build_tiling(config, mask.shape)
    draw_problem(HERE / "problem.png", image, mask, tiling, config["colors"])
    draw_idea(HERE / "idea.png", model, image, tiling, config["colors"])


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "best.pt").exists():
        sys.exit("give the folder of a run of train.py, one that holds best.pt: python -m experiments.idea runs/NAME")
    main(sys.argv[1])
