"""Small image generators of several families, trained in the run: what a detector has to find.

Each takes photos through its own bottleneck and gives them back, so that a generated image shows what its
photo shows and differs only in the traces of the generator:

    transposed   autoencoder, decoder of transposed convolutions (uneven overlap, checkerboards)
    nearest      autoencoder, nearest-neighbor upsampling and convolutions
    shuffle      autoencoder, pixel shuffle (sub-pixel convolutions)
    vae          variational autoencoder, bilinear upsampling, a sample of its posterior
    adversarial  autoencoder, nearest-neighbor upsampling, trained against a discriminator of patches
    diffusion    denoising diffusion: noise is added and taken off again in a few deterministic steps
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from support import photos

LATENT = 16
"""Channels of the bottleneck, whose sides are a quarter of the image's."""
KL_WEIGHT, ADVERSARIAL_WEIGHT = 1e-3, 0.05
NOISE, DENOISING_STEPS = 0.15, 6
"""Diffusion: the part of the noise schedule that is walked, and the steps that lead back."""
BATCH, LEARNING_RATE = 32, 2e-3
SPLITS = ("train", "validation", "test")


class Autoencoder(nn.Module):
    """Two strided convolutions down, two upsampling blocks up; `loss` in training, `forward` gives images."""

    def __init__(self, upsampling: str, latent: int = LATENT) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU()),
            nn.Conv2d(64, latent, 1),
        )
        self.decoder = nn.Sequential(
            *(nn.Conv2d(LATENT, 64, 3, padding=1), nn.SiLU()),
            *(_upsampling(upsampling, 64, 32), nn.SiLU()),
            _upsampling(upsampling, 32, 3),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions of `(N, 3, H, W)`, values from −1 to 1."""
        return self.decoder(self.encoder(images))

    def loss(self, images: Tensor) -> Tensor:
        """Mean absolute error."""
        return F.l1_loss(self(images), images)


class VariationalAutoencoder(Autoencoder):
    """Decodes a sample of `N(μ, σ²)`; loss `|x − x̂| + β·KL(N(μ, σ²) ‖ N(0, 1))`."""

    def __init__(self) -> None:
        super().__init__("bilinear", latent=2 * LATENT)

    def forward(self, images: Tensor) -> Tensor:
        """Decoded sample of the posterior."""
        return self._sampled(images)[0]

    def loss(self, images: Tensor) -> Tensor:
        """Reconstruction error and divergence from the prior."""
        decoded, mean, log_variance = self._sampled(images)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return F.l1_loss(decoded, images) + KL_WEIGHT * divergence

    def _sampled(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(latent), mean, log_variance


class AdversarialAutoencoder(Autoencoder):
    """Trained against a discriminator of patches; the reversed gradient lets one optimizer train both."""

    def __init__(self) -> None:
        super().__init__("nearest")
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(64, 1, 3, padding=1),
        )  # fmt: skip

    def loss(self, images: Tensor) -> Tensor:
        """Reconstruction error and the discriminator's hinge loss, which the decoder raises."""
        decoded = self(images)
        real, generated = self.discriminator(images), self.discriminator(_ReversedGradient.apply(decoded))
        return F.l1_loss(decoded, images) + F.relu(1 - real).mean() + F.relu(1 + generated).mean()


class Diffusion(nn.Module):
    """Predicts the noise ε in `cos(πt/2)·x + sin(πt/2)·ε`; generates by noising a photo and walking back."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(4, 32, 3, padding=1)
        self.coarse = nn.Sequential(
            nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, padding=1),
        )  # fmt: skip
        self.outward = nn.Sequential(
            nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1)
        )

    def loss(self, images: Tensor) -> Tensor:
        """Squared error of the noise."""
        time = NOISE * torch.rand(len(images), 1, 1, 1)
        noise = torch.randn_like(images)
        return F.mse_loss(self._noise(_mixed(images, noise, time), time), noise)

    def forward(self, images: Tensor) -> Tensor:
        """Images with the noise added and taken off."""
        times = torch.linspace(NOISE, 0, DENOISING_STEPS + 1).view(-1, 1, 1, 1, 1)
        noisy = _mixed(images, torch.randn_like(images), times[0])
        for time, following in itertools.pairwise(times):
            noise = self._noise(noisy, time)
            clean = (noisy - torch.sin(math.pi / 2 * time) * noise) / torch.cos(math.pi / 2 * time)
            noisy = _mixed(clean.clamp(-1, 1), noise, following)
        return noisy

    def _noise(self, noisy: Tensor, time: Tensor) -> Tensor:
        level = time.expand(len(noisy), 1, *noisy.shape[2:])
        features = self.inward(torch.cat([noisy, level], dim=1))
        return self.outward(features + self.coarse(features))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "transposed": lambda: Autoencoder("transposed"),
    "nearest": lambda: Autoencoder("nearest"),
    "shuffle": lambda: Autoencoder("shuffle"),
    "vae": VariationalAutoencoder,
    "adversarial": AdversarialAutoencoder,
    "diffusion": Diffusion,
}


def generated(family: str, real: photos.Photos, steps: int, seed: int, cache: Path) -> dict[str, Tensor]:
    """What a generator makes of the photos of each split, encoded as they are; kept in the file `cache`.

    Returns:
        Images by split, in the order of the photos they were made from.
    """
    if not cache.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            generator = _trained(family, real.generator, steps)
            made = {split: _images(generator, getattr(real, split)) for split in SPLITS}
        arrays = {split: photos.encoded(images).numpy() for split, images in made.items()}
        np.savez_compressed(cache, allow_pickle=False, **arrays)
    with np.load(cache) as stored:
        return {split: torch.from_numpy(stored[split]) for split in stored.files}


def _trained(family: str, images: Tensor, steps: int) -> nn.Module:
    generator = FAMILIES[family]()
    optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc=f"generator {family}", disable=None):
        batch = images[torch.randint(len(images), (BATCH,))]
        loss = generator.loss(_signed(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return generator.eval()


@torch.inference_mode()
def _images(generator: nn.Module, originals: Tensor) -> Tensor:
    """What the generator makes of 8-bit images, in 8 bits."""
    made = torch.cat([generator(_signed(batch)) for batch in originals.split(64)])
    return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _mixed(images: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    return torch.cos(math.pi / 2 * time) * images + torch.sin(math.pi / 2 * time) * noise


def _upsampling(kind: str, width: int, new_width: int) -> nn.Module:
    """Twice the sides, `width` to `new_width` channels."""
    if kind == "transposed":
        return nn.ConvTranspose2d(width, new_width, 3, stride=2, padding=1, output_padding=1)
    if kind == "shuffle":
        return nn.Sequential(nn.Conv2d(width, 4 * new_width, 3, padding=1), nn.PixelShuffle(2))
    return nn.Sequential(nn.Upsample(scale_factor=2, mode=kind), nn.Conv2d(width, new_width, 3, padding=1))


class _ReversedGradient(torch.autograd.Function):
    """The identity, whose gradient is negated and scaled by `ADVERSARIAL_WEIGHT`."""

    @staticmethod
    def forward(_: object, images: Tensor) -> Tensor:
        return images.view_as(images)

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return -ADVERSARIAL_WEIGHT * gradient
