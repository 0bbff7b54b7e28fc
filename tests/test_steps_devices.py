"""Steps 4 and 5 of docs/steps.md on two devices, one of which is pretended."""

import pytest
from conftest import assert_same_step
from pretend_device import PretendDevice
from test_steps import BATCH, one_step

from experiments import step4, step5


@pytest.mark.parametrize("program", [step4, step5])
def test_on_two_devices_the_step_is_the_same_and_no_feature_maps_travel_but_those_that_are_sent(program, monkeypatch):
    on_one = one_step(program.Model)
    monkeypatch.setattr(program, "DEVICES", ["cpu", "pretend:0"])
    with PretendDevice() as pretend:
        on_two = one_step(program.Model)
    assert_same_step(on_two, on_one, tolerance=1e-12)

    travelled = set()
    for move in pretend.moved:
        is_map = len(move.shape) == 4 and move.shape[3] > 3  # and not the kernel of a convolution
        if is_map:
            travelled.add(move.shape)
    tile = (BATCH, 1, 32, 32)
    sent = (BATCH, program.K, 4, 4)
    logits = (BATCH, 3, 32, 32)
    assert travelled == {tile, sent, logits}
