"""The forward pass of decompose.py for more: several tiles in one call, with less memory, or among processes.

`forward_in_groups` and `forward_with_recompute` compute what `model(tiles, tiling)` computes, with the methods of the
model itself, up to rounding and the random numbers of dropout.
They compute only the tiles of this process, which are all of them if there is one process.

    load_tile(i)            returns tile i (B,C,h,w) on its device
    reduce_tile(i, logits)  returns what is kept of the logits (B,L,h,w) of tile i, such as its share of the loss

Both return what reduce_tile returned, as a list in the order of the tiles. With recompute, load_tile and
reduce_tile are called again in the backward pass, so they must not draw random numbers. Letters as in
decompose.py.
"""

import math
import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from decompose import DecomposedUNet, MultiDeviceModule, Tiling, learns_statistics
from support import processes


def forward_in_groups(model: DecomposedUNet, load_tile: Callable, tiling: Tiling, devices: list[torch.device],
                      reduce_tile: Callable) -> list:
    """Keeps the activations of all tiles, as the model itself does, but computes several tiles in one call.

    A group are tiles of one size on one device, stacked as one batch, which is faster where tiles
    are small. If a layer of encoder or decoder looks at its batch as a whole, as batch norm does
    while it learns its statistics, each tile is a group of its own.

    devices: those on which tiles lie, each at least once.
    """
    encoder = MultiDeviceModule(model.encoder, devices)
    decoder = MultiDeviceModule(model.decoder, devices)
    seeds = draw_seeds(model, tiling)
    tiles = {}
    for i in processes.own_tiles(len(tiling)):
        tiles[i] = load_tile(i)
    groups = group_tiles(tiles, can_stack(model))

    skips, coarse_maps, sent = [], {}, {}
    for group in groups:
        batch = torch.cat([tiles[i] for i in group])
        with fixed_dropout(seeds[group[0]], devices):
            skips_of_group, coarse_map = encoder(batch.device, batch)
        skips.append(skips_of_group)
        for i, coarse_map_of_tile in zip(group, coarse_map.chunk(len(group))):
            coarse_maps[i] = coarse_map_of_tile
            sent[i] = model.to_send(i, coarse_map_of_tile, tiling)

    if model.comm_net is not None:
        received = communicate(model, sent, tiling)
        for i, coarse_map in coarse_maps.items():
            coarse_maps[i] = model.replace(coarse_map, received[i].to(coarse_map.device))

    reduced = {}
    for group, skips_of_group in zip(groups, skips):
        coarse_map = torch.cat([coarse_maps[i] for i in group])
        with fixed_dropout(seeds[group[0]] + 1, devices):  # other channels than in the encoder
            logits = decoder(coarse_map.device, skips_of_group, coarse_map)
        for i, logits_of_tile in zip(group, logits.chunk(len(group))):
            reduced[i] = reduce_tile(i, tiling.crop(i, logits_of_tile))
    update_buffers(encoder, tiling)
    update_buffers(decoder, tiling)
    return [reduced[i] for i in tiles]  # in the order of the tiles, whatever the groups are


MANY_PIXELS = 2**20  # the most of one call: with more it would not be faster
FEW_PIXELS = 2**17  # up to so many are always computed in one call, as the memory that they take does not matter


def group_tiles(tiles: dict[int, Tensor], stack: bool) -> list[list[int]]:
    """The numbers of the tiles that are computed in one call. stack: whether it may be more than one.

    At most half of the tiles of a device, unless they are few pixels, since what is needed only during a call grows
    with its tiles.
    """
    if not stack:
        return [[i] for i in tiles]
    alike = {}
    for i, tile in tiles.items():
        alike.setdefault((tile.device, tile.shape), []).append(i)
    groups = []
    for (_, shape), numbers in alike.items():
        batch, _, height, width = shape
        pixels = batch * height * width
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


def forward_with_recompute(model: DecomposedUNet, load_tile: Callable, tiling: Tiling, devices: list[torch.device],
                           reduce_tile: Callable) -> list:
    """Keeps the activations of one tile at a time on each device. devices: those of the tiles.

    A first pass encodes each tile and keeps only what the tile sends. A second pass encodes it
    again, decodes it, and keeps only what reduce_tile returns. Both are under activation
    checkpointing: the backward pass calls them again, one tile after the other. So in all a tile is
    encoded four times and decoded twice in a training step with communication. What each tile has
    received stays in memory until then, and so do the activations of the communication network.
    """
    encoder = MultiDeviceModule(model.encoder, devices)
    decoder = MultiDeviceModule(model.decoder, devices)
    seeds = draw_seeds(model, tiling)
    own_tiles = processes.own_tiles(len(tiling))

    def encode_to_send(i: int) -> Tensor:
        tile = load_tile(i)
        with fixed_dropout(seeds[i], devices):
            _, coarse_map = encoder(tile.device, tile)
        return model.to_send(i, coarse_map, tiling).clone()  # a view would keep all channels in memory

    def encode_and_decode(i: int, received: Tensor | None):
        tile = load_tile(i)
        with fixed_dropout(seeds[i], devices):
            skips, coarse_map = encoder(tile.device, tile)
        if received is not None:
            # Times 1, only for its gradient: that of torch.cat is a view, which would keep the gradient of all
            # channels in memory until every tile is done. That of a multiplication has a memory of its own.
            coarse_map = model.replace(coarse_map, received.to(tile.device) * 1)
        with fixed_dropout(seeds[i] + 1, devices):
            logits = decoder(tile.device, skips, coarse_map)
        return reduce_tile(i, tiling.crop(i, logits))

    received = [None] * len(tiling)
    if model.comm_net is not None:
        sent = {}
        for i in own_tiles:
            sent[i] = forget_activations(encode_to_send, i)
        received = communicate(model, sent, tiling)
    reduced = []
    for i in own_tiles:
        reduced.append(forget_activations(encode_and_decode, i, received[i]))
    update_buffers(encoder, tiling)
    update_buffers(decoder, tiling)
    return reduced


def forget_activations(function: Callable, *inputs):
    """function(*inputs) under activation checkpointing. The random numbers of dropout are those of `fixed_dropout`."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def communicate(model: DecomposedUNet, sent: dict[int, Tensor], tiling: Tiling) -> list[Tensor]:
    """What the tiles of this process send -> what all tiles receive, on the device of the communication network.

    Where processes share an image, each stitches a coarse map that is zero where the tiles of the
    others are, and these maps are added up.
    """
    example = sent[min(sent)]
    batch, channels = example.shape[:2]
    parts = []
    for i, (top, bottom, left, right) in enumerate(tiling.coarse.boxes):
        if i in sent:
            parts.append(sent[i])
        else:
            parts.append(example.new_zeros(batch, channels, bottom - top, right - left))
    if len(sent) < len(tiling):
        coarse_map = processes.sum_over_group(tiling.coarse.stitch(parts))
        parts = tiling.coarse.split(coarse_map, overlap=False)  # again, as the model stitches them itself
    return model.communicate(parts, tiling)


def update_buffers(module: MultiDeviceModule, tiling: Tiling):
    """The buffers of the module become the mean over all tiles, also those of the other processes."""
    module.update_buffers()
    if module.learns_statistics:
        own_tiles = processes.own_tiles(len(tiling))
        processes.average_over_group(module.module, len(own_tiles) / len(tiling))


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
def fixed_dropout(seed: int, devices: list[torch.device]):
    """Inside, dropout draws the random numbers of a seed, the same whenever the tile is computed again.

    Outside, the random numbers go on as if nothing had been drawn. So the processes that share an
    image, each with other tiles, draw the same ones in the communication network.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    with LOCK, torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        yield
