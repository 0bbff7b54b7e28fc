import pytest
import torch

from comm_net import CommNet


@pytest.mark.parametrize("channels, expected", [(64, 307_776), (32, 77_088)])
def test_parameter_counts_of_the_paper(channels, expected):
    assert sum(weight.numel() for weight in CommNet(channels).parameters()) == expected


def test_it_sees_as_far_as_it_says_and_no_further():
    net = CommNet(8).eval()
    maps = torch.randn(1, 8, 21, 21, requires_grad=True)
    net(maps)[..., 10, 10].sum().backward()
    rows, columns = maps.grad.abs().sum(dim=(0, 1)).nonzero().T
    reach = net.reach(depth=0)
    assert reach == 6 and net.reach(depth=3) == 48 and net.reach(depth=4) == 96
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10 - reach, 10 + reach, 10 - reach, 10 + reach)
