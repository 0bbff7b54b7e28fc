import pytest
import torch

from comm_net import CommNet


@pytest.mark.parametrize("channels, expected", [(64, 307_776), (32, 77_088)])
def test_parameter_counts_of_the_paper(channels, expected):
    assert sum(weight.numel() for weight in CommNet(channels).parameters()) == expected


def test_dilations_cost_no_parameters():
    counts = {sum(weight.numel() for weight in CommNet(8, dilations=d).parameters()) for d in ((1, 1, 1), (1, 2, 4))}
    assert len(counts) == 1


@pytest.mark.parametrize("dilations, cells", [((1, 1, 1), 6), ((1, 2, 4), 14), ((1, 2, 4, 8), 30), ((3,), 6)])
def test_it_sees_as_far_as_it_says_and_no_further(dilations, cells):
    net = CommNet(8, dilations=dilations).eval().double()
    side = 2 * cells + 9
    maps = torch.randn(1, 8, side, side, requires_grad=True, dtype=torch.double)
    net(maps)[..., cells + 4, cells + 4].sum().backward()
    seen = maps.grad.abs().sum(dim=(0, 1)).nonzero()
    assert net.reach(depth=0) == cells and net.reach(depth=3) == 8 * cells and net.reach(depth=4) == 16 * cells
    assert seen.amin(dim=0).tolist() == [4, 4] and seen.amax(dim=0).tolist() == [2 * cells + 4] * 2
