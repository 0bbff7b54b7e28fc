import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are too small to share among threads
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # runs are compared to the last bit, which no GPU promises

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from support import plots


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def no_pictures(monkeypatch):
    """To draw a run takes longer than what most tests do in it: for these its pictures are empty files."""
    for name in ("draw_curves", "draw_predictions"):
        monkeypatch.setattr(plots, name, lambda path, *_: path.touch())


@pytest.fixture
def in_float64(monkeypatch):
    """Networks, images and the sums of the loss in float64, so that only true differences are seen."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)
