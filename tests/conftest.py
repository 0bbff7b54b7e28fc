import json
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
}


def random_batch(images: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B,1,H,W), and masks (B,H,W) of three classes."""
    height, width = size
    noise = torch.randn(images, 1, height, width)
    masks = torch.randint(0, 3, (images, height, width), dtype=torch.uint8)
    return noise, masks


def training_step(tiling, devices=(CPU,), **changes) -> tuple[torch.Tensor, torch.nn.Module]:
    """The loss and the model after the backward pass, from the same weights and two images every time."""
    torch.manual_seed(0)
    config = {**CONFIG, **changes}
    model = build_from_config(config).to(devices[0])
    images, masks = random_batch(2, tiling.size)
    loss = train.batch_loss(model, images, masks, tiling, devices, config)
    loss.backward()
    return loss.detach(), model


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [weight.grad for weight in model.parameters()]


def assert_all_close(tensors, expected, tolerance: float):
    """Two lists of tensors are equal up to an absolute tolerance. With a tolerance of 0, they are equal."""
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=tolerance)


# All tests run in two processes, as most of them need one core only

class Reports:
    """Of the second process: what it has to report is kept, and left in a file when all tests have run."""

    def __init__(self, config):
        self.config = config
        self.reports = []

    def pytest_runtest_logreport(self, report):
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_sessionfinish(self, exitstatus):
        stopped = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
        if not stopped:
            self.config.option.reports.write_text(json.dumps(self.reports))


def pytest_addoption(parser):
    parser.addoption("--reports", type=Path, help="given to the second process: the file for its reports")


def pytest_configure(config):
    if config.option.reports:
        config.pluginmanager.register(Reports(config))


def half_of(items, number: int) -> list:
    """The tests of every other file. number: 0 or 1. Sorted by size, the halves need about as long."""
    files = sorted({item.path for item in items}, key=lambda path: (path.stat().st_size, path))
    return [item for item in items if item.path in files[number::2]]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Runs the tests. The first process starts the second one, and in the end reports what that has
    found as if it were its own. Where files are named, and with --pdb, there is one process only, and
    where pytest-xdist is installed, its option -n does the same."""
    config = session.config
    files_are_named = config.args_source is pytest.Config.ArgsSource.ARGS
    has_xdist = config.pluginmanager.hasplugin("xdist")
    if files_are_named or config.option.collectonly or config.option.usepdb or has_xdist:
        return (yield)
    if config.option.reports:
        session.items = half_of(session.items, 1)
        return (yield)

    session.items = half_of(session.items, 0)
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder, "reports.json")
        output = Path(folder, "output.txt")
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "--reports", reports]
        with open(output, "w") as file:
            second = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            result = yield
        except BaseException:  # Ctrl-C, or a failure with -x
            second.terminate()
            second.wait()
            raise
        second.wait()
        if not reports.exists():
            pytest.exit(f"the second process of the tests was stopped:\n{output.read_text()}", returncode=1)
        for data in json.loads(reports.read_text()):
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            if report.when == "setup":
                config.hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            config.hook.pytest_runtest_logreport(report=report)
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
