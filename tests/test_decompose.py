import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from comm_net import CommNet
from decompose import DecomposedUNet, Tiling
from unet import Decoder, Encoder, UNet

CPU = torch.device("cpu")


def decomposed(unet: UNet, comm_net=None, comm_channels=0) -> DecomposedUNet:
    """The same weights, tile by tile."""
    return DecomposedUNet(copy.deepcopy(unet.encoder), copy.deepcopy(unet.decoder), comm_net, comm_channels)


def run(model, image, tiling, **options):
    return tiling.stitch(model(tiling.split(image), tiling, [CPU] * len(tiling), **options))


# Tiling

@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (3, 2), (5, 3)])
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (41, 67)])  # even, uneven tiles, padded
@pytest.mark.parametrize("overlap", [0, 8, 24])
def test_split_then_stitch_is_the_identity(size, grid, overlap):
    tiling = Tiling(size, grid, 8, overlap)
    image = torch.randn(2, 3, *size)
    tiles = [tiling.crop(i, tile) for i, tile in enumerate(tiling.split(image))]
    assert torch.equal(tiling.stitch(tiles), image)
    assert torch.equal(tiling.stitch(tiling.split(image, overlap=False)), image)
    assert all(side % 8 == 0 for tile in tiling.split(image) for side in tile.shape[-2:])


def test_tiles_are_row_major_and_as_equal_as_whole_cells_allow():
    assert Tiling((2448, 2448), (2, 2), 16).boxes == [
        (0, 1232, 0, 1232), (0, 1232, 1232, 2448), (1232, 2448, 0, 1232), (1232, 2448, 1232, 2448)]
    assert Tiling((8, 56), (1, 3), 8).boxes == [(0, 8, 0, 24), (0, 8, 24, 40), (0, 8, 40, 56)]


def test_overlap_ends_at_the_border_of_the_image():
    tiling = Tiling((32, 32), (2, 2), 8, overlap=8)
    assert tiling.halos == [(0, 24, 0, 24), (0, 24, 8, 32), (8, 32, 0, 24), (8, 32, 8, 32)]


def test_the_coarse_tiling_is_the_same_tiling_in_cells():
    tiling = Tiling((45, 60), (2, 3), 4, overlap=8)
    for fine, coarse in ((tiling.boxes, tiling.coarse.boxes), (tiling.halos, tiling.coarse.halos)):
        assert fine == [tuple(4 * side for side in box) for box in coarse]


def test_split_copies_nothing_but_padded_tiles_and_fills_those():
    image = torch.ones(1, 1, 16, 20)
    left, right = Tiling((16, 20), (1, 2), 8).split(image, fill=255)
    assert left.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    assert right.shape == (1, 1, 16, 8) and (right[..., 4:] == 255).all() and (right[..., :4] == 1).all()


def test_to_split_costs_a_gradient_of_a_strip_per_tile_and_not_one_of_the_image():
    class Made(TorchDispatchMode):
        pixels = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.slice_backward.default:
                self.pixels += out.numel()
            return out

    image = torch.zeros(32, 32, requires_grad=True)
    with Made() as made:
        sum(tile.sum() for tile in Tiling((32, 32), (8, 8)).split(image)).backward()
    assert 0 < made.pixels <= 16 * 32 * 32  # as much as 16 images; 64 tiles with a gradient of the image each were 64


@pytest.mark.parametrize("grid, overlap, message", [
    ((5, 1), 0, "5 rows of tiles.*32x32.*8x8 can have 1 to 4"), ((0, 1), 0, "0 rows"), ((1, 9), 0, "9 columns"),
    ((2, 2), 4, "overlap of 4 pixels.*multiple of the cell, 8"), ((2, 2), -8, "overlap of -8")])
def test_a_tiling_that_cannot_be_is_refused(grid, overlap, message):
    with pytest.raises(ValueError, match=message):
        Tiling((32, 32), grid, 8, overlap)


# DecomposedUNet against the plain U-Net

def test_one_tile_without_communication_is_the_unet():
    unet = UNet(2, 3, 4, 2, dropout=0).double()
    model, tiling = decomposed(unet), Tiling((24, 32), (1, 1), 4)
    image = torch.randn(3, 2, 24, 32, dtype=torch.double)
    expected, out = unet(image), run(model, image, tiling)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for logits in (expected, out):
        logits.square().sum().backward()
    twin = dict(unet.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, twin[name].grad, rtol=0, atol=1e-12)
    for name, buffer in unet.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=0, atol=1e-15)


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (5, 3)])
@pytest.mark.parametrize("size", [(80, 96), (76, 96)])
def test_with_an_overlap_as_wide_as_its_field_of_view_every_grid_is_the_unet(grid, size):
    unet = UNet(1, 3, 2, 2).double()
    unet(torch.randn(2, 1, 32, 32, dtype=torch.double))  # running statistics that matter
    unet.eval()
    image = torch.randn(2, 1, *size, dtype=torch.double)
    tiling = Tiling(size, grid, 4, overlap=24)  # the U-Net sees 22 pixels beyond a tile at depth 2
    torch.testing.assert_close(run(decomposed(unet).eval(), image, tiling), unet(image), rtol=0, atol=1e-10)
    narrow = Tiling(size, grid, 4, overlap=4)
    assert (run(decomposed(unet).eval(), image, narrow) - unet(image)).abs().max() > 1e-6


def test_running_statistics_are_the_mean_over_tiles():
    unet = UNet(1, 2, 2, 1, dropout=0).double()
    image, tiling = torch.randn(2, 1, 12, 16, dtype=torch.double), Tiling((12, 16), (2, 3), 2)
    alone = [copy.deepcopy(unet) for _ in range(len(tiling))]
    for net, tile in zip(alone, tiling.split(image)):
        net(tile)
    model = decomposed(unet)
    run(model, image, tiling)
    for name, buffer in model.named_buffers():
        new = [dict(net.named_buffers())[name] for net in alone]
        expected = torch.stack(new).mean(dim=0) if buffer.is_floating_point() else torch.tensor(1)
        torch.testing.assert_close(buffer, expected, rtol=0, atol=1e-15)


def test_evaluation_leaves_the_buffers_alone():
    model, tiling = decomposed(UNet(1, 2, 2, 1), CommNet(4), 4).eval(), Tiling((8, 8), (2, 2), 2)
    before = copy.deepcopy(model.state_dict())
    run(model, torch.randn(1, 1, 8, 8), tiling)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Communication

def gradient_of_first_tile_with_respect_to_last(comm_net, k):
    """1x4 tiles of 16 pixels at depth 1: coarse cells of 2 pixels, 8 to a tile."""
    model = DecomposedUNet(Encoder(1, 8, 1), Decoder(2, 8, 1), comm_net, k).double().eval()
    tiling = Tiling((16, 64), (1, 4), 2)
    image = torch.randn(1, 1, 16, 64, dtype=torch.double, requires_grad=True)
    first, *_ = model(tiling.split(image), tiling, [CPU] * 4)
    first.square().sum().backward()
    return [tile.abs().max().item() for tile in tiling.split(image.grad)]


def test_tiles_hear_of_each_other_through_the_communication_network_alone_and_within_its_reach():
    alone = gradient_of_first_tile_with_respect_to_last(None, 0)
    assert alone[0] > 0 and alone[1:] == [0, 0, 0]
    heard = gradient_of_first_tile_with_respect_to_last(CommNet(4), 4)  # reach: 6 cells, 12 pixels
    assert heard[0] > 0 and heard[1] > 0 and heard[2:] == [0, 0]


def test_communication_replaces_the_last_k_channels_and_only_those():
    seen = {}

    class Remember(nn.Module):
        def forward(self, skips, coarse):
            seen[len(seen)] = coarse
            return coarse

    encoder, tiling = Encoder(1, 2, 1).eval(), Tiling((8, 8), (2, 2), 2)
    image = torch.randn(1, 1, 8, 8)
    model = DecomposedUNet(encoder, Remember(), nn.Flatten(0, 0), 3)  # a network that changes nothing
    model(tiling.split(image), tiling, [CPU] * 4)
    for i, tile in enumerate(tiling.split(image)):
        torch.testing.assert_close(seen[i], encoder(tile)[1])
    constant = DecomposedUNet(encoder, Remember(), nn.Hardtanh(-8, -7), 3)  # a network that always says -7
    seen.clear()
    constant(tiling.split(image), tiling, [CPU] * 4)
    for i, tile in enumerate(tiling.split(image)):
        torch.testing.assert_close(seen[i][:, :1], encoder(tile)[1][:, :1])
        assert (seen[i][:, 1:] == -7).all()


def test_with_overlap_the_communicated_map_is_that_of_the_tiles_without_it():
    """Every cell of the global coarse map comes from the tile that owns it, halo cells come back from there."""
    class Ones(nn.Module):  # a tile's coarse map says where it is: the value of its own pixels
        def forward(self, tile):
            return [], tile[..., ::2, ::2]

    class Take(nn.Module):
        def forward(self, skips, coarse):
            return coarse.repeat_interleave(2, -1).repeat_interleave(2, -2)

    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    tiling = Tiling((8, 8), (2, 2), 2, overlap=2)
    out = run(DecomposedUNet(Ones(), Take(), nn.Identity(), 1), image, tiling)
    torch.testing.assert_close(out, image[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_any_encoder_and_decoder_that_agree_on_their_skips_can_be_plugged_in():
    class ToyEncoder(nn.Module):  # one strided convolution; its "skips" are a dict
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 4, stride=4)

        def forward(self, tile):
            return {"tile": tile}, self.conv(tile)

    class ToyDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(6, 5, 4, stride=4)

        def forward(self, skips, coarse):
            return self.up(coarse) + skips["tile"].mean(dim=1, keepdim=True)

    image, tiling = torch.randn(2, 3, 16, 24), Tiling((16, 24), (2, 3), 4)
    encoder, decoder, comm_net = ToyEncoder(), ToyDecoder(), nn.Conv2d(2, 2, 3, padding=1)
    out = run(DecomposedUNet(encoder, decoder, comm_net, 2), image, tiling)
    skips, coarse = encoder(image)  # without padding inside, tiles make the same map as the whole image
    expected = decoder(skips, torch.cat([coarse[:, :-2], comm_net(coarse[:, -2:])], dim=1))
    torch.testing.assert_close(out, expected)


def test_finish_decides_what_is_kept_of_a_tile():
    model, tiling = decomposed(UNet(1, 2, 2, 1)).eval(), Tiling((8, 8), (2, 2), 2)
    image = torch.randn(1, 1, 8, 8)
    sums = model(tiling.split(image), tiling, [CPU] * 4, lambda i, logits: (i, logits.sum()))
    logits = model(tiling.split(image), tiling, [CPU] * 4)
    assert [i for i, _ in sums] == [0, 1, 2, 3]
    assert all(torch.equal(total, tile.sum()) for (_, total), tile in zip(sums, logits))


@pytest.mark.parametrize("comm_net, channels", [(None, 4), (CommNet(4), 0)])
def test_a_communication_network_and_its_channels_come_together(comm_net, channels):
    with pytest.raises(ValueError, match=f"{channels} communicated channels, but the communication network is"):
        decomposed(UNet(1, 2, 2, 1), comm_net, channels)


def test_images_tiles_and_devices_must_fit_the_tiling():
    tiling = Tiling((8, 12), (2, 3), 4)
    for image in (torch.zeros(1, 1, 12, 8), torch.zeros(1, 1, 16, 24)):
        with pytest.raises(ValueError, match="made for 8 rows, 12 columns"):
            tiling.split(image)
    model, tiles = DecomposedUNet(nn.Identity(), nn.Identity()), tiling.split(torch.zeros(1, 1, 8, 12))
    for devices in (1, 12):
        with pytest.raises(ValueError, match=f"6 tiles and {devices} devices"):
            model(tiles, tiling, devices * [torch.device("cpu")])
