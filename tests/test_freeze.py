"""Batch norm that keeps its running statistics: when it begins, and what it makes exact."""

import pytest
from conftest import CONFIG, assert_all_close, assert_same_step, training_step

import train
from decompose import Tiling

SIZE = (128, 96)
CELL = 2 ** CONFIG["depth"]
SEEN = 6 * CELL  # pixels: an overlap as wide as the U-Net sees, see test_unet.py


def frozen_step(grid, overlap, **changes):
    """Loss and model after the backward pass of a step whose statistics are frozen."""
    tiling = Tiling(SIZE, grid, CELL, overlap)
    return training_step(tiling, images=1, frozen=True, **changes)


@pytest.mark.parametrize("comm_channels", [0, 8])
@pytest.mark.parametrize("grid", [(4, 3), (5, 2)])
def test_a_training_step_depends_on_the_grid_if_and_only_if_the_overlap_is_narrower_than_the_unet_sees(
        grid, comm_channels, in_float64):
    """And it leaves the statistics to the last bit: the mean of twelve equal numbers would be rounded."""
    whole = frozen_step((1, 1), 0, comm_channels=comm_channels)
    for recompute in (False, True):
        cut = frozen_step(grid, SEEN, comm_channels=comm_channels, recompute=recompute)
        assert_same_step(cut, whole, tolerance=1e-13)
        assert_all_close(cut[1].buffers(), whole[1].buffers(), tolerance=0)
    narrow = frozen_step(grid, SEEN // 2, comm_channels=comm_channels)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_step(narrow, whole, tolerance=1e-9)


# When it begins

@pytest.mark.parametrize("part, steps, expected", [
    (None, 2000, 600),
    (None, 600, 300),
    (None, 100, 50),
    (None, 1, 1),
    (0.99, 4, 4),
    (0.5, 4, 2),
    (0, 4, 1),
])
def test_the_step_from_which_on_it_is_frozen(part, steps, expected):
    assert train.freeze_step_of({"freeze_batch_norm": part}, steps) == expected


def test_statistics_are_learned_up_to_this_step_of_all_epochs(tmp_path, monkeypatch, no_pictures):
    learned = []  # for each of the four steps
    batch_loss = train.batch_loss

    def watched(model, *arguments):
        norm = model.encoder.blocks[0][1]
        assert norm.weight.grad is None  # or old gradients would lie beside all activations
        learned.append(norm.training)
        return batch_loss(model, *arguments)

    monkeypatch.setattr(train, "batch_loss", watched)
    options = "--width 2 --comm-channels 4 --train-images 16 --batch-size 8 --epochs 2 --freeze-batch-norm 0.75"
    train.main(options.split() + ["--out", str(tmp_path / "run")])
    assert learned == [True, True, True, False]
