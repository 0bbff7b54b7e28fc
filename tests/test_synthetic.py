from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from synthetic import BACKGROUND, CIRCLE, LINE, LinesAndCircles


def tiles_with_circles(data, mask):
    """The tiles (row, column) in which there is a pixel of a circle."""
    height, width = data.tile
    tiles = set()
    for y, x in (mask == CIRCLE).nonzero().tolist():
        tiles.add((y // height, x // width))
    return tiles


def test_names_and_colours_go_with_the_class_numbers():
    names = LinesAndCircles.classes
    assert (names[BACKGROUND], names[LINE], names[CIRCLE]) == ("background", "line", "circle")
    assert len(names) == len(LinesAndCircles.colors) == 3


@pytest.mark.parametrize("size, grid", [
    ((64, 64), (2, 2)),
    ((32, 256), (1, 8)),
    ((100, 70), (3, 2)),
])
def test_two_whole_discs_in_different_tiles_of_any_image_and_grid(size, grid):
    data = LinesAndCircles(50, size, grid)
    for image, mask in data:
        assert image.shape == (1, *size)
        assert image.dtype == torch.float32
        assert mask.shape == size
        assert mask.dtype == torch.uint8
        assert len(tiles_with_circles(data, mask)) == 2
        assert torch.equal(image[0] == 1, mask == CIRCLE)
        assert torch.equal(image[0] == 0, mask != CIRCLE)
        assert (mask == CIRCLE).sum() == 2 * 49  # a disc of radius 4 has 49 pixels


def test_the_line_is_straight_joins_the_centres_and_is_three_wide():
    """In complex numbers: divided by end - start, a point between the two has a real part from 0 to 1."""
    data = LinesAndCircles(1)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    points = x + 1j * y
    for _ in range(200):
        centres = data.draw_centres(rng)
        _, mask = data.draw(*centres)
        start, end = centres[:, 1] + 1j * centres[:, 0]
        relative = (points - start) / (end - start)
        across = abs(relative.imag * (end - start))
        expected = np.full((64, 64), BACKGROUND)
        expected[(across < 1.5 + 1e-9) & (relative.real > 0) & (relative.real < 1)] = LINE
        expected[abs(points - start) <= 4] = CIRCLE
        expected[abs(points - end) <= 4] = CIRCLE
        assert np.array_equal(mask, expected)


def test_max_apart_bounds_the_distance_of_the_discs():
    data = LinesAndCircles(100, (32, 256), (1, 8), max_apart=2)
    distances = set()
    for _, mask in data:
        (_, first), (_, second) = tiles_with_circles(data, mask)
        distances.add(abs(first - second))
    assert distances == {1, 2}


def test_every_pair_of_tiles_is_as_likely_as_any_other():
    data = LinesAndCircles(1)
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(12_000):
        first, second = data.draw_tiles(rng).tolist()
        counts[tuple(first), tuple(second)] += 1
    assert len(counts) == 12
    assert min(counts.values()) > 850
    assert max(counts.values()) < 1150


def test_a_huge_image_needs_no_list_of_all_its_pairs():
    LinesAndCircles(1, (2**15, 2**15), (2**10, 2**10))


def assert_same_pairs(one, other):
    for (image, mask), (other_image, other_mask) in zip(one, other, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(mask, other_mask)


def test_an_image_depends_neither_on_the_order_nor_on_the_length():
    long = LinesAndCircles(500)
    short = LinesAndCircles(20)
    for i in reversed(range(20)):
        assert_same_pairs([short[i]], [long[i]])


def test_an_image_does_not_depend_on_the_process_that_draws_it():
    data = LinesAndCircles(20)
    assert_same_pairs(data, DataLoader(data, batch_size=None, num_workers=2))


@pytest.mark.parametrize("option", [{"seed": 1}, {"split": "test"}])
def test_another_seed_or_split_has_other_images(option):
    equal = 0
    for (_, mask), (_, other_mask) in zip(LinesAndCircles(20), LinesAndCircles(20, **option)):
        equal += torch.equal(mask, other_mask)
    assert equal <= 1


@pytest.mark.parametrize("grid", [(1, 1), (8, 8), (0, 2)])
def test_an_image_that_cannot_hold_two_discs_in_two_tiles_is_refused(grid):
    with pytest.raises(ValueError, match=f"64x64 in {grid[0]}x{grid[1]} tiles"):
        LinesAndCircles(1, (64, 64), grid)


def test_discs_that_are_to_be_in_the_same_tile_are_refused():
    with pytest.raises(ValueError, match="max_apart 0"):
        LinesAndCircles(1, max_apart=0)
