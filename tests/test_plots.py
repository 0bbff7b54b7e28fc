import matplotlib.image
import pytest
import torch

from support import plots


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
