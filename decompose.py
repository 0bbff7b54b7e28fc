"""One U-Net, one image, many devices: cut the image into tiles, run each tile on its device, let the tiles communicate.

    image (B,C,H,W) --split--> tiles --encode--> skips + coarse maps        tile i is computed on placement[i]
                                           | the last K channels of each, moved to one device and stitched
                                           v
                               communication network on the global coarse map (B,K,H/2^D,W/2^D)
                                           | split again and moved back: they replace those K channels
                                           v
        mask  <--stitch-- logits <--decode-- skips + coarse maps

With the defaults of train.py, a batch of images is (16,1,64,64), each of its 2x2 tiles (16,1,32,32), a coarse map
(16,64,4,4), what a tile sends (16,32,4,4), and the global coarse map (16,32,8,8).

Letters, here and in every file: B images in a batch, C channels, H W image, h w tile, R x Q grid
(rows x columns, tiles always row-major in a list), K communicated channels, D depth, L classes. A
cell is one pixel of a coarse map, which is 2^D x 2^D pixels of the image.

Source: Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266). There are two departures from it: one
set of weights instead of a replica on every device, and running statistics of batch norm that are
the mean over all tiles. This file imports nothing but torch: copy it.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

Box = tuple[int, int, int, int]  # top, bottom, left, right, in pixels


@dataclass(frozen=True)
class Tiling:
    """How an image is cut into tiles.

    size: (H, W) of the image, in pixels.
    grid: (R, Q), rows and columns of tiles.
    cell: the borders between tiles lie on multiples of this many pixels, 2^D for a U-Net of depth D.
    overlap: how many pixels of its neighbours a tile also sees, on each side, as far as the image goes.

    The tiles are as equal as whole cells allow: 2448 pixels in cells of 16 are 153 cells, so two
    tiles are 1232 and 1216 wide. If the image ends inside a cell, `split` pads it at the bottom and
    right, and `stitch` crops it again.
    ValueError: there are no tiles, or more than cells; or the overlap is not a whole number of cells.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    cell: int = 1
    overlap: int = 0

    def __post_init__(self):
        for name, tiles, cells in zip(("rows", "columns"), self.grid, self.coarse_size):
            if not 1 <= tiles <= cells:
                raise ValueError(f"{tiles} {name} of tiles: an image of {self.size[0]}x{self.size[1]} pixels in cells "
                                 f"of {self.cell}x{self.cell} can have 1 to {cells}")
        if self.overlap < 0 or self.overlap % self.cell != 0:
            raise ValueError(f"an overlap of {self.overlap} pixels: it must be a multiple of the cell, {self.cell}")

    def __len__(self) -> int:
        """The number of tiles."""
        return self.grid[0] * self.grid[1]

    @functools.cached_property
    def coarse_size(self) -> tuple[int, int]:
        """Rows and columns of cells: the size of the coarse map of the whole image. The last cells may be padded."""
        height, width = self.size
        return -(-height // self.cell), -(-width // self.cell)

    @functools.cached_property
    def coarse(self) -> "Tiling":
        """The same cuts for the coarse map, which has one pixel for every cell: it splits and stitches coarse maps."""
        return Tiling(self.coarse_size, self.grid, overlap=self.overlap // self.cell)

    def spans(self, axis: int, overlap: int) -> list[tuple[int, int]]:
        """Where each row of tiles (axis 0) or column of tiles (axis 1) begins and ends, in pixels.
        overlap: in pixels."""
        cells = self.coarse_size[axis]
        tiles = self.grid[axis]
        spans = []
        first_cell = 0
        for i in range(tiles):
            end_cell = first_cell + cells // tiles
            if i < cells % tiles:  # the first tiles take the cells that are left over
                end_cell += 1
            begin = max(first_cell * self.cell - overlap, 0)
            end = min(end_cell * self.cell + overlap, cells * self.cell)
            spans.append((begin, end))
            first_cell = end_cell
        return spans

    def make_boxes(self, overlap: int) -> list[Box]:
        """The box of each tile, row-major, with an overlap of this many pixels."""
        boxes = []
        for top, bottom in self.spans(0, overlap):
            for left, right in self.spans(1, overlap):
                boxes.append((top, bottom, left, right))
        return boxes

    @functools.cached_property
    def boxes(self) -> list[Box]:
        """The box of each tile, row-major, without overlap. Together they cover the (padded) image once."""
        return self.make_boxes(0)

    @functools.cached_property
    def halos(self) -> list[Box]:
        """The box of each tile with its overlap."""
        return self.make_boxes(self.overlap)

    def split(self, x: Tensor, overlap: bool = True, fill: float = 0) -> list[Tensor]:
        """(...,H,W) -> tiles (...,h,w), row-major. They are views of x, except where they are padded with `fill`.

        overlap: whether each tile includes its overlap. ValueError: x is not of size (H,W).
        """
        if x.shape[-2:] != tuple(self.size):
            raise ValueError(f"a tensor of shape {tuple(x.shape)}, but the tiling is made for {self.size[0]} rows and "
                             f"{self.size[1]} columns")
        pixels = self.overlap if overlap else 0
        tiles = []
        for top, bottom in self.spans(0, pixels):
            # First a strip, then tiles of it, to save memory: in the backward pass each slice makes
            # zeros as large as what it was cut from.
            strip = x[..., top:bottom, :]
            for left, right in self.spans(1, pixels):
                tile = strip[..., left:right]
                missing_rows = bottom - top - tile.shape[-2]
                missing_columns = right - left - tile.shape[-1]
                if missing_rows or missing_columns:
                    tile = nn.functional.pad(tile, (0, missing_columns, 0, missing_rows), value=fill)
                tiles.append(tile)
        return tiles

    def crop(self, i: int, tile: Tensor) -> Tensor:
        """Tile i with its overlap (...,h,w) -> the same tile without its overlap."""
        top, bottom, left, right = self.boxes[i]
        halo_top, _, halo_left, _ = self.halos[i]
        return tile[..., top - halo_top:bottom - halo_top, left - halo_left:right - halo_left]

    def stitch(self, tiles: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
        """Tiles (...,h,w) without overlap, row-major, on any devices -> (...,H,W) on `device`.

        device: None stands for that of the first tile.
        """
        if device is None:
            device = tiles[0].device
        moved = []
        for tile in tiles:
            moved.append(tile.to(device))
        strips = []
        for start in range(0, len(self), self.grid[1]):
            strips.append(torch.cat(moved[start:start + self.grid[1]], dim=-1))
        height, width = self.size
        return torch.cat(strips, dim=-2)[..., :height, :width]


def unchanged(x: Tensor) -> Tensor:
    return x


def keep_logits(i: int, logits: Tensor) -> Tensor:
    return logits


class DecomposedUNet(nn.Module):
    """An encoder and a decoder that are run on the tiles of an image, and a communication network between the two.

    encoder: tile (B,C,h,w) -> (skips, coarse map). Only the decoder needs to understand the skips.
    decoder: (skips, coarse map) -> logits (B,L,h,w).
    comm_net: (B,K,H/2^D,W/2^D) -> the same shape. Without one (None, K = 0) the tiles know nothing of each other.
    comm_channels: K, at most the channels of the coarse map.

    None of the three may call torch.utils.checkpoint: it would run layers again in the backward
    pass, when the weights that `SharedModule` puts into them are no longer there. `recompute` does
    what it is for.
    ValueError: a communication network without channels, or channels without a network.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, comm_net: nn.Module | None = None,
                 comm_channels: int = 0):
        super().__init__()
        if (comm_net is None) != (comm_channels == 0):
            raise ValueError(f"{comm_channels} communicated channels, but the communication network is {comm_net}")
        self.encoder = encoder
        self.decoder = decoder
        self.comm_net = comm_net
        self.comm_channels = comm_channels

    def forward(self, tiles: Sequence[Tensor], tiling: Tiling, placement: Sequence[torch.device],
                finish: Callable = keep_logits, prepare: Callable = unchanged, recompute: bool = False,
                comm_device: torch.device | None = None, own: Sequence[int] | None = None,
                add_up: Callable = unchanged) -> list:
        """Tiles (B,C,h,w), as `tiling.split` made them -> a list of what `finish` returned for each tile.

        placement: the device of each tile. A tile is moved there, and all that belongs to it is computed there.
        finish(i, logits): is called with the logits (B,L,h,w) of tile i, without overlap, on its
            device. What it returns (these logits, or the tile's share of a loss) is all that comes
            back.
        prepare(tile): is called with each tile on its device, before it is encoded, and must not
            change it in place. With recompute it is called several times, so it must draw no random
            numbers, and neither must finish.
        recompute: trade time for memory. Without it, the activations of all tiles are kept until
            the backward pass. With it, each tile is forgotten and computed again when it is needed,
            so a device holds the activations of one tile at a time, and one device also those of
            the communication network. Loss, gradients and running statistics are the same.
        comm_device: where the communication network is computed; None: on the device of the first
            tile. Under autocast it must be of the same type as the devices of the tiles, as
            autocast is for one type.
        own: the numbers of the tiles that are computed here; None: all. The list that is returned
            has these tiles, in this order. The others are computed by other processes, which call
            this at the same time. Each process needs at least one tile.
        add_up(x): the sum of x over these processes. It must be differentiable: in the backward
            pass it adds up the gradient of x over the processes, too.

        Dropout: each tile has seeds of its own, by its number in the tiling, and so has the
            communication network. They are drawn from PyTorch's generator of the CPU. So which
            channels are left out depends neither on recompute nor on which GPU computes what. But a
            CPU draws other channels than a GPU.
        ValueError: there is not one tile and one device for each tile of the tiling.
        """
        if not len(tiles) == len(placement) == len(tiling):
            raise ValueError(f"{len(tiles)} tiles and {len(placement)} devices, but the tiling has {len(tiling)} tiles")
        if own is None:
            own = range(len(tiling))
        if comm_device is None:
            comm_device = placement[0]
        # Each is called with the number of a tile and its inputs: encode(i, tile) runs the encoder
        # on tile i, with a copy of its weights on placement[i] (see SharedModule below).
        encode = SharedModule(self.encoder, placement, draw_seeds(len(tiling)))
        decode = SharedModule(self.decoder, placement, draw_seeds(len(tiling)))
        communicate = None
        if self.comm_net is not None:
            communicate = SharedModule(self.comm_net, [comm_device], draw_seeds(1))

        def fetch(i):
            return prepare(to_device(tiles[i], placement[i]))

        def exchange(sent):
            return self.stitch_communicate_split(sent, communicate, tiling, placement, add_up)

        def crop_and_finish(i, logits):
            return finish(i, tiling.crop(i, logits))

        run = self.forward_with_recompute if recompute else self.forward_keeping_activations
        outputs = run(own, tiling, fetch, encode, exchange, decode, crop_and_finish)

        encode.update_buffers(len(tiling), add_up)
        decode.update_buffers(len(tiling), add_up)
        if communicate is not None:
            communicate.update_buffers(1, unchanged)  # every process has run it on the same map
        return outputs

    def forward_keeping_activations(self, own: Sequence[int], tiling: Tiling, fetch: Callable, encode: Callable,
                                    exchange: Callable, decode: Callable, finish: Callable) -> list:
        """The forward pass as the picture at the top shows it. PyTorch keeps what the backward pass needs.

        own: the numbers of the tiles. fetch(i): tile i on its device. encode, exchange, decode: the arrows of the
        picture. finish(i, logits): what is kept of tile i.
        """
        skips, coarse_maps = {}, {}
        for i in own:
            skips[i], coarse_maps[i] = encode(i, fetch(i))

        sent = {i: self.to_send(i, coarse_maps[i], tiling) for i in own}
        received = exchange(sent)

        outputs = []
        for i in own:
            coarse = self.replace(coarse_maps[i], received[i])
            logits = decode(i, skips[i], coarse)
            outputs.append(finish(i, logits))
        return outputs

    def to_send(self, i: int, coarse: Tensor, tiling: Tiling) -> Tensor | None:
        """The last K channels of the coarse map of tile i, without its overlap."""
        if self.comm_net is None:
            return None
        channels = coarse[:, -self.comm_channels:]
        return tiling.coarse.crop(i, channels).clone()  # a copy: with recompute, a view would keep all channels

    def stitch_communicate_split(self, sent: dict[int, Tensor], communicate: "SharedModule | None", tiling: Tiling,
                                 placement: Sequence[torch.device], add_up: Callable) -> dict:
        """What each tile sends (B,K,h/2^D,w/2^D) -> what it receives (with overlap), on its own device."""
        if communicate is None:
            return dict.fromkeys(sent)
        parts = fill_with_zeros(sent, tiling.coarse.boxes)
        coarse_map = add_up(tiling.coarse.stitch(parts, device=communicate.placement[0]))
        coarse_map = communicate(0, coarse_map)  # it has a single tile, number 0, which is the whole map
        received = tiling.coarse.split(coarse_map)
        return {i: to_device(received[i], placement[i]) for i in sent}

    def replace(self, coarse: Tensor, received: Tensor | None) -> Tensor:
        """The coarse map of a tile, with its last K channels replaced by what the tile received."""
        if received is None:
            return coarse
        coarse = coarse.clone()
        coarse[:, -self.comm_channels:] = received  # the gradient of torch.cat would be a view that keeps all channels
        return coarse

    # This is the method. Below is the machinery: how to forget tiles, and how to run one module on
    # many devices. On a first reading, go on with train.py.

    def forward_with_recompute(self, own: Sequence[int], tiling: Tiling, fetch: Callable, encode: Callable,
                               exchange: Callable, decode: Callable, finish: Callable) -> list:
        """The same in two passes, each of which forgets a tile before it goes on to the next.

        The first pass encodes each tile and keeps only what the tile sends. The second pass encodes
        it again, decodes it, and keeps only what `finish` returns. The backward pass calls both
        functions again, one tile after the other. Until then, what each tile has received stays on
        its device, and so do the activations of the communication network.

        So in all a tile is encoded four times and decoded twice; without communication, both twice.
        """
        def encode_to_send(i):
            _, coarse = encode(i, fetch(i))
            return self.to_send(i, coarse, tiling)

        def encode_and_decode(i, received):
            skips, coarse = encode(i, fetch(i))
            logits = decode(i, skips, self.replace(coarse, received))
            return finish(i, logits)

        sent = dict.fromkeys(own)
        if self.comm_net is not None:
            for i in own:
                sent[i] = forget(encode_to_send, i)
        received = exchange(sent)
        outputs = []
        for i in own:
            outputs.append(forget(encode_and_decode, i, received[i]))
        return outputs


def fill_with_zeros(sent: dict[int, Tensor], boxes: Sequence[Box]) -> list[Tensor]:
    """What the tiles send, and zeros for the tiles that are computed by other processes.

    These have zeros where the tiles of this process are, so the sum of all their coarse maps is the whole one.
    """
    example = next(iter(sent.values()))
    batch, channels = example.shape[:2]
    zero = example.new_zeros(())  # a single number, which expand shows in every place without taking memory
    parts = []
    for i, (top, bottom, left, right) in enumerate(boxes):
        if i in sent:
            parts.append(sent[i])
        else:
            parts.append(zero.expand(batch, channels, bottom - top, right - left))
    return parts


def forget(function: Callable, *inputs):
    """Returns function(*inputs) and keeps no activations of it. The backward pass calls the function again."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # SharedModule seeds dropout


def draw_seeds(number: int) -> list[int]:
    """One seed for the dropout of each tile. number: of tiles."""
    return torch.randint(2**62, (number,)).tolist()


@contextmanager
def random_numbers_of(seed: int, device: torch.device):
    """Inside, dropout on the device draws the numbers that belong to a seed, so that a tile loses
    the same channels wherever and however often it is computed. Outside, the random numbers go on
    as if nothing had been drawn."""
    generator = generator_of(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def generator_of(device: torch.device) -> torch.Generator:
    """The generator from which dropout on this device draws. Every GPU has its own, and
    torch.manual_seed gives the same seed to all of them."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def to_device(tile: Tensor, device: torch.device) -> Tensor:
    """A tile on its device. Copies from the CPU to a GPU go through pinned memory, so that the loop
    need not wait for one GPU before it gives work to the next. A copy to the CPU is waited for: the
    CPU would read it before it is there."""
    if device.type == "cpu":
        return tile.to(device)
    if device.type == "cuda" and tile.device.type == "cpu":
        pinned = torch.empty_like(tile, pin_memory=True)  # in the tile's own order, so this is the only copy
        tile = pinned.copy_(tile)
    return tile.to(device, non_blocking=True)


# Modules are run one after the other: in the backward pass with recompute, autograd runs the tiles
# of each GPU in a thread of its own, and two threads in one module would mix up its weights. There
# is one lock for all, because two modules may share layers.
LOCK = threading.RLock()


class SharedModule:
    """A module with one set of weights that is run on many tiles, each on its own device.

    Weights: weight.to(device) copies them to each device once per step, and autograd records the
    copy. So in the backward pass it carries the gradients of all devices back and adds them up in
    the one set of weights. Nothing else has to be done.

    Buffers (the running statistics of batch norm): every tile starts from the same old ones and
    changes a copy of its own. `update_buffers` then takes the mean over all tiles: that of their
    means, and that of their variances. With momentum m (0.1 in PyTorch) a tile makes
    (1 - m) * old + m * its own statistics, so the mean is (1 - m) * old + m * mean of the tiles'
    statistics. So neither the number of devices nor the order of the tiles changes the result, but
    for rounding.

    Random numbers: whenever tile i is run, dropout draws those of seeds[i].

    module: its weights may lie on any device; placement: the device of each tile; seeds: the seed of each tile.
    """

    def __init__(self, module: nn.Module, placement: Sequence[torch.device], seeds: Sequence[int]):
        self.module = module
        self.placement = placement
        self.seeds = seeds
        self.weights = {}
        self.rounded = {}
        self.buffers = {}
        weights, buffers = weights_and_buffers(module)
        self.changing = buffers_that_change(module, buffers)
        for device in dict.fromkeys(placement):  # each device once, in order
            self.weights[device] = {name: weight.to(device) for name, weight in weights.items()}  # in autograd's graph
            self.rounded[device] = round_weights(module, self.weights[device], device)
            self.buffers[device] = {name: buffer.to(device) for name, buffer in buffers.items()}
            # What is computed again begins with the old buffers, but the module has the new ones by then.
            self.buffers[device].update(self.copy_changing(self.buffers[device]))
        self.sums = {}  # for each device: the new buffers of its tiles, one after the other, added up
        self.counted = set()  # the tiles that are in these sums

    def __call__(self, i: int, *inputs):
        """What the module makes of the inputs of tile i, which lie on placement[i]."""
        weights = self.weights_for(i)
        buffers = self.buffers_for(i)
        # functional_call runs the module with these weights and buffers in place of its own, which
        # it puts back afterwards.
        with LOCK, random_numbers_of(self.seeds[i], self.placement[i]):
            outputs = functional_call(self.module, (weights, buffers), inputs, tie_weights=False)
        self.count(i, buffers)
        return outputs

    def weights_for(self, i: int) -> dict[str, Tensor]:
        """The weights on the device of tile i; under autocast, rounded to bfloat16 (see RoundedWeight)."""
        device = self.placement[i]
        weights = dict(self.weights[device])
        for name, rounded in self.rounded[device].items():
            weights[name] = RoundedWeight.apply(weights[name], rounded)
        return weights

    def buffers_for(self, i: int) -> dict[str, Tensor]:
        """The old buffers on the device of tile i, copied if they will change."""
        buffers = self.buffers[self.placement[i]]
        return buffers | self.copy_changing(buffers)

    def copy_changing(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of those buffers that will change, under all their names."""
        copies = {}
        for group in self.changing:
            old = [buffers[names[0]] for names in group]
            new = [torch.empty_like(buffer) for buffer in old]
            torch._foreach_copy_(new, old)  # all in one call, as each call takes a while to reach the GPU
            for names, copy in zip(group, new):
                copies.update(dict.fromkeys(names, copy))
        return copies

    @torch.no_grad()
    def count(self, i: int, buffers: dict[str, Tensor]):
        """Adds the new buffers of tile i to the sums, once: with recompute, a tile is run several times."""
        if i in self.counted or not self.changing:
            return
        self.counted.add(i)
        values = []
        for group in self.changing:
            of_one_type = torch.cat([buffers[names[0]].flatten() for names in group])
            values.append(of_one_type.double())
        device = self.placement[i]
        self.sums[device] = self.sums.get(device, 0) + torch.cat(values)

    @torch.no_grad()
    def update_buffers(self, tiles: int, add_up: Callable):
        """The buffers of the module become the mean over all tiles. To be called once, after the forward pass.

        tiles: how many there are, in all processes together; add_up: the sum over these processes.
        It is called once, for all buffers in one tensor. That is of float64, which holds the values
        of all other types exactly, but for integers beyond 2^53.
        """
        if not self.changing:
            return
        buffers = []
        for group in self.changing:
            buffers += [self.module.get_buffer(names[0]) for names in group]
        total = 0
        for sums in self.sums.values():  # of each device
            total = total + sums.to(buffers[0].device)
        means = add_up(total) / tiles
        sizes = [buffer.numel() for buffer in buffers]
        for buffer, mean in zip(buffers, means.split(sizes)):
            buffer.copy_(mean.view_as(buffer))


# The layers whose weights autocast rounds to bfloat16.
ROUNDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def round_weights(module: nn.Module, weights: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Under autocast, the weights of convolutions and linear layers, rounded to bfloat16. Otherwise nothing."""
    rounded = {}
    if torch.is_autocast_enabled(device.type):
        for prefix, layer in module.named_modules():
            weight = weights.get(full_name(prefix, "weight"))  # None if it is parametrised
            if isinstance(layer, ROUNDED) and weight is not None and weight.dtype == torch.float32:
                rounded[full_name(prefix, "weight")] = weight.detach().to(torch.get_autocast_dtype(device.type))
    return rounded


class RoundedWeight(torch.autograd.Function):
    """For bfloat16. Forwards: the rounded weight. Backwards: its gradient, in the precision of the weight itself.

    Autocast itself has two ways to round a weight, and both are bad for many tiles. With its cache,
    the gradients of all tiles are added up in bfloat16, in which a small number that is added to a
    large one is lost. Without it, every tile keeps a copy of all weights until the backward pass.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.to(ctx.dtype), None


def weights_and_buffers(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By their names. What two layers share is there for each of them. A layer that is found in two
    places is there once, as functional_call would not find back to its own weights."""
    weights, buffers = {}, {}
    for prefix, layer in module.named_modules():
        for name, weight in layer.named_parameters(recurse=False, remove_duplicate=False):
            weights[full_name(prefix, name)] = weight
        for name, buffer in layer.named_buffers(recurse=False, remove_duplicate=False):
            buffers[full_name(prefix, name)] = buffer
    return weights, buffers


def full_name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def buffers_that_change(module: nn.Module, buffers: dict[str, Tensor]) -> list[list[list[str]]]:
    """The buffers that a forward pass changes: those of the submodules in training mode. Batch norm
    that is frozen, which means in evaluation mode, only reads its running statistics.

    buffers: all buffers by their names. Returns groups of one type, and in them the names of each
    buffer, of which it may have several. Complex numbers are taken not to change. A truth value
    becomes true if it does for any tile, as then its mean is not 0.
    """
    names = {}
    for name, buffer in buffers.items():
        names.setdefault(buffer, []).append(name)
    groups = {}
    for layer in module.modules():
        for buffer in layer.buffers(recurse=False):
            if layer.training and not buffer.is_complex():
                groups.setdefault(buffer.dtype, {})[buffer] = names[buffer]
    return [list(group.values()) for group in groups.values()]
