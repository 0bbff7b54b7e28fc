"""`--amp` computes in bfloat16 what float32 would give up to rounding; weights, statistics, sums stay in float32."""

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch, training_step

import train
from decompose import Tiling
from support import options
from support.loss import loss_sums
from support.model import build_from_config


def gradient_of(model) -> torch.Tensor:
    """That of all weights in one row."""
    flat = []
    for gradient in gradients_of(model):
        flat.append(gradient.flatten())
    return torch.cat(flat)


def similarity(one, other) -> torch.Tensor:
    """1 if the gradients of two models have the same direction."""
    return torch.cosine_similarity(gradient_of(one), gradient_of(other), dim=0)


def one_step(**changes):
    tiling = Tiling((44, 64), (2, 3), 4)
    return training_step(tiling, width=8, dilations=[1, 1, 1], **changes)


def test_loss_and_gradients_are_those_of_float32_up_to_rounding(monkeypatch):
    loss, model = one_step()
    precisions = set()

    def watched(logits, mask):
        precisions.add(logits.dtype)
        return loss_sums(logits, mask)

    monkeypatch.setattr(train, "loss_sums", watched)
    rounded_loss, rounded = one_step(amp=True)
    assert precisions == {torch.bfloat16}
    assert rounded_loss != loss
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=0.01)
    assert similarity(rounded, model) > 0.97

    again, recomputed = one_step(amp=True, recompute=True)
    assert again == rounded_loss
    assert similarity(recomputed, rounded) > 0.999
    assert_all_close(recomputed.buffers(), rounded.buffers(), tolerance=0)


def gradient_of_equal_tiles(n, recompute):
    """Of n x n tiles that all show the same."""
    torch.manual_seed(0)
    config = {**CONFIG, "width": 2, "depth": 1, "comm_channels": 0, "amp": True, "recompute": recompute}
    model = build_from_config(config)
    tile, mask = random_batch(1, (8, 8))
    images = tile.repeat(1, 1, n, n)
    masks = mask.repeat(1, n, n)
    tiling = Tiling((8 * n, 8 * n), (n, n), 2)
    loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
    loss.backward()
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
    pixels = 2**24
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[0, pixels], [0, 2 * pixels], [0, 0], [0, pixels]]


# The option

@pytest.mark.parametrize("has", [False, True])
def test_it_is_on_where_the_hardware_has_it_unless_asked_otherwise(has, monkeypatch):
    def has_bfloat16():
        return has

    monkeypatch.setattr(options, "has_bfloat16", has_bfloat16)
    parser = options.train_parser()
    assert options.parse([], parser)["amp"] == has
    assert options.parse(["--amp"], parser)["amp"]
    assert not options.parse(["--no-amp"], parser)["amp"]
