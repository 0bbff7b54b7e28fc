"""One training step on two devices against the same step on one, with a pretend second device or two real GPUs."""

import time
from collections import Counter
from multiprocessing.pool import ThreadPool

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch, training_step
from pretend_device import DEVICE, PretendDevice
from torch import nn

import train
from decompose import DecomposedUNet, MultiDeviceModule, Tiling
from support import scale
from support.model import build_from_config

pytestmark = pytest.mark.usefixtures("in_float64")
BATCH, CLASSES = 2, 3
K = CONFIG["comm_channels"]
CELL = 2 ** CONFIG["depth"]
SUMS = (4, CLASSES)  # the shape of what a tile tells of its loss


def one_step(grid, devices, recompute=False):
    """Loss, gradients and running statistics, on the CPU."""
    loss, model = training_step(Tiling((64, 64), grid, CELL), devices, recompute=recompute)
    return on_cpu([loss, *gradients_of(model), *model.buffers()])


def on_cpu(tensors) -> list:
    return [tensor.cpu() for tensor in tensors]


# The numbers

@pytest.mark.parametrize("grid, devices, tolerance", [
    ((1, 2), [CPU, DEVICE], 0),
    ((2, 2), [CPU, DEVICE], 1e-14),  # with more tiles than devices the order of additions differs
    ((3, 1), [DEVICE, CPU], 1e-14),
])
def test_a_step_on_two_devices_is_the_step_on_one(grid, devices, tolerance):
    with PretendDevice():
        one = one_step(grid, [CPU])
        two = one_step(grid, devices)
    assert_all_close(two, one, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="needs a GPU: CUDA_VISIBLE_DEVICES=0,1 python -m pytest tests/test_devices.py")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_on_gpus_is_the_step_on_the_cpu(recompute):
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    expected = one_step((4, 4), [CPU])
    for devices in (gpus[:1], [gpus[0], CPU], gpus):
        assert_all_close(one_step((4, 4), devices, recompute), expected, tolerance=1e-10)


def step_with_communication(comm_device) -> list:
    """Logits, gradients and statistics of tiles on the CPU."""
    torch.manual_seed(0)
    model = build_from_config(CONFIG)
    model.comm_net.to(comm_device)
    tiling = Tiling((16, 24), (2, 2), CELL)
    logits = model(tiling.split(torch.randn(2, 1, 16, 24)), tiling)
    tiling.stitch(logits).square().sum().backward()
    assert {buffer.device for buffer in model.comm_net.buffers()} == {comm_device}
    return on_cpu([*logits, *gradients_of(model), *model.buffers()])


def test_the_communication_network_can_be_on_a_device_of_its_own():
    with PretendDevice():
        here = step_with_communication(CPU)
        there = step_with_communication(DEVICE)
    assert_all_close(there, here, tolerance=0)


def test_stitch_moves_the_tiles_to_the_device_that_is_asked_for_or_else_to_that_of_the_first():
    tiling = Tiling((8, 12), (1, 2), 4)
    image = torch.randn(2, 3, 8, 12)
    with PretendDevice():
        left, right = tiling.split(image)
        right = right.to(DEVICE)
        assert torch.equal(tiling.stitch([left, right]), image)
        stitched = tiling.stitch([left, right], DEVICE)
        assert stitched.device == DEVICE
        assert torch.equal(stitched.to(CPU), image)


class TwoNames(nn.Module):
    """An encoder with a layer that is found under two names."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.same_norm = self.norm

    def forward(self, tile):
        return None, self.same_norm(tile)


class CoarseMap(nn.Module):
    """A decoder that gives back what it gets."""

    def forward(self, skips, coarse_map):
        return coarse_map


def test_a_layer_under_two_names_learns_on_two_devices():
    model = DecomposedUNet(TwoNames(), CoarseMap())
    weight = model.encoder.norm.weight
    tiling = Tiling((4, 8), (1, 2))
    with PretendDevice():
        left, right = tiling.split(torch.randn(2, 1, 4, 8))
        for step in (1, 2):
            logits = model([left, right.to(DEVICE)], tiling)
            tiling.stitch(logits).sum().backward()
            assert model.encoder.same_norm.weight is weight
            assert model.encoder.norm.num_batches_tracked == step
    assert model.encoder.norm.bias.grad == 2 * 2 * 4 * 8


# Threads

class SlowLinear(nn.Linear):
    def forward(self, x):
        time.sleep(0.1)  # until the other thread is here too
        return super().forward(x)


def test_each_thread_gets_the_weights_of_its_device():
    """In the backward pass of --recompute, autograd runs tiles in a thread for each GPU. Here the threads are our own."""
    linear = SlowLinear(1, 1)
    weights = dict(linear.named_parameters())
    module, other = MultiDeviceModule(linear), MultiDeviceModule(linear)
    module.copy_to(CPU)
    other.copy_to(CPU)
    other.weights[CPU] = {name: weight.detach() + 1 for name, weight in weights.items()}  # as if on another device

    def compute(module):
        with scale.fixed_dropout(0, [CPU]):
            return module(torch.zeros(1))

    with ThreadPool(2) as pool:
        first, second = pool.map(compute, [module, other])
    assert first == weights["bias"]
    assert second == weights["bias"] + 1
    for name, weight in linear.named_parameters():
        assert weight is weights[name]


# What moves

def test_a_misplaced_tensor_fails():
    with PretendDevice(), pytest.raises(RuntimeError, match="mixes pretend:0 with cpu"):
        torch.ones(2).to(DEVICE) + torch.ones(2)


def shapes_of(tensors) -> Counter:
    return Counter([tuple(tensor.shape) for tensor in tensors])


def test_nothing_of_image_size_crosses_between_devices():
    model = build_from_config(CONFIG)
    with PretendDevice() as device:
        one_step((1, 2), [CPU, DEVICE])
    moved = {"pretend:0": Counter(), "cpu": Counter()}
    for move in device.moved:
        moved[move.target][move.shape] += 1

    weights = shapes_of([*model.encoder.parameters(), *model.decoder.parameters()])
    statistics = shapes_of([*model.encoder.buffers(), *model.decoder.buffers()])
    coarse_map = (BATCH, K, 64 // CELL, 32 // CELL)
    exchanged = Counter({coarse_map: 2, SUMS: 1})  # each way the map, and the gradient of the map that came
    tile = Counter([(BATCH, 1, 64, 32), (BATCH, 64, 32)])  # image and mask
    assert moved["pretend:0"] == weights + statistics + exchanged + tile
    assert moved["cpu"] == weights + statistics + exchanged  # gradients of the weights, new statistics


def test_no_copy_between_devices_stands_between_their_tiles():
    """It would wait for what both still have to do, and they would take turns."""
    with PretendDevice() as device:
        one_step((1, 4), [CPU, DEVICE])
    image, mask = (BATCH, 1, 64, 16), (BATCH, 64, 16)
    coarse_map = (BATCH, K, 64 // CELL, 16 // CELL)
    order = []
    for move in device.moved:
        if move.shape in (image, mask, coarse_map):
            order.append((move.shape, move.source))
    there_and_back = [(coarse_map, "pretend:0")] * 2 + [(coarse_map, "cpu")] * 2
    gradients = there_and_back
    assert order == [(image, "cpu")] * 2 + there_and_back + [(mask, "cpu")] * 2 + gradients


class Waiting(PretendDevice):
    """Notes what would make the loop wait for a GPU: numbers that are read, sizes that depend on them, copies to the CPU."""

    WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        target = (kwargs or {}).get("device")
        if name in self.WAITS or name == "_to_copy" and target == CPU and args[0].device == DEVICE:
            self.waits.append(name)
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_in_a_step_waits_for_the_gpu(frozen, recompute):
    with Waiting() as device:
        config = {**CONFIG, "image_size": (32, 32), "grid": (2, 2), "overlap": 0, "loss_weights": [0.2, 1.0, 1.8],
                  "dropout": 0.1, "recompute": recompute}
        model = build_from_config(config).to(DEVICE)
        train.set_training_mode(model, frozen)
        optimizer = torch.optim.SGD(model.parameters(), foreach=False)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=False)
        images, masks = random_batch(BATCH, (32, 32))
        loss = train.train_step(model, images, masks, optimizer, schedule, config, [DEVICE])
        assert device.waits == []
        loss.item()
        assert device.waits == ["_local_scalar_dense"]
