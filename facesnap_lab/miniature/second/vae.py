"""The second edition's VAE: a PCA of patches in parallel with a convolutional network, on grids of 32×32 and 16×16.

The PCA alone reaches 30 dB before any training. Its matrices are the initial values and are also trained. The
convolutions add what a linear map cannot. Pixels are folded into channels, so nothing runs at full resolution.

`vae16` has 16 channels on 16×16 cells, for the lab. `vae4` has 4 channels on 32×32 cells, as WebUIs assume, and
therefore as many values. It starts from the same PCA, whose components are rotated so that each belongs to one of the
four cells of a patch as far as possible.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.files import atomic_write
from facesnap_lab.miniature.perception import to_tensor
from facesnap_lab.miniature.second.loop import CPU, Compute, fit, load_state, prepared

PATCH, FINE = 8, 4  # sides in pixels: the PCA's patches, and the cells of the 32×32 grid
LATENT_NOISE = 0.02
DETAIL = 6.0  # how much more an error counts at the strongest edges and thin lines


@dataclass(frozen=True)
class VaeConfig:
    channels: int
    factor: int  # side of a cell in pixels, 4 or 8
    widths: tuple[int, int] = (64, 128)  # channels at 32×32 and 16×16
    blocks: tuple[int, int] = (1, 2)  # numbers of blocks in each arm at 32×32, and at 16×16


@dataclass(frozen=True)
class VaeRecipe:
    config: VaeConfig
    steps: int = 9000
    batch: int = 8
    rate: float = 1e-3


RECIPES = {
    "vae16": VaeRecipe(VaeConfig(channels=16, factor=8)),
    "vae4": VaeRecipe(VaeConfig(channels=4, factor=4), steps=3000),
    "vae8": VaeRecipe(VaeConfig(channels=8, factor=8)),
}


class Vae(nn.Module):
    """Encodes images [N,3,S,S] in -1…1 as latents [N,C,S/f,S/f], which `whiten` makes white, and decodes them."""

    mean: Tensor
    to_white: Tensor
    from_white: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.fold = PATCH // config.factor  # cells along a patch's side
        components = config.channels * self.fold**2
        self.to_components = nn.Conv2d(3 * PATCH**2, components, 1)
        self.to_patches = nn.Conv2d(components, 3 * PATCH**2, 1)
        fine = config.factor == FINE
        self.encoder = Hourglass(3 * FINE**2, config.channels, config, fine_input=True, fine_output=fine)
        self.decoder = Hourglass(config.channels, 3 * FINE**2, config, fine_input=fine, fine_output=True)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("to_white", torch.eye(config.channels))
        self.register_buffer("from_white", torch.eye(config.channels))

    def encode(self, pictures: Tensor) -> Tensor:
        linear = F.pixel_shuffle(self.to_components(F.pixel_unshuffle(pictures, PATCH)), self.fold)
        latents = linear + self.encoder(F.pixel_unshuffle(pictures, FINE))
        return mix_channels(latents - self.mean[:, None, None], self.to_white)

    def decode(self, latents: Tensor) -> Tensor:
        latents = mix_channels(latents, self.from_white) + self.mean[:, None, None]
        linear = F.pixel_shuffle(self.to_patches(F.pixel_unshuffle(latents, self.fold)), PATCH)
        return linear + F.pixel_shuffle(self.decoder(latents), FINE)


class Hourglass(nn.Module):
    """A convolutional network that works on the fine grid, then on one with half the side, then on the fine grid again.

    Either arm is absent where the input or the output is coarse. Its output is initially zero.
    """

    def __init__(self, inputs: int, outputs: int, config: VaeConfig, *, fine_input: bool, fine_output: bool) -> None:
        super().__init__()
        fine, coarse = config.widths
        arm, middle = config.blocks
        self.fine_input, self.fine_output = fine_input, fine_output
        self.stem = nn.Conv2d(inputs, fine if fine_input else coarse, 3, 1, 1)
        if fine_input:
            self.down_arm = nn.Sequential(*(Block(fine) for _ in range(arm)))
            self.down = nn.Conv2d(4 * fine, coarse, 1)
        self.middle = nn.Sequential(*(Block(coarse) for _ in range(middle)))
        if fine_output:
            self.up = nn.Conv2d(coarse, 4 * fine, 1)
            self.up_arm = nn.Sequential(*(Block(fine) for _ in range(arm)))
        self.head = nn.Conv2d(fine if fine_output else coarse, outputs, 3, 1, 1)
        start_at_zero(self.head)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            x = skip = self.stem(x.contiguous(memory_format=torch.channels_last))
            if self.fine_input:
                x = skip = self.down_arm(x)
                x = self.down(F.pixel_unshuffle(x, 2))
            x = self.middle(x)
            if self.fine_output:
                x = F.pixel_shuffle(self.up(x), 2)
                x = self.up_arm(x + skip if self.fine_input else x)
            return self.head(F.silu(x)).float()


class Block(nn.Module):
    """A residual block that starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        start_at_zero(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def start_at_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def mix_channels(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the channels of [N,C,H,W] by a matrix [D,C]."""
    return F.conv2d(x, matrix[:, :, None, None])


@torch.no_grad()
def start_from_pca(vae: Vae, pictures: Tensor) -> None:
    """Set both linear maps to the PCA of the images' patches, with white components."""
    patches = _columns_of(F.pixel_unshuffle(pictures, PATCH))
    mean, covariance = patches.mean(0), torch.cov(patches.T)
    white, colour = _pca(covariance, vae.to_components.out_channels)  # [C,192], [192,C]
    if vae.fold > 1:
        local = _local_filters(pictures, vae)
        left, _, right = torch.linalg.svd(white @ covariance @ local.T)  # Procrustes: the rotation nearest to `local`
        turn = (left @ right).T
        white, colour = turn @ white, colour @ turn.T
    for layer, matrix, bias in ((vae.to_components, white, -white @ mean), (vae.to_patches, colour, mean)):
        layer.load_state_dict({"weight": matrix[:, :, None, None], "bias": bias})


def _local_filters(pictures: Tensor, vae: Vae) -> Tensor:
    """Return the white components [C·fold²,192] of a PCA of each cell of the patches, in pixel shuffle's order."""
    cells = _columns_of(F.pixel_unshuffle(pictures, vae.config.factor))
    white, _ = _pca(torch.cov(cells.T), vae.config.channels)
    basis = torch.eye(3 * PATCH**2, dtype=white.dtype).reshape(-1, 3 * PATCH**2, 1, 1)
    patches = F.pixel_unshuffle(F.pixel_shuffle(basis, PATCH), vae.config.factor)  # [192,3·f²,fold,fold]
    responses = mix_channels(patches, white)
    return F.pixel_unshuffle(responses, vae.fold).flatten(1).T


def _columns_of(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2).double()


def _pca(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return maps to `count` white components and back, [count,D] and [D,count]."""
    values, vectors = torch.linalg.eigh(covariance)
    scale, vectors = values[-count:].flip(0).clamp(min=1e-8).sqrt(), vectors[:, -count:].flip(1)
    return (vectors / scale).T, vectors * scale


@torch.no_grad()
def whiten(vae: Vae, pictures: Tensor) -> None:
    """Give the latents mean 0 and the identity as covariance of the channels, without changing reconstructions."""
    flat = _columns_of(torch.cat([vae.encode(part) for part in pictures.split(64)]))
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    whitening = (vectors / values.sqrt()) @ vectors.T  # ZCA: channels stay as near as possible to what they were
    vae.mean += mix_channels(flat.mean(0)[None, :, None, None].float(), vae.from_white).flatten()
    vae.to_white.copy_(whitening.float() @ vae.to_white)
    vae.from_white.copy_(vae.from_white @ torch.linalg.inv(whitening).float())


def reconstruction_loss(again: Tensor, pictures: Tensor) -> Tensor:
    """Return the squared error, weighted by local contrast so that thin lines count, plus a little absolute error."""
    contrast = (pictures - F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1)).abs().amax(1, True)
    weights = 1 + DETAIL * contrast.clamp(max=1)
    error = again - pictures
    return (weights * error.pow(2)).mean() + 0.02 * error.abs().mean()


def noisy_batch(pictures: np.ndarray, count: int, config: VaeConfig, seed: list[int]) -> tuple[Tensor, Tensor]:
    """Return random images [count,3,S,S] in -1…1, all mirrored or none, and normal noise for their latents."""
    random = np.random.default_rng(seed)
    batch = to_tensor(pictures[np.sort(random.integers(0, len(pictures), count))])
    if random.random() < 0.5:
        batch = batch.flip(-1)
    side = batch.shape[-1] // config.factor
    noise = random.standard_normal((count, config.channels, side, side), dtype=np.float32)
    return batch, torch.from_numpy(noise)


def train_vae(
    name: str,
    train_pictures: np.ndarray,
    test_pictures: np.ndarray,
    out: Path,
    *,
    minutes: float,
    compute: Compute = CPU,
) -> tuple[Vae, int]:
    """Train or resume a VAE, and write it whitened as `out/vae.safetensors`.

    Returns:
        The whitened VAE on the CPU, and the number of its steps.
    """
    recipe = RECIPES[name]
    torch.manual_seed(0)
    vae = Vae(recipe.config)
    sample = to_tensor(np.array(train_pictures[:: max(1, len(train_pictures) // 800)]))
    if not (out / "state.pt").exists():
        start_from_pca(vae, sample)
    vae.to(compute.device)
    test = to_tensor(np.array(test_pictures[:480:8])).to(compute.device)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        return noisy_batch(train_pictures, recipe.batch * compute.batch, recipe.config, [7, step])

    batch_of = prepared(draw, compute.threads)

    def loss_of(step: int) -> Tensor:
        pictures, noise = (part.to(compute.device) for part in batch_of(step))
        latents = vae.encode(pictures)
        again = vae.decode(latents + LATENT_NOISE * noise)
        return reconstruction_loss(again, pictures) + 1e-4 * latents.pow(2).mean()

    steps = fit(
        vae,
        loss_of,
        out,
        steps=recipe.steps,
        minutes=minutes,
        rate=recipe.rate,
        report=lambda: f"test {psnr(vae, test):.2f} dB",
        compute=compute,
    )
    load_state(out, vae)
    white = copy.deepcopy(vae).cpu().eval().requires_grad_(False)
    whiten(white, sample)
    save_vae(white, out / "vae.safetensors")
    return white, steps


@torch.no_grad()
def reconstruct(vae: Vae, pictures: Tensor) -> Tensor:
    """Pass images through the VAE."""
    return torch.cat([vae.decode(vae.encode(part)).clamp(-1, 1) for part in pictures.split(32)])


def psnr(vae: Vae, pictures: Tensor) -> float:
    """Return the PSNR over all pixels in dB."""
    return -10 * torch.log10(F.mse_loss(reconstruct(vae, pictures), pictures) / 4).item()


def save_vae(vae: Vae, path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    with atomic_write(path) as part:
        save_file(state, part, {"config": json.dumps(asdict(vae.config))})


def load_vae(path: Path) -> Vae:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    config = VaeConfig(**config | {name: tuple(config[name]) for name in ("widths", "blocks")})
    vae = Vae(config)
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)
