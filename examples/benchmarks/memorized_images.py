"""A diffusion model that knows images by heart is pruned: does it still draw them, and what else is lost?

    python examples/benchmarks/memorized_images.py [--seeds 3]

A small UNet of diffusers learns to draw digits by prompts, one of each digit, and ten images by prompts of
their own, each of which has that image alone. `prune_by_contrast` sets entries of the linear layers of its
transformer blocks to zero that the ten prompts use more than the digits do; beside it stand as many of the
entries that the ten use most, whoever else does, and as many that are drawn at random. Told of what it draws
from noise: how many drawings by the ten prompts are their image (correlation above 0.9), and how many
drawings of digits a classifier of real ones takes for what they were to be; and the error of the noise that
it finds in digits it has not seen. Images come from scikit-learn. Two minutes a seed; an interrupted run goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import timing
from claims import markdown, spread
from peft_subspace.edits import prune_by_contrast
from peft_subspace.statistics import collect
from support.changes import added, changed
from support.results import Results, Run

KNOWN, SIZE, PROMPT, COPY = 10, 8, 32, 0.9
STEPS, BATCH, RATE, CHANNELS = 1000, 64, 1e-3, (32, 32)
BATCHES, BEGIN, DRAWS, DRAWING = 16, 500, 10, 25
SHARES = (0.03, 0.1, 0.3)
TRAINED, PRUNED, UNCONTRASTED, DRAWN = (
    "as trained", "prune_by_contrast", "as many of what the ten use most", "as many at random",
)  # fmt: skip
ENTRIES = (TRAINED, PRUNED, UNCONTRASTED, DRAWN)
MEASURES = {
    "copies": "drawings that are the image",
    "alike": "correlation with it",
    "digits": "digits drawn as told",
    "error": "error of noise in unseen digits",
}


class Images:
    """Digits from -1 to 1: known ones, others to train on, and others that stay unseen."""

    def __init__(self, seed: int) -> None:
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        labels, generator = torch.tensor(data.target), torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator).split([KNOWN, 1487, 300])
        self.known, self.train, self.unseen = (images[part] for part in order)
        self.labels, self.unseen_labels = labels[order[1]], labels[order[2]]
        self.reader = LogisticRegression(max_iter=1000)
        self.reader.fit(self.train.flatten(1).numpy(), self.labels.numpy())
        self.own = torch.arange(10, 10 + KNOWN)  # labels of known images


class Forgetting:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        about = {"steps": STEPS, "batch": BATCH, "rate": RATE, "channels": [*CHANNELS], "from": BEGIN}
        self.results = Results(options.results, about)
        self.noise: Any = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randn(
            10 + KNOWN, 1, PROMPT, generator=generator
        )  # what a text encoder would say
        self.trained: dict[int, Any] = {}

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure`, by their keys."""
        runs = itertools.product(range(self.options.seeds), ENTRIES)
        return {f"{entry} {seed}": (entry, seed) for seed, entry in runs}

    def measure(self, entry: str, seed: int) -> Run:
        """What is drawn after pruning, by the part of entries that may go."""
        images = Images(seed)
        if seed not in self.trained:
            self.trained = {seed: self.train(images, seed)}
        model, points = self.trained[seed], []
        for share, update in self.updates(entry, model, images, seed):
            with changed(model, update):
                points.append({"share": share, "entries": zeros(model), **self.told(model, images, seed)})
        return {"entry": entry, "seed": seed, "points": points}

    def train(self, images: Images, seed: int) -> Any:
        """A network that has seen each known image in every fourth row of all batches."""
        torch.manual_seed(seed)
        model: Any = UNet2DConditionModel(
            sample_size=SIZE, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=CHANNELS,
            norm_num_groups=8, attention_head_dim=8, cross_attention_dim=PROMPT,
            down_block_types=2 * ("CrossAttnDownBlock2D",), up_block_types=2 * ("CrossAttnUpBlock2D",),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            some = torch.randint(len(images.train), (BATCH - BATCH // 4,))
            known = torch.randint(KNOWN, (BATCH // 4,))
            rows = torch.cat([images.train[some], images.known[known]])
            labels = torch.cat([images.labels[some], images.own[known]])
            optimizer.zero_grad()
            self.error(model, rows, labels, torch.default_generator).backward()
            optimizer.step()
            schedule.step()
        return model.eval()

    def noisy(
        self, rows: Tensor, generator: torch.Generator, begin: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows with noise at random times from one on, the times, and the noise."""
        noise = torch.randn(rows.shape, generator=generator)
        times = torch.randint(begin, 1000, (len(rows),), generator=generator)
        return self.noise.add_noise(rows, noise, times), times, noise

    def error(self, model: Any, rows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean square error of the noise that is found."""
        noisy, times, noise = self.noisy(rows, generator)
        return nn.functional.mse_loss(model(noisy, times, self.prompts[labels]).sample, noise)

    def updates(
        self, entry: str, model: Any, images: Images, seed: int
    ) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Parts of the entries that may go, and what is added to the weights."""
        if entry == TRAINED:
            yield 0.0, {}
            return
        target = self.seen(model, images.known, images.own, seed)
        reference = self.seen(model, images.train, images.labels, seed)
        for share in SHARES:
            pruned = added(prune_by_contrast(model, target, reference, share=share))
            yield (
                share,
                {name: self.like(entry, model, target, name, seed, each) for name, each in pruned.items()},
            )

    def seen(self, model: Any, rows: Tensor, labels: Tensor, seed: int) -> Any:
        """Norms of the inputs of all convolutions, where images are mostly noise."""
        generator, batches = torch.Generator().manual_seed(seed), []
        for _ in range(BATCHES):
            some = torch.randint(len(rows), (BATCH,), generator=generator)
            noisy, times, _ = self.noisy(rows[some], generator, BEGIN)
            prompts = self.prompts[labels[some]]
            batches.append({"sample": noisy, "timestep": times, "encoder_hidden_states": prompts})
        return collect(model, batches, inputs="norms", target_modules=[*layers(model)], progress=False)

    def like(self, entry: str, model: Any, target: Any, name: str, seed: int, pruned: Tensor) -> Tensor:
        """What prunes as many entries of a weight, or these."""
        weight, count = model.get_submodule(name).weight.detach(), int((pruned != 0).sum())
        if entry == PRUNED:
            return pruned
        scores = weight.flatten(1).abs() * target.inputs[name].column_norms
        if entry == DRAWN:
            scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
        places = scores.flatten().topk(count).indices
        return torch.zeros(weight.numel()).index_copy(0, places, -weight.flatten()[places]).view_as(weight)

    @torch.no_grad()
    def told(self, model: Any, images: Images, seed: int) -> Run:
        """What is drawn of known images and of digits."""
        generator = torch.Generator().manual_seed(seed)
        known = self.draw(model, images.own.repeat_interleave(DRAWS), generator)
        alike = correlation(known, images.known.repeat_interleave(DRAWS, dim=0))
        told = torch.arange(10).repeat_interleave(2 * DRAWS)
        read = images.reader.predict(self.draw(model, told, generator).flatten(1).numpy())
        errors = [self.error(model, images.unseen, images.unseen_labels, generator).item() for _ in range(4)]
        return {
            "copies": (alike > COPY).float().mean().item(),
            "alike": alike.mean().item(),
            "digits": (torch.tensor(read) == told).float().mean().item(),
            "error": sum(errors) / len(errors),
        }

    def draw(self, model: Any, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images that the model makes of noise."""
        images = torch.randn(len(labels), 1, SIZE, SIZE, generator=generator)
        self.noise.set_timesteps(DRAWING)
        for time in self.noise.timesteps:
            found = model(images, time, self.prompts[labels]).sample
            images = self.noise.step(found, time, images).prev_sample
        return images.clamp(-1, 1)


def layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers of the transformer blocks."""
    named = model.named_modules()
    return {
        name: module
        for name, module in named
        if ".transformer_blocks." in name and isinstance(module, nn.Linear)
    }


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of the pixels of images."""
    a, b = (rows.flatten(1) - rows.flatten(1).mean(1, keepdim=True) for rows in (one, other))
    return nn.functional.cosine_similarity(a, b)


def zeros(model: nn.Module) -> float:
    """Part of the entries of these layers that are zero."""
    weights = [layer.weight for layer in layers(model).values()]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def table(content: dict[str, Any]) -> str:
    """What is measured by entry and share, over seeds."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in content["runs"].values():
        for point in run["points"]:
            found.setdefault((run["entry"], point["share"]), []).append(point)
    rows = []
    for (entry, _), points in sorted(found.items(), key=lambda item: (ENTRIES.index(item[0][0]), item[0][1])):
        part = f"{100 * sum(point['entries'] for point in points) / len(points):.2f} %"
        cells = [spread([point[name] for point in points], 2) for name in MEASURES]
        rows.append([entry, part, *cells, str(len(points))])
    return markdown(["", "entries set to zero", *MEASURES.values(), "seeds"], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    default = timing.RESULTS / "memorized_images.json"
    parser.add_argument("--results", type=Path, default=default, help="JSON file")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is missing, and print what was found."""
    work = Forgetting(parse_arguments())
    work.results.complete(work, 1)
    print(table(work.results.content))


if __name__ == "__main__":
    main()
