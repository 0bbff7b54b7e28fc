"""The U-Net of the paper, in the two halves that the decomposition needs apart.

`Encoder` turns an image into skips (one feature map per level, finest first) and a coarse map.
`Decoder` turns skips and a coarse map into class scores. `UNet` is one after the other.

    image (B,C,H,W)                                               logits (B,L,H,W)
        |                                                               ^
    DoubleConv ----------------- skip (B,width,H,W) ----------------> DoubleConv, 1x1 conv
        v pool 2x2                                                      | up 2x2
    DoubleConv ------------- skip (B,2*width,H/2,W/2) --------------> DoubleConv
        v pool 2x2                                                      | up 2x2
        ...                                                            ...
        +--- DoubleConv = coarse map (B,2^D*width,H/2^D,W/2^D) ---------+

Letters: B images, C channels, H W image, D depth (number of poolings), L classes.
Sources: Ronneberger, Fischer, Brox, "U-Net" (arXiv 1505.04597). The variant with batch
normalisation, dropout and padded convolutions is that of Verburg, Heinlein, Cyr, "DDU-Net" (arXiv
2407.21266). This file imports nothing but torch: copy it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# What makes the layer of normalisation, from its number of channels. For group norm of 4 groups, put in place of the
# last line: def NORM(channels): return nn.GroupNorm(4, channels), and choose a width that 4 divides.
Norm = Callable[[int], nn.Module]
NORM = nn.BatchNorm2d  # that of encoder and decoder; the communication network keeps batch norm


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, normalisation, ReLU, dropout of whole channels. (B,in,h,w) -> (B,out,h,w)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, norm: Norm = NORM):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),  # the norm adds a bias
            norm(out_channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            norm(out_channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
        )


class Encoder(nn.Module):
    """The way down: (B,C,h,w) -> (skips, coarse map).

    The skips are a list of D maps, finest first. That of level l = 0 .. D-1 is (B, width*2^l,
    h/2^l, w/2^l). The coarse map is (B, width*2^D, h/2^D, w/2^D).
    ValueError: h or w is not a multiple of 2^D.
    """

    def __init__(self, in_channels: int, width: int, depth: int, dropout: float = 0.0, norm: Norm = NORM):
        super().__init__()
        self.blocks = nn.ModuleList()
        channels = in_channels
        for level in range(depth + 1):
            out_channels = width * 2**level
            self.blocks.append(DoubleConv(channels, out_channels, dropout, norm))
            channels = out_channels
        self.pool = nn.MaxPool2d(2)
        self.depth = depth

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        rows, columns = x.shape[-2:]
        cell = 2**self.depth
        if rows % cell != 0 or columns % cell != 0:
            raise ValueError(f"image of {rows}x{columns} at depth {self.depth}: height and width must be multiples of "
                             f"{cell}; pad it, or use a smaller depth")
        skips = []
        for block in self.blocks[:-1]:
            skip = block(x)
            skips.append(skip)
            x = self.pool(skip)
        coarse = self.blocks[-1](x)
        return skips, coarse


class Decoder(nn.Module):
    """The way up: skips and coarse map of an `Encoder` of the same width and depth -> logits (B,L,h,w)."""

    def __init__(self, classes: int, width: int, depth: int, dropout: float = 0.0, norm: Norm = NORM):
        super().__init__()
        self.ups = nn.ModuleList()
        for level in reversed(range(depth)):  # the coarsest level first
            channels = width * 2**level
            self.ups.append(nn.ConvTranspose2d(2 * channels, channels, kernel_size=2, stride=2))
        self.blocks = nn.ModuleList()
        for level in reversed(range(depth)):
            channels = width * 2**level
            self.blocks.append(DoubleConv(2 * channels, channels, dropout, norm))
        self.head = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, skips: list[Tensor], coarse: Tensor) -> Tensor:
        x = coarse
        for up, block, skip in zip(self.ups, self.blocks, reversed(skips)):
            x = block(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


class UNet(nn.Module):
    """The plain U-Net on a whole image, the baseline of every comparison. (B,C,H,W) -> logits (B,L,H,W).

    width: channels of the finest level. Each level below has twice as many.
    depth: how often the image is halved. H and W must be multiples of 2^depth.
    dropout: the probability with which a channel is left out in training; 0.1 in the paper.
    norm: see NORM above; a class or a function. The layer that it makes should add a bias, as the
        convolutions before it add none.
    """

    def __init__(self, in_channels: int, classes: int, width: int, depth: int, dropout: float = 0.0, norm: Norm = NORM):
        super().__init__()
        self.encoder = Encoder(in_channels, width, depth, dropout, norm)
        self.decoder = Decoder(classes, width, depth, dropout, norm)

    def forward(self, image: Tensor) -> Tensor:
        skips, coarse = self.encoder(image)
        return self.decoder(skips, coarse)
