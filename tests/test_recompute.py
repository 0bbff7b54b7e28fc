"""support/scale.py and `--recompute` change what is remembered, and nothing else."""

import copy

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch, training_step
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

import train
from decompose import DecomposedUNet, Tiling
from support import scale
from support.memory import LiveMemory
from support.model import build_from_config
from unet import UNet


TILINGS = [
    Tiling((32, 32), (2, 2), 4),
    Tiling((44, 61), (2, 3), 4, overlap=4),  # uneven, padded
]


@pytest.mark.parametrize("comm_channels", [0, 8])
@pytest.mark.parametrize("tiling", TILINGS, ids=["even", "uneven"])
def test_loss_gradients_and_running_statistics_are_the_same(tiling, comm_channels, in_float64):
    loss, model = training_step(tiling, comm_channels=comm_channels)
    again, recomputed = training_step(tiling, comm_channels=comm_channels, recompute=True)
    assert_all_close([again, *gradients_of(recomputed)], [loss, *gradients_of(model)], tolerance=1e-12)
    assert_all_close(recomputed.buffers(), model.buffers(), tolerance=1e-12)


class SpectralNormEncoder(nn.Module):
    """Its output depends on buffers that every pass changes."""

    def __init__(self):
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(1, 4, 3, padding=1))

    def forward(self, tile):
        return 1, self.conv(tile)


def mean_of_square(i, logits):
    return logits.square().mean()


def forward_with_recompute(model, tiles, tiling):
    one_by_one = [[i] for i in range(len(tiling))]
    return scale.forward(model, tiling, one_by_one, [CPU], tiles.__getitem__, mean_of_square, recompute=True)


def test_a_tile_is_computed_again_with_the_buffers_of_before():
    model = DecomposedUNet(SpectralNormEncoder(), MultiplyingDecoder())
    other = copy.deepcopy(model)
    tiling = Tiling((8, 8), (2, 2))
    tiles = tiling.split(torch.randn(2, 1, 8, 8))
    sum(mean_of_square(i, logits) for i, logits in enumerate(model(tiles, tiling))).backward()
    sum(forward_with_recompute(other, tiles, tiling)).backward()
    assert_all_close(gradients_of(other), gradients_of(model), tolerance=1e-6)


# Dropout

def remember(recompute, function, *inputs):
    return function(*inputs)


@pytest.mark.parametrize("comm_channels", [0, 8])
def test_with_dropout_loss_and_gradients_are_those_of_what_is_not_computed_again(comm_channels, in_float64, monkeypatch):
    options = {"comm_channels": comm_channels, "recompute": True, "dropout": 0.3}
    loss, model = training_step(TILINGS[1], **options)
    monkeypatch.setattr(scale, "forget_activations", remember)
    expected, remembered = training_step(TILINGS[1], **options)
    assert loss == expected
    assert_all_close(gradients_of(model), gradients_of(remembered), tolerance=1e-12)


class WatchedEncoder(nn.Module):
    """Keeps every coarse map that it makes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 1)
        self.seen = []

    def forward(self, tile):
        coarse = nn.functional.dropout2d(self.conv(tile), 0.5)
        self.seen.append(coarse.detach().clone())
        return coarse.exp(), coarse


class MultiplyingDecoder(nn.Module):
    def forward(self, skips, coarse):
        return skips * coarse


def test_dropout_leaves_out_the_same_channels_whenever_a_tile_is_encoded():
    encoder = WatchedEncoder()
    model = DecomposedUNet(encoder, MultiplyingDecoder(), nn.Conv2d(8, 8, 1), comm_channels=8)
    tiling = Tiling((4, 4), (2, 2))
    tiles = tiling.split(torch.randn(1, 1, 4, 4))
    sum(forward_with_recompute(model, tiles, tiling)).backward()

    assert len(encoder.seen) == 16
    first = encoder.seen[:4]
    assert_all_close(encoder.seen[4:8], first, tolerance=0)
    first.reverse()  # the backward pass goes from the last tile to the first
    assert_all_close(encoder.seen[8:], first * 2, tolerance=0)
    assert not torch.equal(first[0] == 0, first[1] == 0)  # each tile leaves out channels of its own
    assert scale.draw_seeds(model, tiling) != scale.draw_seeds(model, tiling)  # and other ones in each step


@pytest.mark.parametrize("recompute", [False, True])
def test_an_evaluation_draws_no_random_numbers_so_that_training_does_not_depend_on_its_tiles(recompute):
    config = {**CONFIG, "dropout": 0.3, "recompute": recompute, "image_size": (16, 16), "grid": (2, 2), "overlap": 0}
    batch = random_batch(1, (16, 16))
    model = build_from_config(config)
    state = torch.get_rng_state()
    train.evaluate(model, [batch], config, [CPU])
    assert torch.equal(torch.get_rng_state(), state)


# Memory

def test_a_tile_keeps_what_it_sends_and_not_all_channels_of_its_coarse_map(monkeypatch):
    sent = []
    stitch = Tiling.stitch

    def watched_stitch(tiling, tiles, device):
        sent.extend(tiles)
        return stitch(tiling, tiles, device)

    monkeypatch.setattr(Tiling, "stitch", watched_stitch)
    training_step(TILINGS[0], recompute=True)
    assert len(sent) == 4
    for tile in sent:
        assert tile.untyped_storage().nbytes() == tile.nbytes


def evaluated(recompute):
    """Logits, and the bytes alive at the peak."""
    torch.manual_seed(0)
    tiling = TILINGS[0]
    config = {**CONFIG, "recompute": recompute}
    model = build_from_config(config).eval()
    images, _ = random_batch(2, tiling.size)
    with torch.no_grad(), LiveMemory() as memory:
        logits = train.run_tiles(model, images, tiling, [CPU], config, logits_of_tile)
    return logits, memory.peak["cpu"]


def logits_of_tile(i, logits):
    return logits


def test_evaluation_is_the_same_and_remembers_less():
    logits, peak = evaluated(recompute=False)
    again, smaller_peak = evaluated(recompute=True)
    assert_all_close(again, logits, tolerance=0)
    assert smaller_peak < peak


@pytest.mark.parametrize("size, recompute", [((16, 16), False), ((16, 20), True)])
def test_an_image_larger_than_those_of_training_is_evaluated_with_recompute(size, recompute, monkeypatch):
    calls = []

    def watched(*arguments):
        calls.append(arguments)
        return []

    monkeypatch.setattr(scale, "forward", watched)
    config = {**CONFIG, "image_size": (16, 16), "grid": (2, 2), "overlap": 0}
    train.evaluate(build_from_config(config), [random_batch(1, size)], config, [CPU])
    assert [arguments[-1] for arguments in calls] == [recompute]


# Time

def multiplications(function, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return counter.get_total_flops()


def test_tiles_multiply_as_often_as_the_plain_unet_and_recompute_adds_one_forward_pass_where_nobody_communicates():
    tiling = Tiling((64, 64), (2, 4), 4)
    plain = multiplications(training_step, Tiling((64, 64), (1, 1), 4), comm_channels=0)
    assert multiplications(training_step, tiling, comm_channels=0) == plain
    forward = multiplications(UNet(1, 3, width=4, depth=2).eval().requires_grad_(False), torch.zeros(2, 1, 64, 64))
    assert multiplications(training_step, tiling, comm_channels=0, recompute=True) == plain + forward
