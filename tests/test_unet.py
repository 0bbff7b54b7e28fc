import pytest
import torch

from unet import Decoder, DoubleConv, Encoder, UNet


def parameters(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("channels, classes, width, depth, expected", [
    (1, 3, 4, 3, 30_479), (3, 7, 32, 4, 7_763_239), (3, 7, 64, 4, 31_038_023)])
def test_parameter_counts_of_the_paper(channels, classes, width, depth, expected):
    assert parameters(UNet(channels, classes, width, depth)) == expected


@pytest.mark.parametrize("depth, width, channels, classes", [(1, 3, 1, 2), (2, 5, 4, 3), (5, 2, 2, 9)])
def test_any_depth_width_channels_and_classes(depth, width, channels, classes):
    image = torch.randn(2, channels, 64, 96)
    skips, coarse = Encoder(channels, width, depth)(image)
    assert [tuple(skip.shape) for skip in skips] == [(2, width * 2**l, 64 // 2**l, 96 // 2**l) for l in range(depth)]
    assert coarse.shape == (2, width * 2**depth, 64 // 2**depth, 96 // 2**depth)
    assert UNet(channels, classes, width, depth)(image).shape == (2, classes, 64, 96)


def test_decoder_leaves_its_skips_as_they_are():
    skips, coarse = Encoder(1, 2, 2)(torch.randn(1, 1, 8, 8))
    before = list(skips)
    Decoder(2, 2, 2)(skips, coarse)
    assert all(a is b for a, b in zip(before, skips)) and len(before) == len(skips)


def test_double_conv_is_conv_norm_relu_dropout_twice():
    block = DoubleConv(3, 4, dropout=0.5).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = x
    for conv, norm in ((block[0], block[1]), (block[4], block[5])):
        norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2)
        expected = torch.nn.functional.conv2d(expected, conv.weight, padding=1)
        mean, var = (buffer[:, None, None] for buffer in (norm.running_mean, norm.running_var))
        expected = ((expected - mean) / (var + norm.eps).sqrt()).relu()
    torch.testing.assert_close(block(x), expected)
    block.train()
    assert (block(x).amax(dim=(2, 3)) == 0).any()  # whole channels are dropped


def test_every_weight_gets_a_gradient():
    net = UNet(1, 3, 2, 2)
    net(torch.randn(2, 1, 16, 16)).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in net.named_parameters() if "head.bias" not in name)


def test_a_size_that_cannot_be_halved_is_named_with_its_fix():
    with pytest.raises(ValueError, match="20x16 at depth 3.*multiples of 8"):
        UNet(1, 2, 2, 3)(torch.zeros(1, 1, 20, 16))


def test_another_normalisation_takes_the_place_of_batch_norm():
    block = DoubleConv(2, 4, dropout=0.0, norm=lambda channels: torch.nn.GroupNorm(2, channels))
    x = torch.randn(3, 2, 8, 8)
    expected = x
    for conv, _ in ((block[0], block[1]), (block[4], block[5])):
        expected = torch.nn.functional.group_norm(conv(expected), 2).relu()
    torch.testing.assert_close(block(x), expected)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in block)


@pytest.mark.parametrize("depth, pixels", [(1, 8), (2, 22), (3, 46), (4, 94)])
def test_how_far_the_unet_sees_beyond_a_tile_is_at_most_six_cells(depth, pixels):
    """By the gradient of a pixel at the border of a tile, of which the input pixels differ from zero that it depends on."""
    cell, side = 2**depth, 16 * 2**depth
    unet = UNet(1, 1, 1, depth, dropout=0).double().eval()
    for weight in unet.parameters():
        weight.data.abs_().add_(0.1)  # so that nothing cancels
    image = torch.ones(1, 1, side, side, dtype=torch.double, requires_grad=True)
    border = 8 * cell  # where a tile begins
    unet(image)[0, 0, border, border].backward()
    seen = image.grad[0, 0, border].nonzero().min().item()
    assert border - seen == pixels and pixels <= 6 * cell
