"""Step 4: each tile on its device, and one set of weights."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from comm_net import CommNet
from experiments.step_report import report
from synthetic import LinesAndCircles
from unet import Decoder, Encoder

K = 32  # how many of the 64 channels of its coarse map a tile sends
DEVICES = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu", "cpu"]  # they take the tiles in turn


class MultiDeviceModule:  # a module with one set of weights that is run on many devices
    def __init__(self, module):
        self.module = module
        self.weights = {}
        self.changed = []  # for each call, its copy of the running statistics of batch norm
        for device in DEVICES:  # autograd records these copies, so it adds up the gradients of all devices
            self.weights[device] = {name: weight.to(device) for name, weight in module.named_parameters()}

    def __call__(self, device, *inputs):
        buffers = {name: buffer.to(device, copy=True) for name, buffer in self.module.named_buffers()}
        self.changed.append(buffers)
        return functional_call(self.module, (self.weights[device], buffers), inputs)

    def update_buffers(self):  # the mean of all calls
        for name, buffer in self.module.named_buffers():
            copies = torch.stack([buffers[name].to(buffer.device) for buffers in self.changed])
            buffer.copy_(copies.double().mean(dim=0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder(in_channels=1, width=8, depth=3, dropout=0)
        self.decoder = Decoder(classes=3, width=8, depth=3, dropout=0)
        self.comm_net = CommNet(K, dropout=0)

    def forward(self, images):  # (B,1,64,64) -> logits (B,3,64,64)
        encoder = MultiDeviceModule(self.encoder)
        decoder = MultiDeviceModule(self.decoder)
        encoded, sent = [], []
        for tile, device in zip(split(images), DEVICES * 4):  # four times (B,1,32,32)
            skips, coarse = encoder(device, tile.to(device))
            encoded.append((skips, coarse))
            sent.append(coarse[:, -K:].to(DEVICES[0]))  # (B,K,4,4)
        received = split(self.comm_net(stitch(sent)))  # through (B,K,8,8), the coarse map of the whole image
        logits = []
        for (skips, coarse), part, device in zip(encoded, received, DEVICES * 4):
            coarse = torch.cat([coarse[:, :-K], part.to(device)], dim=1)  # in place of what was sent
            logits.append(decoder(device, skips, coarse).to(images.device))
        encoder.update_buffers()
        decoder.update_buffers()
        return stitch(logits)


def split(x):  # (B,C,H,W) -> four tiles (B,C,H/2,W/2), row by row
    upper, lower = x.chunk(2, dim=2)
    return upper.chunk(2, dim=3) + lower.chunk(2, dim=3)


def stitch(tiles):  # the opposite
    upper = torch.cat(tiles[:2], dim=3)
    lower = torch.cat(tiles[2:], dim=3)
    return torch.cat([upper, lower], dim=2)


def main(steps=400):
    torch.manual_seed(0)
    model = Model().to(DEVICES[0])
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    batches = DataLoader(LinesAndCircles(8 * steps), batch_size=8)
    losses = []
    for step, (images, masks) in enumerate(batches):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), masks.long())
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}")
    return model, losses, report(model, images, masks)


if __name__ == "__main__":
    main()
