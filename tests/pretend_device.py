"""A second device for machines that have none: `pretend:0` computes on the CPU and mixes with nothing else.

A `PretendTensor` holds a CPU tensor and reports the device pretend:0. An operation that mixes the two devices
fails, as it would between two GPUs, and the bytes that cross are counted in `PretendDevice.moved`.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

try:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip("this PyTorch cannot host a device in Python", allow_module_level=True)


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):  # activation checkpointing asks every backend
        return []

    def is_autocast_enabled(self):
        return False


_setup_privateuseone_for_python_backend("pretend", backend_module=Backend())
DEVICE = torch.device("pretend:0")


class PretendTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def dispatch(function, args, kwargs):
    """Runs an operation of pretend:0 on the CPU tensors inside."""
    for tensor in tree_flatten((args, kwargs))[0]:
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, PretendTensor) and tensor.dim() > 0:
            raise RuntimeError(f"{function} mixes pretend:0 with cpu")
    inside = tree_map_only(PretendTensor, lambda tensor: tensor.inner, (args, kwargs))
    if "device" in inside[1]:
        inside[1]["device"] = torch.device("cpu")
    out = function(*inside[0], **inside[1])
    if function._schema.name.endswith("_"):  # in place: the tensor inside has changed
        return args[0]
    return tree_map_only(torch.Tensor, PretendTensor, out)


class PretendDevice(TorchDispatchMode):
    """While active, `.to("pretend:0")` and `.to("cpu")` move tensors. moved: (from, to, shape, bytes) of each move."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if function is torch.ops.aten._to_copy.default and target is not None and target != args[0].device:
            source = args[0]
            inner = source.inner if isinstance(source, PretendTensor) else source
            moved = function(inner, **(kwargs | {"device": torch.device("cpu")}))
            self.moved.append((str(source.device), str(target), tuple(source.shape), moved.nbytes))
            return PretendTensor(moved) if target.type == "pretend" else moved
        if target is not None and target.type == "pretend":
            return dispatch(function, args, kwargs)
        return function(*args, **kwargs)
