import pytest
import torch
from conftest import number_of_parameters

from comm_net import CommNet


@pytest.mark.parametrize("channels, dilations, expected", [
    (64, (1, 1, 1), 307_776),
    (32, (1, 1, 1), 77_088),
    (32, (1, 2, 4), 77_088),
])
def test_parameter_counts_of_the_paper_to_which_dilations_add_nothing(channels, dilations, expected):
    net = CommNet(channels, dilations=dilations)
    assert number_of_parameters(net) == expected


@pytest.mark.parametrize("dilations, cells", [
    ((1, 1, 1), 6),
    ((1, 2, 4, 8), 30),
    ((3,), 6),
])
def test_it_sees_as_far_as_it_says_and_no_further(dilations, cells):
    """The gradient of a cell in the middle differs from zero for the cells that it depends on."""
    net = CommNet(8, dilations=dilations)
    net.eval()
    middle = cells + 4
    side = 2 * middle
    maps = torch.randn(8, side, side, requires_grad=True)
    heard = net(maps[None])[0, :, middle, middle]
    heard.sum().backward()
    _, rows, columns = maps.grad.nonzero(as_tuple=True)
    for seen in (rows, columns):
        assert seen.min() == middle - cells
        assert seen.max() == middle + cells
    assert net.reach(depth=3) == 8 * cells
