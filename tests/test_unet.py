import pytest
import torch
from conftest import number_of_parameters
from torch import nn
from torch.nn import functional as F

from unet import Decoder, DoubleConv, Encoder, UNet


@pytest.mark.parametrize("channels, classes, width, depth, expected", [
    (1, 3, 4, 3, 30_479),
    (3, 7, 32, 4, 7_763_239),
    (3, 7, 64, 4, 31_038_023),
])
def test_parameter_counts_of_the_paper(channels, classes, width, depth, expected):
    unet = UNet(channels, classes, width, depth)
    assert number_of_parameters(unet) == expected


@pytest.mark.parametrize("depth, width, channels, classes", [
    (1, 3, 1, 2),
    (2, 5, 4, 3),
    (5, 2, 2, 9),
])
def test_any_depth_width_channels_and_classes(depth, width, channels, classes):
    image = torch.randn(2, channels, 64, 96)
    skips, coarse = Encoder(channels, width, depth)(image)
    assert len(skips) == depth
    for level, feature_map in enumerate([*skips, coarse]):
        cell = 2**level
        assert feature_map.shape == (2, width * cell, 64 // cell, 96 // cell)
    logits = UNet(channels, classes, width, depth)(image)
    assert logits.shape == (2, classes, 64, 96)


def test_decoder_leaves_its_skips_as_they_are():
    image = torch.randn(1, 1, 8, 8)
    skips, coarse = Encoder(1, 2, 2)(image)
    before = list(skips)
    Decoder(2, 2, 2)(skips, coarse)
    assert skips == before


def test_double_conv_is_conv_norm_relu_dropout_twice():
    block = DoubleConv(3, 4, dropout=0.5).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = x
    for number in (0, 4):
        conv = block[number]
        norm = block[number + 1]
        norm.running_mean.uniform_()
        norm.running_var.uniform_(0.5, 2)
        expected = F.conv2d(expected, conv.weight, padding=1)
        expected = F.batch_norm(expected, norm.running_mean, norm.running_var).relu()
    torch.testing.assert_close(block(x), expected)


def test_double_conv_drops_whole_channels_in_training():
    block = DoubleConv(3, 4, dropout=0.5).train()
    out = block(torch.randn(2, 3, 6, 6))
    largest = out.amax(dim=(2, 3))
    assert (largest == 0).any()


def test_every_weight_gets_a_gradient():
    net = UNet(1, 3, 2, 2)
    image = torch.randn(2, 1, 16, 16)
    net(image).square().sum().backward()
    for name, weight in net.named_parameters():
        if name != "decoder.head.bias":
            assert weight.grad.abs().sum() > 0, name


def test_a_size_that_cannot_be_halved_is_named_with_its_fix():
    unet = UNet(1, 2, 2, 3)
    image = torch.zeros(1, 1, 20, 16)
    with pytest.raises(ValueError, match="20x16 at depth 3.*multiples of 8"):
        unet(image)


def group_norm(channels):
    return nn.GroupNorm(2, channels)


def test_another_normalisation_takes_the_place_of_batch_norm():
    block = DoubleConv(2, 4, dropout=0.0, norm=group_norm)
    x = torch.randn(3, 2, 8, 8)
    expected = x
    for conv in (block[0], block[4]):
        expected = F.group_norm(conv(expected), 2).relu()
    torch.testing.assert_close(block(x), expected)


def test_another_normalisation_of_the_unet_is_that_of_all_its_blocks():
    unet = UNet(1, 2, 4, depth=3, norm=group_norm)
    kinds = [type(layer) for layer in unet.modules()]
    assert kinds.count(nn.GroupNorm) == 2 * (4 + 3)  # in the blocks of the encoder and of the decoder
    assert kinds.count(nn.BatchNorm2d) == 0


@pytest.mark.parametrize("depth, pixels", [
    (1, 8),
    (2, 22),
    (3, 46),
    (4, 94),
])
def test_how_far_the_unet_sees_beyond_a_tile_is_at_most_six_cells(depth, pixels):
    """The gradient of a pixel at the border of a tile differs from zero for the pixels that it depends on."""
    cell = 2**depth
    unet = UNet(1, 1, 1, depth, dropout=0)
    unet.double().eval()
    for weight in unet.parameters():
        weight.data.abs_().add_(0.1)  # so that nothing cancels
    size = (1, 1, 16 * cell, 16 * cell)
    image = torch.ones(size, dtype=torch.double, requires_grad=True)
    border = 8 * cell  # where a tile begins
    unet(image)[0, 0, border, border].backward()
    first_seen = image.grad[0, 0, border].nonzero().min().item()
    assert border - first_seen == pixels
    assert pixels <= 6 * cell
