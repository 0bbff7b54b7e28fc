"""One U-Net, one image, many devices: cut the image into tiles, run each tile on its device, let the tiles communicate.

    image (B,C,H,W) --split--> tiles --encode--> skips + coarse maps        each tile on its own device
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

Source: Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266). There are two departures from it in this
file: one set of weights instead of a replica on every device, and running statistics of batch norm that are
the mean over all tiles. This file imports nothing but torch: copy it.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Tiling:
    """How an image is cut into tiles.

    size: (H, W) of the image, in pixels.
    grid: (R, Q), rows and columns of tiles.
    cell: the borders between tiles lie on multiples of this many pixels, 2^D for a U-Net of depth D.
    overlap: how many pixels of its neighbours a tile also sees, on each side, as far as the image goes.

    boxes, halos: for each tile, row-major, its (top, bottom, left, right) without and with the overlap.
        The boxes cover the (padded) image once.
    coarse: a Tiling with the same cuts for the coarse map, which has one pixel for every cell (with a cell of 1, the
        Tiling itself).

    The tiles are as equal as whole cells allow: 10 cells in four tiles are 3, 2, 3 and 2. And 2448 pixels in cells of
    16 are 153 cells, so two tiles are 1232 and 1216 wide. If the image ends inside a cell, `split` pads it at the
    bottom and right, and `stitch` crops it again.
    ValueError: there are no tiles, or more than cells; or the overlap is not a whole number of cells.
    """

    def __init__(self, size: tuple[int, int], grid: tuple[int, int], cell: int = 1, overlap: int = 0):
        height, width = size
        rows, columns = grid
        cells = (math.ceil(height / cell), math.ceil(width / cell))
        if not (1 <= rows <= cells[0] and 1 <= columns <= cells[1]):
            raise ValueError(f"{rows}x{columns} tiles: an image of {height}x{width} pixels in cells of {cell}x{cell} "
                             f"can have 1x1 to {cells[0]}x{cells[1]}")
        if overlap < 0 or overlap % cell != 0:
            raise ValueError(f"an overlap of {overlap} pixels: it must be a multiple of the cell, {cell}")
        self.size = (height, width)
        self.grid = grid
        self.boxes = []
        self.halos = []
        padded_height, padded_width = cells[0] * cell, cells[1] * cell
        for top, bottom in cut(cells[0], rows, cell):
            for left, right in cut(cells[1], columns, cell):
                self.boxes.append((top, bottom, left, right))
                self.halos.append((max(top - overlap, 0), min(bottom + overlap, padded_height),
                                   max(left - overlap, 0), min(right + overlap, padded_width)))
        self.coarse = self
        if cell > 1:
            self.coarse = Tiling(cells, grid, cell=1, overlap=overlap // cell)

    def __len__(self) -> int:
        """The number of tiles."""
        return len(self.boxes)

    def split(self, x: Tensor, overlap: bool = True, fill: float = 0) -> list[Tensor]:
        """(...,H,W) -> tiles (...,h,w), row-major. They are views of x, except where they are padded with `fill`.

        overlap: whether each tile includes its overlap. ValueError: x is not of size (H,W).
        """
        if x.shape[-2:] != self.size:
            raise ValueError(f"a tensor of shape {tuple(x.shape)}, but the tiling is made for {self.size[0]} rows and "
                             f"{self.size[1]} columns")
        boxes = self.halos if overlap else self.boxes
        columns = self.grid[1]
        tiles = []
        for start in range(0, len(boxes), columns):
            # First a strip, then tiles of it, to save memory: the gradient of a slice is zeros as large as what it was
            # cut from, with the gradient of the slice written into them.
            top, bottom, _, _ = boxes[start]
            strip = x[..., top:bottom, :]
            for _, _, left, right in boxes[start:start + columns]:
                tile = strip[..., left:right]
                missing_rows = bottom - top - tile.shape[-2]
                missing_columns = right - left - tile.shape[-1]
                if missing_rows or missing_columns:
                    tile = nn.functional.pad(tile, (0, missing_columns, 0, missing_rows), value=fill)
                tiles.append(tile)
        return tiles

    def crop(self, i: int, tile: Tensor) -> Tensor:
        """Tile i with its overlap (...,h,w) -> the same tile without its overlap. ValueError: it is of another size."""
        top, bottom, left, right = self.boxes[i]
        halo_top, halo_bottom, halo_left, halo_right = self.halos[i]
        height, width = halo_bottom - halo_top, halo_right - halo_left
        if tile.shape[-2:] != (height, width):
            raise ValueError(f"tile {i} has the shape {tuple(tile.shape)}, but the tiling makes it {height} rows and "
                             f"{width} columns; if this is a coarse map, give Tiling as `cell` by how much the "
                             "encoder shrinks a tile (2^D for a U-Net of depth D)")
        return tile[..., top - halo_top:bottom - halo_top, left - halo_left:right - halo_left]

    def stitch(self, tiles: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
        """Tiles (...,h,w) without overlap, row-major, on any devices -> (...,H,W) on `device`.

        device: None stands for that of the first tile.
        """
        if device is None:
            device = tiles[0].device
        columns = self.grid[1]
        strips = []
        for start in range(0, len(tiles), columns):
            row = []
            for tile in tiles[start:start + columns]:
                row.append(tile.to(device))
            strips.append(torch.cat(row, dim=-1))
        height, width = self.size
        return torch.cat(strips, dim=-2)[..., :height, :width]


def cut(cells: int, tiles: int, cell: int) -> Iterable[tuple[int, int]]:
    """Cuts a row of cells, each `cell` pixels long, into tiles that are as equal as can be. Returns the pixels at
    which each tile begins and ends."""
    borders = []
    for i in range(tiles + 1):
        borders.append(math.ceil(cells * i / tiles) * cell)
    return pairwise(borders)


class DecomposedUNet(nn.Module):
    """An encoder and a decoder that are run on the tiles of an image, and a communication network between the two.

    encoder: tile (B,C,h,w) -> (skips, coarse map). Only the decoder needs to understand the skips.
    decoder: (skips, coarse map) -> logits (B,L,h,w).
    comm_net: (B,K,H/2^D,W/2^D) -> the same shape. Without one (None, K = 0) the tiles know nothing of each other.
    comm_channels: K, at most the channels of the coarse map.

    Tiles may lie on different devices, and encoder and decoder are computed where the tile lies. The
    communication network is computed where its weights are: `model.comm_net.to("cuda:3")` moves it.
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

    def forward(self, tiles: Sequence[Tensor], tiling: Tiling) -> list[Tensor]:
        """Tiles (B,C,h,w), cut by `tiling.split`, each on its device -> their logits (B,L,h,w), each on its device.

        The logits are without overlap, so that `tiling.stitch` makes the mask of them.
        ValueError: there is not one tile for each of the tiling, or a tile or its coarse map is of another size.
        """
        if len(tiles) != len(tiling):
            raise ValueError(f"{len(tiles)} tiles, but the tiling has {len(tiling)}")
        encoder = MultiDeviceModule(self.encoder)
        decoder = MultiDeviceModule(self.decoder)

        skips, coarse_maps = [], []
        for tile in tiles:
            tile_skips, coarse_map = encoder(tile)
            skips.append(tile_skips)
            coarse_maps.append(coarse_map)

        if self.comm_net is not None:
            sent = []
            for i, coarse_map in enumerate(coarse_maps):
                sent.append(self.to_send(i, coarse_map, tiling))
            comm_device = next(self.comm_net.parameters()).device
            global_map = tiling.coarse.stitch(sent, comm_device)
            received = tiling.coarse.split(self.comm_net(global_map))
            for i, coarse_map in enumerate(coarse_maps):
                coarse_maps[i] = self.replace(coarse_map, received[i])

        logits = []
        for i, coarse_map in enumerate(coarse_maps):
            tile_logits = decoder(skips[i], coarse_map)
            logits.append(tiling.crop(i, tile_logits))

        encoder.update_buffers()
        decoder.update_buffers()
        return logits

    def to_send(self, i: int, coarse_map: Tensor, tiling: Tiling) -> Tensor:
        """The coarse map of tile i -> its last K channels (B,K,h/2^D,w/2^D), without its overlap.

        ValueError: it has fewer channels.
        """
        channels = coarse_map.shape[1]
        if channels < self.comm_channels:
            raise ValueError(f"{self.comm_channels} communicated channels, but the coarse map has only {channels}")
        return tiling.coarse.crop(i, coarse_map[:, -self.comm_channels:])

    def replace(self, coarse_map: Tensor, received: Tensor) -> Tensor:
        """The coarse map of a tile, with its last K channels replaced by what the tile received, on any device."""
        kept = coarse_map[:, :-self.comm_channels]
        return torch.cat([kept, received.to(coarse_map.device)], dim=1)


class MultiDeviceModule:
    """One module with one set of weights, which is run on tiles on many devices.

    Weights: weight.to(device) copies them to each device once, and autograd records the copy. So in
    the backward pass it carries the gradients of all devices back and adds them up in the one set
    of weights. Nothing else has to be done.

    Buffers (the running statistics of batch norm): each call starts from the old ones and changes a
    copy of its own. `update_buffers` then takes the mean of these copies. With momentum m (0.1 in
    PyTorch) a tile makes (1 - m) * old + m * its own statistics, so the mean is
    (1 - m) * old + m * mean of the tiles' statistics. So neither the number of devices nor the order
    of the tiles changes the result. (The communication network runs once, as an ordinary module.)

    Where no layer learns statistics (batch norm is in evaluation mode, or there is none) the buffers
    stay as they are.

    module: its weights may lie on any device.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.learns_statistics = learns_statistics(module)
        self.weights = {}  # of each device, by their names
        self.buffers = {}
        self.changed = []  # for each call, its copy of the buffers

    def copy_to(self, device: torch.device):
        self.weights[device] = {}
        for name, weight in self.module.named_parameters():
            self.weights[device][name] = weight.to(device)
        self.buffers[device] = {}
        for name, buffer in self.module.named_buffers():
            # A copy on the module's own device, too: `update_buffers` overwrites those of the module, but a tile that
            # is computed again in the backward pass (see support/scale.py) must see the old ones.
            self.buffers[device][name] = buffer.to(device, copy=True)

    def __call__(self, *inputs):
        """What the module makes of these inputs. It is computed on the device of the last one, which is a tensor."""
        device = inputs[-1].device
        if device not in self.weights:
            self.copy_to(device)
        buffers = dict(self.buffers[device])
        if self.learns_statistics:
            for name, buffer in self.buffers[device].items():
                buffers[name] = buffer.clone()
            self.changed.append(buffers)
        # functional_call runs the module with these weights and buffers in place of its own. With its default,
        # tie_weights=True, a layer that has two names would keep the copies after the call. (The price: a weight that
        # two layers share fails on a second device.)
        return functional_call(self.module, (self.weights[device], buffers), inputs, tie_weights=False)

    @torch.no_grad()
    def update_buffers(self):
        """The buffers of the module become the mean of those of all calls. To be called after a forward pass."""
        if not self.changed:
            return
        for name, buffer in self.module.named_buffers():
            copies = []
            for buffers in self.changed:
                copies.append(buffers[name].to(buffer.device))
            buffer.copy_(torch.stack(copies).double().mean(dim=0))


def learns_statistics(module: nn.Module) -> bool:
    """Whether a layer that has buffers, such as batch norm, is in training mode, in which it changes them."""
    for layer in module.modules():
        if layer.training and list(layer.buffers(recurse=False)):
            return True
    return False
