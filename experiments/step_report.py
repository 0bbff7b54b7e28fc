"""What step1.py ... step5.py report when they have trained: the same measure for all."""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from support.memory import LiveMemory
from synthetic import LINE, LinesAndCircles

TEST_IMAGES = 400


def report(model, images, masks) -> tuple[float, float]:
    """Prints and returns the line IoU of test images, and the peak memory of a training step on a batch, in MiB."""
    peak = peak_memory(model, images, masks)
    iou = line_iou(model)
    print(f"line IoU of test images {iou:.3f}, peak memory of a step {peak:.1f} MiB")
    return iou, peak


def peak_memory(model, images, masks) -> float:
    """The most MiB that the tensors of a training step take at one moment, on the fullest device.

    Tensors that are there before (weights, images, Adam's averages) do not count.
    """
    with LiveMemory() as memory, torch.autograd.set_multithreading_enabled(False):  # see step5.py
        cross_entropy(model(images), masks.long()).backward()
    return max(memory.peak.values()) / 2**20


@torch.no_grad()
def line_iou(model) -> float:
    """Intersection over union of the line, over all pixels of the test images."""
    images, masks = default_collate(list(LinesAndCircles(TEST_IMAGES, split="test")))
    model.eval()
    found = model(images).argmax(dim=1) == LINE
    true = masks == LINE
    return (found & true).sum().item() / (found | true).sum().item()
