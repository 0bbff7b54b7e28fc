import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CONFIG, CPU, ROOT

import train
from support import plots
from support.folder import ImageFolder
from support.memory import LiveMemory
from support.model import build_model

BLACK_AND_WHITE = [(0, 0, 0), (1, 1, 1)]


@pytest.mark.parametrize("height, width", [
    (32, 32),
    (32, 256),
    (96, 32),
])
def test_pictures_of_any_shape_fill_their_rows(height, width, tmp_path):
    mask = np.zeros((height, width), np.uint8)
    columns = {
        "image": [mask[None]] * 4,
        "true mask": [mask] * 4,
    }
    boxes = [[]] * 4
    path = tmp_path / "some.png"
    names = ["black", "white"]
    plots.draw_predictions(path, columns, boxes, names, BLACK_AND_WHITE)
    picture = matplotlib.image.imread(path)[..., :3]
    black = (picture == 0).all(axis=2)
    assert black.mean() > 0.5


@pytest.mark.parametrize("missing", [np.nan, -np.inf, -9999, -1e300])
@pytest.mark.filterwarnings("error")
def test_pixels_without_data_are_black_and_leave_the_others_their_grey(missing):
    image = np.full((1, 1, 1400), float(missing))
    image[..., 900:] = np.linspace(2, 6, 500)
    grey = plots.visible(image)[0, :, 0]
    assert (grey[:900] == 0).all()
    expected = np.linspace(0, 1, 500)
    np.testing.assert_allclose(grey[900:], expected, atol=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("image, expected", [
    (np.array([0, 51, 255], np.uint8), [0, 0.2, 1]),
    (np.array([False, True, True]), [0, 1, 1]),
    (np.full(3, np.nan), [0, 0, 0]),
    (np.full(3, 7.0), [7 / 255] * 3),
])
def test_photographs_keep_their_colours_and_images_of_any_numbers_are_drawn(image, expected):
    image = image.reshape(3, 1, 1)
    visible = plots.visible(image)
    np.testing.assert_allclose(visible[0, 0], expected)


@pytest.mark.parametrize("mask, expected", [
    ([[0, 1, 255]], [[0, 1, 0.5]]),
    ([[False, True]], [[0, 1]]),
])
def test_a_mask_has_the_colours_of_its_classes_and_grey_where_it_does_not_count(mask, expected):
    painted = plots.paint(np.array(mask), BLACK_AND_WHITE)
    red = painted[..., 0]
    assert red.tolist() == expected


def test_it_draws_whatever_backend_matplotlib_is_told_to_take(tmp_path):
    draw = """
import sys
from numpy import eye
from support import options, plots
plots.draw_predictions(sys.argv[1], {"image": [eye(2)]}, [[]], ["a", "b"], [(0, 0, 0), (1, 1, 1)])
"""
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-c", draw, tmp_path / "some.png"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert matplotlib.image.imread(tmp_path / "some.png").size > 0


def test_the_pictures_of_a_large_array_on_disk_take_a_part_of_its_memory(tmp_path):
    image = np.zeros((700, 2100, 3), np.uint8)
    image[:350, :, 0] = 200
    mask = np.zeros((700, 2100), np.uint8)
    mask[:350] = 1
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "mask.npy", mask)
    images = ImageFolder([(tmp_path / "image.npy", tmp_path / "mask.npy")])
    model = build_model(3, 2, width=1, depth=2, comm_channels=0)
    config = {
        **CONFIG,
        "image_size": (700, 2100),
        "grid": (4, 12),
        "overlap": 0,
        "mean": [0.5] * 3,
        "std": [1.0] * 3,
    }
    with LiveMemory() as memory:
        pictures, boxes = train.predict_some(model, images, config, [CPU])
    on_disk = image.nbytes + mask.nbytes  # counted as tensors, but not read
    assert memory.peak["cpu"] - on_disk < 2 * image.nbytes  # in float32, the image alone would be four times as large
    (drawn_image,) = pictures["image"]
    (drawn_mask,) = pictures["true mask"]
    assert np.array_equal(drawn_image.permute(1, 2, 0), image[::3, ::3])
    assert np.array_equal(drawn_mask, mask[::3, ::3])
    assert pictures["prediction"][0].shape == (234, 700)
    assert len(boxes[0]) == 48
    assert boxes[0][13].tolist() == [176 / 3, 352 / 3, 176 / 3, 352 / 3]
