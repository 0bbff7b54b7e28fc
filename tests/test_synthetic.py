from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from synthetic import LinesAndCircles


def tiles_with_circles(data, mask):
    """(row, column) of the tile of every circle pixel."""
    return {(int(y) // data.tile[0], int(x) // data.tile[1]) for y, x in (mask == 2).nonzero()}


@pytest.mark.parametrize("size, grid", [((64, 64), (2, 2)), ((32, 256), (1, 8)), ((100, 70), (3, 2))])
def test_two_whole_discs_in_different_tiles_of_any_image_and_grid(size, grid):
    data = LinesAndCircles(50, size, grid)
    for image, mask in data:
        assert image.shape == (1, *size) and image.dtype == torch.float32 and mask.shape == size and mask.dtype == torch.uint8
        assert len(tiles_with_circles(data, mask)) == 2
        assert torch.equal(image[0] == 1, mask == 2)
        assert (mask == 2).sum() == 2 * 49  # a disc of radius 4 has 49 pixels


def test_the_line_is_straight_joins_the_centres_and_is_three_wide():
    data = LinesAndCircles(200)
    for _, mask in data:
        discs = (mask == 2).nonzero().double()
        first = discs[0] + torch.tensor([4.0, 0.0])  # the top pixel of a disc is above its centre
        a = discs[(discs - first).norm(dim=1) <= 4].mean(dim=0)
        b = discs[(discs - first).norm(dim=1) > 4.5].mean(dim=0)
        if (a - b).norm() < 12:
            continue  # the discs touch: the two cannot be told apart this way
        direction = (b - a) / (b - a).norm()
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        away = torch.stack([y, x], dim=-1).double() - a
        along, across = away @ direction, away[..., 1] * direction[0] - away[..., 0] * direction[1]
        near = (across.abs() <= 1.5 - 1e-9) & (along > 0) & (along < (b - a).norm())
        far = (across.abs() > 1.5 + 1e-9) | (along < 0) | (along > (b - a).norm())
        assert (mask[near] > 0).all() and (mask[far] != 1).all()


def test_max_apart_bounds_the_distance_of_the_discs():
    data = LinesAndCircles(100, (32, 256), (1, 8), max_apart=2)
    distances = {max(columns) - min(columns) for _, mask in data
                 if (columns := [column for _, column in tiles_with_circles(data, mask)])}
    assert distances == {1, 2}


def test_every_pair_of_tiles_is_as_likely_as_any_other():
    data = LinesAndCircles(1)
    rng = np.random.default_rng(0)
    counts = Counter(tuple(map(tuple, data.draw_tiles(rng))) for _ in range(12_000))
    assert len(counts) == 12 and all(850 < count < 1150 for count in counts.values())


def test_a_huge_image_needs_no_list_of_all_its_pairs():
    LinesAndCircles(1, (2**15, 2**15), (2**10, 2**10))


def test_an_image_depends_on_seed_split_and_index_alone():
    data = LinesAndCircles(20)
    backwards = [LinesAndCircles(500)[i] for i in reversed(range(20))][::-1]
    workers = [(image[0], mask[0]) for image, mask in DataLoader(data, num_workers=2)]
    for one, two, three in zip(data, backwards, workers):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three))
    for other in (LinesAndCircles(20, seed=1), LinesAndCircles(20, split="test")):
        assert sum(torch.equal(a[1], b[1]) for a, b in zip(data, other)) <= 1


@pytest.mark.parametrize("size, grid", [((64, 64), (1, 1)), ((64, 64), (8, 8)), ((64, 64), (0, 2))])
def test_an_image_that_cannot_hold_two_discs_in_two_tiles_is_refused(size, grid):
    with pytest.raises(ValueError, match="max_apart 0"):
        LinesAndCircles(1, max_apart=0)
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} in {grid[0]}x{grid[1]} tiles"):
        LinesAndCircles(1, size, grid)
