import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metrics
from decompose import Tiling


def loss_by_hand(logits: Tensor, mask: Tensor) -> Tensor:
    """The same definition from other functions: PyTorch's cross-entropy, and Dice class by class."""
    p, known = logits.softmax(dim=1), mask != metrics.IGNORE
    dice = []
    for label in range(logits.shape[1]):
        predicted, true = p[:, label][known], (mask[known] == label).to(p.dtype)
        dice.append((2 * (predicted * true).sum() + 1) / (predicted.sum() + true.sum() + 1))
    return 1 - sum(dice) / len(dice) + F.cross_entropy(logits, mask.long(), ignore_index=metrics.IGNORE)


def case(name: str):
    logits, mask = torch.randn(2, 4, 20, 28), torch.randint(0, 4, (2, 20, 28), dtype=torch.uint8)
    if name == "absent class":
        mask[mask == 3] = 0
    if name == "ignored pixels":
        mask[:, 3:9, 5:20] = metrics.IGNORE
    if name == "empty tile":
        mask[:, :10, :14] = metrics.IGNORE
    return logits.requires_grad_(), mask


@pytest.mark.parametrize("name", ["plain", "absent class", "ignored pixels", "empty tile"])
def test_loss_and_iou_of_the_tiles_are_those_of_the_stitched_mask(name):
    logits, mask = case(name)
    tiling = Tiling((20, 28), (2, 2), 4)
    tiles = list(zip(tiling.split(logits), tiling.split(mask, fill=metrics.IGNORE)))
    loss = metrics.dice_cross_entropy(sum(metrics.loss_sums(*tile) for tile in tiles))
    expected = loss_by_hand(logits, mask)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])

    scores = metrics.iou(sum(metrics.confusion(tile.argmax(dim=1), mask, torch.tensor(False), 4)[0] for tile, mask in tiles))
    predicted, known = logits.argmax(dim=1), mask != metrics.IGNORE
    for label, score in enumerate(scores):
        both = ((predicted == label) & (mask == label) & known).sum()
        either = (((predicted == label) | (mask == label)) & known).sum()
        torch.testing.assert_close(score, both.double() / either)


def counts_of(predicted, mask):
    return metrics.confusion(torch.tensor(predicted)[None], torch.tensor(mask)[None], torch.tensor(False), 3)[0]


def test_a_class_neither_true_nor_predicted_has_no_iou():
    counts = counts_of([[0, 0]], [[0, 0]])
    assert metrics.iou(counts)[0] == 1 and metrics.iou(counts)[1:].isnan().all() and metrics.mean_iou(counts) == 1


def test_a_class_that_is_predicted_but_never_true_is_a_miss_for_the_true_one_and_no_class_of_the_mean():
    counts = counts_of([[0, 2, 2, 1]], [[0, 0, 255, 1]])
    assert metrics.iou(counts).tolist() == [0.5, 1, 0] and metrics.mean_iou(counts) == 0.75


@pytest.mark.parametrize("size, grid", [((40, 60), (2, 2)), ((45, 61), (3, 4)), ((30, 30), (1, 1))])
def test_pixels_near_a_seam_are_those_within_eight_pixels_of_a_border_between_tiles(size, grid):
    tiling = Tiling(size, grid, 5)
    near = tiling.stitch([metrics.near_seam(tiling, i, torch.device("cpu")) for i in range(len(tiling))])
    expected = torch.zeros(size, dtype=torch.bool)
    for border in {top for top, *_ in tiling.boxes} - {0}:
        expected[border - 8:border + 8] = True
    for border in {left for _, _, left, _ in tiling.boxes} - {0}:
        expected[:, border - 8:border + 8] = True
    assert torch.equal(near, expected) and near.any() == (grid != (1, 1))


def test_scores_near_seams_and_away_from_them_are_told_apart():
    tiling, mask = Tiling((32, 64), (1, 2)), torch.zeros(1, 32, 64, dtype=torch.uint8)
    mask[..., ::2] = 1
    predicted = mask.clone()
    predicted[..., 24:40] = 1  # right away from the seam, and always 1 near it
    tiles = zip(tiling.split(predicted), tiling.split(mask), [metrics.near_seam(tiling, i, mask.device) for i in (0, 1)])
    scores = metrics.scores(sum(metrics.confusion(*tile, 2) for tile in tiles), ["even", "odd"])
    assert scores["seam"] == {"mean_iou_border": 0.25, "mean_iou_interior": 1}
    whole = metrics.scores(metrics.confusion(predicted, mask, torch.tensor(False), 2), ["even", "odd"])
    assert scores["iou"] == whole["iou"] and scores["mean_iou"] == whole["mean_iou"]
    assert math.isnan(whole["seam"]["mean_iou_border"])


def test_a_batch_without_a_known_pixel_has_a_finite_loss():
    mask = torch.full((1, 4, 4), metrics.IGNORE, dtype=torch.uint8)
    loss = metrics.dice_cross_entropy(metrics.loss_sums(torch.randn(1, 3, 4, 4), mask))
    assert loss == 0
