"""A second device for machines that have none: `pretend:0` computes on the CPU and mixes with nothing else.

A `PretendTensor` holds a CPU tensor and reports the device pretend:0. An operation that mixes the
two devices fails, as it would between two GPUs, and the tensors that cross are noted in
`PretendDevice.moved`.
"""

from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

try:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip("this PyTorch cannot host a device in Python", allow_module_level=True)


class Backend(_DummyBackendModule):
    def manual_seed_all(self, seed):  # torch.manual_seed calls it
        pass

    def get_amp_supported_dtype(self):  # activation checkpointing asks every backend
        return []

    def is_autocast_enabled(self):
        return False


_setup_privateuseone_for_python_backend("pretend", backend_module=Backend())
CPU = torch.device("cpu")
DEVICE = torch.device("pretend:0")


class PretendTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute_inside(function, args, kwargs or {})


def inner_of(tensor: PretendTensor) -> torch.Tensor:
    return tensor.inner


def check_devices(function, tensors):
    """RuntimeError: a tensor of the CPU is among those of pretend:0. Single numbers may be, as with GPUs."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, PretendTensor) and tensor.dim() > 0:
            raise RuntimeError(f"{function} mixes pretend:0 with cpu")


def compute_inside(function, args, kwargs):
    """Runs an operation of pretend:0 on the CPU tensors inside."""
    check_devices(function, tree_leaves((args, kwargs)))
    inner_args = tree_map_only(PretendTensor, inner_of, args)
    inner_kwargs = tree_map_only(PretendTensor, inner_of, kwargs)
    if "device" in inner_kwargs:
        inner_kwargs["device"] = CPU
    out = function(*inner_args, **inner_kwargs)
    if out is not None and function._schema.name.endswith("_"):  # in place: the tensor inside has changed
        return args[0]
    return tree_map_only(torch.Tensor, PretendTensor, out)


class Move(NamedTuple):
    """A tensor that was copied from one device to another."""

    source: str
    target: str
    shape: tuple


class PretendDevice(TorchDispatchMode):
    """While active, `.to("pretend:0")` and `.to("cpu")` move tensors. moved: a `Move` for each."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if target is None:
            return function(*args, **kwargs)
        if function is torch.ops.aten._to_copy.default and target != args[0].device:
            return self.move(function, args[0], target, kwargs)
        if target.type == "pretend":
            return compute_inside(function, args, kwargs)
        return function(*args, **kwargs)

    def move(self, copy, tensor: torch.Tensor, target: torch.device, kwargs: dict) -> torch.Tensor:
        self.moved.append(Move(str(tensor.device), str(target), tuple(tensor.shape)))
        if isinstance(tensor, PretendTensor):
            tensor = tensor.inner
        copied = copy(tensor, **{**kwargs, "device": CPU})
        if target == CPU and kwargs.get("non_blocking"):
            copied.zero_()  # as from a GPU: who does not wait for a copy reads it before it is there
        if target.type == "pretend":
            copied = PretendTensor(copied)
        return copied
