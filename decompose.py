"""One U-Net, one image, many devices: cut the image into tiles, run each on its device, let them communicate.

    image (B,C,H,W) --split--> tiles --encode--> skips + coarse maps         tile i is computed on devices[i]
                                            | last K channels of each, moved home and stitched
                                            v
                                communication network on the global coarse map (B,K,H/2^D,W/2^D)
                                            | split again, moved back: they replace those K channels
                                            v
        mask  <--stitch-- logits <--decode-- skips + coarse maps

Letters, here and in every file: B images in a batch, C channels, H W image, h w tile, R x Q grid (rows x columns)
with tiles row-major in a list, K communicated channels, D depth, L classes. A cell is one pixel of a coarse map,
2^D x 2^D pixels of the image. Home is devices[0]: it holds the weights and runs the communication network.

Source: Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266). Two departures: one set of weights instead of a replica
per device, and running statistics of batch norm that are the mean over all tiles.
This file imports nothing but torch: copy it.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Tiling:
    """How an image of size (H, W) is cut into a grid of (R, Q) tiles, with borders on whole cells.

    The tiles are as equal as whole cells allow: 2448 pixels in cells of 16 are 153 cells, so two tiles are 1232 and
    1216 wide. An image that ends inside a cell is padded there, at the bottom and right; `stitch` crops it again.
    With an overlap, `split` hands every tile that many pixels more on each side, as far as the image goes.
    ValueError: no tiles, or more than there are cells; an overlap that is not a whole number of cells.
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
        if self.overlap < 0 or self.overlap % self.cell:
            raise ValueError(f"an overlap of {self.overlap} pixels: it must be a multiple of the cell, {self.cell}")

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1]

    @functools.cached_property
    def coarse_size(self) -> tuple[int, int]:
        """Rows and columns of cells, the last ones perhaps padded."""
        return -(-self.size[0] // self.cell), -(-self.size[1] // self.cell)

    @functools.cached_property
    def coarse(self) -> "Tiling":
        """The same tiling of the coarse map: one pixel for every cell."""
        return Tiling(self.coarse_size, self.grid, overlap=self.overlap // self.cell)

    @functools.cached_property
    def boxes(self) -> list[tuple]:
        """(top, bottom, left, right) of the tiles, row-major, without overlap. They cover the (padded) image once."""
        rows, columns = ([self.cell * (i * (cells // tiles) + min(i, cells % tiles)) for i in range(tiles + 1)]
                         for cells, tiles in zip(self.coarse_size, self.grid))
        return [(top, bottom, left, right)
                for top, bottom in zip(rows, rows[1:]) for left, right in zip(columns, columns[1:])]

    @functools.cached_property
    def halos(self) -> list[tuple]:
        """(top, bottom, left, right) of the tiles, row-major, with overlap."""
        height, width = (cells * self.cell for cells in self.coarse_size)
        return [(max(top - self.overlap, 0), min(bottom + self.overlap, height),
                 max(left - self.overlap, 0), min(right + self.overlap, width))
                for top, bottom, left, right in self.boxes]

    def split(self, x: Tensor, overlap: bool = True, fill: float = 0) -> list[Tensor]:
        """(...,H,W) -> tiles (...,h,w), row-major: views of x, except where padded with `fill`. ValueError: not (H,W)."""
        if x.shape[-2:] != tuple(self.size):
            raise ValueError(f"{tuple(x.shape)}, but the tiling is made for {self.size[0]} rows, {self.size[1]} columns")
        tiles, strip = [], functools.cache(lambda top, bottom: x[..., top:bottom, :])
        for top, bottom, left, right in self.halos if overlap else self.boxes:
            tile = strip(top, bottom)[..., left:right]  # its gradient is as large as the strip, not as the image
            missing = 0, right - left - tile.shape[-1], 0, bottom - top - tile.shape[-2]
            tiles.append(nn.functional.pad(tile, missing, value=fill) if any(missing) else tile)
        return tiles

    def crop(self, i: int, tile: Tensor) -> Tensor:
        """Tile i without its overlap."""
        (top, bottom, left, right), (halo_top, _, halo_left, _) = self.boxes[i], self.halos[i]
        return tile[..., top - halo_top:bottom - halo_top, left - halo_left:right - halo_left]

    def stitch(self, tiles: Sequence[Tensor]) -> Tensor:
        """Tiles (...,h,w) without overlap, row-major and on one device -> (...,H,W)."""
        columns = self.grid[1]
        rows = [torch.cat(list(tiles[i:i + columns]), dim=-1) for i in range(0, len(self), columns)]
        return torch.cat(rows, dim=-2)[..., :self.size[0], :self.size[1]]


class Rounded(torch.autograd.Function):
    """A weight for one of many tiles, rounded once for all of them to what autocast computes in. Their gradients add up
    in the weight's own precision: autocast would add them in bfloat16, which rounds away those of the last of many."""

    @staticmethod
    def forward(ctx, weight: Tensor, rounded: Tensor) -> Tensor:
        ctx.precision = weight.dtype
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.to(ctx.precision), None


class PerTile:
    """A module that is run on many tiles: one copy of its weights per device, one copy of its buffers per tile.

    The copies of the weights are part of the graph, so autograd adds up the gradients of all devices by itself.
    Every tile is normalised by its own statistics and starts from the same old running statistics: neither the
    number of devices nor the order of the tiles changes what comes out, but for rounding.
    """

    def __init__(self, module: nn.Module, devices: Sequence[torch.device]):
        self.module, self.devices = module, devices
        self.weights = {device: {name: weight.to(device) for name, weight in module.named_parameters()}
                        for device in dict.fromkeys(devices)}
        self.rounded = {device: {name: weight.detach().to(torch.get_autocast_dtype(device.type))
                                 for name, weight in weights.items() if weight.dtype == torch.float32 and weight.ndim > 1}
                        for device, weights in self.weights.items() if torch.is_autocast_enabled(device.type)}
        self.buffers = {device: {name: old.to(device) for name, old in module.named_buffers()} for device in self.weights}
        self.changing = buffers_that_change(module)
        self.sums, self.counted = {}, set()  # on each device, of its tiles' new buffers; and the tiles in them
        self.turn = threading.Lock()

    def __call__(self, i: int, *inputs):
        """The module on tile i, whose inputs are on devices[i]."""
        device = self.devices[i]
        buffers = {name: old.clone() if name in self.changing else old for name, old in self.buffers[device].items()}
        weights = self.weights[device]
        if rounded := self.rounded.get(device):
            weights = {name: Rounded.apply(weight, rounded.get(name, weight)) for name, weight in weights.items()}
        with self.turn:  # backward has a thread for each GPU, and the call puts these weights into the one module
            outputs = functional_call(self.module, (weights, buffers), inputs)
        if self.changing and i not in self.counted:  # whoever recomputes runs a tile more than once
            self.counted.add(i)
            sums = self.sums.setdefault(device, dict.fromkeys(self.changing, 0))
            for name in self.changing:
                sums[name] += buffers[name]
        return outputs

    @torch.no_grad()
    def update_buffers(self):
        """After training: running statistics = (1 - momentum) * old + momentum * mean over tiles."""
        for name in self.changing:
            old = self.module.get_buffer(name)
            total, tiles = sum(sums[name].to(old.device) for sums in self.sums.values()), len(self.counted)
            old.copy_(total / tiles if total.is_floating_point() else total // tiles)  # a count is the same for all


def buffers_that_change(module: nn.Module) -> list[str]:
    """The names of the buffers that running the module changes: those of its parts that are in training mode. Batch norm
    that is frozen, which is to say in evaluation mode, only reads its running statistics."""
    changing = []
    for prefix, part in module.named_modules(remove_duplicate=True):
        if part.training:
            changing += [f"{prefix}.{name}" if prefix else name for name, _ in part.named_buffers(recurse=False)]
    return changing


class DecomposedUNet(nn.Module):
    """Any encoder and decoder, run on the tiles of an image, and a communication network between the two.

    encoder: tile (B,C,h,w) -> (skips, coarse map); the skips are for the decoder alone to understand;
    decoder: (skips, coarse map) -> logits (B,L,h,w); neither may checkpoint or switch autocast inside;
    comm_net: (B,K,H/2^D,W/2^D) -> the same shape; without it (None, K = 0) the tiles know nothing of each other;
    comm_channels: K, at most the channels of the coarse map;
    recompute: trade time for memory. What is alive on a device, in training:
        without: the activations of all its tiles, from their encoding to their gradient;
        with: coarse maps, and the activations of one tile. A tile is encoded, and forgotten but for what it sends; later
        encoded and decoded, and forgotten but for what `finish` returns; the backward pass does both again.
        Loss, gradients and running statistics are the same, but for other dropout. Without gradients nothing is kept.
    ValueError: a communication network without channels, or channels without a network.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, comm_net: nn.Module | None = None,
                 comm_channels: int = 0, recompute: bool = False):
        super().__init__()
        if (comm_net is None) != (comm_channels == 0):
            raise ValueError(f"{comm_channels} communicated channels, but the communication network is {comm_net}")
        self.encoder, self.decoder, self.comm_net = encoder, decoder, comm_net
        self.comm_channels, self.recompute = comm_channels, recompute

    def forward(self, tiles: Sequence[Tensor], tiling: Tiling, devices: Sequence[torch.device],
                finish: Callable = lambda i, logits: logits) -> list:
        """Tiles (B,C,h,w), as `tiling.split` made them -> what `finish` returned for each tile.

        Tile i is moved to devices[i] and computed there. `finish(i, logits)` is called there too (again if recomputed),
        with the tile's logits (B,L,h,w) without overlap. What it returns (these logits, or their share of a loss) is all
        that comes back; no tensor of image size is ever made on a device. ValueError: not one device for each tile.
        """
        home, k = devices[0], self.comm_channels
        encoder, decoder = PerTile(self.encoder, devices), PerTile(self.decoder, devices)
        if not len(tiles) == len(devices) == len(tiling):
            raise ValueError(f"{len(tiles)} tiles and {len(devices)} devices, but the tiling has {len(tiling)} tiles")
        remember = torch.is_grad_enabled() and not self.recompute
        run = (lambda function, i: function(i)) if remember else recomputed(devices)

        def encode(i):
            return encoder(i, sent(tiles[i], devices[i]))

        if remember:
            encode = functools.cache(encode)  # to send and to decode, the tile is encoded once and remembered

        def send(i):
            _, coarse = encode(i)
            return tiling.coarse.crop(i, coarse[:, -k:]).clone()  # a view would keep all channels alive

        def decode(i):
            skips, coarse = encode(i)
            if self.comm_net is not None:
                coarse = torch.cat([coarse[:, :-k], received[i] * 1], dim=1)  # * 1: or its gradient would be a view, too
            return finish(i, tiling.crop(i, decoder(i, skips, coarse)))

        everyone = range(len(tiling))
        if self.comm_net is not None:
            coarse_map = tiling.coarse.stitch([part.to(home) for part in [run(send, i) for i in everyone]])
            received = list(map(sent, tiling.coarse.split(self.comm_net(coarse_map)), devices))
        outputs = [run(decode, i) for i in everyone]
        encoder.update_buffers()
        decoder.update_buffers()
        return outputs


def sent(tile: Tensor, device: torch.device) -> Tensor:
    """A tile on its device. To copy from pinned memory to a GPU, nobody waits: the loop goes on to the next GPU."""
    pin = device.type == "cuda" and tile.device.type == "cpu"
    return (tile.contiguous().pin_memory() if pin else tile).to(device, non_blocking=True)


def recomputed(devices: Sequence[torch.device]) -> Callable:
    """Runs a function of tile i, forgets all but its result, and runs it again when its gradient is computed. A tile is
    encoded several times in a step: a seed of its own lets dropout leave out the same channels every time."""
    seeds = torch.randint(2**62, (len(devices),)).tolist()

    def run(function: Callable, i: int):
        gpu = devices[i].type == "cuda"
        generator = torch.cuda.default_generators[devices[i].index] if gpu else torch.default_generator
        def seeded(i):
            before = generator.get_state()
            generator.manual_seed(seeds[i])
            try:
                return function(i)
            finally:
                generator.set_state(before)
        return checkpoint(seeded, i, use_reentrant=False, preserve_rng_state=False)

    return run
