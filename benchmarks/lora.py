"""Does a LoRA that was trained elsewhere keep working under an image prompt? On a style the world lacks.

    python benchmarks/lora.py

draws scenes as blueprints (white lines on blue paper, a style that neither base nor adapter has seen),
trains a LoRA on the base's UNet by PEFT alone (nothing of imprompt takes part in it), saves it as
diffusers does, loads it with `add_lora`, and generates from image prompts with and without it. The table
goes to benchmarks/results/lora.md and the documents, the picture to docs/images/lora.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as functional
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from pages import DOCS, RESULTS, publish
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from imprompt.adapters.site_presets import preset_scales
from imprompt.bases import load_base
from imprompt.bases.extensions import add_lora
from imprompt.checkpoints import load_adapter
from imprompt.core.images import image_grid, pixels_to_images
from imprompt.core.progress import progress
from imprompt.core.shipped import ADAPTERS, shipped
from imprompt.diorama import OBJECT_KINDS, Render, render, sample_scene
from imprompt.diorama.vocabulary import GROUND
from imprompt.evaluation.judge import load_judge, read, truth
from imprompt.evaluation.measure import Sampling, draw, prompt_of_pictures, unseen_scenes

PAPER = torch.tensor([0.06, 0.20, 0.48])[None, :, None, None]
INK = torch.tensor([0.92, 0.96, 1.00])[None, :, None, None]


def blueprint(drawn: Render) -> torch.Tensor:
    """The scenes as blueprints: pixels (batch, 3, size, size) in [-1, 1]."""
    size = drawn.edges.shape[-1]
    on_object = (drawn.segmentation > GROUND)[:, None].float()
    grid = torch.zeros(size, size)
    grid[::8] = grid[:, ::8] = 0.10
    # Hatching where the surface turns away from the viewer.
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    hatch = ((row + column) % 4 == 0).float() * (1 - drawn.normals[:, 2:3]).clamp(0, 1)
    ink = torch.maximum(drawn.edges[:, None], on_object * (0.12 + 0.5 * hatch))
    ink = torch.maximum(ink, (1 - on_object) * grid)
    return (PAPER + (INK - PAPER) * ink) * 2 - 1


def train_lora(folder: Path, steps: int, count: int, batch_size: int = 16) -> None:
    """A plain PEFT training, as anyone might write it: noise in, noise (here velocity) out."""
    base = load_base("diorama")
    scenes = [sample_scene(2_000_000 + i, kind=OBJECT_KINDS[i % 12]) for i in range(count)]
    with torch.no_grad():
        drawn = [render(scenes[i : i + 32]) for i in range(0, count, 32)]
        latents = torch.cat([base.encode_image(blueprint(one)) for one in drawn])
        texts = base.encode_text([f"a {scene.kind}" for scene in scenes]).sequence
    unet = base.unet
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=[*layers, "conv_in", "conv_out"]))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    with progress(steps, "PEFT trains a LoRA", unit="step") as bar:
        for _ in range(steps):
            rows = torch.randint(count, (batch_size,), generator=generator)
            noise = torch.randn(latents[rows].shape, generator=generator)
            timesteps = torch.randint(1000, (batch_size,), generator=generator)
            noisy = scheduler.add_noise(latents[rows], noise, timesteps)
            target = scheduler.get_velocity(latents[rows], noise, timesteps)
            loss = functional.mse_loss(unet(noisy, timesteps, texts[rows]).sample, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update(1)
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights)


class StyleReader:
    """Tells blueprints from the six known styles by the nearest mean of coarse pictures."""

    def __init__(self, count: int = 240) -> None:
        scenes = [sample_scene(3_000_000 + i) for i in range(count)]
        drawn = [render(scenes[i : i + 40]) for i in range(0, count, 40)]
        old = torch.cat([self._coarse(one.pixels) for one in drawn])
        new = torch.cat([self._coarse(blueprint(one)) for one in drawn])
        both = torch.cat([old, new])
        labels = torch.cat([torch.zeros(count), torch.ones(count)])
        design = torch.cat([both, torch.ones(2 * count, 1)], 1)
        # Ridge regression of "is a blueprint".
        gram = design.T @ design + 1.0 * torch.eye(design.shape[1])
        self._weights = torch.linalg.solve(gram, design.T @ labels)

    @staticmethod
    def _coarse(pixels: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(pixels, 8).flatten(1)

    def is_blueprint(self, pixels: torch.Tensor) -> torch.Tensor:
        coarse = self._coarse(pixels)
        return torch.cat([coarse, torch.ones(len(coarse), 1)], 1) @ self._weights > 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--scenes", type=int, default=192)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="of trained LoRAs")
    parser.add_argument("--table", type=Path, default=RESULTS / "lora.md")
    parser.add_argument("--picture", type=Path, default=DOCS / "images/lora.png")
    arguments = parser.parse_args()
    base, judge, reader = load_base("diorama"), load_judge(), StyleReader()
    # One that was trained on another base, or for another time, is none of this one's.
    folder = arguments.folder / f"lora-blueprint-{base.fingerprint()}-{arguments.steps}"
    file = folder / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        train_lora(folder, arguments.steps, arguments.scenes)
    adapter = load_adapter(shipped(ADAPTERS["diorama"]))
    scenes = unseen_scenes(arguments.count, first=50_000)
    wanted = truth(scenes)
    drawn = render(scenes)
    sampling = Sampling(steps=20, sampler="dpm-solver++")

    def prompted(scale: float, texts: list[str], preset: str | None = None) -> torch.Tensor:
        with adapter.install(base.unet) as handle:
            sites = [site for site in handle.sites if site.is_cross]
            scales = preset_scales(preset, sites, scale) if preset else scale
            prompt = prompt_of_pictures(base, adapter, handle, drawn.pixels, scales)
            return draw(base, texts, [prompt] if scale else [], sampling)

    nouns = [f"a {scene.kind}" for scene in scenes]
    empty = [""] * len(scenes)
    rows: list[tuple[str, torch.Tensor]] = [
        ("the references", drawn.pixels),
        ("the references as blueprints", blueprint(drawn)),
        ("image prompt", prompted(1.0, empty)),
    ]
    add_lora(base, file, 1.0)
    rows += [
        ("LoRA, text alone", prompted(0.0, nouns)),
        ("LoRA and image prompt, λ = 0.5", prompted(0.5, empty)),
        ("LoRA and image prompt, λ = 1", prompted(1.0, empty)),
        ("LoRA and image prompt, λ = 1, weak output", prompted(1.0, empty, "weak output")),
        ("LoRA, image prompt (λ = 0.5) and text", prompted(0.5, nouns)),
    ]
    lines = ["| | object of the reference | blueprint |", "|---|---:|---:|"]
    cells = []
    for name, pixels in rows:
        kept = (read(judge, pixels)["kind"] == wanted["kind"]).float().mean().item()
        style = reader.is_blueprint(pixels).float().mean().item()
        lines.append(f"| {name} | {kept:.0%} | {style:.0%} |")
        cells += pixels_to_images(pixels[:12])
    table = "\n".join(lines) + "\n"
    print(table)
    arguments.table.parent.mkdir(parents=True, exist_ok=True)
    arguments.table.write_text(table, encoding="utf-8")
    publish(DOCS / "controls.md", "lora", table)
    image_grid(cells, 12).save(arguments.picture)


if __name__ == "__main__":
    main()
