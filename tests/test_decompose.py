"""The method: images are cut and stitched, and tiles compute what the plain U-Net computes on the whole image."""

import copy

import pytest
import torch
from conftest import assert_all_close, gradients_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from comm_net import CommNet
from decompose import DecomposedUNet, Tiling
from unet import Decoder, Encoder, UNet


def decomposed(unet: UNet, comm_net=None, comm_channels=0) -> DecomposedUNet:
    """The same weights, tile by tile."""
    return DecomposedUNet(copy.deepcopy(unet.encoder), copy.deepcopy(unet.decoder), comm_net, comm_channels)


def run(model, image, tiling):
    """The logits of the image."""
    return tiling.stitch(model(tiling.split(image), tiling))


# Tiling

@pytest.mark.parametrize("size", [(64, 64), (40, 72), (41, 67)])  # even, uneven tiles, padded
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (5, 3)])
@pytest.mark.parametrize("overlap", [0, 8, 24])
def test_split_then_stitch_is_the_identity_and_tiles_are_whole_cells(size, grid, overlap):
    tiling = Tiling(size, grid, 8, overlap)
    image = torch.randn(2, 3, *size)
    cropped = []
    for i, tile in enumerate(tiling.split(image)):
        assert tile.shape[-2] % 8 == 0
        assert tile.shape[-1] % 8 == 0
        cropped.append(tiling.crop(i, tile))
    assert torch.equal(tiling.stitch(cropped), image)
    without_overlap = tiling.split(image, overlap=False)
    assert torch.equal(tiling.stitch(without_overlap), image)


def test_tiles_are_row_major_and_as_equal_as_whole_cells_allow():
    assert Tiling((2448, 2448), (2, 2), 16).boxes == [
        (0, 1232, 0, 1232),
        (0, 1232, 1232, 2448),
        (1232, 2448, 0, 1232),
        (1232, 2448, 1232, 2448),
    ]
    assert Tiling((8, 56), (1, 3), 8).boxes == [
        (0, 8, 0, 24),
        (0, 8, 24, 40),
        (0, 8, 40, 56),
    ]


def test_overlap_ends_at_the_border_of_the_image():
    tiling = Tiling((32, 32), (2, 2), 8, overlap=8)
    assert tiling.halos == [
        (0, 24, 0, 24),
        (0, 24, 8, 32),
        (8, 32, 0, 24),
        (8, 32, 8, 32),
    ]


def test_split_copies_nothing_but_padded_tiles_and_fills_those():
    image = torch.ones(1, 1, 16, 20)
    left, right = Tiling((16, 20), (1, 2), 8).split(image, fill=255)
    assert left.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    assert right.shape == (1, 1, 16, 8)
    assert (right[..., :4] == 1).all()
    assert (right[..., 4:] == 255).all()


class GradientsOfCuts(TorchDispatchMode):
    """Counts the pixels of the gradients that the backward pass makes for cuts."""

    pixels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.slice_backward.default:
            self.pixels += out.numel()
        return out


def test_to_split_costs_a_gradient_of_a_strip_per_tile_and_not_one_of_the_image():
    image = torch.zeros(32, 32, requires_grad=True)
    with GradientsOfCuts() as gradients:
        tiles = Tiling((32, 32), (8, 8)).split(image)
        torch.stack(tiles).sum().backward()
    images = gradients.pixels / image.numel()
    assert 0 < images <= 16  # 64 tiles with a gradient of the image each would make 64


@pytest.mark.parametrize("grid, overlap, message", [
    ((5, 1), 0, "5x1 tiles.*32x32.*8x8 can have 1x1 to 4x4"),
    ((0, 1), 0, "0x1 tiles"),
    ((1, 9), 0, "1x9 tiles"),
    ((2, 2), 4, "overlap of 4 pixels.*multiple of the cell, 8"),
    ((2, 2), -8, "overlap of -8"),
])
def test_a_tiling_that_cannot_be_is_refused(grid, overlap, message):
    with pytest.raises(ValueError, match=message):
        Tiling((32, 32), grid, 8, overlap)


@pytest.mark.parametrize("size", [(12, 8), (16, 24)])
def test_an_image_must_fit_the_tiling(size):
    tiling = Tiling((8, 12), (2, 3), 4)
    with pytest.raises(ValueError, match="made for 8 rows and 12 columns"):
        tiling.split(torch.zeros(1, 1, *size))


# DecomposedUNet against the plain U-Net

def test_one_tile_without_communication_is_the_unet():
    unet = UNet(2, 3, 4, 2, dropout=0).double()
    model = decomposed(unet)
    image = torch.randn(3, 2, 24, 32, dtype=torch.double)
    expected = unet(image)
    logits = run(model, image, Tiling((24, 32), (1, 1), 4))
    assert torch.equal(logits, expected)
    expected.square().sum().backward()
    logits.square().sum().backward()
    assert_all_close(gradients_of(model), gradients_of(unet), tolerance=1e-12)
    assert_all_close(model.buffers(), unet.buffers(), tolerance=1e-15)


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (5, 3)])
@pytest.mark.parametrize("size", [(80, 96), (76, 96)])
def test_every_grid_is_the_unet_if_and_only_if_its_overlap_is_as_wide_as_the_unet_sees(grid, size):
    """This one sees 22 pixels far. It is in evaluation mode, with running statistics that matter."""
    unet = UNet(1, 3, 2, 2).double()
    unet(torch.randn(2, 1, 32, 32, dtype=torch.double))
    unet.eval()
    image = torch.randn(2, 1, *size, dtype=torch.double)
    model = decomposed(unet).eval()
    wide = run(model, image, Tiling(size, grid, 4, overlap=24)) - unet(image)
    assert wide.abs().max() < 1e-10
    narrow = run(model, image, Tiling(size, grid, 4, overlap=4)) - unet(image)
    assert narrow.abs().max() > 1e-6


def test_running_statistics_are_the_mean_over_tiles():
    unet = UNet(1, 2, 2, 1, dropout=0).double()
    image = torch.randn(2, 1, 12, 16, dtype=torch.double)
    tiling = Tiling((12, 16), (2, 3), 2)
    buffers_of_tiles = []
    for tile in tiling.split(image):
        alone = copy.deepcopy(unet)
        alone(tile)
        buffers_of_tiles.append(alone.buffers())
    model = decomposed(unet)
    run(model, image, tiling)
    for buffer, *of_tiles in zip(model.buffers(), *buffers_of_tiles, strict=True):
        mean = torch.stack(of_tiles).double().mean(dim=0)
        torch.testing.assert_close(buffer.double(), mean, rtol=0, atol=1e-15)


def test_evaluation_leaves_weights_and_buffers_to_the_last_bit():
    model = decomposed(UNet(1, 2, 2, 1), CommNet(4), 4)
    tiling = Tiling((12, 12), (1, 3), 2)
    image = torch.randn(1, 1, 12, 12)
    run(model, image, tiling)  # makes statistics
    model.eval()
    before = copy.deepcopy(model.state_dict())
    run(model, image, tiling)
    assert_all_close(model.state_dict().values(), before.values(), tolerance=0)


# Communication

@pytest.mark.parametrize("comm_channels, heard", [
    (0, [True, False, False, False]),
    (4, [True, True, False, False]),  # it reaches 6 cells, which are 12 pixels
])
def test_tiles_hear_of_each_other_only_through_the_communication_network_and_within_its_reach(comm_channels, heard):
    """Of tiles 16 pixels wide, which pixels have an influence on the logits of the first? A cell is 2 pixels wide."""
    comm_net = CommNet(comm_channels) if comm_channels > 0 else None
    model = DecomposedUNet(Encoder(1, 8, 1), Decoder(2, 8, 1), comm_net, comm_channels).double().eval()
    tiling = Tiling((16, 64), (1, 4), 2)
    image = torch.randn(1, 1, 16, 64, dtype=torch.double, requires_grad=True)
    logits = model(tiling.split(image), tiling)
    logits[0].square().sum().backward()
    has_influence = [(tile != 0).any().item() for tile in tiling.split(image.grad)]
    assert has_influence == heard


class ToyEncoder(nn.Module):
    """The coarse map is a convolution of the tile, plus the mean of the tile. The skips are a dictionary."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, tile):
        mean = tile.mean(dim=(1, 2, 3), keepdim=True)  # by which one can tell which tile a cell comes from
        return {"tile": tile}, self.conv(tile) + mean


class ToyDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 3, 4, stride=4)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)  # it sees a pixel of the overlap

    def forward(self, skips, coarse):
        return self.conv(self.up(coarse) + skips["tile"])


def test_any_encoder_and_decoder_that_agree_on_their_skips_can_be_plugged_in():
    """Communication replaces the last K channels, and only those. With overlap, every cell that is
    communicated comes from the tile that owns it, and all cells that a tile sees come back."""
    encoder, decoder, comm_net = ToyEncoder(), ToyDecoder(), nn.Conv2d(2, 2, 3, padding=1)
    image = torch.randn(2, 3, 8, 24)
    tiling = Tiling((8, 24), (1, 2), cell=4, overlap=4)
    logits = run(DecomposedUNet(encoder, decoder, comm_net, comm_channels=2), image, tiling)

    # The tiles see the columns 0 to 16 and 8 to 24, which are the cells 0 to 4 and 2 to 6.
    left_skips, left = encoder(image[..., 0:16])
    right_skips, right = encoder(image[..., 8:24])
    sent = torch.cat([left[:, 4:, :, 0:3], right[:, 4:, :, 1:4]], dim=-1)
    received = comm_net(sent)
    left = torch.cat([left[:, :4], received[..., 0:4]], dim=1)
    right = torch.cat([right[:, :4], received[..., 2:6]], dim=1)
    left = decoder(left_skips, left)[..., 0:12]
    right = decoder(right_skips, right)[..., 4:16]
    torch.testing.assert_close(logits, torch.cat([left, right], dim=-1))


# What is refused

@pytest.mark.parametrize("comm_net, channels", [(None, 4), (CommNet(4), 0)])
def test_a_communication_network_and_its_channels_come_together(comm_net, channels):
    with pytest.raises(ValueError, match=f"{channels} communicated channels, but the communication network is"):
        decomposed(UNet(1, 2, 2, 1), comm_net, channels)


def test_a_coarse_map_with_too_few_channels_is_refused():
    model = decomposed(UNet(1, 2, 2, 1), CommNet(5), 5)
    with pytest.raises(ValueError, match="5 communicated channels, but the coarse map has only 4"):
        run(model, torch.zeros(1, 1, 8, 8), Tiling((8, 8), (2, 2), 2))


def test_tiles_that_are_not_those_of_the_tiling_are_refused():
    model = decomposed(UNet(1, 2, 2, 1))
    tiling = Tiling((8, 12), (2, 2), 2)
    tiles = tiling.split(torch.zeros(1, 1, 8, 12))
    with pytest.raises(ValueError, match="3 tiles, but the tiling has 4"):
        model(tiles[:3], tiling)
    larger = torch.zeros(1, 1, 6, 6)
    with pytest.raises(ValueError, match="tile 1 has the shape .* but the tiling makes it"):
        model([tiles[0], larger, *tiles[2:]], tiling)


def test_a_tiling_that_does_not_know_the_cell_is_refused():
    model = decomposed(UNet(1, 2, 2, 1), CommNet(4), 4)
    with pytest.raises(ValueError, match="if this is a coarse map, give Tiling as `cell` by how much the encoder shrinks"):
        run(model, torch.zeros(1, 1, 8, 8), Tiling((8, 8), (2, 2)))
