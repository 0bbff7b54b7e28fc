"""The communication network: the only place where tiles hear of each other.

Every tile sends the last K channels of its coarse map. Stitched together they are a map of the whole image,
small enough for one device (at depth 4 it has 1/256 of the image's pixels). A few convolutions spread what each
tile knows over its neighbours, and every tile gets its own part back in place of what it sent.

Source: Verburg, Heinlein, Cyr, "DDU-Net" (arXiv 2407.21266).
This file imports nothing but torch: copy it.
"""

from torch import nn


class CommNet(nn.Sequential):
    """Three times: 5x5 convolution, batch norm, ReLU, dropout of whole channels. (B,K,h,w) -> (B,K,h,w).

    How far it sees: a 5x5 convolution looks 2 cells to every side, so three of them look 6. A coarse cell is
    2^D pixels wide: 6 cells are 48 pixels at depth 3, 96 at depth 4. Beyond that, nothing passes.
    """

    def __init__(self, channels: int, dropout: float = 0.1):
        layers = []
        for _ in range(3):
            layers += [
                nn.Conv2d(channels, channels, kernel_size=5, padding=2),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.Dropout2d(dropout),
            ]
        super().__init__(*layers)

    def reach(self, depth: int) -> int:
        """How far it sees to every side, in pixels of the image, when a coarse cell is 2^depth pixels wide."""
        return 2**depth * sum(layer.padding[0] for layer in self if isinstance(layer, nn.Conv2d))
