"""docs/own-encoder.md: its code runs, with torchvision or a stand-in of the same interface, in communicating tiles."""

import importlib.util
import re
import sys
from types import ModuleType

import pytest
from conftest import ROOT
from test_folder import make_folder
from test_predict import read_picture, run
from torch import nn

import train
from comm_net import CommNet
from decompose import DecomposedUNet
from support import model as support_model
from support.model import load_model

PAGE = (ROOT / "docs/own-encoder.md").read_text()
CLASSES, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class ResNet18(nn.Module):
    """A stand-in for torchvision.models.resnet18: each layer has the same name, channels and stride."""

    def __init__(self, weights=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = layer(64, 64, 1)
        self.layer2 = layer(64, 128, 2)
        self.layer3 = layer(128, 256, 2)
        self.layer4 = layer(256, 512, 2)


def layer(in_channels, channels, stride):
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def run_page(code, names):
    """Runs code of the page. The weights would have to be downloaded, so they are drawn."""
    assert '(weights="DEFAULT")' in USE
    exec(code.replace('weights="DEFAULT"', "weights=None"), names)


@pytest.fixture
def page(monkeypatch):
    """The names that the first block of the page defines."""
    if importlib.util.find_spec("torchvision") is None:
        models = ModuleType("torchvision.models")
        models.resnet18 = ResNet18
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.models", models)
    names = {}
    run_page(CLASSES, names)
    return names


def test_the_code_of_the_page_runs_and_keeps_the_statistics_of_the_encoder(page):
    run_page(USE, page)
    kept = page["model"].encoder.levels[0][1]
    assert (kept.running_mean == 0).all()  # as it was before
    assert (kept.running_var == 1).all()
    learned = page["model"].decoder.blocks[0][1]
    assert learned.num_batches_tracked == 2
    assert learned.running_mean.abs().max() > 0


def test_train_and_predict_work_with_the_encoder(page, tmp_path, no_pictures, monkeypatch):
    def build_model(channels, classes, width, depth, comm_channels, dilations, dropout):
        encoder = page["ResNetEncoder"](page["resnet18"](weights=None))
        return DecomposedUNet(encoder, page["ResNetDecoder"](classes), CommNet(comm_channels), comm_channels)

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
