"""`--amp` computes in bfloat16 what float32 would give up to rounding; weights, statistics, sums stay in float32."""

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch, training_step

import train
from decompose import Tiling
from support import options
from support.loss import loss_sums
from support.model import build_from_config
from support.images import normalise


def gradient_of(model) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients_of(model)])


def similarity(one, other) -> torch.Tensor:
    """1 if the gradients of two models have the same direction."""
    return torch.cosine_similarity(gradient_of(one), gradient_of(other), dim=0)


def one_step(**options):
    return training_step(Tiling((44, 64), (2, 3), 4), width=8, dilations=[1, 1, 1], **options)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_float32_up_to_rounding(recompute, monkeypatch):
    loss, model = one_step()
    precisions = set()

    def watched(logits, *others):
        precisions.add(logits.dtype)
        return loss_sums(logits, *others)

    monkeypatch.setattr(train, "loss_sums", watched)
    rounded_loss, rounded = one_step(amp=True, recompute=recompute)
    assert precisions == {torch.bfloat16}
    assert rounded_loss != loss
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=0.01)
    assert similarity(rounded, model) > 0.97
    for tensor in [rounded_loss, *rounded.parameters(), *gradients_of(rounded), *rounded.buffers()]:
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point()


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
    model = build_from_config(config)
    tiling = Tiling((8 * n, 8 * n), (n, n), 2)
    train.batch_loss(model, tile.repeat(1, 1, n, n), mask.repeat(1, n, n), tiling, [CPU], config).backward()
    return gradient_of(model)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradients_of_many_tiles_add_up(recompute):
    """A loss that is a mean has the same gradient for 169 equal tiles as for one, but not if they
    are added up in bfloat16."""
    one = gradient_of_equal_tiles(1, recompute)
    many = gradient_of_equal_tiles(13, recompute)
    assert (many - one).norm() < 0.05 * one.norm()


# What is computed in float32

def test_the_sums_of_a_large_image_are_exact():
    """4096x4096 pixels are 2^24, the last whole number up to which float32 counts, and far beyond bfloat16 (2^8)."""
    logits = torch.tensor([-300.0, 300.0], dtype=torch.bfloat16)
    logits = logits.view(1, 2, 1, 1).expand(1, 2, 4096, 4096)
    mask = torch.ones(1, 4096, 4096, dtype=torch.uint8)
    sums = loss_sums(logits, mask)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[0, 2**24], [0, 2**25], [0, 0], [0, 2**24]]


def test_images_of_a_narrow_range_are_normalised_before_they_are_rounded():
    """In bfloat16, which autocast computes in, 1001 - 1000 would be 0."""
    image = torch.tensor([999.0, 1000.0, 1001.0, 1005.0]).view(1, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        x = normalise(image, [1000.0], [5.0])
    torch.testing.assert_close(x.flatten(), torch.tensor([-0.2, 0.0, 0.2, 1.0]))


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
        config = options.parse(list(arguments), options.train_parser())
        return config["amp"]

    monkeypatch.setattr(options, "has_bfloat16", has_bfloat16)
    assert asked() == has
    assert asked("--amp")
    assert not asked("--no-amp")
