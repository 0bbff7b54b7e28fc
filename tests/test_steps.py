"""The five programs of docs/steps.md: what each keeps of the one before, and that the page shows them as they are."""

import difflib
import re

import pytest
import torch
from conftest import ROOT, assert_all_close, gradients_of
from torch.nn.functional import cross_entropy

from comm_net import CommNet
from decompose import DecomposedUNet, Tiling
from experiments import step1, step2, step3, step4, step5, step_report, steps
from synthetic import LinesAndCircles
from unet import Decoder, Encoder, UNet

PROGRAMS = [step1, step2, step3, step4, step5]
SOURCES = [(ROOT / f"experiments/step{number}.py").read_text() for number in range(1, 6)]
PAGE = (ROOT / "docs/steps.md").read_text()
BATCH = 8


# A few steps of each program

@pytest.fixture(scope="module", autouse=True)
def fewer_test_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_report, "TEST_IMAGES", 8)
        yield


@pytest.fixture(scope="module")
def trained() -> list:
    """What the main of each program returns: model, losses, (line IoU, peak memory)."""
    return [program.main(steps=4) for program in PROGRAMS]


def test_each_program_learns(trained):
    for _, losses, (iou, _) in trained:
        assert len(losses) == 4
        assert losses[3] < losses[0]
        assert 0 <= iou <= 1


def test_the_losses_of_steps_3_4_and_5_are_the_same(trained):
    losses = [losses for _, losses, _ in trained]
    assert losses[3] == pytest.approx(losses[2], rel=1e-5)
    assert losses[4] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] != pytest.approx(losses[2], rel=1e-5)


def test_step_5_alone_needs_less_memory(trained):
    peaks = [peak for _, _, (_, peak) in trained]
    assert peaks[1:4] == pytest.approx([peaks[0]] * 3, rel=0.1)
    assert peaks[4] < 0.4 * peaks[3]


# One step in float64

def first_batch():
    """Images (8,1,64,64), in float64, and masks (8,64,64)."""
    images, masks = [], []
    for image, mask in LinesAndCircles(BATCH):
        images.append(image)
        masks.append(mask)
    return torch.stack(images).double(), torch.stack(masks).long()


def one_step(program):
    """Loss and model after the backward pass, from the same weights and images every time."""
    torch.manual_seed(0)
    model = program.Model().double()
    images, masks = first_batch()
    loss = cross_entropy(model(images), masks)
    with torch.autograd.set_multithreading_enabled(False):  # step 5 needs it where there are several devices
        loss.backward()
    return loss.detach(), model


def step_of_unet():
    """The same for the plain U-Net."""
    torch.manual_seed(0)
    unet = UNet(1, 3, width=8, depth=3, dropout=0).double()
    images, masks = first_batch()
    loss = cross_entropy(unet(images), masks)
    loss.backward()
    return loss.detach(), unet


def step_of_decompose():
    """The same for decompose.py."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(1, width=8, depth=3, dropout=0), Decoder(3, width=8, depth=3, dropout=0)
    model = DecomposedUNet(encoder, decoder, CommNet(step3.K, dropout=0), step3.K).double()
    images, masks = first_batch()
    tiling = Tiling((64, 64), (2, 2), cell=8)
    logits = model(tiling.split(images), tiling)
    loss = cross_entropy(tiling.stitch(logits), masks)
    loss.backward()
    return loss.detach(), model


def assert_same_gradients(one, other):
    """Two steps have the same loss and the same gradients, parameter by parameter."""
    loss, model = one
    other_loss, other_model = other
    assert_all_close([loss], [other_loss], tolerance=1e-12)
    assert_all_close(gradients_of(model), gradients_of(other_model), tolerance=1e-12)


def test_step_1_is_the_plain_unet():
    one, other = one_step(step1), step_of_unet()
    assert_same_gradients(one, other)
    assert_all_close(one[1].buffers(), other[1].buffers(), tolerance=0)


def test_steps_3_4_and_5_have_the_same_gradients():
    assert_same_gradients(one_step(step4), one_step(step3))
    assert_same_gradients(one_step(step5), one_step(step3))


@pytest.mark.parametrize("program", [step4, step5])
def test_steps_4_and_5_have_the_gradients_and_running_statistics_of_decompose(program):
    one, other = one_step(program), step_of_decompose()
    assert_same_gradients(one, other)
    assert_all_close(one[1].buffers(), other[1].buffers(), tolerance=1e-12)


@pytest.mark.parametrize("program, hears", [(step2, False), (step3, True), (step4, True), (step5, True)])
def test_tiles_hear_of_each_other_from_step_3_on(program, hears):
    _, model = one_step(program)
    model.eval()
    images, _ = first_batch()
    with torch.no_grad():
        before = model(images)
        images[:, :, 32:, 32:] = 1  # another last tile
        after = model(images)
    assert torch.equal(after[:, :, :32, :32], before[:, :, :32, :32]) != hears


# The table and the picture

def test_one_tile_and_four_have_the_same_losses_if_they_overlap_as_far_as_the_unet_sees():
    curves = steps.compare_grids(steps=2)
    one_tile = curves["one tile"]
    assert curves["overlap of 48 pixels"] == pytest.approx(one_tile, rel=1e-12)
    assert curves["no overlap"] != pytest.approx(one_tile, rel=1e-6)


def test_a_quick_run_leaves_a_table_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "PROGRAMS", {"1": step1})
    steps.main(["--quick"])
    folder = tmp_path / "runs/steps-quick"
    assert "| 1.00 |" in (folder / "steps.md").read_text()
    assert (folder / "steps.png").exists()


# The files and the page

@pytest.mark.parametrize("source", SOURCES)
def test_each_program_is_short_and_imports_no_machinery(source):
    assert len(source.splitlines()) <= 100
    imported = set(re.findall(r"^(?:from|import) ([\w.]+)", source, re.MULTILINE))
    allowed = {"torch", "torch.func", "torch.nn.functional", "torch.utils.checkpoint", "torch.utils.data", "comm_net",
               "synthetic", "unet", "experiments.step_report"}
    assert imported <= allowed


def test_the_page_shows_step_1_and_what_each_later_step_changes():
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert program == SOURCES[0]
    shown = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    expected = []
    for before, after in zip(SOURCES, SOURCES[1:]):
        lines = difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), n=1)
        expected.append("".join(lines))
    assert shown == expected


def test_the_page_is_short():
    assert len(PAGE.encode()) <= 12_000
