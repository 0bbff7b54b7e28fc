"""`--amp` computes in bfloat16 what float32 would give up to rounding; weights, statistics, sums stay in float32."""

import numpy as np
import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch

import train
from decompose import Tiling
from support import options
from support.values import normalise
from support.loss import loss_sums
from support.memory import LiveMemory
from support.model import build_from_config


def one_vector(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def similarity(one, other) -> torch.Tensor:
    """1 if the gradients of two models have the same direction."""
    one = one_vector(gradients_of(one))
    other = one_vector(gradients_of(other))
    return torch.cosine_similarity(one, other, dim=0)


class NotingHead(torch.nn.Conv2d):
    """Notes in which precision it computes logits."""

    def forward(self, x):
        logits = super().forward(x)
        self.dtype_of_logits = logits.dtype
        return logits


def one_step(amp=False, recompute=False):
    """Loss and model after the backward pass, from the same weights and images every time."""
    torch.manual_seed(0)
    config = {**CONFIG, "width": 8, "dilations": [1, 1, 1], "amp": amp, "recompute": recompute}
    model = build_from_config(config)
    model.decoder.head = NotingHead(8, 3, 1)
    tiling = Tiling((44, 64), (2, 3), 4)
    images, masks = random_batch(2, tiling.size)
    loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
    loss.backward()
    return loss, model


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_float32_up_to_rounding(recompute):
    loss, model = one_step()
    rounded_loss, rounded = one_step(amp=True, recompute=recompute)
    assert rounded_loss != loss
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=0.01)
    assert similarity(rounded, model) > 0.97


@pytest.mark.parametrize("recompute", [False, True])
def test_logits_are_in_bfloat16_and_loss_weights_gradients_and_statistics_in_float32(recompute):
    loss, model = one_step(amp=True, recompute=recompute)
    assert model.decoder.head.dtype_of_logits == torch.bfloat16
    assert loss.dtype == torch.float32
    for weight in model.parameters():
        assert weight.dtype == torch.float32
        assert weight.grad.dtype == torch.float32
    for buffer in model.buffers():
        if buffer.is_floating_point():
            assert buffer.dtype == torch.float32


def test_recompute_is_the_same_with_amp():
    loss, model = one_step(amp=True)
    again, recomputed = one_step(amp=True, recompute=True)
    assert again == loss
    assert similarity(recomputed, model) > 0.999
    assert_all_close(recomputed.buffers(), model.buffers(), tolerance=0)


def gradient_of_equal_tiles(n, recompute):
    """Of n x n tiles that all show the same."""
    torch.manual_seed(0)
    config = {**CONFIG, "width": 2, "depth": 1, "comm_channels": 0, "amp": True, "recompute": recompute}
    tile, mask = random_batch(1, (8, 8))
    images = tile.repeat(1, 1, n, n)
    masks = mask.repeat(1, n, n)
    model = build_from_config(config)
    tiling = Tiling((8 * n, 8 * n), (n, n), 2)
    loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
    loss.backward()
    return one_vector(gradients_of(model))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradients_of_many_tiles_add_up(recompute):
    """A loss that is a mean has the same gradient for 169 equal tiles as for one, but not if they
    are added up in bfloat16."""
    one = gradient_of_equal_tiles(1, recompute)
    many = gradient_of_equal_tiles(13, recompute)
    assert (many - one).norm() < 0.05 * one.norm()


# Memory

def peak_of_a_step(amp: bool) -> tuple[int, int]:
    """Bytes alive at the peak of a step with 16 small tiles, and bytes of the weights in bfloat16."""
    config = {**CONFIG, "width": 16, "depth": 3, "dilations": [1, 1, 1], "amp": amp}
    model = build_from_config(config)
    tiling = Tiling((64, 64), (4, 4), 8)
    images, masks = random_batch(1, tiling.size)
    with LiveMemory() as memory:
        loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
        loss.backward()
    weights = one_vector(model.parameters())
    return memory.peak["cpu"], 2 * weights.numel()


def test_a_tile_keeps_no_rounded_weights_of_its_own():
    rounded_peak, weights = peak_of_a_step(amp=True)
    peak, _ = peak_of_a_step(amp=False)
    assert rounded_peak < peak + 1.5 * weights  # one rounded copy for all tiles, and no activation is larger


# What is computed in float32

def test_the_sums_of_a_large_image_are_exact():
    """4096x4096 pixels are 2^24, the last whole number up to which float32 counts, and far beyond bfloat16 (2^8)."""
    logits = torch.tensor([-300.0, 300.0], dtype=torch.bfloat16)
    logits = logits.view(1, 2, 1, 1).expand(1, 2, 4096, 4096)
    mask = torch.ones(1, 4096, 4096, dtype=torch.uint8)
    sums = loss_sums(logits, mask)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [0, 2**24, 0, 2**25, 0, 2**24]


def test_images_of_a_narrow_range_are_normalised_before_they_are_rounded():
    """In bfloat16, which autocast computes in, 1001 - 1000 would be 0."""
    image = torch.tensor([999.0, 1000.0, 1001.0, 1005.0]).view(1, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        x = normalise(image, [1000.0], [5.0])
    torch.testing.assert_close(x.flatten(), torch.tensor([-0.2, 0.0, 0.2, 1.0]))


@pytest.mark.parametrize("missing", [-9999, 1e38, np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_or_far_outside_the_range_of_training_become_the_mean(missing):
    image = torch.tensor([2.0, 6.0, -1.9, 9.9, missing])[None, None, None]  # -2 and 10 are the limits
    x = normalise(image, [4.0], [2.0], [[2.0], [6.0]])
    torch.testing.assert_close(x.flatten(), torch.tensor([-1.0, 1.0, -2.95, 2.95, 0.0]))


def test_without_a_known_range_numbers_that_are_not_finite_become_the_mean_and_others_stay():
    image = torch.tensor([2.0, -9999.0, np.nan, np.inf])[None, None, None]
    x = normalise(image, [1.0], [1.0])
    assert x.flatten().tolist() == [1, -10000, 0, 0]


def test_no_value_of_8_bits_is_far_outside():
    image = torch.tensor([10, 255], dtype=torch.uint8)[None, None, None]
    x = normalise(image, [0.0], [1 / 255], [[10], [20]])
    torch.testing.assert_close(x.flatten(), torch.tensor([10.0, 255.0]))


def test_every_channel_is_normalised_by_its_own_numbers_and_white_is_one():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    x = normalise(image, [0.5, 0.2, 0.0], [0.5, 0.1, 2.0])
    torch.testing.assert_close(x.flatten(), torch.tensor([-1, 0, 0.5]))
    x = normalise(image.to(torch.uint16), [0.0, 0.0, 0.0], [1.0, 1.0, 51 / 65535])
    torch.testing.assert_close(x.flatten(), torch.tensor([0, 51 / 65535, 5]))


# The option

@pytest.mark.parametrize("has", [False, True])
def test_it_is_on_where_the_hardware_has_it_unless_asked_otherwise(has, monkeypatch):
    def has_bfloat16():
        return has

    def asked(*arguments):
        config = options.parse(list(arguments), options.make_parser(""))
        return config["amp"]

    monkeypatch.setattr(options, "has_bfloat16", has_bfloat16)
    assert asked() == has
    assert asked("--amp")
    assert not asked("--no-amp")
