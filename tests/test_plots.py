import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CPU, ROOT

import train
from support import plots
from support.folder import ImageFolder
from support.memory import LiveMemory
from support.model import build_model


@pytest.mark.parametrize("height, width", [(32, 32), (32, 256), (256, 32)])
def test_pictures_of_any_shape_fill_their_rows(height, width, tmp_path):
    mask = torch.zeros(height, width, dtype=torch.uint8)
    image = mask[None]
    columns = {"image": [image] * 4, "true mask": [mask] * 4}
    boxes = [[]] * 4
    path = tmp_path / "some.png"
    plots.draw_predictions(path, columns, boxes, ["black", "white"], ["k", "w"])
    picture = matplotlib.image.imread(path)[..., :3]
    black = (picture == 0).all(axis=2)
    assert black.mean() > 0.6


@pytest.mark.parametrize("missing", [np.nan, -np.inf, -9999, -1e300])
@pytest.mark.filterwarnings("error")
def test_pixels_without_data_are_black_and_leave_the_others_their_grey(missing):
    image = np.array([[[missing] * 20 + [2.0, 3.0, 4.0, 5.0, 6.0]]])
    grey = plots.visible(image)[0, :, 0]
    np.testing.assert_allclose(grey[19:], [0, 0, 0.25, 0.5, 0.75, 1])


def test_photographs_keep_their_colours_and_an_image_of_one_value_is_drawn():
    image = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1)
    np.testing.assert_allclose(plots.visible(image)[0, 0], [0, 0.2, 1], rtol=1e-6)
    assert np.isfinite(plots.visible(np.full((1, 2, 2), 7.0))).all()


def test_it_draws_whatever_backend_matplotlib_is_told_to_take(tmp_path):
    draw = ("import sys, numpy; from support import options, plots; "
            "plots.draw_predictions(sys.argv[1], {'mask': [numpy.eye(2)]}, [[]], ['a', 'b'], ['k', 'w'])")
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", draw, tmp_path / "some.png"], cwd=ROOT, env=environment, check=True)
    assert matplotlib.image.imread(tmp_path / "some.png").size > 0


# Pictures of large images

@pytest.mark.parametrize("size, step", [((1024, 64), 1), ((1025, 64), 2), ((64, 5000), 5)])
def test_an_image_is_thinned_until_no_side_is_longer_than_1024_pixels(size, step):
    assert plots.downsampling(size, longest=1024) == step


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
        "image_size": (700, 2100),
        "grid": (4, 12),
        "depth": 2,
        "overlap": 0,
        "mean": [0.5] * 3,
        "std": [1.0] * 3,
        "amp": False,
    }
    with LiveMemory() as memory:
        pictures, boxes = train.predict_some(model, images, config, [CPU])
    on_disk = image.nbytes + mask.nbytes  # counted as tensors, but not read
    assert memory.peak["cpu"] - on_disk < image.nbytes
    (drawn_image,) = pictures["image"]
    (drawn_mask,) = pictures["true mask"]
    assert np.array_equal(drawn_image.permute(1, 2, 0), image[::3, ::3])
    assert np.array_equal(drawn_mask, mask[::3, ::3])
    assert pictures["prediction"][0].shape == (234, 700)
    assert len(boxes[0]) == 48
    assert boxes[0][13].tolist() == [176 / 3, 352 / 3, 176 / 3, 352 / 3]
