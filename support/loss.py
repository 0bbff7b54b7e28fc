"""The loss: one minus the mean Dice, plus the mean cross-entropy. No other file knows what the loss is.

The Dice of a class is twice the intersection of what is predicted and what is true, divided by
their cardinality, which is the sum of the two. It is 1 where both are the same.

No device ever holds the whole mask. So each tile gives a few sums over its pixels (`loss_sums`),
these sums are added up over tiles, images and processes, and the loss is made of the totals
(`loss_from_sums`). It equals the loss of the stitched image. Where classes have weights, both
functions need them, and both means are weighted. For another loss, change these functions, and the
tests of their values. Letters as in decompose.py. This file imports nothing but torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = 255  # the value in a mask of pixels that are neither learned nor scored


def number_of_sums(classes: int) -> int:
    """How many numbers `loss_sums` returns."""
    return 2 * classes + 2


def loss_sums(logits: Tensor, mask: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Logits (B,L,h,w) and mask (B,h,w) of a tile -> (2L+2,) float32.

    They are, for each class, the intersection; for each class, the cardinality (predicted plus
    true); the sum of the cross-entropy; and the number of pixels that count. float32 also where the
    logits are bfloat16.
    weights: of each class. The last two sums are then those of pixels times the weight of their class.
    """
    log_probability = logits.float().log_softmax(dim=1)
    mask = mask.unsqueeze(1)
    valid = mask != IGNORE
    true_class = mask.long().where(valid, 0)
    one_hot = torch.zeros_like(log_probability)
    one_hot.scatter_(1, true_class, valid.float())  # writes 1 at the true class, but 0 where a pixel does not count
    probability = log_probability.exp() * valid

    pixels = (0, 2, 3)
    intersection = (probability * one_hot).sum(pixels)
    cardinality = probability.sum(pixels) + one_hot.sum(pixels)
    if weights is None:
        cross_entropy = -(log_probability * one_hot).sum()
        pixels_that_count = valid.sum().float()
    else:
        weights = torch.tensor(weights).to(one_hot)
        cross_entropy = -(weights * (log_probability * one_hot).sum(pixels)).sum()
        pixels_that_count = (weights * one_hot.sum(pixels)).sum()
    scalars = torch.stack([cross_entropy, pixels_that_count])
    return torch.cat([intersection, cardinality, scalars])


def loss_from_sums(sums: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The sums of all tiles, added up -> the loss, a scalar.

    The Dice of a class is (2 * intersection + 1) / (cardinality + 1), so a class that is neither
    there nor predicted has 1.
    """
    classes = (len(sums) - 2) // 2
    intersection = sums[:classes]
    cardinality = sums[classes:2 * classes]
    cross_entropy, pixels = sums[2 * classes:]
    dice = (2 * intersection + 1) / (cardinality + 1)
    if weights is None:
        mean_dice = dice.mean()
    else:
        weights = torch.tensor(weights).to(sums)
        mean_dice = (weights * dice).sum() / weights.sum()
    return 1 - mean_dice + cross_entropy / pixels.where(pixels > 0, 1)  # 0 where no pixel counts


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """How many pixels each class has -> weights that are inverse to that, with a mean of 1.

    So each class counts as much as any other. One without a pixel, of which nothing can be learned, has weight 0.
    """
    inverse = []
    for number in pixels:
        inverse.append(1 / number if number > 0 else 0.0)
    mean = sum(inverse) / len(inverse)
    return [value / mean for value in inverse]
