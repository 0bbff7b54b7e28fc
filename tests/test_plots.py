import matplotlib.image
import pytest
import torch

import plots


@pytest.mark.parametrize("height, width", [(32, 32), (32, 256), (256, 32)])
def test_pictures_of_any_shape_fill_their_rows(height, width, tmp_path):
    black = torch.zeros(height, width, dtype=torch.uint8)
    columns = {"image": [black[None]] * 4, "true mask": [black] * 4}
    plots.draw_predictions(tmp_path / "some.png", columns, [[]] * 4, ["black", "white"], ["k", "w"])
    picture = matplotlib.image.imread(tmp_path / "some.png")[..., :3]
    assert (picture == 0).all(axis=2).mean() > 0.6
