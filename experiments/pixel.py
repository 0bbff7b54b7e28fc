"""What does one pixel see? The input that decides whether there is a line at a pixel, for four networks.

    OMP_NUM_THREADS=1 python -m experiments.pixel       # 8 minutes of one core
    python -m experiments.pixel --quick                 # seconds

The image is a row of 8 tiles of 32x32 pixels with a disc near each end. The pixel is in the middle
of the line between them. The answer at this pixel is the logit of "line" less the logit of
"background". Shown is the size of its gradient with respect to every pixel of the image: it is
large where a small change of the image would change the answer most. The frame holds all pixels with
a gradient; beyond it the gradient is exactly zero.

Trains the four networks, unless that has been done before. Writes runs/pixel/pixel.png; that in experiments/ is a copy.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from torch import Tensor, nn

import train
from decompose import Tiling
from experiments.common import make_folder, trained
from support import plots
from support.model import load_model
from support.options import Parser
from support.sizes import build_tiling
from synthetic import LinesAndCircles

TRAINING = "--image-size 32x256 --train-images 2000 --epochs 4 --lr 0.01".split()
QUICK = "--image-size 32x256 --train-images 8 --epochs 1".split()
NETWORKS = {  # name: (title, options of train.py)
    "alone": ("tiles without communication", "--grid 1x8 --comm-channels 0".split()),
    "plain": ("plain U-Net on the whole image", "--grid 1x1 --comm-channels 0".split()),
    "paper": ("the paper's communication: reaches 48 pixels beyond the tile", "--grid 1x8".split()),
    "dilated": ("dilations 1 2 4 8: reach 240 pixels beyond the tile",
                "--grid 1x8 --comm-channels 27 --dilations 1 2 4 8".split()),
}
BACKGROUND, LINE = 0, 1  # class indices
IMAGE = 29  # of the test images: each disc is 3 tiles from the middle of the line
SMALLEST = 1e-3  # of the gradients that are shown, where the largest is 1


# What a pixel sees

def logits_at(pixel: tuple[int, int], model: nn.Module, images: Tensor, config: dict) -> Tensor:
    """One image (1,C,H,W) -> the logits (L,) at a pixel."""
    tiling = build_tiling(config, images.shape[-2:])
    devices = [torch.device("cpu")]

    def keep_logits(i: int, logits: Tensor) -> Tensor:
        return logits

    tiles = train.run_tiles(model, images, tiling, devices, config, keep_logits)
    row, column = pixel
    return tiling.stitch(tiles)[0, :, row, column]


def gradient_size(pixel: tuple[int, int], model: nn.Module, images: Tensor, config: dict) -> Tensor:
    """One image (1,C,H,W) -> for each of its pixels (H,W), how much it would change the answer at one pixel."""
    images = images.clone().requires_grad_()
    logits = logits_at(pixel, model, images, config)
    answer = logits[LINE] - logits[BACKGROUND]
    answer.backward()
    return images.grad[0].abs().sum(dim=0)


# The picture

def middle_of_line(mask: Tensor) -> tuple[int, int]:
    """Row and column."""
    rows, columns = torch.where(mask == LINE)
    column = columns.median()
    row = rows[columns == column].median()
    return row.item(), column.item()


def mark(axes, pixel: tuple[int, int], boxes: list, title: str, answer: str):
    """What all strips have: tile borders, a cross at the pixel, a title, and at the right the answer."""
    for _, _, left, _ in boxes[1:]:
        axes.axvline(left - 0.5, color="#909090", linewidth=0.8)
    row, column = pixel
    axes.plot(column, row, "+", color="white", markersize=11, markeredgewidth=4)
    axes.plot(column, row, "+", color="black", markersize=10, markeredgewidth=1.8)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_title(answer, loc="right", fontsize=11)


def draw_frame(axes, size: Tensor):
    """A frame around all pixels of (H,W) that are not zero."""
    rows, columns = torch.where(size > 0)
    corner = (columns.min() - 0.5, rows.min() - 0.5)
    width = columns.max() - columns.min() + 1
    height = rows.max() - rows.min() + 1
    frame = plt.Rectangle(corner, width, height, fill=False, edgecolor="#35d0e8", linewidth=2.5)
    frame.set(clip_on=False, zorder=3)
    axes.add_patch(frame)


def draw(path: Path, folder: Path, image: Tensor, mask: Tensor):
    """folder: where the runs of the four networks are."""
    pixel = middle_of_line(mask)
    images = image[None]
    figure, strips = plt.subplots(1 + len(NETWORKS), 1, figsize=(7.2, 6.3), layout="constrained")
    for axes, (name, (title, _)) in zip(strips[1:], NETWORKS.items()):
        model, config = load_model(folder / name / "best.pt")
        tiling = build_tiling(config, mask.shape)
        size = gradient_size(pixel, model, images, config)
        draw_frame(axes, size)
        size = size / size.max()
        size = size.clamp(min=SMALLEST)  # a logarithmic scale has no zero
        scale = LogNorm(SMALLEST, 1)
        picture = axes.imshow(size.numpy(), cmap="magma", norm=scale, interpolation="nearest")
        with torch.no_grad():
            probability = logits_at(pixel, model, images, config).softmax(dim=0)[LINE].item()
        mark(axes, pixel, tiling.boxes, title, f"line at +: {probability:.0%}")

    tiles = Tiling(tuple(mask.shape), (1, 8))
    plots.show(strips[0], mask, [], config["colors"])
    mark(strips[0], pixel, tiles.boxes, "the mask to find, and the eight tiles", "line at +: yes")
    bar = figure.colorbar(picture, ax=strips, orientation="horizontal", fraction=0.03, aspect=60, pad=0.02)
    bar.set_label("influence of each pixel on the answer at +, the largest is 1 (frame: all that is not zero)")
    plots.save(figure, path)


def main(arguments: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    asked = parser.parse_args(arguments)
    folder = make_folder("pixel", asked.quick)
    training = QUICK if asked.quick else TRAINING
    for name, (_, options) in NETWORKS.items():
        trained(folder / name, training + options)
    image, mask = LinesAndCircles(IMAGE + 1, (32, 256), (1, 8), "test")[IMAGE]
    draw(folder / "pixel.png", folder, image, mask)
    print(f"wrote {folder / 'pixel.png'}")


if __name__ == "__main__":
    main()
