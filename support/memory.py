"""Counting the bytes of all tensors that are alive, whether they are real or fake."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is active, it follows every tensor that is made. Tensors that are there already: `follow`.

    live, peak: bytes on each device now, and at most so far. A storage counts once, however many views it has.
    moved: bytes copied from one device to another so far, by (from, to).
    """

    def __init__(self):
        super().__init__()
        self.live = Counter()
        self.peak = Counter()
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

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        if function is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.moved[str(args[0].device), str(out.device)] += out.nbytes
        return out
