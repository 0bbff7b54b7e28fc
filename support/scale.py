"""The forward pass of decompose.py for more: several tiles in one call, with less memory, or among processes.

`forward` computes what `model(tiles, tiling)` computes, with the methods of the model itself, up to rounding and the
random numbers of dropout. It computes only the tiles of this process, which are all of them if there is one process.
Letters as in decompose.py.
"""

import math
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from decompose import DecomposedUNet, MultiDeviceModule, Tiling, learns_statistics
from support import processes


def forward(model: DecomposedUNet, tiling: Tiling, groups: list[list[int]], devices: list[torch.device],
            load_tile: Callable, reduce_tile: Callable, recompute: bool) -> list:
    """Returns what is kept of each tile of the groups, in the order of the tiles.

    groups: numbers of tiles of one size on one device, which are computed in one call, as one batch; see `group_tiles`.
    devices: those on which the tiles lie.
    load_tile: load_tile(i) returns tile i (B,C,h,w) on its device.
    reduce_tile: reduce_tile(i, logits) returns what is kept of the logits (B,L,h,w) of tile i, such as its share of
        the loss.
    recompute: keep the activations of one group at a time. A first pass encodes each group and keeps only what its
        tiles send. A second pass encodes it again, decodes it, and keeps only what reduce_tile returns. Both are under
        activation checkpointing: the backward pass calls them again, one group after the other. So in all a tile is
        encoded four times and decoded twice in a training step with communication. load_tile and reduce_tile are
        called again, too, so they must not draw random numbers. What each tile has received stays in memory until the
        backward pass, and so do the activations of the communication network.
    """
    encoder = MultiDeviceModule(model.encoder)
    decoder = MultiDeviceModule(model.decoder)
    for device in devices:  # now, and not when a tile is computed again
        encoder.copy_to(device)
        decoder.copy_to(device)
    seeds = draw_seeds(model, tiling)
    encoded = {}  # what is kept of each group between the two passes, without recompute

    def encode(group: list[int]) -> tuple:
        tiles = [load_tile(i) for i in group]
        with fixed_dropout(seeds[group[0]], devices):
            return encoder(torch.cat(tiles))

    def encode_to_send(group: list[int]) -> list[Tensor]:
        skips, coarse_map = encode(group)
        if not recompute:
            encoded[group[0]] = skips, coarse_map
        sent = []
        for i, coarse_map_of_tile in zip(group, coarse_map.chunk(len(group))):
            sent_by_tile = model.to_send(i, coarse_map_of_tile, tiling)
            sent.append(sent_by_tile.clone())  # a view would keep all channels in memory
        return sent

    def encode_and_decode(group: list[int], received: list[Tensor]) -> list:
        if group[0] in encoded:
            skips, coarse_map = encoded.pop(group[0])
        else:
            skips, coarse_map = encode(group)
        if received:
            # Times 1, only for its gradient: that of torch.cat is a view, which would keep the gradient of all
            # channels in memory until every tile is done. That of a multiplication has a memory of its own.
            coarse_map = model.replace(coarse_map, torch.cat(received) * 1)
        with fixed_dropout(seeds[group[0]] + 1, devices):  # other channels than in the encoder
            logits = decoder(skips, coarse_map)
        reduced = []
        for i, logits_of_tile in zip(group, logits.chunk(len(group))):
            reduced.append(reduce_tile(i, tiling.crop(i, logits_of_tile)))
        return reduced

    received = []
    if model.comm_net is not None:
        sent = {}
        for group in groups:
            sent_by_group = forget_activations(recompute, encode_to_send, group)
            sent.update(zip(group, sent_by_group))
        comm_device = next(model.comm_net.parameters()).device
        global_map = stitch_over_processes(sent, tiling.coarse, comm_device)
        received = tiling.coarse.split(model.comm_net(global_map))

    reduced = {}
    for group in groups:
        received_by_group = []
        if received:
            for i in group:
                received_by_group.append(received[i])
        reduced_of_group = forget_activations(recompute, encode_and_decode, group, received_by_group)
        reduced.update(zip(group, reduced_of_group))
    encoder.update_buffers()
    decoder.update_buffers()
    return [reduced[i] for i in sorted(reduced)]


def forget_activations(recompute: bool, function: Callable, *inputs):
    """function(*inputs), with recompute under activation checkpointing. The random numbers of dropout are those of
    `fixed_dropout`."""
    if not recompute:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


MANY_PIXELS = 2**20  # the most of one call: with more it would not be faster
FEW_PIXELS = 2**17  # up to so many are always computed in one call, as the memory that they take does not matter


def group_tiles(tiling: Tiling, placement: dict[int, torch.device], batch_size: int,
                stack: bool) -> list[list[int]]:
    """The numbers of the tiles that are computed in one call. stack: whether they can be more than one.

    At most half of the tiles of a device, unless they are few pixels, since what is needed only during a call grows
    with its tiles.
    """
    if not stack:
        return [[i] for i in placement]
    alike = {}
    for i, device in placement.items():
        top, bottom, left, right = tiling.halos[i]
        alike.setdefault((device, bottom - top, right - left), []).append(i)
    groups = []
    for (_, height, width), numbers in alike.items():
        pixels = batch_size * height * width
        size = max(math.ceil(len(numbers) / 2), FEW_PIXELS // pixels)
        size = max(min(size, MANY_PIXELS // pixels), 1)
        for start in range(0, len(numbers), size):
            groups.append(numbers[start:start + size])
    return groups


def can_stack(model: DecomposedUNet) -> bool:
    """Whether tiles can be stacked as one batch: no layer of encoder or decoder computes with its batch as a whole.

    Those that do are layers with buffers in training mode, and batch norm that never keeps statistics. (Instance norm
    is refused too, as it cannot be told from that.)
    """
    for half in (model.encoder, model.decoder):
        if learns_statistics(half):
            return False
        for layer in half.modules():
            if getattr(layer, "track_running_stats", True) is False:
                return False
    return True


def stitch_over_processes(tiles: dict[int, Tensor], tiling: Tiling, device: torch.device) -> Tensor:
    """The tiles (...,h,w) of this process by their numbers -> (...,H,W) of all tiles of the image.

    Each process stitches an image that is zero where the tiles of the others are, and these images are added up.
    """
    example = tiles[min(tiles)]
    all_tiles = []
    for i, (top, bottom, left, right) in enumerate(tiling.boxes):
        if i in tiles:
            all_tiles.append(tiles[i])
        else:
            all_tiles.append(example.new_zeros(*example.shape[:-2], bottom - top, right - left))
    return processes.sum_over_group(tiling.stitch(all_tiles, device))


# Dropout, and one thread in a module at a time

# functional_call puts weights into the module for as long as it runs. In the backward pass with
# recompute, autograd runs the tiles of each GPU in a thread of its own, and two threads in one
# module would mix up their weights and random numbers.
LOCK = threading.Lock()


def draw_seeds(model: DecomposedUNet, tiling: Tiling) -> list[int]:
    """A seed for the dropout of each tile. In evaluation nothing is drawn, so that training does not depend on it."""
    if not model.training:
        return [0] * len(tiling)
    return torch.randint(2**62, (len(tiling),)).tolist()


@contextmanager
def fixed_dropout(seed: int, devices: Iterable[torch.device]):
    """Inside, dropout draws the random numbers of a seed, the same whenever the tile is computed again.

    Outside, the random numbers go on as if nothing had been drawn. So the processes that share an
    image, each with other tiles, draw the same ones in the communication network.
    """
    gpus = []
    for device in devices:
        if device.type == "cuda":
            gpus.append(device)
    with LOCK, torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        yield
