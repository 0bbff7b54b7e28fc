"""The communication network: the only place where tiles hear of each other.

Every tile sends the last K channels of its coarse map. Stitched together they are a map of the
whole image. It is small enough for one device: at depth 4 it has 1/256 of the image's pixels. A few
convolutions spread what each tile knows over its neighbours. Then every tile gets its own part
back, in place of what it sent. Its other channels it keeps for itself. With a larger K more numbers
travel, and this network has more weights.

Letters: B images, K channels that are sent, H W image, D depth of the U-Net (number of poolings).
Source: Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266).
This file imports nothing but torch: copy it.
"""

from collections.abc import Sequence

from torch import nn


class CommNet(nn.Sequential):
    """For each dilation: 5x5 convolution, batch norm, ReLU, dropout of whole channels.

    (B,K,H/2^D,W/2^D) -> the same shape. A cell is one pixel of this map, which is 2^D pixels wide
    in the image. A 5x5 convolution looks 2 cells to every side, times its dilation. The default is
    the paper's: three convolutions without dilation, which see 6 cells. These are 48 pixels at
    depth 3 and 96 pixels at depth 4. The dilations (1, 2, 4, 8) see 30 cells, for the price of one
    more convolution. From cell to cell nothing passes beyond this reach. A cell halfway between two
    others hears both of them: with a reach of 6 cells, these two may be up to 12 cells apart.
    """

    def __init__(self, channels: int, dropout: float = 0.0, dilations: Sequence[int] = (1, 1, 1)):
        super().__init__()
        for dilation in dilations:
            # The bias of the convolution has no effect before batch norm, but the paper's network has it.
            self.append(nn.Conv2d(channels, channels, kernel_size=5, padding=2 * dilation, dilation=dilation))
            self.append(nn.BatchNorm2d(channels))
            self.append(nn.ReLU(inplace=True))
            self.append(nn.Dropout2d(dropout))

    def reach(self, depth: int) -> int:
        """How far each cell hears others to every side, in pixels of the image, behind a U-Net of this depth."""
        cells = 0
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                cells += 2 * layer.dilation[0]
        return cells * 2**depth
