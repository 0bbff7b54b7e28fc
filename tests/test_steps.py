"""The five programs of docs/steps.md: what each keeps of the one before, and that the page shows them as they are."""

import difflib
import re

import pytest
import torch
from conftest import ROOT, assert_all_close, assert_same_step, gradients_of
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from comm_net import CommNet
from decompose import DecomposedUNet, Tiling
from experiments import step1, step2, step3, step4, step5, step_report, steps
from synthetic import LinesAndCircles
from unet import Decoder, Encoder

PROGRAMS = [step1, step2, step3, step4, step5]
PAGE = (ROOT / "docs/steps.md").read_text()
BATCH = 8


def source_of(program) -> str:
    with open(program.__file__) as file:
        return file.read()


# A few steps of each program

def test_each_program_learns_and_step_5_alone_needs_less_memory(monkeypatch):
    monkeypatch.setattr(step_report, "TEST_IMAGES", 8)
    peaks = []
    for program in PROGRAMS:
        _, losses, (_, peak) = program.main(steps=4)
        assert losses[3] < losses[0]
        peaks.append(peak)
    assert peaks[1:4] == pytest.approx([peaks[0]] * 3, rel=0.1)
    assert peaks[4] < 0.4 * peaks[0]


# One step in float64

def first_batch():
    """Images (8,1,64,64) and masks (8,64,64)."""
    images, masks = default_collate(list(LinesAndCircles(BATCH)))
    return images.double(), masks.long()


def one_step(make_model):
    """Loss and model after the backward pass, from the same weights and images every time."""
    torch.manual_seed(0)
    model = make_model().double()
    images, masks = first_batch()
    loss = cross_entropy(model(images), masks)
    with torch.autograd.set_multithreading_enabled(False):  # step 5 needs it where there are several devices
        loss.backward()
    return loss.detach(), model


class Reference(DecomposedUNet):
    """decompose.py, built as the programs build their models."""

    def __init__(self):
        encoder = Encoder(1, width=8, depth=3)
        decoder = Decoder(3, width=8, depth=3)
        super().__init__(encoder, decoder, CommNet(step3.K), step3.K)

    def forward(self, images):
        tiling = Tiling((64, 64), (2, 2), cell=8)
        logits = super().forward(tiling.split(images), tiling)
        return tiling.stitch(logits)


@pytest.mark.parametrize("program", [step4, step5])
def test_steps_4_and_5_are_those_of_decompose(program):
    assert_same_step(one_step(program.Model), one_step(Reference), tolerance=1e-12)


def test_step_3_has_the_gradients_of_step_4():
    """Its running statistics are others."""
    _, model = one_step(step3.Model)
    _, other = one_step(step4.Model)
    assert_all_close(gradients_of(model), gradients_of(other), tolerance=1e-12)


def test_tiles_of_step_2_know_nothing_of_each_other():
    image = torch.rand(1, 1, 64, 64, requires_grad=True)
    first_tile = step2.Model()(image)[:, :, :32, :32]
    first_tile.square().sum().backward()
    assert image.grad[:, :, :32, :32].any()
    assert not image.grad[:, :, 32:].any()


# The table and the picture

def test_one_tile_and_four_have_the_same_losses_if_they_overlap_as_far_as_the_unet_sees():
    curves = steps.compare_grids(steps=2)
    one_tile = curves["one tile"]
    assert curves["overlap of 48 pixels"] == pytest.approx(one_tile, rel=1e-12)


def test_a_quick_run_leaves_a_table_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "PROGRAMS", {"1": step1})
    steps.main(["--quick"])
    folder = tmp_path / "runs/steps-quick"
    assert "| 1.00 |" in (folder / "steps.md").read_text()
    assert (folder / "steps.png").exists()


# The files and the page

@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_is_short_and_imports_no_machinery(program):
    source = source_of(program)
    assert len(source.splitlines()) <= 100
    imported = set(re.findall(r"^(?:from|import) ([\w.]+)", source, re.MULTILINE))
    allowed = {"torch", "torch.func", "torch.nn.functional", "torch.utils.checkpoint", "torch.utils.data", "comm_net",
               "synthetic", "unet", "experiments.step_report"}
    assert imported <= allowed


def test_the_page_shows_step_1_and_what_each_later_step_changes():
    assert re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) == [source_of(step1)]
    shown = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    before = source_of(step1).splitlines(keepends=True)
    for program, difference in zip(PROGRAMS[1:], shown, strict=True):
        after = source_of(program).splitlines(keepends=True)
        lines = difflib.unified_diff(before, after, n=1)
        assert difference == "".join(lines)
        before = after
