"""Write segmentation.npz: two tiny mask VQ-VAEs and what PyTorch makes of them. Needs `torch`; tests never run it.

    python tests/golden/make_segmentation_golden.py

Every size differs from its neighbors. Encoder kernels of 4, as published, and of 3, where TensorFlow's "SAME" is
lopsided.
"""
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROWS, CODE, DOWN, UP = 11, 6, (2, 3, 4, 5), (7, 6, 5, 4, 3)
COMMITMENT = 0.3


class SameConv2d(nn.Conv2d):
    """Stride 2 with TensorFlow's padding for even sizes: k-2 zeros, the odd one after."""

    def forward(self, x):
        total = self.kernel_size[0] - 2
        before, after = total // 2, total - total // 2
        return super().forward(nn.functional.pad(x, (before, after, before, after)))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        layers = [nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for kernel in (3, 3, 1)]
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x):
        return x + self.net(x)


class VectorQuantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self._embedding = nn.Parameter(torch.zeros(ROWS, CODE))

    def forward(self, z):
        cells = z.permute(0, 2, 3, 1).reshape(-1, CODE)
        codes = torch.cdist(cells, self._embedding, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        return codes.reshape(-1, 16), self._embedding[codes].reshape(-1, 4, 4, CODE).permute(0, 3, 1, 2)


class VQVAE(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        down = [layer for i, o in zip((1, *DOWN), DOWN) for layer in (SameConv2d(i, o, kernel, stride=2), nn.ReLU())]
        self.encoder = nn.Sequential(*down, Residual(DOWN[-1]), Residual(DOWN[-1]), nn.Conv2d(DOWN[-1], CODE, 1))
        up = [layer for i, o in pairwise(UP) for layer in (nn.ConvTranspose2d(i, o, 4, stride=2, padding=1), nn.ReLU())]
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE, UP[0], 1), nn.ReLU(), Residual(UP[0]), Residual(UP[0]), *up, nn.Conv2d(UP[-1], 1, 1))
        self._vq_vae = VectorQuantizer()


def case(kernel, rng):
    model = VQVAE(kernel).double()
    for parameter in model.parameters():
        inputs = max(parameter[0].numel(), 1)
        values = rng.normal(0, 1.3 / inputs**0.5, parameter.shape).astype(np.float32)
        parameter.data = torch.from_numpy(values.astype(np.float64))
    pixels = rng.integers(0, 256, (2, 64, 64)).astype(np.uint8)
    x = 2 * torch.from_numpy(pixels / 256)[:, None] - 1
    z = model.encoder(x)
    cells = z.detach().permute(0, 2, 3, 1).reshape(-1, CODE).numpy()
    # Rows among the cells, so that many rows are in use and no cell lies between two.
    book = cells[rng.choice(len(cells), ROWS, replace=False)] + rng.normal(0, 0.1 * cells.std(), (ROWS, CODE))
    model._vq_vae._embedding.data = torch.from_numpy(book.astype(np.float32).astype(np.float64))
    codes, e = model._vq_vae(z)
    y = model.decoder(z + (e - z).detach())
    loss = ((y - x) ** 2).mean() + ((e - z.detach()) ** 2).mean() + COMMITMENT * ((e.detach() - z) ** 2).mean()
    loss.backward()
    arrays = {f"params/{name}": p.detach().numpy().astype(np.float32) for name, p in model.named_parameters()}
    arrays |= {"pixels": pixels, "z": z.detach().numpy(), "codes": codes.numpy()}
    if kernel == 3:  # the decoder is the same as the other case's
        return {name: array for name, array in arrays.items() if "decoder" not in name}
    arrays |= {f"grads/{name}": p.grad.numpy() for name, p in model.named_parameters()}
    arrays |= {"decoded": y.detach().numpy()[:, 0], "loss": loss.detach().numpy()}
    return arrays | {"commitment": np.array(COMMITMENT)}


def main():
    rng = np.random.default_rng(0)
    arrays = {f"kernel{kernel}/{name}": array for kernel in (3, 4) for name, array in case(kernel, rng).items()}
    np.savez_compressed(Path(__file__).with_name("segmentation.npz"), **arrays)


if __name__ == "__main__":
    main()
