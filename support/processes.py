"""Many processes, started by torchrun, each with GPUs of its own. They share out batches, or the tiles of an image.

    torchrun --nproc-per-node 4 train.py                             # a quarter of every batch for each process
    torchrun --nproc-per-node 4 train.py --image-processes 4         # a quarter of every image for each process
    torchrun --nproc-per-node 4 train.py --image-processes 2         # two groups: half of every batch for each group,
                                                                     # and half of every image for each of its processes

All processes hold the same weights. Once per step the gradients and the few sums of the loss are
added up, and the running statistics are averaged. The processes of a group also add up the coarse
maps of what their tiles send. Of an image, K numbers for every 4^D pixels travel, and
never the pixels. In a single process, everything here leaves things as they are.
"""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decompose import learns_statistics
from support.options import UserError

image_processes = 1  # how many processes share the tiles of an image
image_group = None  # these processes, if there are several


# Which processes there are, and which GPUs are whose

def init_process_group():
    """Joins the other processes, if there are any: torchrun, and some other launchers, tell it in these variables.

    UserError: some of the variables are missing.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend)
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is set, so there are other processes, but they cannot be joined ({error}); start "
                        "them with torchrun") from None


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


def number_of_groups() -> int:
    """How many groups there are, each of which takes its share of every batch."""
    return world_size() // image_processes


def group_rank() -> int:
    """The number of the group of this process, 0 for the first."""
    return rank() // image_processes


def own_tiles(tiles: int) -> range:
    """The numbers of the tiles that this process computes. tiles: how many an image has."""
    return range(rank() % image_processes, tiles, image_processes)


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
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    devices = []
    for i in range(found):
        devices.append(torch.device("cuda", local_rank * found + i))
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
        sys.stdout = open(os.devnull, "w")
    return devices


# What the processes do together

def broadcast_result(function: Callable, *arguments):
    """Calls function(*arguments) in the first process only, and returns in every process what it
    returned. If it fails, the first process says why, and the others end."""
    if not dist.is_initialized():
        return function(*arguments)
    message = [None]  # a failure
    try:
        if is_first():
            message = [[function(*arguments)]]
    finally:
        dist.broadcast_object_list(message)
    if message[0] is None:
        sys.exit(2)
    return message[0][0]


def seed_dropout(seed: int, epoch: int):
    """From here on, random numbers are those of this epoch, so a run that goes on need not know earlier ones. The
    processes of a group draw the same, so that dropout in the communication network is the same in all of them."""
    torch.manual_seed(hash((seed, epoch, group_rank())) % 2**63)


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


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over processes. Its gradient goes to the x of this process, which is all that it knows of the sum.

    Suppose two processes hold 2 and 3. Both return 5, and in each of them the gradient of 5 goes to its own x.
    """
    if not dist.is_initialized():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + (x - x.detach())  # adds zero, and a gradient


@torch.no_grad()
def synchronise(model: nn.Module, tiles: int):
    """The gradient of each weight becomes the sum over processes, and while batch norm learns its
    statistics, these become the mean over all tiles of all images. To be called after the backward pass.

    tiles: how many the images of this process have, of which it may have computed a part. Each
    process has the gradient of what its own tiles add to the loss. In the backward pass itself
    only the sum over a group is made: so all processes do the same in the same order, and none
    waits for another one that waits for it.
    """
    if not dist.is_initialized():
        return
    gradients = []
    for weight in model.parameters():
        if weight.grad is not None:
            gradients.append(weight.grad)
    all_reduce_together(gradients)
    if learns_statistics(model):
        share = len(own_tiles(tiles)) / tiles / number_of_groups()
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        averages = [share * buffer.double() for buffer in buffers]
        all_reduce_together(averages)
        for buffer, average in zip(buffers, averages):
            buffer.copy_(average)


def all_reduce_together(tensors: list[Tensor]):
    """Each tensor becomes its sum over all processes, in a single message."""
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, total in zip(tensors, message.split(sizes)):
        tensor.copy_(total.view(tensor.shape))


# Memory

def peak_mib(devices: list) -> dict[str, float]:
    """The allocator's peak on each GPU; without one, the process's peak resident memory, where the system tells it."""
    if devices[0].type == "cuda":
        return {str(device): torch.cuda.max_memory_allocated(device) / 2**20 for device in devices}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
