"""Step 1: the plain U-Net, trained on the whole image."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from experiments.step_report import report
from synthetic import LinesAndCircles
from unet import Decoder, Encoder


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder(in_channels=1, width=8, depth=3, dropout=0)
        self.decoder = Decoder(classes=3, width=8, depth=3, dropout=0)

    def forward(self, images):  # (B,1,64,64) -> logits (B,3,64,64)
        skips, coarse = self.encoder(images)
        return self.decoder(skips, coarse)


def main(steps=400):
    torch.manual_seed(0)
    model = Model()
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
