"""Tiles of one size on one device in one call, against one call for each tile."""

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch
from torch import nn

import train
from decompose import Tiling
from support import scale
from support.model import build_from_config, build_model

try:
    from pretend_device import DEVICE, PretendDevice
except pytest.skip.Exception:
    DEVICE = None

pytestmark = pytest.mark.usefixtures("in_float64")

TILINGS = {
    "even": Tiling((32, 32), (2, 2), 4),
    "uneven, padded": Tiling((44, 61), (2, 3), 4),
    "overlap": Tiling((44, 64), (3, 3), 4, overlap=4),
}


def never_stack(tiling, placement, batch_size, stack):
    return [[i] for i in placement]


def frozen_step(tiling, images=2, devices=(CPU,), changes=None, weights=None):
    """Loss, gradients and logits of a step with frozen statistics, from the same numbers every time."""
    torch.manual_seed(0)
    model = build_from_config({**CONFIG, "dilations": [1, 1, 1], **(changes or {})})
    config = {**CONFIG, "loss_weights": weights}
    for layer in train.batch_norms(model):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    train.set_training_mode(model, frozen=True)
    image, mask = random_batch(images, tiling.size)
    mask[:, :9, :5] = 255  # pixels that do not count

    def keep(i, logits_of_tile):
        return logits_of_tile.detach()

    logits = train.run_tiles(model, image, tiling, list(devices), config, keep)
    loss = train.batch_loss(model, image, mask, tiling, list(devices), config)
    loss.backward()
    return [loss.detach()] + gradients_of(model) + [tile.to(CPU) for tile in logits]


@pytest.mark.parametrize("images, changes, weights", [
    (1, {}, None),
    (3, {"comm_channels": 0}, [0.2, 1.0, 1.8]),
])
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_stacked_tiles_have_the_loss_gradients_and_logits_of_single_ones(tiling, images, changes, weights, monkeypatch):
    stacked = frozen_step(tiling, images, changes=changes, weights=weights)
    monkeypatch.setattr(scale, "group_tiles", never_stack)
    single = frozen_step(tiling, images, changes=changes, weights=weights)
    assert_all_close(stacked, single, tolerance=1e-12)


def test_tiles_on_two_devices_are_stacked_on_each(monkeypatch):
    if DEVICE is None:
        pytest.skip("this PyTorch cannot host a device in Python")
    sizes = []
    group_tiles = scale.group_tiles

    def watched(*arguments):
        groups = group_tiles(*arguments)
        sizes.append([len(group) for group in groups])
        return groups

    monkeypatch.setattr(scale, "group_tiles", watched)
    tiling = Tiling((32, 32), (4, 2), 4)
    with PretendDevice():
        two = frozen_step(tiling, devices=(CPU, DEVICE))
    assert sizes == [[4, 4], [4, 4]]  # of each device; without and with gradients
    one = frozen_step(tiling)
    assert_all_close(two, one, tolerance=1e-12)


def groups_of(size, grid, stack=True):
    tiling = Tiling(size, grid, 4)
    return scale.group_tiles(tiling, train.place(tiling, [CPU]), 1, stack)


def test_a_group_has_tiles_of_one_size_and_unless_they_are_small_half_of_them_and_a_million_pixels_at_most():
    assert groups_of((16, 64), (2, 4)) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert groups_of((16, 64), (2, 4), stack=False) == [[0], [1], [2], [3], [4], [5], [6], [7]]
    assert groups_of((12, 56), (1, 4)) == [[0, 2], [1, 3]]  # two of each size
    assert groups_of((512, 1024), (2, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups_of((512, 1280), (1, 5)) == [[0, 1, 2], [3, 4]]
    assert groups_of((512, 8192), (1, 16)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert groups_of((2048, 4096), (1, 2)) == [[0], [1]]


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
