"""One training step on two devices against the same step on one, with a pretend second device or two real GPUs."""

import math
import time
from collections import Counter
from multiprocessing.pool import ThreadPool

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of
from pretend_device import DEVICE, GENERATOR, PretendDevice
from torch import nn

import decompose
import train
from decompose import DecomposedUNet, SharedModule, Tiling
from support.model import build_from_config
from synthetic import LinesAndCircles

pytestmark = pytest.mark.usefixtures("in_float64")
BATCH, CLASSES = 3, 3
K = CONFIG["comm_channels"]
CELL = 2 ** CONFIG["depth"]
SUMS = (2 * CLASSES + 2,)  # the shape of what a tile tells of its loss


def batch_of_images():
    images, masks = [], []
    for image, mask in LinesAndCircles(BATCH):
        images.append(image)
        masks.append(mask)
    return torch.stack(images), torch.stack(masks)


def one_step(grid, devices, recompute=False, dropout=0.0):
    """Loss and model after the backward pass, from the same weights and images every time."""
    torch.manual_seed(0)
    config = {**CONFIG, "recompute": recompute, "dropout": dropout}
    model = build_from_config(config).to(devices[0])
    images, masks = batch_of_images()
    tiling = Tiling((64, 64), grid, CELL)
    loss = train.batch_loss(model, images, masks, tiling, devices, config)
    loss.backward()
    return loss.detach(), model


def on_cpu(tensors) -> list:
    return [tensor.cpu() for tensor in tensors]


def assert_same_step(one, other, tolerance):
    """Two results of `one_step` have the same loss, gradients and running statistics."""
    loss, model = one
    other_loss, other_model = other
    assert_all_close(on_cpu([loss]), on_cpu([other_loss]), tolerance)
    assert_all_close(on_cpu(gradients_of(model)), on_cpu(gradients_of(other_model)), tolerance)
    assert_all_close(on_cpu(model.buffers()), on_cpu(other_model.buffers()), tolerance)


# The numbers

def test_a_step_on_two_devices_is_the_step_on_one_to_the_last_bit():
    with PretendDevice():
        one = one_step((1, 2), [CPU])
        two = one_step((1, 2), [CPU, DEVICE])
        assert_same_step(one, two, tolerance=0)


@pytest.mark.parametrize("grid, devices", [
    ((2, 2), [CPU, DEVICE]),
    ((3, 1), [DEVICE, CPU]),
])
def test_with_more_tiles_than_devices_only_the_order_of_additions_differs(grid, devices):
    with PretendDevice():
        one = one_step(grid, [CPU])
        two = one_step(grid, devices)
        assert_same_step(one, two, tolerance=1e-14)


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="needs a GPU: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_devices.py")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_on_a_gpu_and_one_shared_by_gpu_and_cpu_are_the_step_on_the_cpu(recompute):
    gpu = torch.device("cuda", 0)
    on_the_cpu = one_step((2, 2), [CPU])
    assert_same_step(on_the_cpu, one_step((2, 2), [gpu], recompute), tolerance=1e-10)
    assert_same_step(on_the_cpu, one_step((2, 2), [gpu, CPU], recompute), tolerance=1e-10)


@pytest.mark.skipif(torch.cuda.device_count() < 2,
                    reason="needs two GPUs: CUDA_VISIBLE_DEVICES=0,1 python -m pytest tests/test_devices.py")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_on_two_gpus_is_the_step_on_one(recompute):
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    one = one_step((4, 4), [first])
    two = one_step((4, 4), [first, second], recompute)
    assert_same_step(one, two, tolerance=1e-12)


# Dropout

@pytest.fixture
def own_random_numbers(monkeypatch):
    """The pretend device draws from a generator of its own, which torch.manual_seed gives the seed of all others."""
    generators = {"cpu": torch.default_generator, "pretend": GENERATOR}

    def generator_of(device):
        return generators[device.type]

    monkeypatch.setattr(decompose, "generator_of", generator_of)


def test_a_step_on_two_devices_leaves_out_the_channels_of_the_step_on_one(own_random_numbers):
    with PretendDevice():
        one = one_step((1, 2), [CPU], dropout=0.3)
        two = one_step((1, 2), [CPU, DEVICE], dropout=0.3)
        without, _ = one_step((1, 2), [CPU])
        assert_same_step(one, two, tolerance=0)
        assert one[0] != without


class DroppingEncoder(nn.Module):
    """The coarse map is the tile, of which half of the channels are left out."""

    def forward(self, tile):
        return [], nn.functional.dropout2d(tile, 0.5)


class SendingEncoder(nn.Module):
    """The coarse map is the tile."""

    def forward(self, tile):
        return [], tile


class SendingDecoder(nn.Module):
    """The logits are the coarse map."""

    def forward(self, skips, coarse):
        return coarse


def ones_after_dropout(placement, comm_device, comm_net=None, comm_channels=0) -> list:
    """What is left of two tiles of 64 channels of ones, on the CPU."""
    torch.manual_seed(0)
    model = DecomposedUNet(DroppingEncoder(), SendingDecoder(), comm_net, comm_channels)
    tiling = Tiling((1, 2), (1, 2))
    tiles = tiling.split(torch.ones(1, 64, 1, 2))
    return on_cpu(model(tiles, tiling, placement, comm_device=comm_device))


def test_tiles_on_two_devices_leave_out_channels_of_their_own(own_random_numbers):
    with PretendDevice():
        first, second = ones_after_dropout([CPU, DEVICE], CPU)
        same_first, same_second = ones_after_dropout([DEVICE, CPU], CPU)
    assert not torch.equal(first, second)
    assert torch.equal(same_first, first)
    assert torch.equal(same_second, second)


def test_the_communication_network_leaves_out_the_same_channels_on_any_device(own_random_numbers):
    with PretendDevice():
        here = ones_after_dropout([CPU, CPU], CPU, nn.Dropout2d(0.5), 64)
        there = ones_after_dropout([CPU, CPU], DEVICE, nn.Dropout2d(0.5), 64)
    assert_all_close(there, here, tolerance=0)
    assert here[0].count_nonzero() < 32  # both dropouts leave out half of what comes


def test_the_communication_network_leaves_out_other_channels_in_each_forward_pass():
    torch.manual_seed(0)
    model = DecomposedUNet(SendingEncoder(), SendingDecoder(), nn.Dropout2d(0.5), comm_channels=64)
    tiling = Tiling((1, 1), (1, 1))
    ones = [torch.ones(1, 64, 1, 1)]
    (first,) = model(ones, tiling, [CPU])
    (second,) = model(ones, tiling, [CPU])
    assert not torch.equal(first, second)


# Weights and threads

class SlowLinear(nn.Linear):
    def forward(self, x):
        time.sleep(0.1)  # until the other thread is here too
        return super().forward(x)


@pytest.mark.parametrize("passes", [1, 2])
def test_each_thread_gets_the_weights_of_its_device(passes):
    """In the backward pass of --recompute, autograd runs tiles in a thread for each GPU. Here the
    threads are our own. passes: how many forward passes the tiles are of, before a common backward pass."""
    other_name = torch.device("cpu", 0)  # the same device by another name
    module = SlowLinear(1, 1)
    weights = dict(module.named_parameters())
    larger = {name: weight.detach() + 1 for name, weight in weights.items()}
    shared = SharedModule(module, [CPU, other_name], seeds=[0, 0])
    again = shared  # that of the other thread
    if passes == 2:
        again = SharedModule(module, [CPU, other_name], seeds=[0, 0])
    again.weights[other_name] = larger

    zero = torch.zeros(1)
    with ThreadPool(2) as pool:
        first = pool.apply_async(shared, (0, zero))
        second = pool.apply_async(again, (1, zero))
        assert first.get() == weights["bias"]
        assert second.get() == larger["bias"]
    for name, weight in module.named_parameters():
        assert weight is weights[name]


# What moves

def test_a_misplaced_tensor_fails():
    with PretendDevice(), pytest.raises(RuntimeError, match="mixes pretend:0 with cpu"):
        torch.ones(2).to(DEVICE) + torch.ones(2)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_image_and_a_mask_of_the_host_never_appear_whole_on_a_device(recompute):
    """Everything is computed on the pretend device. As it cannot do that under checkpoints, those have no gradients."""
    images, masks = batch_of_images()
    config = {**CONFIG, "recompute": recompute}
    tiling = Tiling((64, 64), (2, 2), CELL)
    with PretendDevice() as device:
        model = build_from_config(config).to(DEVICE)
        device.moved.clear()
        with torch.set_grad_enabled(not recompute):
            train.batch_loss(model, images, masks, tiling, [DEVICE], config)

    large = Counter()
    for move in device.moved:
        if math.prod(move.shape) > math.prod(SUMS):
            large[move.shape] += 1
    times = 2 if recompute else 1  # that a tile is encoded
    assert large == {(BATCH, 1, 32, 32): 4 * times, (BATCH, 32, 32): 4}


def shapes_from(source: str, moved: list) -> list:
    """The shapes of all tensors that left a device, in their order."""
    return [move.shape for move in moved if move.source == source]


def shapes_of(tensors) -> Counter:
    return Counter([tuple(tensor.shape) for tensor in tensors])


def test_nothing_of_image_size_crosses_between_devices():
    with PretendDevice() as device:
        _, model = one_step((1, 2), [CPU, DEVICE])
    there = Counter(shapes_from("cpu", device.moved))
    back = Counter(shapes_from("pretend:0", device.moved))

    weights, statistics, vectors = Counter(), Counter(), Counter()
    for half in (model.encoder, model.decoder):
        weights += shapes_of(half.parameters())
        statistics += shapes_of(half.buffers())
        vectors[sum(buffer.numel() for buffer in half.buffers()),] += 1  # all statistics one after the other
    coarse_map = (BATCH, K, 64 // CELL, 32 // CELL)
    exchanged = Counter({coarse_map: 2, SUMS: 1})  # each way the map, and the gradient of the map that came
    tile = Counter([(BATCH, 1, 64, 32), (BATCH, 64, 32)])  # image and mask
    assert there == weights + statistics + exchanged + tile
    assert back == weights + vectors + exchanged  # gradients of the weights, new statistics


def test_no_copy_between_devices_stands_between_their_tiles():
    """It would wait for what both still have to do, and they would take turns."""
    with PretendDevice() as device:
        _, model = one_step((1, 4), [CPU, DEVICE])
    image, mask = (BATCH, 1, 64, 16), (BATCH, 64, 16)
    coarse_map = (BATCH, K, 64 // CELL, 16 // CELL)
    order = []
    for move in device.moved:
        if move.shape in (image, mask, coarse_map):
            order.append((move.shape, move.source))
    there_and_back = [
        (coarse_map, "pretend:0"),
        (coarse_map, "pretend:0"),
        (coarse_map, "cpu"),
        (coarse_map, "cpu"),
    ]
    assert order[:2] == [(image, "cpu")] * 2
    assert order[2:6] == there_and_back
    assert order[6:8] == [(mask, "cpu")] * 2
    assert order[8:] == there_and_back  # gradients

    there = shapes_from("cpu", device.moved)
    between = there[there.index(image):there.index(mask)]
    weights = shapes_of(model.encoder.state_dict().values())
    assert set(weights).isdisjoint(between)
