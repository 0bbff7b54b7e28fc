"""Building the decomposed U-Net of the paper, and loading one that was trained."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from comm_net import CommNet
from decompose import DecomposedUNet
from support import checkpoints
from support.checkpoints import CheckpointError
from unet import NORM, Decoder, Encoder, Norm


def build_model(channels: int, classes: int, width: int = 8, depth: int = 3, comm_channels: int = 32,
                dilations: Sequence[int] = (1, 1, 1), dropout: float = 0.0, norm: Norm = NORM) -> DecomposedUNet:
    """A new network for images of `channels` channels and masks of `classes` classes.

    width: channels at full resolution; depth: how often the encoder halves the resolution;
    comm_channels: K, at most width * 2^depth, or 0 for tiles that know nothing of each other;
    dilations: of each convolution of the communication network; dropout: probability with which a
    channel is left out; norm: makes the normalisation of encoder and decoder (see NORM in unet.py);
    the communication network keeps batch norm.
    """
    encoder = Encoder(channels, width, depth, dropout, norm)
    decoder = Decoder(classes, width, depth, dropout, norm)
    comm_net = CommNet(comm_channels, dropout, dilations) if comm_channels > 0 else None
    model = DecomposedUNet(encoder, decoder, comm_net, comm_channels)
    for weight in model.parameters():
        if weight.ndim == 4:  # convolutions are faster in this memory format
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


def build_from_config(config: dict) -> DecomposedUNet:
    """The network that a configuration describes, as train.py makes it and a checkpoint holds it under "config"."""
    return build_model(config["channels"], len(config["classes"]), config["width"], config["depth"],
                       config["comm_channels"], config["dilations"], config["dropout"])


def weights_to_begin_with(config: dict) -> dict[str, Tensor]:
    """The weights of a checkpoint for a new network (--init). If its classes are not those of the new network, the last
    layer is not among them, and a line says so.

    CheckpointError: the checkpoint's network is another.
    """
    path = Path(config["init"])
    model, trained = load_model(path)
    for name in ("channels", "width", "depth", "comm_channels", "dilations"):
        if trained[name] != config[name]:
            raise CheckpointError(f"--init {path}: its {name} is {trained[name]}; take the same, or another checkpoint")
    weights = model.state_dict()
    if trained["classes"] != config["classes"]:
        print(f"{path}: its classes are others, so the last layer is drawn anew")
        del weights["decoder.head.weight"], weights["decoder.head.bias"]
    return weights


def load_model(path: Path) -> tuple[DecomposedUNet, dict]:
    """The network of a checkpoint, on the CPU and in evaluation mode, and its configuration.

    CheckpointError: the file is damaged, or its weights do not fit its configuration. OSError: it cannot be read.
    """
    state = checkpoints.load(path)
    try:
        model = build_from_config(state["config"])
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError):
        raise CheckpointError(f"{path}: its weights do not fit its configuration, or it comes from another version of "
                              "train.py; name another checkpoint") from None
    return model.eval(), state["config"]
