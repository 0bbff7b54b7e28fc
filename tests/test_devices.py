"""One training step on two devices against the same step on one, with a pretend second device or two real GPUs."""

import time
from multiprocessing.pool import ThreadPool

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch, training_step
from pretend_device import DEVICE, PretendDevice
from torch import nn
from torch.utils._pytree import tree_map

import train
from decompose import MultiDeviceModule, Tiling
from support import scale
from support.model import build_from_config

pytestmark = pytest.mark.usefixtures("in_float64")
BATCH = 2
K = CONFIG["comm_channels"]
CELL = 2 ** CONFIG["depth"]


def one_step(grid, devices, recompute=False):
    """Loss, gradients and running statistics, on the CPU."""
    tiling = Tiling((64, 64), grid, CELL)
    loss, model = training_step(tiling, devices, recompute=recompute)
    return tree_map(torch.Tensor.cpu, [loss, *gradients_of(model), *model.buffers()])


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
    gpus = []
    for i in range(torch.cuda.device_count()):
        gpus.append(torch.device("cuda", i))
    expected = one_step((4, 4), [CPU])
    for devices in (gpus[:1], [gpus[0], CPU], gpus):
        found = one_step((4, 4), devices, recompute)
        assert_all_close(found, expected, tolerance=1e-10)


def step_with_communication(comm_device) -> list:
    """Logits, gradients and statistics of tiles on the CPU."""
    torch.manual_seed(0)
    model = build_from_config(CONFIG)
    model.comm_net.to(comm_device)
    tiling = Tiling((16, 24), (2, 2), CELL)
    image = torch.randn(2, 1, 16, 24)
    logits = tiling.stitch(model(tiling.split(image), tiling))
    logits.square().sum().backward()
    return tree_map(torch.Tensor.cpu, [logits, *gradients_of(model), *model.buffers()])


def test_the_communication_network_can_be_on_a_device_of_its_own():
    with PretendDevice():
        here = step_with_communication(CPU)
        there = step_with_communication(DEVICE)
    assert_all_close(there, here, tolerance=0)


def test_stitch_moves_all_tiles_to_the_device_of_the_first():
    tiling = Tiling((8, 12), (1, 2), 4)
    image = torch.randn(8, 12)
    with PretendDevice():
        left, right = tiling.split(image)
        stitched = tiling.stitch([left.to(DEVICE), right])
        assert stitched.device == DEVICE
        assert torch.equal(stitched.to(CPU), image)


def test_a_layer_under_two_names_learns_on_two_devices():
    norm = nn.BatchNorm2d(1)
    weight = norm.weight
    module = nn.Sequential(norm, norm)
    image = torch.randn(2, 1, 4, 4)
    with PretendDevice():
        for _ in range(2):
            on_devices = MultiDeviceModule(module)
            on_devices(image).sum().backward()
            on_devices(image.to(DEVICE)).sum().backward()
            on_devices.update_buffers()
    assert module[1].weight is weight
    assert norm.num_batches_tracked == 4
    assert norm.bias.grad == 2 * 2 * image.numel()


# Threads

class SlowLinear(nn.Linear):
    def forward(self, x):
        time.sleep(0.1)  # until the other thread is here too
        return super().forward(x)


def compute_zero(module):
    with scale.fixed_dropout(0, [CPU]):
        return module(torch.zeros(1)).item()


def test_each_thread_gets_the_weights_of_its_device():
    """In the backward pass of --recompute, autograd runs tiles in a thread for each GPU. Here the threads are ours."""
    linear = SlowLinear(1, 1)
    weight, bias = linear.weight, linear.bias
    one, other = MultiDeviceModule(linear), MultiDeviceModule(linear)
    one.weights[CPU] = {"weight": weight, "bias": torch.ones(1)}
    other.weights[CPU] = {"weight": weight, "bias": torch.zeros(1)}  # as if on another device
    one.buffers[CPU] = other.buffers[CPU] = {}
    with ThreadPool(2) as pool:
        assert pool.map(compute_zero, [one, other]) == [1, 0]
    assert linear.weight is weight
    assert linear.bias is bias


# What moves

def test_a_misplaced_tensor_fails():
    with PretendDevice(), pytest.raises(RuntimeError, match="mixes pretend:0 with cpu"):
        torch.ones(2).to(DEVICE).add(torch.ones(2))


def test_what_crosses_between_devices_is_small_and_never_waits_for_tiles():
    """A copy between two tiles would wait for what both devices still have to do, and they would take turns."""
    with PretendDevice() as device:
        one_step((1, 4), [CPU, DEVICE])
    model = build_from_config(CONFIG)
    weights = [*model.encoder.parameters(), *model.decoder.parameters()]
    statistics = [*model.encoder.buffers(), *model.decoder.buffers()]
    copied = {tensor.shape for tensor in weights + statistics}
    copies = 0
    others = []
    for move in device.moved:
        if move.shape in copied:
            copies += 1
        else:
            others.append((move.shape, move.source))
    assert copies == 2 * len(weights) + 3 * len(statistics)  # there; gradients back, and the statistics of both tiles

    image = (BATCH, 1, 64, 16)
    mask = (BATCH, 64, 16)
    coarse_map = (BATCH, K, 64 // CELL, 16 // CELL)
    sums = (4, 3)  # of each class
    communication = [(coarse_map, "pretend:0")] * 2 + [(coarse_map, "cpu")] * 2
    forwards = [(image, "cpu")] * 2 + communication + [(mask, "cpu")] * 2 + [(sums, "pretend:0")] * 2
    gradients = [(sums, "cpu")] * 2 + communication
    assert others == forwards + gradients


class Waiting(PretendDevice):
    """Notes what makes the loop wait for a GPU: numbers that are read, sizes that depend on them, copies to the CPU."""

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
        config = {**CONFIG, "loss_weights": [0.2, 1.0, 1.8], "dropout": 0.1, "recompute": recompute}
        model = build_from_config(config).to(DEVICE)
        train.set_training_mode(model, frozen)
        optimizer = torch.optim.SGD(model.parameters(), foreach=False)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=False)
        images, masks = random_batch(BATCH, (32, 32))
        loss = train.train_step(model, images, masks, optimizer, schedule, config, [DEVICE])
        assert device.waits == []
        loss.item()
        assert device.waits == ["_local_scalar_dense"]
