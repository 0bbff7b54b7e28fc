import os
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are too small to share among threads
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # runs are compared to the last bit, which no GPU promises

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train
from support import loaders, plots
from support.loss import IGNORE
from support.model import build_from_config

MOST_WORKERS = loaders.MOST_WORKERS
loaders.MOST_WORKERS = 0  # unless a test asks for --workers: to start one takes longer than to read small images

CPU = torch.device("cpu")
CONFIG = {  # of a small network, in the form in which train.py and a checkpoint hold it
    "channels": 1,
    "classes": ["background", "line", "circle"],
    "width": 4,
    "depth": 2,
    "dropout": 0.0,
    "comm_channels": 8,
    "dilations": [1, 2],
    "recompute": False,
    "image_processes": 1,
    "mean": [0.5],
    "std": [2.0],
    "amp": False,
    "loss_weights": None,
    "image_size": (32, 32),
    "grid": (2, 2),
    "overlap": 0,
}


def random_batch(images: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B,1,H,W), and masks (B,H,W) of three classes, in which a few pixels do not count."""
    height, width = size
    noise = torch.randn(images, 1, height, width)
    masks = torch.randint(0, 3, (images, height, width), dtype=torch.uint8)
    masks[:, :4, :3] = IGNORE
    return noise, masks


def training_step(tiling, devices=(CPU,), images=2, frozen=False, **changes) -> tuple[torch.Tensor, torch.nn.Module]:
    """The loss and the model after the backward pass, from the same weights and images every time.

    frozen: batch norm uses its running statistics, which are random ones.
    """
    torch.manual_seed(0)
    config = {**CONFIG, **changes}
    model = build_from_config(config).to(devices[0])
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    train.set_training_mode(model, frozen)
    pixels, masks = random_batch(images, tiling.size)
    loss = train.batch_loss(model, pixels, masks, tiling, devices, config)
    loss.backward()
    return loss.detach(), model


def number_of_parameters(module: torch.nn.Module) -> int:
    total = 0
    for weight in module.parameters():
        total += weight.numel()
    return total


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [weight.grad for weight in model.parameters()]


def assert_all_close(tensors, expected, tolerance: float):
    """Two lists of tensors are equal up to an absolute tolerance. With a tolerance of 0, they are equal."""
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=tolerance)


def assert_same_step(step, expected, tolerance: float):
    """Two pairs of a loss and a model after the backward pass have the same loss, gradients and running statistics."""
    loss, model = step
    expected_loss, expected_model = expected
    assert_all_close([loss], [expected_loss], tolerance)
    assert_all_close(gradients_of(model), gradients_of(expected_model), tolerance)
    assert_all_close(model.buffers(), expected_model.buffers(), tolerance)


# All tests run in two processes, as most of them need one core only

def pytest_addoption(parser):
    parser.addoption("--second-half", action="store_true", help="given to the second process: its half of the tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Runs the tests of every other file. The first process starts the second one, and in the end prints what that has
    printed. Where files are named, and with --pdb, there is one process only, and where pytest-xdist is installed, its
    option -n does the same."""
    config = session.config
    files_are_named = config.args_source is pytest.Config.ArgsSource.ARGS
    has_xdist = config.pluginmanager.hasplugin("xdist")
    if files_are_named or config.option.collectonly or config.option.usepdb or has_xdist:
        return (yield)
    files = {item.path for item in session.items}
    files = sorted(files, key=lambda path: (path.stat().st_size, path))  # so that the halves need about as long
    number = int(config.option.second_half)
    half = files[number::2]
    session.items = [item for item in session.items if item.path in half]
    if config.option.second_half:
        return (yield)

    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "--second-half"]
        second = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            result = yield
        except BaseException:  # Ctrl-C, or a failure with -x
            second.terminate()
            raise
        finally:
            second.wait()
        output.seek(0)
        print(f"\n\nThe second process:\n{output.read()}\nThe first process:")
    if second.returncode != 0:
        session.testsfailed += 1
        session.shouldfail = "tests of the second process have failed, see above"
    return result


@pytest.fixture(autouse=True, scope="session")
def processes_start_quickly():
    """New processes are forked from one that has imported these already. It does so while the first tests run."""
    forkserver.set_forkserver_preload(["torch", "torch._dynamo", "matplotlib.pyplot", "pytest"])
    forkserver.ensure_running()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def no_pictures(monkeypatch):
    """To draw a run takes longer than what most tests do in it: for these its pictures are empty files."""
    def draw_nothing(path, *what):
        path.touch()

    monkeypatch.setattr(plots, "draw_curves", draw_nothing)
    monkeypatch.setattr(plots, "draw_predictions", draw_nothing)


@pytest.fixture
def in_float64(monkeypatch):
    """Networks, images and the sums of the loss in float64, so that only true differences are seen."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)
