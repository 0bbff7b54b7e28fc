"""Tiles of one size on one device in one call, against one call for each tile."""

import pytest
from conftest import CPU, assert_all_close, gradients_of, training_step
from torch import nn

import train
from decompose import Tiling
from support import scale
from support.model import build_model

try:
    from pretend_device import DEVICE, PretendDevice
except pytest.skip.Exception:
    DEVICE = None

pytestmark = pytest.mark.usefixtures("in_float64")


def never_stack(tiling, placement, batch_size, stack):
    groups = []
    for i in placement:
        groups.append([i])
    return groups


def frozen_step(tiling, devices=(CPU,), **changes) -> list:
    """Loss and gradients of a step with frozen statistics, from the same numbers every time."""
    loss, model = training_step(tiling, devices, frozen=True, **changes)
    return [loss, *gradients_of(model)]


@pytest.mark.parametrize("changes", [
    {"images": 1},
    {"images": 3, "comm_channels": 0, "loss_weights": [0.2, 1.0, 1.8]},
])
@pytest.mark.parametrize("tiling", [
    pytest.param(Tiling((32, 32), (2, 2), 4), id="even"),
    pytest.param(Tiling((44, 61), (2, 3), 4), id="uneven, padded"),
    pytest.param(Tiling((44, 64), (3, 3), 4, overlap=4), id="overlap"),
])
def test_stacked_tiles_have_the_loss_and_gradients_of_single_ones(tiling, changes, monkeypatch):
    """tests/test_recompute.py compares logits."""
    stacked = frozen_step(tiling, **changes)
    monkeypatch.setattr(scale, "group_tiles", never_stack)
    single = frozen_step(tiling, **changes)
    assert_all_close(stacked, single, tolerance=1e-12)


def test_tiles_on_two_devices_are_stacked_on_each(monkeypatch):
    if DEVICE is None:
        pytest.skip("this PyTorch cannot host a device in Python")
    found = []
    group_tiles = scale.group_tiles

    def watched(*arguments):
        groups = group_tiles(*arguments)
        found.extend(groups)
        return groups

    monkeypatch.setattr(scale, "group_tiles", watched)
    tiling = Tiling((32, 32), (4, 2), 4)
    with PretendDevice():
        two = frozen_step(tiling, (CPU, DEVICE))
    assert found == [[0, 2, 4, 6], [1, 3, 5, 7]]
    one = frozen_step(tiling)
    assert_all_close(two, one, tolerance=1e-12)


@pytest.mark.parametrize("size, grid, stack, expected", [
    ((16, 32), (2, 2), True, [[0, 1, 2, 3]]),
    ((16, 32), (2, 2), False, [[0], [1], [2], [3]]),
    ((12, 56), (1, 4), True, [[0, 2], [1, 3]]),  # two of each size
    ((512, 1280), (1, 5), True, [[0, 1, 2], [3, 4]]),
    ((512, 6144), (1, 12), True, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ((2048, 4096), (1, 2), True, [[0], [1]]),
])
def test_a_group_has_tiles_of_one_size_and_unless_they_are_small_half_of_them_and_a_million_pixels_at_most(
        size, grid, stack, expected):
    tiling = Tiling(size, grid, 4)
    placement = train.place(tiling, [CPU])
    assert scale.group_tiles(tiling, placement, 1, stack) == expected


def group_norm(channels):
    return nn.GroupNorm(2, channels)


def norm_of_each_batch(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


@pytest.mark.parametrize("norm, frozen, looks", [
    (nn.BatchNorm2d, False, True),  # learns its statistics
    (nn.BatchNorm2d, True, False),
    (group_norm, False, False),
    (norm_of_each_batch, True, True),  # has none, so that it always takes those of the batch
])
def test_tiles_are_stacked_where_no_layer_looks_at_its_batch(norm, frozen, looks):
    model = build_model(1, 3, width=4, depth=2, comm_channels=0, norm=norm)
    train.set_training_mode(model, frozen)
    assert scale.can_stack(model) != looks
