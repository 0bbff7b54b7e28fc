"""One training step on two devices against the same step on one, with a pretend second device or two real GPUs."""

import math
import time
from collections import Counter
from multiprocessing.pool import ThreadPool

import pytest
import torch
from pretend_device import DEVICE, PretendDevice
from torch import nn

import train
from decompose import SharedModule, Tiling
from support.model import build_from_config
from synthetic import LinesAndCircles

pytestmark = pytest.mark.usefixtures("in_float64")
CPU = torch.device("cpu")
B, L, K, WIDTH, DEPTH = 3, 3, 8, 4, 2
CONFIG = {"channels": 1, "classes": LinesAndCircles.classes, "width": WIDTH, "depth": DEPTH, "dropout": 0.0,
          "comm_channels": K, "dilations": [1, 2], "recompute": False,
          "mean": [0.5], "std": [2.0], "amp": False}


def one_step(grid, devices, recompute=False):
    """Loss, gradients and buffers after one step, from the same weights and images every time."""
    torch.manual_seed(0)
    config = CONFIG | {"recompute": recompute}
    model = build_from_config(config).to(devices[0])
    images, masks = map(torch.stack, zip(*LinesAndCircles(B)))
    loss = train.batch_loss(model, images, masks, Tiling((64, 64), grid, 2**DEPTH), devices, config)
    loss.backward()
    return loss.detach().cpu(), [w.grad.cpu() for w in model.parameters()], [b.cpu() for b in model.buffers()], model


def assert_same(one, two, tolerance):
    for a, b in zip([one[0], *one[1], *one[2]], [two[0], *two[1], *two[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_a_step_on_two_devices_is_the_step_on_one_to_the_last_bit():
    with PretendDevice():
        assert_same(one_step((1, 2), [CPU]), one_step((1, 2), [CPU, DEVICE]), tolerance=0)


@pytest.mark.parametrize("grid", [(2, 2), (3, 1)])
def test_with_more_tiles_than_devices_only_the_order_of_additions_differs(grid):
    with PretendDevice():
        assert_same(one_step(grid, [CPU]), one_step(grid, [CPU, DEVICE]), tolerance=1e-14)


@pytest.mark.skipif(torch.cuda.device_count() < 2,
                    reason="needs two GPUs: CUDA_VISIBLE_DEVICES=0,1 python -m pytest tests/test_devices.py")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_on_two_gpus_is_the_step_on_one(recompute):
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert_same(one_step((4, 4), gpus[:1]), one_step((4, 4), gpus, recompute), tolerance=1e-12)


def test_each_thread_gets_the_weights_of_its_device():
    """In the backward pass of --recompute, autograd runs tiles in a thread for each GPU. Here the threads are our own."""
    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.1)  # until the other thread is here too
            return super().forward(x)

    devices = [CPU, torch.device("cpu", 0)]  # two names for one
    module = Slow(1, 1)
    per_tile, weights = SharedModule(module, devices), dict(module.named_parameters())
    per_tile.weights[devices[1]] = {name: weight.detach() + 1 for name, weight in weights.items()}
    with ThreadPool(2) as pool:
        first, second = pool.starmap(per_tile, [(i, torch.zeros(1)) for i in range(2)], chunksize=1)
    assert first == weights["bias"] and second == weights["bias"] + 1
    assert all(weight is weights[name] for name, weight in module.named_parameters())


def test_a_misplaced_tensor_fails():
    with PretendDevice(), pytest.raises(RuntimeError, match="mixes pretend:0 with cpu"):
        torch.ones(2).to(DEVICE) + torch.ones(2)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_image_and_a_mask_of_the_host_never_appear_whole_on_a_device(recompute):
    """Everything is computed on the pretend device; as it cannot do that under checkpoints, those without gradients."""
    images, masks = map(torch.stack, zip(*LinesAndCircles(B)))
    with PretendDevice() as device:
        config = CONFIG | {"recompute": recompute}
        model = build_from_config(config).to(DEVICE)
        device.moved.clear()
        with torch.set_grad_enabled(not recompute):
            train.batch_loss(model, images, masks, Tiling((64, 64), (2, 2), 2**DEPTH), [DEVICE], config)
    assert Counter(shape for _, _, shape, _ in device.moved if math.prod(shape) > 2 * L + 2) == {
        (B, 1, 32, 32): 8 if recompute else 4, (B, 32, 32): 4}


def test_nothing_of_image_size_crosses_between_devices():
    with PretendDevice() as device:
        *_, model = one_step((1, 2), [CPU, DEVICE])
    there = Counter(shape for source, _, shape, _ in device.moved if source == "cpu")
    back = Counter(shape for source, _, shape, _ in device.moved if source == "pretend:0")

    weights = Counter(tuple(w.shape) for half in (model.encoder, model.decoder) for w in half.parameters())
    buffers = Counter(tuple(b.shape) for half in (model.encoder, model.decoder) for b in half.buffers())
    coarse = Counter([(B, K, 64 >> DEPTH, 32 >> DEPTH)])  # there and back: the map, and its gradient
    tile = Counter([(B, 1, 64, 32), (B, 64, 32)])  # image and mask
    sums = Counter([(2 * L + 2,)])
    assert there == weights + buffers + coarse + coarse + tile + sums
    assert back == weights + buffers + coarse + coarse + sums


def test_no_copy_between_devices_stands_between_their_tiles():
    """It would wait for what both still have to do, and they would take turns."""
    with PretendDevice() as device:
        *_, model = one_step((1, 4), [CPU, DEVICE])
    names = {(B, 1, 64, 16): "image", (B, 64, 16): "mask", (B, K, 64 >> DEPTH, 16 >> DEPTH): "coarse map"}
    assert [(names[shape], source) for source, _, shape, _ in device.moved if shape in names] == [
        ("image", "cpu"), ("image", "cpu"), ("coarse map", "pretend:0"), ("coarse map", "pretend:0"),
        ("coarse map", "cpu"), ("coarse map", "cpu"), ("mask", "cpu"), ("mask", "cpu"),
        ("coarse map", "pretend:0"), ("coarse map", "pretend:0"), ("coarse map", "cpu"), ("coarse map", "cpu")]  # gradients
    there = [shape for source, _, shape, _ in device.moved if source == "cpu"]
    image, mask, _ = names
    between = there[there.index(image):there.index(mask)]
    assert {tuple(x.shape) for x in model.encoder.state_dict().values()}.isdisjoint(between)
