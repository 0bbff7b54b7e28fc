"""Peak memory where no allocator tells it: adds up the storages of all tensors that are alive."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While active, follows every tensor that is made, and those in `holders` (tensors, modules, optimizers).

    live, peak: bytes now, and at most so far. A storage counts once, however many views it has, until it is freed.
    What a kernel needs only inside itself is not seen. Checked against the resident memory of a process in the tests.
    """

    def __init__(self, *holders):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()
        for holder in holders:
            if isinstance(holder, torch.nn.Module):
                tensors = [*holder.parameters(), *holder.buffers(), *(w.grad for w in holder.parameters())]
            elif isinstance(holder, torch.optim.Optimizer):
                tensors = tree_leaves(list(holder.state.values()))
            else:
                tensors = [holder]
            self.follow(tensors)

    def follow(self, tensors: list):
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                weakref.finalize(storage, self.release, key, size)
        self.peak = max(self.peak, self.live)

    def release(self, key: int, size: int):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.follow(tree_leaves(out))
        return out
