"""Batch norm that keeps its running statistics: when it begins, and what it makes exact."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train
from decompose import Tiling
from support import checkpoints
from support.datasets import build_datasets
from support.loss import loss_from_sums, loss_sums
from support.model import build_from_config, load_model
from unet import UNet

CPU = torch.device("cpu")
DEPTH, SIZE = 2, (128, 96)
SEEN = 6 * 2**DEPTH  # pixels, 6 cells: an overlap as wide as the U-Net sees, see test_unet.py
CONFIG = {"channels": 1, "classes": "abc", "width": 4, "depth": DEPTH, "dropout": 0.0, "comm_channels": 8,
          "dilations": [1, 2], "recompute": False, "mean": [0.5], "std": [2.0], "amp": False}

pytestmark = pytest.mark.usefixtures("no_pictures")


def frozen_model(**changes):
    """A network whose batch norm is frozen, with statistics and weights that matter."""
    torch.manual_seed(0)
    model = build_from_config(CONFIG | changes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.uniform_(0, 1)
    train.set_training_mode(model, frozen=True)
    return model


def data():
    torch.manual_seed(1)
    return torch.randn(1, 1, *SIZE), torch.randint(0, 3, (1, *SIZE), dtype=torch.uint8)


def loss_and_gradients(grid, overlap=0, **changes):
    model = frozen_model(**changes)
    images, masks = data()
    loss = train.batch_loss(model, images, masks, Tiling(SIZE, grid, 2**DEPTH, overlap), [CPU], CONFIG | changes)
    loss.backward()
    return loss.detach(), [weight.grad for weight in model.parameters()], model


def largest_difference(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("comm_channels", [0, 8])
@pytest.mark.parametrize("grid", [(2, 2), (4, 3), (5, 2)])
def test_with_an_overlap_as_wide_as_the_unet_sees_a_training_step_does_not_depend_on_the_grid(
        grid, comm_channels, recompute, in_float64):
    whole, gradients, _ = loss_and_gradients((1, 1), comm_channels=comm_channels)
    loss, cut, _ = loss_and_gradients(grid, SEEN, comm_channels=comm_channels, recompute=recompute)
    torch.testing.assert_close(loss, whole, rtol=0, atol=1e-14)
    assert largest_difference(cut, gradients) < 1e-13
    _, narrow, _ = loss_and_gradients(grid, SEEN - 2**DEPTH, comm_channels=comm_channels)
    assert largest_difference(narrow, gradients) > 1e-9


def test_without_communication_it_is_the_step_of_the_plain_unet(in_float64):
    loss, gradients, model = loss_and_gradients((4, 3), SEEN, comm_channels=0)
    unet = UNet(1, 3, 4, DEPTH, dropout=0.0)
    unet.load_state_dict(model.state_dict())
    train.set_training_mode(unet, frozen=True)
    images, masks = data()
    logits = unet((images - 0.5) / 2)
    expected = loss_from_sums(loss_sums(logits, masks))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-14)
    assert largest_difference(gradients, [weight.grad for weight in unet.parameters()]) < 1e-13


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_step_leaves_the_statistics_to_the_last_bit(recompute):
    model = frozen_model()
    before = [buffer.clone() for buffer in model.buffers()]
    images, masks = data()
    tiling = Tiling(SIZE, (3, 1), 2**DEPTH)  # the mean of three equal numbers would be rounded
    train.batch_loss(model, images, masks, tiling, [CPU], CONFIG | {"recompute": recompute}).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def train_one_epoch(out, *options) -> list:
    """The running statistics after every step of an epoch of 8 steps, and what was printed."""
    train.main(["--width", "2", "--depth", "2", "--comm-channels", "4", "--train-images", "32", "--epochs", "1",
                "--batch-size", "4", "--out", str(out), *options])


@pytest.mark.parametrize("part, changed", [("1", 8), ("0.5", 4), ("0", 1), ("0.99", 8)])
def test_statistics_are_learned_for_the_asked_part_of_the_steps_and_then_kept(part, changed, tmp_path, monkeypatch, capsys):
    seen = []

    def watched(model, *arguments, loss=train.batch_loss):
        if len(seen) <= 8 and torch.is_grad_enabled():
            seen.append(torch.cat([b.flatten().float() for b in model.buffers()]).clone())
        return loss(model, *arguments)

    monkeypatch.setattr(train, "batch_loss", watched)
    train_one_epoch(tmp_path / "run", "--freeze-batch-norm", part)
    seen.append(torch.cat([b.flatten().float() for b in load_model(tmp_path / "run/last.pt")[0].buffers()]))
    assert [not torch.equal(a, b) for a, b in zip(seen, seen[1:])] == [True] * changed + [False] * (8 - changed)
    assert ("batch norm keeps its statistics after" in capsys.readouterr().out) == (changed < 8)


def test_a_run_of_before_there_was_a_choice_goes_on_without_freezing(tmp_path, capsys):
    train_one_epoch(tmp_path / "run", "--epochs", "0")
    state = checkpoints.load(tmp_path / "run/last.pt")
    del state["config"]["freeze_batch_norm"]
    checkpoints.save(tmp_path / "run/last.pt", state)
    train.main(["--resume", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["config"]["freeze_batch_norm"] == 1


def dark_and_bright(folder):
    """Images that are dark or bright in halves or whole, so that the tiles of a 2x2 grid are all of one class."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / "train" / name).mkdir(parents=True)
    for i in range(32):
        mask = np.full((32, 32), rng.integers(2), np.uint8)
        if rng.random() < 0.5:
            mask[:, :16] = rng.integers(2)
        image = np.array([60, 180])[mask] + rng.normal(0, 8, mask.shape)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"train/images/{i}.png")
        Image.fromarray(mask).save(folder / f"train/masks/{i}.png")


def test_with_one_image_a_step_the_network_knows_its_training_images_only_if_batch_norm_is_frozen(tmp_path, capsys):
    dark_and_bright(tmp_path / "data")
    accuracy = {}
    for part in ("0.5", "1"):
        out = tmp_path / part
        train.main(["--dataset", "folder", "--data", str(tmp_path / "data"), "--batch-size", "1", "--epochs", "12",
                    "--width", "4", "--depth", "2", "--comm-channels", "8", "--lr", "0.01", "--no-amp",
                    "--freeze-batch-norm", part, "--out", str(out)])
        model, config = load_model(out / "last.pt")
        some = train.predict_some(model, build_datasets(config)["train"], config, [CPU], count=20)
        right = [(mask == prediction).float().mean() for mask, prediction in zip(some["true mask"], some["prediction"])]
        accuracy[part] = sum(right).item() / len(right)
        metrics, said = json.loads((out / "metrics.json").read_text()), capsys.readouterr().out
        loss = metrics["loss_of_training_images"]
        line = f"{loss['training_mode']:.4f} as trained, {loss['evaluation_mode']:.4f} in evaluation mode"
        assert line in said and (f"{line}; they should be alike" in said) == (part == "1")
    assert accuracy["0.5"] > 0.95 and accuracy["1"] < 0.8
