"""`--amp` computes in bfloat16 what float32 would give up to rounding, and keeps weights, statistics and sums in float32."""

import pytest
import torch

import train
from support import options
from support.image_files import normalise
from support.loss import loss_sums
from support.memory import LiveMemory
from support.model import build_from_config
from decompose import Tiling

CPU = torch.device("cpu")
CONFIG = {"channels": 1, "classes": "abc", "width": 8, "depth": 2, "dropout": 0.0, "comm_channels": 8,
          "dilations": [1, 1, 1], "recompute": False, "mean": [0.5], "std": [2.0], "amp": False}


def one_step(**changes):
    """Loss, gradients as one vector, and the network after a step from the same weights."""
    torch.manual_seed(0)
    config = CONFIG | changes
    model = build_from_config(config)
    images, masks = torch.randn(2, 1, 44, 64), torch.randint(0, 3, (2, 44, 64), dtype=torch.uint8)
    kinds = []
    model.decoder.head.register_forward_hook(lambda module, inputs, out: kinds.append(out.dtype))
    loss = train.batch_loss(model, images, masks, Tiling((44, 64), (2, 3), 4), [CPU], config)
    loss.backward()
    return loss, torch.cat([weight.grad.flatten() for weight in model.parameters()]), model, set(kinds)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_float32_up_to_rounding(recompute):
    (loss, gradient, _, _), (rounded, rounded_gradient, model, kinds) = one_step(), one_step(amp=True, recompute=recompute)
    assert kinds == {torch.bfloat16} and rounded.dtype == torch.float32 and rounded != loss
    assert rounded.item() == pytest.approx(loss.item(), rel=0.01)
    assert torch.cosine_similarity(gradient, rounded_gradient, dim=0) > 0.97
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point()), rounded_gradient]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)


def test_recompute_is_the_same_with_amp():
    (loss, gradient, model, _), (again, gradient_again, model_again, _) = one_step(amp=True), one_step(amp=True, recompute=True)
    assert loss == again and torch.cosine_similarity(gradient, gradient_again, dim=0) > 0.999
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), model_again.buffers()))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradients_of_many_tiles_add_up(recompute):
    """A loss that is a mean has the same gradient for 400 equal tiles as for one, but not if they are added up in bfloat16."""
    config = CONFIG | {"width": 2, "depth": 1, "comm_channels": 0, "amp": True, "recompute": recompute}
    torch.manual_seed(0)
    tile, mask = torch.randn(1, 1, 8, 8), torch.randint(0, 3, (1, 8, 8), dtype=torch.uint8)
    gradients = []
    for n in (1, 20):
        torch.manual_seed(0)
        model = build_from_config(config)
        images, masks, tiling = tile.repeat(1, 1, n, n), mask.repeat(1, n, n), Tiling((8 * n, 8 * n), (n, n), 2)
        train.batch_loss(model, images, masks, tiling, [CPU], config).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def peak_of_a_step(amp: bool) -> tuple[int, int]:
    """Bytes alive at the peak of a step with 16 small tiles, and bytes of the weights in bfloat16."""
    config = CONFIG | {"width": 16, "depth": 3, "amp": amp}
    torch.manual_seed(0)
    model = build_from_config(config)
    images, masks = torch.randn(1, 1, 64, 64), torch.zeros(1, 64, 64, dtype=torch.uint8)
    with LiveMemory() as memory:
        train.batch_loss(model, images, masks, Tiling((64, 64), (4, 4), 8), [CPU], config).backward()
    return memory.peak["cpu"], 2 * sum(weight.numel() for weight in model.parameters())


def test_a_tile_keeps_no_rounded_weights_of_its_own():
    rounded_peak, weights = peak_of_a_step(amp=True)
    peak, _ = peak_of_a_step(amp=False)
    assert rounded_peak < peak + 1.5 * weights  # one rounded copy for all tiles, and no activation is larger


def test_the_sums_of_a_large_image_are_exact():
    """4096x4096 pixels are 2^24, the last whole number up to which float32 counts, and far beyond bfloat16 (2^8)."""
    logits = torch.tensor([-300.0, 300.0], dtype=torch.bfloat16)[None, :, None, None].expand(1, 2, 4096, 4096)
    sums = loss_sums(logits, torch.ones(1, 4096, 4096, dtype=torch.uint8))
    assert sums.dtype == torch.float32 and sums.tolist() == [0, 2**24, 0, 2**25, 0, 2**24]


def test_it_is_on_where_the_hardware_has_it_unless_asked_otherwise(monkeypatch, tmp_path):
    def asked(*arguments):
        return options.parse([*arguments, "--out", str(tmp_path / "new")], options.make_parser(""))["amp"]

    for has in (False, True):
        monkeypatch.setattr(options, "has_bfloat16", lambda: has)
        assert (asked(), asked("--amp"), asked("--no-amp")) == (has, True, False)


def test_images_of_a_narrow_range_are_normalised_before_they_are_rounded():
    """In bfloat16, which autocast computes in, 1001 - 1000 would be 0."""
    image = torch.tensor([[[[999, 1000], [1001, 1005]]]], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = normalise(image, [1000.0], [5.0])
    torch.testing.assert_close(x, torch.tensor([[[[-0.2, 0], [0.2, 1]]]]))


def test_every_channel_is_normalised_by_its_own_numbers_and_white_is_one():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    x = normalise(image, [0.5, 0.2, 0.0], [0.5, 0.1, 2.0])
    torch.testing.assert_close(x.flatten(), torch.tensor([-1, 0, 0.5]))
    x = normalise(image.to(torch.uint16), [0.0, 0.0, 0.0], [1.0, 1.0, 51 / 65535])
    torch.testing.assert_close(x.flatten(), torch.tensor([0, 51 / 65535, 5]))
