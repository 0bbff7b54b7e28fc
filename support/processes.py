"""Many processes, started by torchrun, each with GPUs of its own. They share out batches, or the tiles of an image.

    torchrun --nproc-per-node 4 train.py                             # a quarter of every batch for each process
    torchrun --nproc-per-node 4 train.py --image-processes 4         # a quarter of every image for each process
    torchrun --nproc-per-node 4 train.py --image-processes 2         # two groups: half of every batch for each group,
                                                                     # and half of every image for each of its processes

All processes hold the same weights. Once per step the gradients are averaged (by
DistributedDataParallel) and the few sums of the loss are added up; once per epoch the running
statistics are averaged. The processes of a group also add up the coarse maps of what their tiles
send. Of an image, K numbers for every 4^D pixels travel, and never the pixels. Without torchrun
there is one process, and everything here leaves things as they are.
"""

import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Sampler

CAN_RESTART = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"  # torchrun --max-restarts
# Whether torchrun, after a restart, hands out the addresses of before it.
KEEPS_ADDRESSES = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # which process of this machine

image_processes = 1  # how many processes share the tiles of an image
image_group = None  # these processes, if there are several


@contextmanager
def together():
    """Inside, the processes that torchrun started know each other. One that calls sys.exit ends at once."""
    if dist.is_torchelastic_launched():
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
    try:
        yield
    except SystemExit as ended:
        if dist.is_initialized():  # the others may never answer, and PyTorch's threads that wait for them would abort
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 for the first."""
    if dist.is_initialized():
        return dist.get_rank()
    return 0


def world_size() -> int:
    """The number of processes."""
    if dist.is_initialized():
        return dist.get_world_size()
    return 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks for all."""
    return rank() == 0


def share_images(count: int):
    """From now on, `count` processes with neighbouring ranks are a group, and share the tiles of
    each image. The number of all processes must be a multiple of it."""
    global image_processes, image_group
    image_processes = count
    if count > 1:
        image_group, _ = dist.new_subgroups(group_size=count)


def groups() -> int:
    """The number of groups, each of which takes its share of every batch."""
    return world_size() // image_processes


def group() -> int:
    """The number of the group of this process, 0 for the first."""
    return rank() // image_processes


def own_tiles(tiles: int) -> range:
    """The numbers of the tiles that this process computes. tiles: how many an image has."""
    return range(rank() % image_processes, tiles, image_processes)


class SumOverGroup(torch.autograd.Function):
    """Adds up x over the processes of a group. The gradients are added up in the same way, because
    each process knows only the part of the gradient that comes from its own tiles.

    This is not all_reduce_sum below: there every process makes the same of the sum, and so knows its whole gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=image_group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOverGroup.forward(ctx, gradient)


def sum_over_group(x: Tensor) -> Tensor:
    """x of this process -> the sum of x over the processes that share an image."""
    if image_processes == 1:
        return x
    return SumOverGroup.apply(x)


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def gpus_each() -> int:
    """How many GPUs of this machine each of its processes can have."""
    return torch.cuda.device_count() // local_world_size()


def find_devices(gpus: int, tiles: str) -> list[torch.device]:
    """The GPUs that are asked for, as far as they exist, or else the CPU. The first of them becomes
    the current one. Says in one line where the tiles are computed; from then on only the first
    process prints."""
    found = min(gpus, gpus_each())
    devices = [torch.device("cuda", LOCAL_RANK * found + i) for i in range(found)]
    if devices:
        torch.cuda.set_device(devices[0])  # or a process would also take memory of the first GPU of all
    else:
        devices = [torch.device("cpu")]
    line = f"{tiles} on {', '.join(map(str, devices))}"
    if found < gpus:
        line += f" ({gpus} GPUs asked for, {found} found)"
    if world_size() > 1:
        line = f"process {rank()} of {world_size()}: {line}"
    print(f"{line}\n", end="", flush=True)  # at once, or the lines of several processes could mix
    if not is_first():
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return devices


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def is_lost(error: Exception) -> bool:
    """Whether an error only says that another process has ended."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def from_first(function: Callable, *arguments):
    """Calls function(*arguments) in the first process only, and returns what it returned in every
    process. If it fails, the first process says why, and the others end."""
    if not dist.is_initialized():
        return function(*arguments)
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # the first may have many images to look at
    result, failed = None, True
    try:
        if is_first():
            result = function(*arguments)
            failed = False
    finally:
        message = [result, failed]
        dist.broadcast_object_list(message, group=patient)
    result, failed = message
    if failed:
        sys.exit(2)
    return result


class Shares(Sampler):
    """The share of one group in every batch: its images group, group + groups, ... The batches are
    those of a single process, so a run can go on with any number of processes.

    The last batch may have fewer images than there are groups. Then the groups that are left
    without one get its first image as a filler, which counts in their running statistics, but not
    in the loss (see mask_out_fillers in loaders.py).
    """

    def __init__(self, batches: BatchSampler):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            share = batch[group()::groups()]
            if not share:
                share = batch[:1]
            yield share


def seed(number: int, epoch: int):
    """Every group but the first draws random numbers of its own in each epoch, so that they need
    not be saved. The processes of a group draw the same, so that dropout in the communication
    network is the same in all of them."""
    if group() > 0:
        torch.manual_seed(hash((number, epoch, group())) % 2**63)


def parallel(model: nn.Module) -> nn.Module:
    """The model to train with. In the backward pass it averages the gradients of all processes."""
    if not dist.is_initialized():
        return model
    # Those of a 1x1 convolution, for which all memory formats are one.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    with warnings.catch_warnings():  # PyTorch 2.13 has another name for broadcast_buffers, which 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over processes, with the gradient of a sum.

    Each process only knows how its own x came about, so the total gets the gradient of that part.
    Suppose two processes hold 2 and 3. Both return 5, and in each of them the gradient of 5 goes to
    its own x. DistributedDataParallel takes the mean of the processes' gradients where the sum is
    wanted, which the factor undoes.
    """
    if not dist.is_initialized():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    if x.requires_grad:
        total = total + world_size() * (x - x.detach())  # adds zero, and a gradient
    return total


@torch.no_grad()
def average_buffers(model: nn.Module):
    """The running statistics become their mean over processes. They are linear in what each step
    adds to them, so once per epoch is as good as once per step."""
    if not dist.is_initialized():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world_size()


def memory_gib() -> float:
    """The memory that a step may need: nine tenths of that of the smallest GPU, or of the machine
    if there is no GPU."""
    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    else:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    return 0.9 * min(sizes) / 2**30


def peak_mib(devices: list) -> dict[str, float]:
    """The allocator's peak on each GPU; without one, the process's peak resident memory, which Linux counts in KiB."""
    if devices[0].type == "cuda":
        return {str(device): torch.cuda.max_memory_allocated(device) / 2**20 for device in devices}
    return {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
