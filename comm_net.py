"""The communication network: the only place where tiles hear of each other.

Every tile sends the last K channels of its coarse map. Stitched together they are a map of the whole image,
small enough for one device (at depth 4 it has 1/256 of the image's pixels). A few convolutions spread what each
tile knows over its neighbours, and every tile gets its own part back in place of what it sent.

Source: Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266).
This file imports nothing but torch: copy it.
"""

from collections.abc import Sequence

from torch import nn


class CommNet(nn.Sequential):
    """For each dilation: 5x5 convolution, batch norm, ReLU, dropout of whole channels. (B,K,H/2^D,W/2^D) -> the same.

    The default is the paper's: three convolutions without dilation. A 5x5 convolution looks 2 cells to every side, times
    its dilation, and a coarse cell is 2^D pixels wide: three of them see 6 cells, 48 pixels at depth 3, 96 at depth 4.
    Dilations 1, 2, 4, 8 see 30 cells, with weights for one convolution more. Beyond its reach nothing passes, but a
    cell halfway between two others hears both if they are up to twice as far apart.
    """

    def __init__(self, channels: int, dropout: float = 0.1, dilations: Sequence[int] = (1, 1, 1)):
        layers = []
        for dilation in dilations:
            layers += [
                nn.Conv2d(channels, channels, kernel_size=5, padding=2 * dilation, dilation=dilation),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.Dropout2d(dropout),
            ]
        super().__init__(*layers)

    def reach(self, depth: int) -> int:
        """How far it sees to every side, in pixels of the image, when a coarse cell is 2^depth pixels wide."""
        return 2**depth * sum(layer.padding[0] for layer in self if isinstance(layer, nn.Conv2d))
