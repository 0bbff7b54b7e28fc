"""The loss: one minus the mean Dice, plus the mean cross-entropy. No other file knows what the loss is.

The Dice of a class is twice the intersection of what is predicted and what is true, divided by
their cardinality, which is the sum of the two. It is 1 where both are the same.

No device ever holds the whole mask. So each tile gives a few sums over its pixels (`loss_sums`),
these sums are added up over tiles, images and processes, and the loss is made of the totals
(`loss_from_sums`). It equals the loss of the stitched image. For another loss, change these
functions, and the tests of their values. Letters as in decompose.py. This file imports nothing but
torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = 255  # the value in a mask of pixels that are neither learned nor scored
SUMS = 4  # how many numbers there are for each class


def loss_sums(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B,L,h,w) and mask (B,h,w) of a tile -> (4,L) float32, also where the logits are bfloat16.

    They are, for each class: the intersection, the cardinality (predicted plus true), and over the
    pixels of the class the sum of the cross-entropy and their number.
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
    number_of_pixels = one_hot.sum(pixels)
    cardinality = probability.sum(pixels) + number_of_pixels
    cross_entropy = -(log_probability * one_hot).sum(pixels)
    return torch.stack([intersection, cardinality, cross_entropy, number_of_pixels])


def loss_from_sums(sums: Tensor, class_weights: Sequence[float] | None = None) -> Tensor:
    """The sums of all tiles, added up, (4,L) -> the loss, a scalar.

    The Dice of a class is (2 * intersection + 1) / (cardinality + 1), so a class that is neither
    there nor predicted has 1. class_weights: what each class counts in both means; None: all the same.
    """
    intersection, cardinality, cross_entropy, pixels = sums
    weights = torch.ones_like(pixels)
    if class_weights is not None:
        weights = torch.tensor(class_weights, dtype=sums.dtype).to(sums.device, non_blocking=True)  # no need to wait
    dice = (2 * intersection + 1) / (cardinality + 1)
    mean_dice = (weights * dice).sum() / weights.sum()
    weight_of_pixels = (weights * pixels).sum()
    mean_cross_entropy = (weights * cross_entropy).sum() / weight_of_pixels.where(weight_of_pixels > 0, 1)
    return 1 - mean_dice + mean_cross_entropy  # 0 where no pixel counts


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """How many pixels each class has -> weights that are inverse to that, with a mean of 1.

    So each class counts as much as any other. One without a pixel, of which nothing can be learned, has weight 0.
    """
    inverse = []
    for number in pixels:
        inverse.append(1 / number if number > 0 else 0.0)
    mean = sum(inverse) / len(inverse)
    return [value / mean for value in inverse]
