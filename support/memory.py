"""Counting the bytes of all tensors that are alive, whether they are real or fake."""

import weakref
from collections import Counter

import torch
import torch.distributed  # which defines the all-reduce
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is active, it follows every tensor that is made. Tensors that are there already: `follow`.

    live: bytes on each device now. A storage counts once, however many views it has.
    peak: the most so far in this phase. phases: the peaks of the phases that `end_phase` has ended.
    moved: bytes copied from one device to another so far, by (from, to). What is summed over
        processes by an all-reduce is counted by (from, "other processes").
    """

    def __init__(self):
        super().__init__()
        self.live = Counter()
        self.peak = Counter()
        self.phases = []
        self.moved = Counter()
        self.known = set()

    def follow(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        device = str(tensor.device)
        self.known.add(storage._cdata)
        self.live[device] += storage.nbytes()
        self.peak[device] = max(self.peak[device], self.live[device])
        weakref.finalize(storage, self.forget, storage._cdata, device, storage.nbytes())

    def forget(self, key: int, device: str, size: int):
        self.known.discard(key)
        self.live[device] -= size

    def end_phase(self, *_):
        """Can also be a hook of a module, which is called with more arguments."""
        self.phases.append(self.peak)
        self.peak = self.live.copy()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        if function is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.moved[str(args[0].device), str(out.device)] += out.nbytes
        if function is torch.ops.c10d.allreduce_.default:
            for tensor in args[0]:
                self.moved[str(tensor.device), "other processes"] += tensor.nbytes
        return out
