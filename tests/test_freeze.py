"""Batch norm that keeps its running statistics: when it begins, and what it makes exact."""

import json

import numpy as np
import pytest
import torch
from conftest import CONFIG, CPU, assert_all_close, gradients_of, random_batch
from PIL import Image
from torch import nn

import train
from decompose import Tiling
from support import checkpoints
from support.datasets import build_datasets
from support.loss import loss_from_sums, loss_sums
from support.model import build_from_config, load_model
from unet import UNet

SIZE = (128, 96)
DEPTH = CONFIG["depth"]
CELL = 2**DEPTH
SEEN = 6 * CELL  # pixels: an overlap as wide as the U-Net sees, see test_unet.py

pytestmark = pytest.mark.usefixtures("no_pictures")


# A step with frozen batch norm

def frozen_model(config):
    """A network whose batch norm is frozen, with statistics and weights that matter."""
    torch.manual_seed(0)
    model = build_from_config(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.uniform_(0, 1)
    train.set_training_mode(model, frozen=True)
    return model


def same_images():
    torch.manual_seed(1)
    return random_batch(1, SIZE)


def frozen_step(grid, overlap=0, comm_channels=8, recompute=False):
    """Loss and model after the backward pass, from the same weights and images every time."""
    config = {**CONFIG, "comm_channels": comm_channels, "recompute": recompute}
    model = frozen_model(config)
    images, masks = same_images()
    tiling = Tiling(SIZE, grid, CELL, overlap)
    loss = train.batch_loss(model, images, masks, tiling, [CPU], config)
    loss.backward()
    return loss.detach(), model


def plain_step(weights):
    """The same for the plain U-Net with these weights."""
    images, masks = same_images()
    unet = UNet(1, 3, width=4, depth=DEPTH, dropout=0.0)
    unet.load_state_dict(weights)
    train.set_training_mode(unet, frozen=True)
    logits = unet((images - 0.5) / 2)
    loss = loss_from_sums(loss_sums(logits, masks))
    loss.backward()
    return loss.detach(), unet


def largest_difference(tensors, others) -> float:
    differences = []
    for tensor, other in zip(tensors, others, strict=True):
        differences.append((tensor - other).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("comm_channels", [0, 8])
@pytest.mark.parametrize("grid", [(2, 2), (4, 3), (5, 2)])
def test_with_an_overlap_as_wide_as_the_unet_sees_a_training_step_does_not_depend_on_the_grid(
        grid, comm_channels, recompute, in_float64):
    whole_loss, whole = frozen_step((1, 1), 0, comm_channels)
    loss, cut = frozen_step(grid, SEEN, comm_channels, recompute)
    torch.testing.assert_close(loss, whole_loss, rtol=0, atol=1e-14)
    assert_all_close(gradients_of(cut), gradients_of(whole), tolerance=1e-13)


@pytest.mark.parametrize("comm_channels", [0, 8])
@pytest.mark.parametrize("grid", [(2, 2), (4, 3), (5, 2)])
def test_with_an_overlap_that_is_one_cell_less_it_does(grid, comm_channels, in_float64):
    _, whole = frozen_step((1, 1), 0, comm_channels)
    _, cut = frozen_step(grid, SEEN - CELL, comm_channels)
    assert largest_difference(gradients_of(cut), gradients_of(whole)) > 1e-9


def test_without_communication_it_is_the_step_of_the_plain_unet(in_float64):
    loss, model = frozen_step((4, 3), SEEN, comm_channels=0)
    plain_loss, unet = plain_step(model.state_dict())
    torch.testing.assert_close(loss, plain_loss, rtol=0, atol=1e-14)
    assert_all_close(gradients_of(model), gradients_of(unet), tolerance=1e-13)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_step_leaves_the_statistics_to_the_last_bit(recompute):
    before = frozen_model(CONFIG)
    _, model = frozen_step((3, 1), recompute=recompute)  # the mean of three equal numbers would be rounded
    assert_all_close(model.buffers(), before.buffers(), tolerance=0)


# When it begins

SMALL = "--width 2 --depth 2 --comm-channels 4 --train-images 32 --batch-size 8".split()
STEPS = 4  # of an epoch


def statistics_of(model) -> torch.Tensor:
    """All running statistics, one after the other."""
    return torch.cat([buffer.flatten().double() for buffer in model.buffers()])


def watch_statistics(monkeypatch) -> list:
    """A list to which every training step adds the running statistics that it begins with."""
    seen = []
    batch_loss = train.batch_loss

    def watched(model, *arguments):
        if torch.is_grad_enabled():
            seen.append(statistics_of(model))
        return batch_loss(model, *arguments)

    monkeypatch.setattr(train, "batch_loss", watched)
    return seen


def changes(seen: list) -> list[bool]:
    """Whether each differs from the one before."""
    changed = []
    for before, after in zip(seen, seen[1:]):
        changed.append(not torch.equal(before, after))
    return changed


@pytest.mark.parametrize("part, changing", [("1", 4), ("0.5", 2), ("0", 1), ("0.99", 4)])
def test_statistics_are_learned_for_the_asked_part_of_the_steps_and_then_kept(part, changing, tmp_path, monkeypatch,
                                                                               capsys):
    out = tmp_path / "run"
    seen = watch_statistics(monkeypatch)
    train.main(SMALL + ["--epochs", "1", "--freeze-batch-norm", part, "--out", str(out)])
    model, _ = load_model(out / "last.pt")
    seen.append(statistics_of(model))
    assert changes(seen) == [True] * changing + [False] * (STEPS - changing)
    is_told = "batch norm keeps its statistics after" in capsys.readouterr().out
    assert is_told == (changing < STEPS)


def test_a_run_of_before_there_was_a_choice_goes_on_without_freezing(tmp_path):
    out = tmp_path / "run"
    train.main(SMALL + ["--epochs", "0", "--out", str(out)])
    state = checkpoints.load(out / "last.pt")
    del state["config"]["freeze_batch_norm"]
    checkpoints.save(out / "last.pt", state)
    train.main(["--resume", str(out)])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["config"]["freeze_batch_norm"] == 1


# What it is good for

def draw_dark_and_bright(folder):
    """Images that are dark or bright in halves or whole, so that the tiles of a 2x2 grid are all of one class."""
    rng = np.random.default_rng(0)
    images, masks = folder / "train/images", folder / "train/masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for i in range(32):
        mask = np.full((32, 32), rng.integers(2), np.uint8)
        if rng.random() < 0.5:
            mask[:, :16] = rng.integers(2)
        image = np.where(mask, 180, 60) + rng.normal(0, 8, mask.shape)
        Image.fromarray(image.astype(np.uint8)).save(images / f"{i}.png")
        Image.fromarray(mask).save(masks / f"{i}.png")


def train_on_single_images(data, out, part) -> dict:
    """Trains with one image in a step. Returns what metrics.json holds."""
    network = "--width 4 --depth 1 --comm-channels 8 --dilations 1".split()
    training = "--batch-size 1 --epochs 5 --lr 0.02 --no-amp --no-augment".split()
    images = ["--dataset", "folder", "--data", str(data)]
    train.main(network + training + images + ["--freeze-batch-norm", part, "--out", str(out)])
    return json.loads((out / "metrics.json").read_text())


def accuracy_on_training_images(out) -> float:
    """The part of the pixels whose class a trained network knows."""
    model, config = load_model(out / "last.pt")
    images = build_datasets(config)["train"]
    some, _ = train.predict_some(model, images, config, [CPU], count=20)
    right = []
    for mask, prediction in zip(some["true mask"], some["prediction"]):
        right.append((mask == prediction).float().mean().item())
    return sum(right) / len(right)


@pytest.mark.parametrize("part, knows", [("0.5", True), ("1", False)])
def test_with_one_image_a_step_the_network_knows_its_training_images_only_if_batch_norm_is_frozen(
        part, knows, tmp_path, capsys):
    out = tmp_path / "run"
    draw_dark_and_bright(tmp_path / "data")
    metrics = train_on_single_images(tmp_path / "data", out, part)
    said = capsys.readouterr().out

    accuracy = accuracy_on_training_images(out)
    if knows:
        assert accuracy > 0.95
    else:
        assert accuracy < 0.8
    loss = metrics["loss_of_training_images"]
    line = f"{loss['training_mode']:.4f} in training mode, {loss['evaluation_mode']:.4f} in evaluation mode"
    assert line in said
    is_warned = f"{line}; they should be alike" in said
    assert is_warned != knows
