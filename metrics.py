"""Loss and scores of an image that no device ever holds: each tile yields a few sums where it was computed, and only
these travel. Added up over tiles, images and batches, they give what the stitched mask would give.

Letters as in decompose.py. This file imports nothing but torch and decompose.py.
"""

import torch
from torch import Tensor

from decompose import Tiling

IGNORE = 255  # mask value of pixels that are neither learned nor scored
SEAM = 8  # pixels to both sides of a border between tiles that are scored apart


def loss_sums(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B,L,h,w), mask (B,h,w) -> (2L+2,) float32: per class, the intersection and the cardinality
    (predicted plus true) for Dice; the sum of the cross-entropy; the number of pixels that count."""
    log_p = logits.float().log_softmax(dim=1)
    counts = (mask != IGNORE).unsqueeze(1)
    truth = torch.zeros_like(log_p).scatter_(1, mask.long().unsqueeze(1).where(counts, 0), counts.float())
    p = log_p.exp() * counts
    pixels = (0, 2, 3)
    return torch.cat([(p * truth).sum(pixels), p.sum(pixels) + truth.sum(pixels),
                      -(log_p * truth).sum().unsqueeze(0), counts.sum().float().unsqueeze(0)])


def dice_cross_entropy(sums: Tensor) -> Tensor:
    """The sums of all tiles -> (1 - mean Dice over classes) + mean cross-entropy. The Dice of a class is
    (2 * intersection + 1) / (cardinality + 1), so a class that is neither there nor predicted scores 1."""
    (intersection, cardinality), (cross_entropy, pixels) = sums[:-2].chunk(2), sums[-2:]
    dice = (2 * intersection + 1) / (cardinality + 1)
    return 1 - dice.mean() + cross_entropy / pixels.clamp(min=1)


def confusion(predicted: Tensor, mask: Tensor, near: Tensor, classes: int) -> Tensor:
    """Predicted and true classes (B,h,w), and which pixels are near a seam (h,w) -> (2,L,L) counts of pixels, true class
    by predicted class: first those away from seams, then those near one."""
    # pixels that do not count go to a bin of their own at the end
    pairs = ((near * classes + mask.long()) * classes + predicted).where(mask != IGNORE, 2 * classes**2).flatten()
    counts = torch.zeros(2 * classes**2 + 1, dtype=torch.long, device=mask.device)
    counts.scatter_add_(0, pairs, torch.ones_like(pairs))  # bincount would make the loop wait for each GPU in turn
    return counts[:-1].view(2, classes, classes)


def near_seam(tiling: Tiling, i: int, device: torch.device) -> Tensor:
    """(h,w) for tile i without overlap: which pixels lie within SEAM pixels of a border to another tile."""
    def near(start, stop, end):
        x = torch.arange(start, stop, device=device)
        return (start > 0) & (x < start + SEAM) | (stop < end) & (x >= stop - SEAM)

    top, bottom, left, right = tiling.boxes[i]
    return near(top, bottom, tiling.size[0])[:, None] | near(left, right, tiling.size[1])


def iou(counts: Tensor) -> Tensor:
    """(L,L) counts -> intersection over union of each class, nan for a class neither true nor predicted."""
    counts = counts.double()
    intersection = counts.diagonal()
    return intersection / (counts.sum(dim=0) + counts.sum(dim=1) - intersection)


def mean_iou(counts: Tensor) -> float:
    """(L,L) counts -> mean over the classes that occur in the true masks, nan if none does."""
    return iou(counts)[counts.sum(dim=1) > 0].mean().item()


def scores(counts: Tensor, classes: list[str]) -> dict:
    """(2,L,L) counts -> IoU of all pixels, and of those near seams and away from them."""
    away, near = counts
    return {"mean_iou": mean_iou(away + near), "iou": dict(zip(classes, iou(away + near).tolist())),
            "seam": {"mean_iou_border": mean_iou(near), "mean_iou_interior": mean_iou(away)}}
