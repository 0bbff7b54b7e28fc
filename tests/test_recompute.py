"""support/scale.py and `--recompute` change what is remembered, and nothing else."""

import copy

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, assert_same_step, gradients_of, random_batch, training_step
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

import train
from decompose import DecomposedUNet, Tiling
from support import scale
from support.memory import LiveMemory
from support.model import build_from_config
from unet import UNet

EVEN = Tiling((32, 32), (2, 2), 4)
UNEVEN = Tiling((44, 61), (2, 3), 4, overlap=4)  # and padded


@pytest.mark.parametrize("comm_channels", [0, 8])
@pytest.mark.parametrize("tiling", [EVEN, UNEVEN])
def test_loss_gradients_and_running_statistics_are_the_same(tiling, comm_channels, in_float64):
    step = training_step(tiling, comm_channels=comm_channels)
    recomputed = training_step(tiling, comm_channels=comm_channels, recompute=True)
    assert_same_step(recomputed, step, tolerance=1e-12)


class SpectralNormEncoder(nn.Module):
    """Its output depends on buffers that every pass changes."""

    def __init__(self):
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(1, 4, 3, padding=1))

    def forward(self, tile):
        return None, self.conv(tile)


class SquareDecoder(nn.Module):
    def forward(self, skips, coarse_map):
        return coarse_map.square()


def mean_of_tile(i, logits):
    return logits.mean()


def test_a_tile_is_computed_again_with_the_buffers_of_before():
    model = DecomposedUNet(SpectralNormEncoder(), SquareDecoder())
    other = copy.deepcopy(model)
    tiling = Tiling((4, 8), (1, 2))
    tiles = tiling.split(torch.randn(2, 1, 4, 8))
    left, right = model(tiles, tiling)
    (left.mean() + right.mean()).backward()
    left, right = scale.forward(other, tiling, [[0], [1]], [CPU], tiles.__getitem__, mean_of_tile, recompute=True)
    (left + right).backward()
    assert_all_close(gradients_of(other), gradients_of(model), tolerance=1e-6)


# Dropout

def remember(recompute, function, *inputs):
    return function(*inputs)


@pytest.mark.parametrize("comm_channels", [0, 8])
def test_with_dropout_loss_and_gradients_are_those_of_what_is_not_computed_again(
        comm_channels, in_float64, monkeypatch):
    changes = {"comm_channels": comm_channels, "recompute": True, "dropout": 0.3}
    loss, model = training_step(UNEVEN, **changes)
    monkeypatch.setattr(scale, "forget_activations", remember)
    expected, remembered = training_step(UNEVEN, **changes)
    assert loss == expected
    assert_all_close(gradients_of(model), gradients_of(remembered), tolerance=1e-12)


def test_each_tile_leaves_out_channels_of_its_own_and_other_ones_in_each_step():
    model = build_from_config(CONFIG)
    seeds = scale.draw_seeds(model, EVEN) + scale.draw_seeds(model, EVEN)
    assert len(set(seeds)) == 8


@pytest.mark.parametrize("recompute", [False, True])
def test_an_evaluation_draws_no_random_numbers_so_that_training_does_not_depend_on_its_tiles(recompute):
    config = {**CONFIG, "dropout": 0.3, "recompute": recompute}
    batch = random_batch(1, (32, 32))
    model = build_from_config(config)
    state = torch.get_rng_state()
    train.evaluate(model, [batch], config, [CPU])
    assert torch.equal(torch.get_rng_state(), state)


# Memory

def test_a_tile_keeps_what_it_sends_and_not_all_channels_of_its_coarse_map(monkeypatch):
    sent = []
    stitch = Tiling.stitch

    def watched(tiling, tiles, device):
        sent.extend(tiles)
        return stitch(tiling, tiles, device)

    monkeypatch.setattr(Tiling, "stitch", watched)
    training_step(EVEN, recompute=True)
    assert len(sent) == 4
    for tile in sent:
        assert tile.untyped_storage().nbytes() == tile.nbytes


def logits_of_tile(i, logits):
    return logits


def evaluated(recompute):
    """The logits of each tile, and the bytes alive at the peak."""
    torch.manual_seed(0)
    tiling = Tiling((32, 56), (1, 4), 4)  # in one call the first and the third tile, then the others, which are smaller
    config = {**CONFIG, "recompute": recompute}
    model = build_from_config(config)
    model.eval()
    images, _ = random_batch(2, tiling.size)
    with torch.no_grad(), LiveMemory() as memory:
        logits = train.run_tiles(model, images, tiling, [CPU], config, logits_of_tile)
    return logits, memory.peak["cpu"]


def test_evaluation_is_the_same_and_remembers_less(in_float64):
    logits, peak = evaluated(recompute=False)
    again, smaller_peak = evaluated(recompute=True)
    assert_all_close(again, logits, tolerance=1e-12)
    assert smaller_peak < peak


@pytest.mark.parametrize("size, expected", [
    ((32, 32), ([[0, 1, 2, 3]], False)),
    ((64, 512), ([[0], [1]], True)),  # in tiles of 256 pixels
])
def test_an_image_larger_than_those_of_training_is_evaluated_with_recompute_tile_by_tile(size, expected, monkeypatch):
    found = []

    def watched(model, tiling, groups, devices, load_tile, reduce_tile, recompute):
        found.append((groups, recompute))
        return []

    monkeypatch.setattr(scale, "forward", watched)
    batch = random_batch(1, size)
    train.evaluate(build_from_config(CONFIG), [batch], CONFIG, [CPU])
    assert found == [expected]


# Time

def multiplications(function, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return counter.get_total_flops()


def test_tiles_multiply_as_often_as_the_plain_unet_and_recompute_adds_one_forward_pass_where_nobody_communicates():
    whole = Tiling((64, 64), (1, 1), 4)
    tiling = Tiling((64, 64), (2, 4), 4)
    plain = multiplications(training_step, whole, comm_channels=0)
    assert multiplications(training_step, tiling, comm_channels=0) == plain
    with torch.no_grad():
        unet = UNet(1, 3, width=4, depth=2)
        forward = multiplications(unet, torch.zeros(2, 1, 64, 64))
    assert multiplications(training_step, tiling, comm_channels=0, recompute=True) == plain + forward
