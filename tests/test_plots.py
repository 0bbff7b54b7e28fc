import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CPU

import train
from decompose import Tiling
from support import plots
from support.image_folder import ImageFolder
from support.memory import LiveMemory
from support.model import build_model
from support.plots import Thinned


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
    image = np.array([[[missing, 2.0, 3.0, 4.0]]])
    np.testing.assert_allclose(plots.visible(image)[0, :, 0], [0, 0, 0.5, 1])


# Pictures of large images

@pytest.mark.parametrize("size, step", [((1024, 64), 1), ((1025, 64), 2), ((64, 5000), 5)])
def test_an_image_is_thinned_until_no_side_is_longer_than_1024_pixels(size, step):
    height, width = size
    image = torch.arange(height * width).view(1, height, width)
    tiling = Tiling(size, grid=(2, 2), cell=8)
    picture = Thinned(tiling).image(image)
    assert torch.equal(picture, image[:, ::step, ::step])
    assert picture.untyped_storage().nbytes() == picture.nbytes  # it keeps no large image in memory


@pytest.mark.parametrize("longest", [100, 30, 20, 7])  # with 7, some tiles have no pixel in the picture
def test_tiles_are_written_to_the_thinned_image(longest):
    image = torch.arange(45 * 61).view(45, 61)
    tiling = Tiling((45, 61), grid=(5, 4), cell=4)  # uneven tiles, and padding at the bottom and right
    picture = Thinned(tiling, longest)
    expected = picture.image(image)
    written = torch.zeros_like(expected)
    for i, tile in enumerate(tiling.split(image, overlap=False)):
        picture.write(i, tile, written)
    assert torch.equal(written, expected)


def test_the_borders_between_tiles_are_drawn_where_they_are_in_the_thinned_image():
    tiling = Tiling((40, 60), grid=(2, 3), cell=4)
    boxes = Thinned(tiling, longest=20).boxes()
    assert boxes[4] == (20 / 3, 40 / 3, 20 / 3, 40 / 3)


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
        pictures, _ = train.predict_some(model, images, config, [CPU])
    on_disk = image.nbytes + mask.nbytes  # counted as tensors, but not read
    assert memory.peak["cpu"] - on_disk < image.nbytes / 3
    (drawn_image,) = pictures["image"]
    (drawn_mask,) = pictures["true mask"]
    assert np.array_equal(drawn_image.permute(1, 2, 0), image[::3, ::3])
    assert np.array_equal(drawn_mask, mask[::3, ::3])
    assert pictures["prediction"][0].shape == (234, 700)
