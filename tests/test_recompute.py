"""`--recompute` changes what is remembered, and nothing else."""

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
from decompose import DecomposedUNet, Tiling
from support.memory import LiveMemory
from support.model import build_from_config
from unet import UNet

pytestmark = pytest.mark.usefixtures("in_float64")


def one_step(tiling, **changes):
    """Loss and model after the backward pass, from the same weights and images every time."""
    torch.manual_seed(0)
    config = {**CONFIG, "dilations": [1, 1, 1], **changes}
    model = build_from_config(config)
    images, masks = random_batch(2, tiling.size)
    loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
    loss.backward()
    return loss, model


TILINGS = [
    Tiling((32, 32), (2, 2), 4),
    Tiling((44, 61), (2, 3), 4, overlap=4),  # uneven, padded
]


@pytest.mark.parametrize("comm_channels, dropout", [(0, 0.0), (8, 0.0), (8, 0.3)])
@pytest.mark.parametrize("tiling", TILINGS, ids=["even", "uneven"])
def test_loss_gradients_and_running_statistics_are_the_same(tiling, comm_channels, dropout):
    loss, model = one_step(tiling, comm_channels=comm_channels, dropout=dropout)
    again, recomputed = one_step(tiling, comm_channels=comm_channels, dropout=dropout, recompute=True)
    torch.testing.assert_close(again, loss, rtol=0, atol=1e-12)
    assert_all_close(gradients_of(recomputed), gradients_of(model), tolerance=1e-12)
    assert_all_close(recomputed.buffers(), model.buffers(), tolerance=1e-12)
    for name, buffer in recomputed.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 1  # one step, and not one for each time that a tile is encoded


# Dropout

class WatchedEncoder(nn.Module):
    """Keeps every coarse map that it makes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 1)
        self.seen = []

    def forward(self, tile):
        coarse = nn.functional.dropout2d(self.conv(tile), 0.5)
        self.seen.append(coarse.detach().clone())
        skips = (coarse.relu() + 1).log()
        return skips, coarse


class MultiplyingDecoder(nn.Module):
    def forward(self, skips, coarse):
        return skips * coarse


def sum_of_squares(i, logits):
    return logits.square().sum()


def test_dropout_leaves_out_the_same_channels_whenever_a_tile_is_encoded():
    encoder = WatchedEncoder()
    model = DecomposedUNet(encoder, MultiplyingDecoder(), nn.Identity(), comm_channels=8)
    tiling = Tiling((4, 4), (2, 2))
    tiles = tiling.split(torch.randn(1, 1, 4, 4))
    sums = model(tiles, tiling, [CPU] * 4, sum_of_squares, recompute=True)
    sum(sums).backward()

    assert len(encoder.seen) == 16
    first = encoder.seen[:4]
    for start in (4, 8, 12):
        again = encoder.seen[start:start + 4]
        if start > 4:
            again.reverse()  # the backward pass goes from the last tile to the first
        assert_all_close(again, first, tolerance=0)
    assert not torch.equal(first[0] == 0, first[1] == 0)  # each tile leaves out channels of its own


# Memory

def test_a_tile_keeps_what_it_sends_and_not_all_channels_of_its_coarse_map(monkeypatch):
    sent = []
    stitch = Tiling.stitch

    def watched_stitch(tiling, tiles, device):
        sent.extend(tiles)
        return stitch(tiling, tiles, device)

    monkeypatch.setattr(Tiling, "stitch", watched_stitch)
    one_step(Tiling((32, 32), (2, 2), 4), recompute=True)
    assert len(sent) == 4
    for tile in sent:
        assert tile.untyped_storage().nbytes() == tile.nbytes


def evaluated(recompute):
    """Logits, and the bytes alive at the peak."""
    torch.manual_seed(0)
    tiling = Tiling((32, 32), (2, 2), 4)
    model = build_from_config(CONFIG).eval()
    tiles = tiling.split(torch.randn(2, 1, 32, 32))
    with torch.no_grad(), LiveMemory() as memory:
        logits = tiling.stitch(model(tiles, tiling, [CPU] * 4, recompute=recompute))
    return logits, memory.peak["cpu"]


def test_evaluation_is_the_same_and_remembers_less():
    logits, peak = evaluated(recompute=False)
    again, smaller_peak = evaluated(recompute=True)
    assert torch.equal(again, logits)
    assert smaller_peak < peak


@pytest.mark.parametrize("size, recompute", [((16, 16), False), ((16, 20), True)])
def test_an_image_larger_than_those_of_training_is_evaluated_with_recompute(size, recompute, monkeypatch):
    asked = []
    run_tiles = train.run_tiles

    def watched(model, images, tiling, devices, config, measure):
        asked.append(config["recompute"])
        return run_tiles(model, images, tiling, devices, config, measure)

    monkeypatch.setattr(train, "run_tiles", watched)
    config = {**CONFIG, "image_size": (16, 16), "grid": (2, 2), "overlap": 0}
    train.evaluate(build_from_config(config), [random_batch(1, size)], config, [CPU])
    assert asked == [recompute]


# Time

def multiplications_of_step(grid, recompute=False) -> int:
    tiling = Tiling((64, 64), grid, 4)
    with FlopCounterMode(display=False) as counter:
        one_step(tiling, comm_channels=0, recompute=recompute)
    return counter.get_total_flops()


def multiplications_of_forward_pass() -> int:
    """Of the plain U-Net."""
    unet = UNet(1, 3, width=4, depth=2)
    images = torch.zeros(2, 1, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(images)
    return counter.get_total_flops()


def test_tiles_multiply_as_often_as_the_plain_unet_and_recompute_adds_one_forward_pass_where_nobody_communicates():
    plain = multiplications_of_step((1, 1))
    forward = multiplications_of_forward_pass()
    assert multiplications_of_step((2, 4)) == plain
    assert multiplications_of_step((2, 4), recompute=True) == plain + forward
