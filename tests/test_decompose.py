"""The method: images are cut and stitched, and tiles compute what the plain U-Net computes on the whole image."""

import copy

import pytest
import torch
from conftest import assert_all_close, gradients_of
from torch.nn.utils import parameters_to_vector

from comm_net import CommNet
from decompose import DecomposedUNet, Tiling
from unet import UNet

pytestmark = pytest.mark.usefixtures("in_float64")


def decomposed(unet: UNet, comm_net=None, comm_channels=0) -> DecomposedUNet:
    """The same weights, tile by tile."""
    encoder = copy.deepcopy(unet.encoder)
    decoder = copy.deepcopy(unet.decoder)
    return DecomposedUNet(encoder, decoder, comm_net, comm_channels)


def run(model, image, tiling):
    """The logits of the image."""
    tiles = tiling.split(image)
    logits = model(tiles, tiling)
    return tiling.stitch(logits)


# Tiling

@pytest.mark.parametrize("overlap", [0, 8, 24])
@pytest.mark.parametrize("grid", [
    (1, 1),
    (1, 4),
    (5, 3),
])
@pytest.mark.parametrize("size", [
    (64, 64),  # even
    (40, 72),  # uneven tiles
    (41, 67),  # padded
])
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


@pytest.mark.parametrize("size, grid, cell, overlap, expected", [
    ((2448, 2448), (2, 2), 16, 0, [
        (0, 1232, 0, 1232),
        (0, 1232, 1232, 2448),
        (1232, 2448, 0, 1232),
        (1232, 2448, 1232, 2448),
    ]),
    ((8, 56), (1, 3), 8, 0, [
        (0, 8, 0, 24),
        (0, 8, 24, 40),
        (0, 8, 40, 56),
    ]),
    ((32, 32), (2, 2), 8, 8, [
        (0, 24, 0, 24),
        (0, 24, 8, 32),
        (8, 32, 0, 24),
        (8, 32, 8, 32),
    ]),
])
def test_tiles_are_row_major_as_equal_as_whole_cells_allow_and_overlap_up_to_the_border(
        size, grid, cell, overlap, expected):
    assert Tiling(size, grid, cell, overlap).halos == expected


def test_split_copies_nothing_but_padded_tiles_and_fills_those():
    tiling = Tiling((8, 10), (1, 2), 8)
    image = torch.ones(8, 10)
    left, right = tiling.split(image, fill=255)
    assert left.data_ptr() == image.data_ptr()
    assert right.shape == (8, 8)
    assert (right[:, :2] == 1).all()
    assert (right[:, 2:] == 255).all()


def test_the_tiles_of_a_row_are_cut_from_one_strip():
    """Or in the backward pass each tile would make a gradient as large as the image."""
    tiling = Tiling((8, 8), (2, 4))
    image = torch.zeros(8, 8, requires_grad=True)
    strips = set()
    for tile in tiling.split(image):
        strip, _ = tile.grad_fn.next_functions[0]
        strips.add(strip)
    assert len(strips) == 2


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


def test_an_image_must_fit_the_tiling():
    tiling = Tiling((8, 12), (2, 3), 4)
    with pytest.raises(ValueError, match="made for 8 rows and 12 columns"):
        tiling.split(torch.zeros(16, 24))


# DecomposedUNet against the plain U-Net

def test_one_tile_without_communication_is_the_unet():
    unet = UNet(2, 3, 4, 2)
    model = decomposed(unet)
    image = torch.randn(3, 2, 24, 32)
    tiling = Tiling((24, 32), (1, 1), 4)
    expected = unet(image)
    logits = run(model, image, tiling)
    assert torch.equal(logits, expected)
    expected.square().sum().backward()
    logits.square().sum().backward()
    assert_all_close(gradients_of(model), gradients_of(unet), tolerance=1e-12)
    assert_all_close(model.buffers(), unet.buffers(), tolerance=1e-15)


@pytest.mark.parametrize("size, grid", [
    ((80, 96), (2, 2)),
    ((80, 96), (1, 4)),
    ((76, 96), (5, 3)),  # uneven tiles
])
def test_every_grid_is_the_unet_if_and_only_if_its_overlap_is_as_wide_as_the_unet_sees(size, grid):
    """This one sees 22 pixels far. It is in evaluation mode, with running statistics that matter."""
    unet = UNet(1, 3, 2, 2)
    unet(torch.randn(2, 1, 32, 32))
    model = decomposed(unet.eval())
    model.eval()
    image = torch.randn(2, 1, *size)
    expected = unet(image)
    wide = Tiling(size, grid, 4, overlap=24)
    difference = run(model, image, wide) - expected
    assert difference.abs().max() < 1e-10
    narrow = Tiling(size, grid, 4, overlap=4)
    difference = run(model, image, narrow) - expected
    assert difference.abs().max() > 1e-6


def test_running_statistics_are_the_mean_over_tiles():
    unet = UNet(1, 2, 2, 1)
    model = decomposed(unet)
    image = torch.randn(2, 1, 12, 16)
    tiling = Tiling((12, 16), (2, 3), 2)
    run(model, image, tiling)
    means = 0
    for tile in tiling.split(image):
        alone = copy.deepcopy(unet)
        alone(tile)
        means = means + parameters_to_vector(alone.buffers()) / len(tiling)
    found = parameters_to_vector(model.buffers())
    torch.testing.assert_close(found, means, rtol=0, atol=1e-14)


# Communication

@pytest.mark.parametrize("comm_channels, influential", [
    (0, [0]),
    (4, [0, 1]),  # it reaches 6 cells, which are 12 pixels
])
def test_tiles_hear_of_each_other_only_through_the_communication_network_and_within_its_reach(
        comm_channels, influential):
    """Of tiles 16 pixels wide, which have pixels with an influence on the logits of the first?"""
    unet = UNet(1, 2, 8, 1)
    comm_net = CommNet(comm_channels) if comm_channels > 0 else None
    model = decomposed(unet, comm_net, comm_channels)
    model.eval()
    tiling = Tiling((16, 64), (1, 4), 2)
    image = torch.randn(1, 1, 16, 64, requires_grad=True)
    tiles = tiling.split(image)
    logits = model(tiles, tiling)
    logits[0].square().sum().backward()
    found = []
    for i, gradient in enumerate(tiling.split(image.grad)):
        if gradient.any():
            found.append(i)
    assert found == influential


def test_communication_replaces_the_last_channels_of_a_coarse_map_and_only_those():
    """By hand, for two tiles. That it is right with an overlap, too, is in test_freeze.py and test_recompute.py."""
    unet = UNet(1, 3, 2, 2)
    comm_net = CommNet(2)
    model = decomposed(unet, comm_net, comm_channels=2)
    image = torch.randn(2, 1, 8, 24)
    logits = run(model, image, Tiling((8, 24), (1, 2), 4))

    left, right = image.split(12, dim=-1)
    left_skips, left = unet.encoder(left)
    right_skips, right = unet.encoder(right)
    left, left_sent = left.split([6, 2], dim=1)
    right, right_sent = right.split([6, 2], dim=1)
    received = comm_net(torch.cat([left_sent, right_sent], dim=-1))
    left_received, right_received = received.split(3, dim=-1)
    left = unet.decoder(left_skips, torch.cat([left, left_received], dim=1))
    right = unet.decoder(right_skips, torch.cat([right, right_received], dim=1))
    torch.testing.assert_close(logits, torch.cat([left, right], dim=-1))


# What is refused

@pytest.mark.parametrize("comm_net, channels", [
    (None, 4),
    (CommNet(4), 0),
])
def test_a_communication_network_and_its_channels_come_together(comm_net, channels):
    with pytest.raises(ValueError, match=f"{channels} communicated channels, but the communication network is"):
        DecomposedUNet(None, None, comm_net, channels)


@pytest.mark.parametrize("comm_channels, cell, sides, message", [
    (5, 2, [4, 4, 4, 4], "5 communicated channels, but the coarse map has only 4"),
    (4, 2, [4, 4, 4], "3 tiles, but the tiling has 4"),
    (4, 2, [4, 6, 4, 4], "tile 1 has the shape .* but the tiling makes it 2 rows and 2 columns"),
    (4, 1, [4, 4, 4, 4], "if this is a coarse map, give Tiling as `cell` by how much the encoder shrinks"),
])
def test_tiles_and_coarse_maps_that_do_not_fit_the_tiling_are_refused(comm_channels, cell, sides, message):
    comm_net = CommNet(comm_channels)
    model = decomposed(UNet(1, 2, 2, 1), comm_net, comm_channels)
    tiling = Tiling((8, 8), (2, 2), cell)
    tiles = []
    for side in sides:
        tiles.append(torch.zeros(1, 1, side, side))
    with pytest.raises(ValueError, match=message):
        model(tiles, tiling)
