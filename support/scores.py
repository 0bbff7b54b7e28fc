"""How good a predicted mask is: the intersection over union (IoU) of each class.

Each tile counts its own pixels, and the counts of all tiles, images and processes are added up. So
a score is that of all pixels of a split at once, and not a mean over images or tiles. Letters as in
decompose.py.
"""

import torch
from torch import Tensor

from decompose import Tiling
from support.loss import IGNORE

SEAM = 8  # pixels on both sides of a border between tiles; they are also scored apart


def confusion(predicted: Tensor, mask: Tensor, near_seam: Tensor, classes: int) -> Tensor:
    """Counts the pixels of a tile by true class and predicted class, away from the seams and near them.

    predicted, mask: (B,h,w) class indices; near_seam: (h,w), which pixels are near a seam. Returns
    (2,L,L): first the pixels away from seams, then those near one; rows are true classes, columns
    predicted ones.
    """
    number_of_bins = 2 * classes * classes
    bins = (near_seam * classes + mask.long()) * classes + predicted  # the bin in which each pixel is counted
    bins = bins.where(mask != IGNORE, number_of_bins).flatten()  # one more, at the end, for those that do not count
    counts = bins.new_zeros(number_of_bins + 1)
    counts.scatter_add_(0, bins, torch.ones_like(bins))  # torch.bincount would make the loop wait for each GPU
    return counts[:number_of_bins].view(2, classes, classes)


def pixels_near_seam(tiling: Tiling, i: int, device: torch.device) -> Tensor:
    """(h,w) for tile i without overlap: True within SEAM pixels of a border to another tile."""
    top, bottom, left, right = tiling.boxes[i]
    height, width = tiling.size
    near = torch.zeros(bottom - top, right - left, dtype=torch.bool, device=device)
    if top > 0:  # the borders of the image are no borders between tiles
        near[:SEAM] = True
    if bottom < height:
        near[-SEAM:] = True
    if left > 0:
        near[:, :SEAM] = True
    if right < width:
        near[:, -SEAM:] = True
    return near


def iou(counts: Tensor) -> Tensor:
    """(L,L) counts -> intersection over union of each class; nan for a class that is neither true nor predicted."""
    counts = counts.double()
    intersection = counts.diagonal()
    union = counts.sum(dim=0) + counts.sum(dim=1) - intersection
    return intersection / union


def mean_iou(counts: Tensor) -> float:
    """(L,L) counts -> mean over the classes that occur in the true masks; nan if none does."""
    occurs = counts.sum(dim=1) > 0
    return iou(counts)[occurs].mean().item()


def scores(counts: Tensor, classes: list[str]) -> dict:
    """(2,L,L) counts -> IoU of all pixels, and mean IoU of those near seams and of those away from them.

    And how many pixels of each class there are in the true masks.
    """
    away, near = counts
    everywhere = away + near
    return {
        "mean_iou": mean_iou(everywhere),
        "iou": dict(zip(classes, iou(everywhere).tolist())),
        "seam": {"mean_iou_border": mean_iou(near), "mean_iou_interior": mean_iou(away)},
        "true_pixels": dict(zip(classes, everywhere.sum(dim=1).tolist())),
    }


def print_scores(found: dict):
    """Prints the IoU of each class, and what it does not show. found: what `scores` returned."""
    for name, value in found["iou"].items():
        print(f"  {name:12} {value:.4f}")
    print(f"  {'mean':12} {found['mean_iou']:.4f}")
    for name, pixels in found["true_pixels"].items():
        if pixels == 0:
            print(f"the true masks hold no {name}, so the mean IoU says nothing about that")
