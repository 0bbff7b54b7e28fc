"""Batch norm that keeps its running statistics: when it begins, and what it makes exact."""

import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch

import train
from decompose import Tiling
from support.model import build_from_config

SIZE = (128, 96)
DEPTH = CONFIG["depth"]
CELL = 2**DEPTH
SEEN = 6 * CELL  # pixels: an overlap as wide as the U-Net sees, see test_unet.py


# A step with frozen batch norm

def frozen_model(config):
    """A network whose batch norm is frozen, with statistics and weights that matter."""
    torch.manual_seed(0)
    model = build_from_config(config)
    for layer in train.batch_norms(model):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.weight.data.uniform_(0.5, 2)
        layer.bias.data.uniform_(0, 1)
    train.set_training_mode(model, frozen=True)
    return model


def frozen_step(grid, overlap=0, comm_channels=8, recompute=False):
    """Loss and model after the backward pass, from the same weights and images every time."""
    config = {**CONFIG, "comm_channels": comm_channels, "recompute": recompute}
    model = frozen_model(config)
    images, masks = random_batch(1, SIZE)
    tiling = Tiling(SIZE, grid, CELL, overlap)
    loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
    loss.backward()
    return loss.detach(), model


@pytest.mark.parametrize("comm_channels", [0, 8])
@pytest.mark.parametrize("grid", [(4, 3), (5, 2)])
def test_a_training_step_depends_on_the_grid_if_and_only_if_the_overlap_is_narrower_than_the_unet_sees(
        grid, comm_channels, in_float64):
    """And it leaves the statistics to the last bit: the mean of twelve equal numbers would be rounded."""
    before = frozen_model({**CONFIG, "comm_channels": comm_channels})
    whole_loss, whole = frozen_step((1, 1), 0, comm_channels)
    for recompute in (False, True):
        loss, cut = frozen_step(grid, SEEN, comm_channels, recompute)
        assert_all_close([loss], [whole_loss], tolerance=1e-14)
        assert_all_close(gradients_of(cut), gradients_of(whole), tolerance=1e-13)
        assert_all_close(cut.buffers(), before.buffers(), tolerance=0)
    _, cut = frozen_step(grid, SEEN - CELL, comm_channels)
    differences = []
    for gradient, other in zip(gradients_of(cut), gradients_of(whole)):
        differences.append((gradient - other).abs().max())
    assert max(differences) > 1e-9


# When it begins

SMALL = "--width 2 --depth 2 --comm-channels 4 --train-images 32 --batch-size 8 --epochs 1".split()


@pytest.mark.parametrize("part, learning", [("1", 4), ("0.5", 2), ("0", 1), ("0.99", 4)])
def test_statistics_are_learned_for_the_asked_part_of_the_steps(part, learning, tmp_path, monkeypatch, capsys,
                                                                no_pictures):
    learned = []  # for each of the four steps
    train_step = train.train_step

    def watched(model, *arguments):
        learned.append({layer.training for layer in train.batch_norms(model)})
        return train_step(model, *arguments)

    monkeypatch.setattr(train, "train_step", watched)
    train.main(SMALL + ["--freeze-batch-norm", part, "--out", str(tmp_path / "run")])
    assert learned == [{True}] * learning + [{False}] * (4 - learning)
    is_told = "batch norm keeps its statistics after" in capsys.readouterr().out
    assert is_told == (learning < 4)


# What it is good for

def dark_and_bright_images(count: int) -> list:
    """Images (1,1,32,32) that are dark or bright in halves or whole, and masks of two classes, so that
    the tiles of a 2x2 grid are all of one class."""
    batches = []
    for _ in range(count):
        mask = torch.randint(2, (1, 1, 2)).repeat_interleave(16, dim=2).expand(1, 32, 32)
        if torch.rand(1) < 0.5:
            mask = mask[..., :1].expand(1, 32, 32)
        image = mask[None] + 0.07 * torch.randn(1, 1, 32, 32)
        batches.append((image, mask))
    return batches


@pytest.mark.parametrize("freeze_after, knows", [(48, True), (96, False)])
def test_with_one_image_a_step_the_network_knows_its_training_images_only_if_batch_norm_is_frozen(
        freeze_after, knows, monkeypatch):
    config = {**CONFIG, "classes": ["dark", "bright"], "depth": 1, "dilations": [1], "batch_size": 1,
              "image_size": (32, 32), "grid": (2, 2), "overlap": 0}
    batches = dark_and_bright_images(32)
    model = build_from_config(config)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=96)
    for _ in range(3):
        train.train_epoch(model, batches, optimizer, schedule, config, [CPU], freeze_after)
    iou = train.evaluate(model, batches, config, [CPU])["iou"]
    if knows:
        assert min(iou.values()) > 0.9
    else:
        assert min(iou.values()) < 0.7
