import copy
import itertools

import pytest
import torch
from conftest import assert_all_close, gradients_of
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from comm_net import CommNet
from decompose import DecomposedUNet, Tiling
from unet import Decoder, Encoder, UNet

try:
    from pretend_device import DEVICE, PretendDevice  # here, as autograd must know the device before its first pass
except pytest.skip.Exception:  # the tests that need no second device can do without
    DEVICE = None

CPU = torch.device("cpu")


def decomposed(unet: UNet, comm_net=None, comm_channels=0) -> DecomposedUNet:
    """The same weights, tile by tile."""
    encoder = copy.deepcopy(unet.encoder)
    decoder = copy.deepcopy(unet.decoder)
    return DecomposedUNet(encoder, decoder, comm_net, comm_channels)


def run_tiles(model, image, tiling):
    """The logits of each tile, on the CPU."""
    return model(tiling.split(image), tiling, [CPU] * len(tiling))


def run(model, image, tiling):
    """The logits of the image."""
    return tiling.stitch(run_tiles(model, image, tiling))


# Tiling

SOME_SIZES = [(64, 64), (40, 72), (41, 67)]  # even, uneven tiles, padded
SOME_GRIDS = [(1, 1), (1, 4), (2, 2), (3, 2), (5, 3)]
SOME_OVERLAPS = [0, 8, 24]
CUTS = list(itertools.product(SOME_SIZES, SOME_GRIDS, SOME_OVERLAPS))


@pytest.mark.parametrize("size, grid, overlap", CUTS)
def test_split_then_stitch_is_the_identity(size, grid, overlap):
    tiling = Tiling(size, grid, 8, overlap)
    image = torch.randn(2, 3, *size)
    cropped = []
    for i, tile in enumerate(tiling.split(image)):
        cropped.append(tiling.crop(i, tile))
    assert torch.equal(tiling.stitch(cropped), image)
    without_overlap = tiling.split(image, overlap=False)
    assert torch.equal(tiling.stitch(without_overlap), image)


@pytest.mark.parametrize("size, grid, overlap", CUTS)
def test_the_sides_of_tiles_are_whole_cells(size, grid, overlap):
    tiling = Tiling(size, grid, 8, overlap)
    for tile in tiling.split(torch.randn(2, 3, *size)):
        height, width = tile.shape[-2:]
        assert height % 8 == 0
        assert width % 8 == 0


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


def test_the_coarse_tiling_is_the_same_tiling_in_cells():
    tiling = Tiling((45, 60), (2, 3), 4, overlap=8)
    pixels = torch.tensor(tiling.boxes)
    cells = torch.tensor(tiling.coarse.boxes)
    assert torch.equal(pixels, 4 * cells)
    pixels_with_overlap = torch.tensor(tiling.halos)
    cells_with_overlap = torch.tensor(tiling.coarse.halos)
    assert torch.equal(pixels_with_overlap, 4 * cells_with_overlap)


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
        total = 0
        for tile in Tiling((32, 32), (8, 8)).split(image):
            total = total + tile.sum()
        total.backward()
    images = gradients.pixels / image.numel()
    assert 0 < images <= 16  # 64 tiles with a gradient of the image each would make 64


@pytest.mark.parametrize("grid, overlap, message", [
    ((5, 1), 0, "5 rows of tiles.*32x32.*8x8 can have 1 to 4"),
    ((0, 1), 0, "0 rows"),
    ((1, 9), 0, "9 columns"),
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

def assert_same_gradients(model, other, tolerance):
    """The weights of both have the same names."""
    expected = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=0, atol=tolerance)


def assert_same_buffers(model, other, tolerance):
    expected = dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=tolerance)


def test_one_tile_without_communication_is_the_unet():
    unet = UNet(2, 3, 4, 2, dropout=0).double()
    model = decomposed(unet)
    tiling = Tiling((24, 32), (1, 1), 4)
    image = torch.randn(3, 2, 24, 32, dtype=torch.double)
    expected = unet(image)
    logits = run(model, image, tiling)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    expected.square().sum().backward()
    logits.square().sum().backward()
    assert_same_gradients(model, unet, tolerance=1e-12)
    assert_same_buffers(model, unet, tolerance=1e-15)


@pytest.fixture
def used_unet():
    """A U-Net of depth 2, which sees 22 pixels far, in evaluation mode and with running statistics that matter."""
    unet = UNet(1, 3, 2, 2).double()
    unet(torch.randn(2, 1, 32, 32, dtype=torch.double))
    return unet.eval()


GRIDS = pytest.mark.parametrize("grid", [(2, 2), (1, 4), (5, 3)])
SIZES = pytest.mark.parametrize("size", [(80, 96), (76, 96)])


def largest_difference(unet, size, grid, overlap):
    """Between the U-Net on an image, and the same U-Net on its tiles."""
    image = torch.randn(2, 1, *size, dtype=torch.double)
    tiling = Tiling(size, grid, 4, overlap)
    model = decomposed(unet).eval()
    difference = run(model, image, tiling) - unet(image)
    return difference.abs().max().item()


@GRIDS
@SIZES
def test_with_an_overlap_as_wide_as_its_field_of_view_every_grid_is_the_unet(used_unet, grid, size):
    assert largest_difference(used_unet, size, grid, overlap=24) < 1e-10


@GRIDS
@SIZES
def test_with_an_overlap_narrower_than_its_field_of_view_no_grid_is_the_unet(used_unet, grid, size):
    assert largest_difference(used_unet, size, grid, overlap=4) > 1e-6


def test_running_statistics_are_the_mean_over_tiles():
    unet = UNet(1, 2, 2, 1, dropout=0).double()
    image = torch.randn(2, 1, 12, 16, dtype=torch.double)
    tiling = Tiling((12, 16), (2, 3), 2)
    buffers_of_tiles = []
    for tile in tiling.split(image):
        alone = copy.deepcopy(unet)
        alone(tile)
        buffers_of_tiles.append(dict(alone.named_buffers()))
    model = decomposed(unet)
    run(model, image, tiling)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            new = [buffers[name] for buffers in buffers_of_tiles]
            expected = torch.stack(new).mean(dim=0)
        else:
            expected = torch.tensor(1)  # the number of steps
        torch.testing.assert_close(buffer, expected, rtol=0, atol=1e-15)


def test_evaluation_leaves_the_buffers_alone():
    model = decomposed(UNet(1, 2, 2, 1), CommNet(4), 4).eval()
    tiling = Tiling((8, 8), (2, 2), 2)
    before = copy.deepcopy(model.state_dict())
    run(model, torch.randn(1, 1, 8, 8), tiling)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# Communication

def influence_on_first_tile(comm_net, comm_channels):
    """The largest gradient of the first tile's logits with respect to a pixel of each tile.

    The tiles are 1x4 of 16 pixels. At depth 1 a cell is 2 pixels wide, so a tile is 8 cells wide.
    """
    encoder = Encoder(1, 8, 1)
    decoder = Decoder(2, 8, 1)
    model = DecomposedUNet(encoder, decoder, comm_net, comm_channels).double().eval()
    tiling = Tiling((16, 64), (1, 4), 2)
    image = torch.randn(1, 1, 16, 64, dtype=torch.double, requires_grad=True)
    logits = run_tiles(model, image, tiling)[0]
    logits.square().sum().backward()
    return [tile.abs().max().item() for tile in tiling.split(image.grad)]


def test_without_a_communication_network_tiles_hear_nothing_of_each_other():
    influence = influence_on_first_tile(None, 0)
    assert influence[0] > 0
    assert influence[1:] == [0, 0, 0]


def test_with_a_communication_network_tiles_hear_of_each_other_within_its_reach():
    influence = influence_on_first_tile(CommNet(4), 4)  # reach: 6 cells, 12 pixels
    assert influence[0] > 0
    assert influence[1] > 0
    assert influence[2:] == [0, 0]


class RememberingDecoder(nn.Module):
    """Keeps the coarse maps that it is given, and returns them."""

    def __init__(self):
        super().__init__()
        self.coarse_maps = []

    def forward(self, skips, coarse):
        self.coarse_maps.append(coarse)
        return coarse


class AlwaysMinusSeven(nn.Module):
    def forward(self, coarse_map):
        return torch.full_like(coarse_map, -7)


def coarse_maps_before_and_after(comm_net):
    """For each tile the coarse map of four channels, and the same after communication of the last three."""
    encoder = Encoder(1, 2, 1).eval()
    decoder = RememberingDecoder()
    tiling = Tiling((8, 8), (2, 2), 2)
    image = torch.randn(1, 1, 8, 8)
    run_tiles(DecomposedUNet(encoder, decoder, comm_net, 3), image, tiling)
    pairs = []
    for tile, after in zip(tiling.split(image), decoder.coarse_maps, strict=True):
        _, before = encoder(tile)
        pairs.append((before, after))
    return pairs


def test_a_communication_network_that_changes_nothing_leaves_the_coarse_maps_as_they_are():
    for before, after in coarse_maps_before_and_after(nn.Identity()):
        torch.testing.assert_close(after, before)


def test_communication_replaces_the_last_k_channels_and_only_those():
    for before, after in coarse_maps_before_and_after(AlwaysMinusSeven()):
        torch.testing.assert_close(after[:, :1], before[:, :1])
        assert after.shape == (1, 4, 2, 2)
        assert (after[:, 1:] == -7).all()


class EverySecondPixel(nn.Module):
    """An encoder whose coarse map says where the tile is: it holds the values of the tile's own pixels."""

    def forward(self, tile):
        return [], tile[..., ::2, ::2]


class EachPixelTwice(nn.Module):
    """A decoder that makes a coarse map as large as the tile."""

    def forward(self, skips, coarse):
        return coarse.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_with_overlap_the_communicated_map_is_that_of_the_tiles_without_it():
    """Every cell of the global coarse map comes from the tile that owns it, and halo cells come back from there."""
    encoder = EverySecondPixel()
    decoder = EachPixelTwice()
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    tiling = Tiling((8, 8), (2, 2), 2, overlap=2)
    out = run(DecomposedUNet(encoder, decoder, nn.Identity(), 1), image, tiling)
    skips, coarse = encoder(image)
    torch.testing.assert_close(out, decoder(skips, coarse))


class Halves(nn.Module):
    def forward(self, coarse_map):
        return coarse_map / 2


def test_with_overlap_every_cell_of_a_tile_comes_back_through_the_communication_network():
    """Also the cells of its neighbours that it sees: the decoder is given none that were not communicated."""
    decoder = RememberingDecoder()
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    tiling = Tiling((8, 8), (2, 2), 2, overlap=2)
    run_tiles(DecomposedUNet(EverySecondPixel(), decoder, Halves(), 1), image, tiling)
    expected = tiling.coarse.split(image[..., ::2, ::2] / 2)
    for seen, tile in zip(decoder.coarse_maps, expected, strict=True):
        torch.testing.assert_close(seen, tile)


class ToyEncoder(nn.Module):
    """One strided convolution. Its "skips" are a dictionary."""

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


def test_any_encoder_and_decoder_that_agree_on_their_skips_can_be_plugged_in():
    encoder = ToyEncoder()
    decoder = ToyDecoder()
    comm_net = nn.Conv2d(2, 2, 3, padding=1)
    image = torch.randn(2, 3, 16, 24)
    tiling = Tiling((16, 24), (2, 3), 4)
    out = run(DecomposedUNet(encoder, decoder, comm_net, 2), image, tiling)

    skips, coarse = encoder(image)  # without padding inside, tiles make the same map as the whole image
    communicated = comm_net(coarse[:, -2:])
    expected = decoder(skips, torch.cat([coarse[:, :-2], communicated], dim=1))
    torch.testing.assert_close(out, expected)


def number_and_sum(i, logits):
    return i, logits.sum()


def test_finish_decides_what_is_kept_of_a_tile():
    model = decomposed(UNet(1, 2, 2, 1)).eval()
    tiling = Tiling((8, 8), (2, 2), 2)
    tiles = tiling.split(torch.randn(1, 1, 8, 8))
    logits = model(tiles, tiling, [CPU] * 4)
    outputs = model(tiles, tiling, [CPU] * 4, finish=number_and_sum)
    assert len(outputs) == 4
    for expected_i, (i, total) in enumerate(outputs):
        assert i == expected_i
        assert torch.equal(total, logits[i].sum())


@pytest.mark.parametrize("comm_net, channels", [(None, 4), (CommNet(4), 0)])
def test_a_communication_network_and_its_channels_come_together(comm_net, channels):
    with pytest.raises(ValueError, match=f"{channels} communicated channels, but the communication network is"):
        decomposed(UNet(1, 2, 2, 1), comm_net, channels)


@pytest.mark.parametrize("devices", [1, 12])
def test_tiles_and_devices_must_fit_the_tiling(devices):
    tiling = Tiling((8, 12), (2, 3), 4)
    tiles = tiling.split(torch.zeros(1, 1, 8, 12))
    model = DecomposedUNet(nn.Identity(), nn.Identity())
    with pytest.raises(ValueError, match=f"6 tiles and {devices} devices"):
        model(tiles, tiling, [CPU] * devices)


# Encoders of other kinds

class Flat(nn.Sequential):
    """An encoder of some layers, without skips."""

    def forward(self, tile):
        return [], super().forward(tile)


class CoarseMap(nn.Module):
    """A decoder that gives back what it gets."""

    def forward(self, skips, coarse):
        return coarse


def norms_under_two_names(second_name: bool):
    encoder = Flat(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
    if second_name:
        encoder[0].norm = encoder[1]
    return encoder


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_that_is_found_under_two_names_is_a_layer(recompute):
    tiling = Tiling((8, 12), (2, 3), 1)
    image = torch.randn(2, 1, 8, 12)
    models = []
    for second_name in (False, True):
        torch.manual_seed(0)
        model = DecomposedUNet(norms_under_two_names(second_name), CoarseMap())
        weights = list(model.parameters())
        for _ in range(2):
            tiling.stitch(model(tiling.split(image), tiling, [CPU] * 6, recompute=recompute)).sum().backward()
        assert list(map(id, model.parameters())) == list(map(id, weights))
        models.append(model)
    once, twice = models
    assert twice.encoder[1].num_batches_tracked == 2
    assert_all_close(gradients_of(twice), gradients_of(once), tolerance=0)
    assert_all_close(twice.buffers(), once.buffers(), tolerance=0)


class Table(nn.Module):
    """Has buffers that no pass changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("left_out", torch.tensor([False, True]))
        self.register_buffer("bytes", torch.tensor([100, 255], dtype=torch.uint8))
        self.register_buffer("numbers", torch.tensor([2**52 + 1, -3]))
        self.register_buffer("fractions", torch.tensor([0.1, 1e30]))
        self.register_buffer("rotations", torch.tensor([1 + 2j, 3 - 1j]))

    def forward(self, x):
        x = x.clone()
        x[:, self.left_out] = 0
        return x


def test_buffers_that_no_pass_changes_are_what_they_were():
    model = DecomposedUNet(Flat(Table()), CoarseMap())
    before = copy.deepcopy(model.state_dict())
    tiling = Tiling((30, 30), (30, 30), 1)
    out = run(model, torch.ones(1, 2, 30, 30), tiling)
    assert torch.equal(out[0, :, 0, 0], torch.tensor([1.0, 0.0]))
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


class ScaleOfFirstBatch(nn.Module):
    """Divides by the largest value that it saw when it was used first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, x):
        if not self.ready:
            self.largest.copy_(x.detach().max())
            self.ready.fill_(True)
        return x / self.largest


@pytest.mark.parametrize("recompute", [False, True])
def test_what_one_tile_does_to_a_buffer_no_other_tile_sees(recompute):
    model = DecomposedUNet(Flat(ScaleOfFirstBatch()), CoarseMap())
    tiling = Tiling((1, 4), (1, 4), 1)
    image = torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(1, 1, 1, 4).requires_grad_()
    logits = model(tiling.split(image), tiling, [CPU] * 4, recompute=recompute)
    tiling.stitch(logits).sum().backward()
    assert torch.equal(torch.cat(logits).flatten(), torch.ones(4))  # each by its own
    torch.testing.assert_close(image.grad.flatten(), 1 / image.detach().flatten())
    assert model.encoder[0].ready
    assert model.encoder[0].largest == 3  # the mean


def test_statistics_in_bfloat16_are_the_mean_of_many_tiles_too():
    model = DecomposedUNet(Flat(nn.BatchNorm2d(1)), CoarseMap()).bfloat16()
    tiling = Tiling((64, 64), (32, 32), 1)
    run(model, torch.full((1, 1, 64, 64), 300.0, dtype=torch.bfloat16), tiling)
    assert model.encoder[0].running_mean == 30  # a tenth of the way there


class Scale(nn.Module):
    """A weight of three dimensions that is no matrix."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("layer", [
    lambda: nn.Conv2d(1, 4, 3, padding=1),
    lambda: orthogonal(nn.Conv2d(1, 4, 3, padding=1)),
    lambda: nn.LayerNorm((1, 8, 8)),
    lambda: nn.Conv2d(1, 4, 3, padding=1).double(),
    Scale,
])
def test_under_autocast_an_encoder_computes_what_it_does_alone(layer):
    encoder = Flat(layer())
    model = DecomposedUNet(encoder, CoarseMap()).eval()
    tiling = Tiling((8, 8), (1, 1), 1)
    first_weight = next(encoder.parameters())
    image = torch.randn(1, 1, 8, 8, dtype=first_weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        _, expected = encoder(image)
        assert torch.equal(run(model, image, tiling), expected)


def test_with_recompute_a_tile_is_computed_again_with_the_buffers_of_before():
    """The output of spectral norm depends on buffers that every pass changes."""
    tiling = Tiling((8, 8), (2, 2), 1)
    image = torch.randn(2, 1, 8, 8)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder = Flat(spectral_norm(nn.Conv2d(1, 4, 3, padding=1)))
        model = DecomposedUNet(encoder, CoarseMap())
        tiling.stitch(model(tiling.split(image), tiling, [CPU] * 4, recompute=recompute)).square().sum().backward()
        gradients.append(gradients_of(model))
    assert_all_close(gradients[1], gradients[0], tolerance=0)


# A second device

@pytest.fixture
def second_device():
    """A pretend one, see pretend_device.py."""
    if DEVICE is None:
        pytest.skip("this PyTorch cannot host a device in Python")
    with PretendDevice():
        yield DEVICE


def test_stitch_moves_the_tiles_to_the_device_of_the_first(second_device):
    tiling = Tiling((8, 12), (2, 3), 4)
    image = torch.randn(2, 3, 8, 12)
    for first, others in ((second_device, CPU), (CPU, second_device)):
        tiles = []
        for i, tile in enumerate(tiling.split(image)):
            tiles.append(tile.to(first if i == 0 else others))
        stitched = tiling.stitch(tiles)
        assert stitched.device == first
        assert torch.equal(stitched.to(CPU), image)


def test_stitch_moves_the_tiles_to_a_device_that_is_asked_for(second_device):
    tiling = Tiling((8, 12), (2, 3), 4)
    image = torch.randn(2, 3, 8, 12)
    stitched = tiling.stitch(tiling.split(image), device=second_device)
    assert stitched.device == second_device
    assert torch.equal(stitched.to(CPU), image)


class NotingCommNet(CommNet):
    """Notes on which devices it is computed."""

    def __init__(self, channels):
        super().__init__(channels, dropout=0)
        self.devices = []

    def forward(self, coarse_map):
        self.devices.append(coarse_map.device)
        return super().forward(coarse_map)


def step(comm_device, placement, recompute=False):
    """A model and the logits of its tiles after one forward and backward pass, from the same numbers each time."""
    torch.manual_seed(0)
    tiling = Tiling((16, 24), (2, 2), 4)
    tiles = tiling.split(torch.randn(2, 1, 16, 24))
    model = decomposed(UNet(1, 3, 4, 2, dropout=0), NotingCommNet(8), 8)
    logits = model(tiles, tiling, placement, recompute=recompute, comm_device=comm_device)
    tiling.stitch(logits, device=CPU).square().sum().backward()
    return model, logits


@pytest.mark.parametrize("recompute", [False, True])
def test_the_communication_network_gives_the_same_bits_on_another_device(second_device, recompute):
    model, logits = step(None, [CPU] * 4, recompute)
    there, logits_there = step(second_device, [CPU] * 4, recompute)
    assert set(model.comm_net.devices) == {CPU}
    assert set(there.comm_net.devices) == {second_device}
    for tile, tile_there in zip(logits, logits_there, strict=True):
        assert torch.equal(tile, tile_there)
    assert_same_gradients(there, model, tolerance=0)
    assert_same_buffers(there, model, tolerance=0)


def test_the_communication_network_runs_on_the_device_of_the_first_tile_if_none_is_named(second_device):
    model, _ = step(None, [second_device, CPU, CPU, CPU])
    assert set(model.comm_net.devices) == {second_device}


def test_the_communication_network_can_run_where_no_tile_is(second_device):
    model, logits = step(second_device, [CPU] * 4)
    for tile in logits:
        assert tile.device == CPU
    for buffer in model.comm_net.buffers():
        assert buffer.device == CPU  # the weights and statistics stay where they are
    statistics = model.comm_net[1].running_mean
    assert (statistics != 0).all()
