"""docs/own-encoder.md: its code runs, with torchvision or a stand-in of the same interface, in communicating tiles."""

import importlib.util
import re
import sys
from types import ModuleType

import pytest
import torch
from conftest import CPU, ROOT, assert_all_close, gradients_of
from test_image_folder import make_folder
from test_predict import read_picture, run
from torch import nn

import train
from comm_net import CommNet
from decompose import DecomposedUNet, Tiling
from support import model as support_model
from support.model import load_model

PAGE = (ROOT / "docs/own-encoder.md").read_text()
CLASSES, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


# A stand-in for torchvision.models.resnet18

class BasicBlock(nn.Module):
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        out += x
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.fc = nn.Linear(512, 1000)


def make_stand_in(weights=None):
    assert weights is None
    return ResNet18()


def run_page(code, names):
    """Runs code of the page. The weights would have to be downloaded, so they are drawn."""
    assert '(weights="DEFAULT")' in USE
    exec(code.replace('weights="DEFAULT"', "weights=None"), names)


@pytest.fixture(autouse=True)
def torchvision(monkeypatch):
    if importlib.util.find_spec("torchvision") is None:
        models = ModuleType("torchvision.models")
        models.resnet18 = make_stand_in
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.fixture
def page():
    """The names that the first block of the page defines."""
    names = {}
    run_page(CLASSES, names)
    return names


def build(page, comm_net=None, comm_channels=0):
    encoder = page["ResNetEncoder"](page["resnet18"](weights=None))
    decoder = page["ResNetDecoder"](classes=2)
    return DecomposedUNet(encoder, decoder, comm_net, comm_channels)


# The page

def test_the_code_of_the_page_runs_and_keeps_the_statistics_of_the_encoder(page):
    run_page(USE, page)
    kept = page["model"].encoder.levels[0][1]
    assert (kept.running_mean == 0).all()  # as it was before
    assert (kept.running_var == 1).all()
    learned = page["model"].decoder.blocks[0][1]
    assert learned.num_batches_tracked == 2
    assert learned.running_mean.abs().max() > 0


def test_its_skips_and_its_coarse_map_have_the_sizes_that_the_page_tells(page):
    encoder = build(page).encoder
    skips, coarse = encoder(torch.rand(1, 3, 64, 96))
    shapes = [tuple(x.shape[1:]) for x in [*skips, coarse]]
    assert shapes == [(64, 32, 48), (64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]


# Tiles

def test_one_tile_is_the_decoder_after_the_encoder(page):
    model = build(page).eval()
    images = torch.rand(2, 3, 64, 96)
    tiling = Tiling((64, 96), (1, 1), cell=32)
    with torch.no_grad():
        (logits,) = model(tiling.split(images), tiling, [CPU])
        expected = model.decoder(*model.encoder(images))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("communicate", [False, True])
def test_a_tile_hears_of_another_only_where_they_communicate(communicate, page):
    model = build(page, CommNet(64), 64) if communicate else build(page)
    model.eval()
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    tiling = Tiling((64, 64), (2, 2), cell=32)
    tiles = tiling.split(images)
    logits = model(tiles, tiling, [CPU] * 4)
    logits[0].sum().backward()
    assert images.grad[..., :32, :32].abs().max() > 0
    assert (images.grad[..., 32:, 32:].abs().max() > 0) == communicate


def step(model, images, tiling, recompute):
    model.train()
    tiles = tiling.split(images)
    placement = [CPU] * len(tiling)
    outputs = model(tiles, tiling, placement, recompute=recompute)
    logits = tiling.stitch(outputs)
    logits.square().mean().backward()
    return gradients_of(model)


def test_what_is_forgotten_and_computed_again_has_the_same_gradients_and_statistics(page, in_float64):
    model = build(page, CommNet(64, dropout=0), 64)
    other = build(page, CommNet(64, dropout=0), 64)
    other.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 60, 40)
    tiling = Tiling((60, 40), (2, 1), cell=32)
    gradients = step(model, images, tiling, recompute=False)
    assert_all_close(step(other, images, tiling, recompute=True), gradients, tolerance=1e-10)
    assert_all_close(other.buffers(), model.buffers(), tolerance=1e-10)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 1


# With train.py

def test_train_and_predict_work_with_the_encoder(page, tmp_path, no_pictures, monkeypatch):
    def build_model(channels, classes, width, depth, comm_channels, dilations, dropout):
        return build(page, CommNet(comm_channels, dropout, dilations), comm_channels)

    monkeypatch.setattr(support_model, "build_model", build_model)
    make_folder(tmp_path / "data", 3, size=(64, 64), classes=2)
    (command,) = re.findall(r"python train.py (.*)", PAGE)
    small = "--epochs 1 --batch-size 1 --grid 1x2 --workers 0".split()
    words = command.replace("DIR", str(tmp_path / "data")).split()
    train.main([*words, *small, "--out", str(tmp_path / "run")])
    model, config = load_model(tmp_path / "run/best.pt")
    assert type(model.encoder).__name__ == "ResNetEncoder"
    assert config["depth"] == 5
    image = tmp_path / "data/train/images/0.png"
    assert run(tmp_path / "run/best.pt", image, "--out", tmp_path / "out") == 0
    mask = read_picture(tmp_path / "out/0.png")
    assert mask.shape == (64, 64)
    assert mask.max() <= 1
