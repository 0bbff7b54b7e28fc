"""`--recompute` changes what is remembered, and nothing else."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from decompose import DecomposedUNet, Tiling
from support.memory import LiveMemory
from support.model import build_from_config
from unet import UNet

pytestmark = pytest.mark.usefixtures("in_float64")
CPU = torch.device("cpu")
CONFIG = {"channels": 1, "classes": "abc", "width": 4, "depth": 2, "dropout": 0.0, "comm_channels": 8,
          "dilations": [1, 1, 1], "recompute": False, "mean": [0.5], "std": [2.0], "amp": False}


def one_step(size, tiling, **changes):
    torch.manual_seed(0)
    config = CONFIG | changes
    model = build_from_config(config)
    images, masks = torch.randn(2, 1, *size), torch.randint(0, 3, (2, *size), dtype=torch.uint8)
    loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
    loss.backward()
    return loss, [weight.grad for weight in model.parameters()], list(model.buffers())


@pytest.mark.parametrize("comm_channels", [0, 8])
@pytest.mark.parametrize("size, grid, overlap", [((32, 32), (2, 2), 0), ((44, 61), (2, 3), 4)])  # uneven, padded
def test_loss_gradients_and_running_statistics_are_the_same(size, grid, overlap, comm_channels):
    tiling = Tiling(size, grid, 4, overlap)
    remembered = one_step(size, tiling, comm_channels=comm_channels)
    recomputed = one_step(size, tiling, comm_channels=comm_channels, recompute=True)
    for a, b in zip([remembered[0], *remembered[1], *remembered[2]], [recomputed[0], *recomputed[1], *recomputed[2]],
                    strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert all(counter == 1 for counter in recomputed[2] if not counter.is_floating_point())  # one step, not one per run


def test_dropout_leaves_out_the_same_channels_whenever_a_tile_is_encoded():
    class Watch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.seen = torch.nn.Conv2d(1, 32, 1), []

        def forward(self, tile):
            coarse = torch.nn.functional.dropout2d(self.conv(tile), 0.5)
            self.seen.append(coarse.detach().clone())
            return (coarse.relu() + 1).log(), coarse

    class Multiply(torch.nn.Module):
        def forward(self, skips, coarse):
            return skips * coarse

    encoder, tiling = Watch(), Tiling((4, 4), (2, 2))
    model = DecomposedUNet(encoder, Multiply(), torch.nn.Identity(), 8)
    sums = model(tiling.split(torch.randn(1, 1, 4, 4)), tiling, [CPU] * 4, lambda i, logits: logits.square().sum(), recompute=True)
    sum(sums).backward()
    to_send, to_decode, *again = [encoder.seen[i:i + 4] for i in range(0, len(encoder.seen), 4)]
    assert len(again) == 2
    for maps in (to_decode, *(maps[::-1] for maps in again)):  # the backward pass goes from the last tile to the first
        assert all(torch.equal(a, b) for a, b in zip(to_send, maps, strict=True))
    assert not torch.equal(to_send[0] == 0, to_send[1] == 0)  # each tile leaves out channels of its own


def test_a_tile_keeps_what_it_sends_and_not_all_channels_of_its_coarse_map(monkeypatch):
    sent, stitch = [], Tiling.stitch
    monkeypatch.setattr(Tiling, "stitch", lambda tiling, tiles, device: sent.extend(tiles) or stitch(tiling, tiles))
    one_step((32, 32), Tiling((32, 32), (2, 2), 4), recompute=True)
    assert len(sent) == 4 and all(tile.untyped_storage().nbytes() == tile.nbytes for tile in sent)


def test_evaluation_is_the_same_and_remembers_less():
    tiling, images = Tiling((32, 32), (2, 2), 4), torch.randn(2, 1, 32, 32)
    logits, peaks = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_from_config(CONFIG).eval()
        with torch.no_grad(), LiveMemory() as memory:
            logits.append(tiling.stitch(model(tiling.split(images), tiling, [CPU] * 4, recompute=recompute)))
        peaks.append(memory.peak["cpu"])
    assert torch.equal(*logits) and peaks[1] < peaks[0]


def test_tiles_multiply_as_often_as_the_plain_unet_and_recompute_adds_one_forward_pass_where_nobody_communicates():
    def multiplied(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def step(grid, **changes):
        return one_step((64, 64), Tiling((64, 64), grid, 4), comm_channels=0, **changes)

    plain = multiplied(lambda: step((1, 1)))
    with torch.no_grad():
        unet = UNet(1, 3, 4, 2)
        forward = multiplied(lambda: unet(torch.zeros(2, 1, 64, 64)))
    assert multiplied(lambda: step((2, 4))) == plain
    assert multiplied(lambda: step((2, 4), recompute=True)) == plain + forward
