"""Many processes, started by torchrun: each takes its share of every batch, and cuts its images over its own GPUs.

    torchrun --nnodes 8 --nproc-per-node 1 train.py --gpus 4 ...     # 8 machines with 4 GPUs each
    torchrun --nproc-per-node 2 train.py --gpus 2 ...                # one machine with 4 GPUs

All of them hold the same weights. Once per step the gradients are averaged (by DistributedDataParallel) and the few sums
of the loss added; once per epoch the running statistics are averaged. Nothing that travels has the size of an image.
Without torchrun there is one process, and everything here leaves things as they are.
"""

import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Sampler

CAN_RESTART = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"  # torchrun --max-restarts
REMEMBERS = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # after a restart, the addresses of before
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # which process of this machine


@contextmanager
def together():
    """Inside, the processes that torchrun started know each other."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    if dist.is_initialized():  # not after an error: to wait for processes that wait for this one takes for ever
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is, 0 for the first; only that one writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gpus_each() -> int:
    """How many GPUs of this machine each of its processes can have."""
    return torch.cuda.device_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def find_devices(gpus: int, tiles: str) -> list[torch.device]:
    """The GPUs asked for as far as they exist, else the CPU. Says in one line where the tiles are computed; from then on
    the first process speaks for all."""
    found, which = min(gpus, gpus_each()), LOCAL_RANK
    devices = [torch.device("cuda", which * found + i) for i in range(found)] or [torch.device("cpu")]
    short = f" ({gpus} GPUs asked for, {found} found)" if found < gpus else ""
    process = f"process {rank()} of {count()}: " if count() > 1 else ""
    print(f"{process}{tiles} on {', '.join(map(str, devices))}{short}", flush=True)
    if rank():
        sys.stdout = open(os.devnull, "w")
    return devices


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def is_lost(error: Exception) -> bool:
    """Whether an error only says that another process has ended."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def from_first(make: Callable):
    """What `make` returns in the first process, in every process. Only the first one calls it; if it fails there, it says
    why, and the others end."""
    if not dist.is_initialized():
        return make()
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # the first may have many images to look at
    box = [None, True]
    try:
        if rank() == 0:
            box = [make(), False]
    finally:
        dist.broadcast_object_list(box, group=patient)
    made, failed = box
    if failed:
        sys.exit(2)
    return made


class Shares(Sampler):
    """Every count-th image of each batch. The batches are those of a single process, so a run can go on with any number
    of them. Of a last batch with fewer images than processes, those left without one get its first."""

    def __init__(self, batches: BatchSampler):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[rank()::count()] or batch[:1]


def spread(model: nn.Module) -> nn.Module:
    """The model to train with: its gradients are the mean over processes."""
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():  # PyTorch 2.13 has another name for broadcast_buffers, which 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of a 1x1 convolution, where all orders are one
    parallel.amp = model.amp
    return parallel


def add(sums: Tensor) -> Tensor:
    """The sum over processes. Its gradient is that of a sum too: DistributedDataParallel divides it by their number, so
    here it is multiplied by that."""
    if not dist.is_initialized():
        return sums
    total = sums.detach().clone()
    dist.all_reduce(total)
    return total + count() * (sums - sums.detach())


@torch.no_grad()
def average(buffers: Iterable[Tensor]):
    """Running statistics become their mean over processes. They are linear in what each step adds, so once per epoch is
    as good as once per step."""
    if dist.is_initialized():
        for buffer in buffers:
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= count()


def peak_mib(devices: list) -> dict[str, float]:
    """The allocator's peak on each GPU; without one, the process's peak resident memory (Linux counts it in KiB)."""
    if devices[0].type == "cuda":
        return {str(device): torch.cuda.max_memory_allocated(device) / 2**20 for device in devices}
    return {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
