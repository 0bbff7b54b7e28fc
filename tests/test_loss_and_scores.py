import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decompose import Tiling
from support.loss import IGNORE, balanced_weights, loss_from_sums, loss_sums
from support.scores import confusion, iou, mean_iou, pixels_near_seam, print_scores, scores

AWAY = torch.tensor(False)  # no pixel is near a seam


# Sums over the tiles are those over the whole mask

def dice_by_hand(logits: Tensor, mask: Tensor, label: int) -> Tensor:
    known = mask != IGNORE
    predicted = logits.softmax(dim=1)[:, label][known]
    true = (mask[known] == label).to(logits.dtype)
    intersection = (predicted * true).sum()
    cardinality = predicted.sum() + true.sum()
    return (2 * intersection + 1) / (cardinality + 1)


def loss_by_hand(logits: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """The same definition from other functions: PyTorch's cross-entropy, and Dice class by class."""
    dice = 0
    for label, weight in enumerate(weights):
        dice = dice + weight * dice_by_hand(logits, mask, label)
    cross_entropy = F.cross_entropy(logits, mask.long(), weights, ignore_index=IGNORE)
    return 1 - dice / weights.sum() + cross_entropy


def make_case(name: str):
    """Logits (2,4,20,28) and a mask (2,20,28)."""
    logits = torch.randn(2, 4, 20, 28, requires_grad=True)
    mask = torch.randint(0, 4, (2, 20, 28), dtype=torch.uint8)
    if name == "absent class":
        mask[mask == 3] = 0
    if name == "ignored pixels":
        mask[:, 3:9, 5:20] = IGNORE
    if name == "empty tile":
        mask[:, :10, :14] = IGNORE
    return logits, mask


CASES = pytest.mark.parametrize("name", ["plain", "absent class", "ignored pixels", "empty tile"])


def split_both(logits, mask):
    """The pairs of logits and mask of 2x2 tiles."""
    tiling = Tiling((20, 28), (2, 2), 4)
    logit_tiles = tiling.split(logits)
    mask_tiles = tiling.split(mask, fill=IGNORE)
    return list(zip(logit_tiles, mask_tiles, strict=True))


@pytest.mark.parametrize("weights", [
    None,
    [0.1, 2.0, 0.0, 1.5],
])
@CASES
def test_the_loss_of_the_tiles_and_its_gradient_are_those_of_the_stitched_mask(name, weights, in_float64):
    logits, mask = make_case(name)
    sums = 0
    for logit_tile, mask_tile in split_both(logits, mask):
        sums = sums + loss_sums(logit_tile, mask_tile)
    loss = loss_from_sums(sums, weights)
    if weights is None:
        weights = [1.0] * 4
    expected = loss_by_hand(logits, mask, torch.tensor(weights))
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, logits)[0]
    expected_gradient = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(gradient, expected_gradient)


@CASES
def test_the_iou_of_the_tiles_is_that_of_the_stitched_mask(name):
    logits, mask = make_case(name)
    counts = 0
    for logit_tile, mask_tile in split_both(logits, mask):
        counts = counts + confusion(logit_tile.argmax(dim=1), mask_tile, AWAY, 4)
    predicted = logits.argmax(dim=1)
    predicted[mask == IGNORE] = IGNORE
    for label, found in enumerate(iou(counts[0])):
        both = (predicted == label) & (mask == label)
        either = (predicted == label) | (mask == label)
        expected = both.sum().double() / either.sum()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0]])
def test_a_batch_without_a_known_pixel_has_a_finite_loss_and_no_gradient(weights):
    mask = torch.full((1, 4, 4), IGNORE, dtype=torch.uint8)
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = loss_from_sums(loss_sums(logits, mask), weights)
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("weight", [3.0, 1e-9])
def test_weights_that_are_all_the_same_change_nothing(weight, in_float64):
    sums = loss_sums(*make_case("ignored pixels"))
    plain = loss_from_sums(sums)
    weighted = loss_from_sums(sums, [weight] * 4)
    torch.testing.assert_close(weighted, plain)


def test_balanced_weights_are_inverse_to_the_pixels_with_a_mean_of_one():
    weights = balanced_weights([900, 90, 9, 0])
    assert weights == pytest.approx([4 / 111, 40 / 111, 400 / 111, 0])


# Classes that do not occur

def count(predicted, mask):
    """The counts of three classes in one row of pixels."""
    predicted = torch.tensor([[predicted]])
    mask = torch.tensor([[mask]])
    counts = confusion(predicted, mask, AWAY, 3)
    return counts[0]


def test_a_class_neither_true_nor_predicted_has_no_iou():
    counts = count(predicted=[0, 0], mask=[0, 0])
    assert iou(counts)[0] == 1
    assert iou(counts)[1:].isnan().all()
    assert mean_iou(counts) == 1


def test_a_class_that_is_predicted_but_never_true_is_a_miss_for_the_true_one_and_no_class_of_the_mean():
    counts = count(predicted=[0, 2, 2, 1], mask=[0, 0, IGNORE, 1])
    assert iou(counts).tolist() == [0.5, 1, 0]
    assert mean_iou(counts) == 0.75


def test_classes_that_the_scores_cannot_see_are_named(capsys):
    counts = count(predicted=[0, 1, 0], mask=[0, 0, 2])
    found = scores(torch.stack([counts, counts]), ["ground", "water", "house"])
    assert found["true_pixels"] == {"ground": 4, "water": 0, "house": 2}  # half of them away from seams
    print_scores(found)
    assert capsys.readouterr().out == """\
  ground       0.3333
  water        0.0000
  house        0.0000
  mean         0.1667
the true masks hold no water, so the mean IoU says nothing about that
"""


# Seams

def near_seam_of_tiles(tiling):
    near = []
    for i in range(len(tiling)):
        near.append(pixels_near_seam(tiling, i, torch.device("cpu")))
    return near


@pytest.mark.parametrize("size, grid", [
    ((40, 60), (2, 2)),
    ((45, 61), (3, 4)),
    ((30, 30), (1, 1)),
])
def test_pixels_near_a_seam_are_those_within_eight_pixels_of_a_border_between_tiles(size, grid):
    tiling = Tiling(size, grid, 5)
    expected = torch.zeros(size, dtype=torch.bool)
    for top, _, left, _ in tiling.boxes:
        if top > 0:
            expected[top - 8:top + 8] = True
        if left > 0:
            expected[:, left - 8:left + 8] = True
    near = tiling.stitch(near_seam_of_tiles(tiling))
    assert torch.equal(near, expected)
    assert near.any() == (grid != (1, 1))


def test_scores_near_seams_and_away_from_them_are_told_apart():
    """The mask is striped; the prediction is right, but always 1 near the seam."""
    mask = torch.zeros(1, 32, 64, dtype=torch.uint8)
    mask[..., ::2] = 1
    predicted = mask.clone()
    predicted[..., 24:40] = 1
    tiling = Tiling((32, 64), (1, 2))
    counts = 0
    predicted_tiles = tiling.split(predicted)
    mask_tiles = tiling.split(mask)
    near_seam = near_seam_of_tiles(tiling)
    for predicted_tile, mask_tile, near in zip(predicted_tiles, mask_tiles, near_seam):
        counts = counts + confusion(predicted_tile, mask_tile, near, 2)
    found = scores(counts, ["even", "odd"])
    assert found["seam"] == {"mean_iou_border": 0.25, "mean_iou_interior": 1}
    assert found["iou"] == {"even": 0.75, "odd": 0.8}
