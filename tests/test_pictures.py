"""The animation of the idea, and what one pixel sees."""

import pytest
import torch
from conftest import CONFIG, CPU, ROOT
from PIL import Image

import train
from decompose import Tiling
from experiments import animation, pixel
from support.model import build_model
from support.options import pair
from synthetic import LinesAndCircles

SIZE = (64, 96)
PIXEL = (21, 50)


# What one pixel sees

def gradient_in_some_images(model, config) -> torch.Tensor:
    """A pooling lets only one of four pixels through, but another one in another image: so it is added up."""
    total = torch.zeros(SIZE)
    for _ in range(4):
        images = torch.rand(1, 1, *SIZE)
        total += pixel.gradient_size(PIXEL, model, images, config)
    return total


@pytest.mark.parametrize("tiles, comm_channels, dilations, box", [
    ("4x6", 0, "1 1 1", "16 32 48 64"),  # without communication: its own tile
    ("1x1", 0, "1 1 1", "0 42 30 74"),  # the plain U-Net: its receptive field, as far as the image goes
    ("4x6", 4, "1", "0 48 32 80"),  # a reach of 8 pixels: the tiles around its own
    ("4x6", 4, "1 1 1", "0 64 16 96"),  # 24 pixels: one tile more on each side
    ("4x6", 4, "1 2 4", "0 64 0 96"),  # 56 pixels: everything
])
def test_a_pixel_sees_all_of_its_frame_and_nothing_beyond(tiles, comm_channels, dilations, box):
    grid = pair(tiles)
    dilations = [int(number) for number in dilations.split()]
    top, bottom, left, right = [int(number) for number in box.split()]
    model = build_model(1, 3, width=2, depth=2, comm_channels=comm_channels, dilations=dilations).eval()
    seen = pixel.box_seen(PIXEL, model, Tiling(SIZE, grid, cell=4), depth=2)
    assert seen == (top, bottom, left, right)

    for weight in model.parameters():
        weight.data = weight.data.abs()  # so that nothing cancels, and no ReLU is 0
    config = {**CONFIG, "mean": [0.0], "std": [1.0], "image_size": SIZE, "grid": grid, "overlap": 0}
    gradient = gradient_in_some_images(model, config)
    inside = gradient[top:bottom, left:right]
    assert gradient.count_nonzero() == inside.count_nonzero()
    for border in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
        assert border.any()


# The animation

def test_the_network_of_the_animation_is_looked_at_and_not_changed():
    model = build_model(1, 3).eval()
    image, mask = LinesAndCircles(1)[0]
    tiling = Tiling((64, 64), (2, 2), cell=8)
    maps, drawn = animation.look_inside(model, image, mask, tiling)
    assert len(maps) == 4
    for coarse_map in maps:
        assert coarse_map.shape == (8, 8)
    logits = model(tiling.split(image[None]), tiling, [CPU] * 4)
    expected = tiling.stitch(logits)[0].argmax(dim=0)
    assert torch.equal(drawn, expected)
    for layer in model.modules():
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


# The pictures

@pytest.mark.parametrize("script, name, smallest", [
    (animation, "animation-quick/animation.gif", 20_000),
    (pixel, "pixel-quick/pixel.png", 10_000),
])
def test_a_quick_run_draws_its_picture_and_trains_nothing_twice(script, name, smallest, tmp_path, monkeypatch,
                                                                 no_pictures):
    def draw_nothing(path, folder, *what):
        pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(animation, "MOVE", (1.0,))  # fewer frames
    script.main(["--quick"])
    picture = tmp_path / "runs" / name
    assert smallest < picture.stat().st_size < 300_000

    monkeypatch.setattr(train, "main", None)  # another training would fail
    monkeypatch.setattr(script, "draw", draw_nothing)
    script.main(["--quick"])


def test_the_pictures_of_the_readme_move_and_are_small():
    path = ROOT / "experiments/animation.gif"
    assert path.stat().st_size < 500_000
    with Image.open(path) as film:
        assert film.size == (720, 440)
        assert film.n_frames > 30
        assert film.info["loop"] == 0
        milliseconds = 0
        for i in range(film.n_frames):
            film.seek(i)
            milliseconds += film.info["duration"]
    assert 5000 < milliseconds < 10_000
    assert (ROOT / "experiments/pixel.png").stat().st_size < 300_000
