"""The animation of the idea, and what one pixel sees."""

import pytest
import torch
from PIL import Image

from conftest import ROOT
from decompose import Tiling
from experiments import animation, pixel
from support.model import build_model
from synthetic import LinesAndCircles

SIZE = (64, 96)
PIXEL = (21, 50)
CONFIG = {"depth": 2, "image_size": SIZE, "overlap": 0, "mean": [0.0], "std": [1.0], "amp": False, "recompute": False}


@pytest.mark.parametrize("grid, comm_channels, dilations, box", [
    ((4, 6), 0, (1, 1, 1), (16, 32, 48, 64)),  # without communication: its own tile
    ((1, 1), 0, (1, 1, 1), (0, 42, 30, 74)),  # the plain U-Net: its receptive field, as far as the image goes
    ((4, 6), 4, (1,), (0, 48, 32, 80)),  # a reach of 8 pixels: the tiles around its own
    ((4, 6), 4, (1, 1, 1), (0, 64, 16, 96)),  # 24 pixels: one tile more on each side
    ((4, 6), 4, (1, 2, 4), (0, 64, 0, 96)),  # 56 pixels: everything
])
def test_a_pixel_sees_all_of_its_frame_and_nothing_beyond(grid, comm_channels, dilations, box):
    model = build_model(1, 3, width=2, depth=2, comm_channels=comm_channels, dilations=dilations).eval()
    assert pixel.box_seen(PIXEL, model, Tiling(SIZE, grid, cell=4), depth=2) == box

    for weight in model.parameters():
        weight.data = weight.data.abs()  # so that nothing cancels, and no ReLU is 0
    total = torch.zeros(SIZE)
    for _ in range(4):  # a pooling lets only one of four pixels through, another one in another image
        total += pixel.gradient_size(PIXEL, model, torch.rand(1, 1, *SIZE), CONFIG | {"grid": grid})
    top, bottom, left, right = box
    inside = total[top:bottom, left:right]
    assert total.count_nonzero() == inside.count_nonzero()
    for border in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
        assert border.any()


def test_the_network_of_the_animation_is_looked_at_and_not_changed():
    model = build_model(1, 3).eval()
    image, mask = LinesAndCircles(1)[0]
    tiling = Tiling((64, 64), (2, 2), cell=8)
    maps, drawn = animation.look_inside(model, image, mask, tiling)
    assert [tuple(coarse_map.shape) for coarse_map in maps] == [(8, 8)] * 4
    logits = tiling.stitch(model(tiling.split(image[None]), tiling, [torch.device("cpu")] * 4))
    assert torch.equal(logits[0].argmax(dim=0), drawn)
    for layer in model.modules():
        assert not layer._forward_hooks and not layer._forward_pre_hooks


@pytest.mark.parametrize("script, name, smallest", [(animation, "animation.gif", 20_000), (pixel, "pixel.png", 10_000)])
def test_a_quick_run_draws_its_picture_and_trains_nothing_twice(script, name, smallest, tmp_path, monkeypatch,
                                                                 no_pictures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(animation, "MOVE", (1.0,))  # fewer frames
    script.main(["--quick"])
    folder = script.__name__.split(".")[1] + "-quick"
    assert smallest < (tmp_path / "runs" / folder / name).stat().st_size < 300_000
    monkeypatch.setattr("train.main", None)
    monkeypatch.setattr(script, "draw", print)
    script.main(["--quick"])


def test_the_pictures_of_the_readme_move_and_are_small():
    path = ROOT / "experiments/animation.gif"
    assert path.stat().st_size < 500_000
    with Image.open(path) as film:
        assert film.size == (720, 440) and film.n_frames > 30 and film.info["loop"] == 0
        milliseconds = 0
        for i in range(film.n_frames):
            film.seek(i)
            milliseconds += film.info["duration"]
    assert 5000 < milliseconds < 10_000
    assert (ROOT / "experiments/pixel.png").stat().st_size < 300_000
