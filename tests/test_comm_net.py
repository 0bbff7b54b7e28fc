import pytest
import torch
from conftest import number_of_parameters

from comm_net import CommNet


@pytest.mark.parametrize("channels, expected", [(64, 307_776), (32, 77_088)])
def test_parameter_counts_of_the_paper(channels, expected):
    assert number_of_parameters(CommNet(channels)) == expected


def test_dilations_cost_no_parameters():
    plain = CommNet(8, dilations=(1, 1, 1))
    dilated = CommNet(8, dilations=(1, 2, 4))
    assert number_of_parameters(plain) == number_of_parameters(dilated)


REACH = pytest.mark.parametrize("dilations, cells", [
    ((1, 1, 1), 6),
    ((1, 2, 4), 14),
    ((1, 2, 4, 8), 30),
    ((3,), 6),
])


@REACH
def test_it_says_how_far_it_sees_in_pixels(dilations, cells):
    net = CommNet(8, dilations=dilations)
    assert net.reach(depth=0) == cells
    assert net.reach(depth=3) == 8 * cells
    assert net.reach(depth=4) == 16 * cells


@REACH
def test_it_sees_as_far_as_it_says_and_no_further(dilations, cells):
    """The gradient of a cell in the middle differs from zero for the cells that it depends on."""
    net = CommNet(8, dilations=dilations).eval().double()
    middle = cells + 4
    side = 2 * middle + 1
    maps = torch.randn(1, 8, side, side, requires_grad=True, dtype=torch.double)
    net(maps)[:, :, middle, middle].sum().backward()
    seen = maps.grad.abs().sum(dim=(0, 1)).nonzero()
    nearest, furthest = middle - cells, middle + cells
    assert seen.amin(dim=0).tolist() == [nearest, nearest]
    assert seen.amax(dim=0).tolist() == [furthest, furthest]
