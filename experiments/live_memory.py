"""Peak memory where no allocator tells it: adds up the storages of all tensors that are alive."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While active, follows every tensor that is made. Tensors that are there already: `follow`.

    live, peak: bytes on each device now, and at most so far; a storage counts once, however many views it has. What a
    kernel needs only inside itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak = Counter(), Counter()
        self.known = set()

    def follow(self, tensor: torch.Tensor):
        storage, device = tensor.untyped_storage(), str(tensor.device)
        if storage._cdata not in self.known:
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
        return out
