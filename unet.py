"""The U-Net of the paper, in the two halves that the decomposition needs apart.

`Encoder` turns a picture into skips (one feature map per level, finest first) and a coarse map;
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
Sources: Ronneberger, Fischer, Brox, "U-Net" (arXiv 1505.04597); the variant with batch normalisation,
dropout and padded convolutions is that of Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266).
This file imports nothing but torch: copy it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, batch norm, ReLU, dropout of whole channels. (B,in,h,w) -> (B,out,h,w).

    norm: makes the normalisation of a number of channels, if it is to be another than batch norm.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.1,
                 norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        layers = []
        for channels in (in_channels, out_channels):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),  # the batch norm has the bias
                norm(out_channels),
                nn.ReLU(inplace=True),
                nn.Dropout2d(dropout),
            ]
        super().__init__(*layers)


class Encoder(nn.Module):
    """The way down: (B,C,h,w) -> skips, coarse.

    skips: list of D maps, finest first, (B, width*2^l, h/2^l, w/2^l) for level l = 0 .. D-1;
    coarse: (B, width*2^D, h/2^D, w/2^D). h and w must be multiples of 2^D, else ValueError.
    """

    def __init__(self, in_channels: int, width: int = 32, depth: int = 4, dropout: float = 0.1):
        super().__init__()
        channels = [in_channels] + [width * 2**level for level in range(depth + 1)]
        self.blocks = nn.ModuleList(DoubleConv(a, b, dropout) for a, b in zip(channels, channels[1:]))
        self.pool = nn.MaxPool2d(2)
        self.depth = depth

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        cell = 2**self.depth
        if x.shape[-2] % cell or x.shape[-1] % cell:
            raise ValueError(f"image of {x.shape[-2]}x{x.shape[-1]} at depth {self.depth}: height and width "
                             f"must be multiples of {cell}; pad it, or use a smaller depth")
        skips = []
        for block in self.blocks[:-1]:
            skips.append(block(x))
            x = self.pool(skips[-1])
        return skips, self.blocks[-1](x)


class Decoder(nn.Module):
    """The way up: skips and coarse map of an `Encoder` of the same width and depth -> logits (B,L,h,w)."""

    def __init__(self, classes: int, width: int = 32, depth: int = 4, dropout: float = 0.1):
        super().__init__()
        channels = [width * 2**level for level in range(depth, -1, -1)]  # coarsest first
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in zip(channels, channels[1:]))
        self.blocks = nn.ModuleList(DoubleConv(2 * b, b, dropout) for b in channels[1:])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, skips: list[Tensor], coarse: Tensor) -> Tensor:
        x = coarse
        for up, block, skip in zip(self.ups, self.blocks, reversed(skips)):
            x = block(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


class UNet(nn.Module):
    """The plain U-Net on a whole image, the baseline of every comparison. (B,C,H,W) -> logits (B,L,H,W)."""

    def __init__(self, in_channels: int, classes: int, width: int = 32, depth: int = 4, dropout: float = 0.1):
        super().__init__()
        self.encoder = Encoder(in_channels, width, depth, dropout)
        self.decoder = Decoder(classes, width, depth, dropout)

    def forward(self, image: Tensor) -> Tensor:
        skips, coarse = self.encoder(image)
        return self.decoder(skips, coarse)
