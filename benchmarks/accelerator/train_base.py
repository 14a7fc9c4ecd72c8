"""Train the embedded base from nothing: autoencoder, encoders, denoiser, judge and adapter.

    python benchmarks/accelerator/train_base.py runs/base            # all parts, then measure

The same command resumes. `OUT/weights` in the end has the layout of `src/imprompt/weights`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from imprompt.bases import load_base
from imprompt.bases.clip_vision import ClipImageEncoder
from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.bases.writing import write_base
from imprompt.checkpoints import load_adapter
from imprompt.core.config import build, read_toml
from imprompt.data.dataset import Columns
from imprompt.data.joined import JoinedColumns
from imprompt.data.prepare import prepare
from imprompt.data.rows import Rows
from imprompt.diorama import NUM_PHRASINGS, caption, sample_scene
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.measure import Sampling, measure_adapter, measure_base, measure_judge
from imprompt.systems import autoencoder, classifier, contrastive, text_to_image
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train
from imprompt.training.run import preset_path, run_training


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded base from nothing.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-scenes", type=int, default=48_000)
    parser.add_argument(
        "--num-portraits", type=int, default=16_384, help="for encoder and denoiser"
    )
    parser.add_argument("--num-pairs", type=int, default=20_000, help="of the adapter")
    parser.add_argument("--num-images", type=int, default=500, help="to measure with")
    parser.add_argument("--factor", type=float, default=1.0, help="times the presets' steps")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    out: Path = arguments.output
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # A base of untrained parts says how scenes are encoded; it is replaced part by part.
    seeds = range(arguments.num_scenes)
    sampled = seeds[:: max(1, len(seeds) // 5000)]
    texts = [caption(sample_scene(s), i) for s in sampled for i in range(NUM_PHRASINGS)]
    tokenizer = contrastive.train_tokenizer(texts)
    text, vision = contrastive.create_encoders(tokenizer)
    base = StableDiffusionBase(
        name="diorama",
        unet=text_to_image.create_unet(),
        vae=autoencoder.create_autoencoder(),
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=text_to_image.create_scheduler(),
        image_encoder=ClipImageEncoder(vision),
    )
    base.to(device)
    source = f"diorama:{arguments.num_scenes}"
    portraits = f"diorama-people:{arguments.num_portraits}"
    seen = ("pixels", "labels", "phrasing_ids", "subject_ids")
    columns = Columns.open(prepare(source, out / "pictures", base, columns=seen, batch_size=104))
    faces = Columns.open(prepare(portraits, out / "portraits", base, columns=seen, batch_size=104))

    def preset(name: str) -> dict[str, Any]:
        return read_toml(preset_path(f"diorama-{name}", name))

    def config(name: str) -> TrainConfig:
        settings = build(TrainConfig, preset(name)["train"])
        return dataclasses.replace(settings, steps=max(1, int(settings.steps * arguments.factor)))

    def fit(system: Any, name: str, columns: Rows) -> Path:
        system.module.to(device)
        return train(system, columns, config(name), out / name)

    judge = classifier.ClassifierSystem(classifier.Judge())
    judge_file = fit(judge, "classifier", columns)

    vae: Any = autoencoder.create_autoencoder()
    vae_folder = fit(autoencoder.AutoencoderSystem(vae), "autoencoder", columns)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    sample = columns.rows(range(min(512, len(columns))), ["pixels"])["pixels"].float() / 127.5 - 1
    vae.register_to_config(scaling_factor=autoencoder.measure_scaling(vae, sample))

    encoders = contrastive.ContrastiveSystem(*contrastive.create_encoders(tokenizer))
    clip_folder = fit(encoders, "contrastive", columns)

    def see_with(folder: Path) -> CLIPVisionModelWithProjection:
        encoder: Any = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
        base.image_encoder = ClipImageEncoder(encoder)
        base.to(device)
        return encoder

    base.vae = vae.requires_grad_(False)
    base.text_encoder = CLIPTextModel.from_pretrained(clip_folder / "text_encoder")
    see_with(clip_folder)
    both = JoinedColumns([faces, columns])
    options = build(contrastive.ContrastiveOptions, preset("contrastive-persons")["system"])
    persons = contrastive.build(options, base, both)
    image_encoder = see_with(fit(persons, "contrastive-persons", both))
    read = ("latents", "phrasing_ids", "labels")
    scenes = Columns.open(prepare(source, out / "latents", base, columns=read))
    people = Columns.open(prepare(portraits, out / "people", base, columns=read))

    # Faces are small and few among scenes, and drawn last: their portraits come twice as often.
    drawn = JoinedColumns([people, people, scenes])
    for name in ("text-to-image", "text-to-image-portraits"):
        options = {**preset(name).get("system", {}), "start": "base"}
        denoiser = text_to_image.system_beside(
            base, build(text_to_image.TextToImageOptions, options)
        )
        unet_folder = fit(denoiser, name, drawn)
        base.unet = UNet2DConditionModel.from_pretrained(unet_folder / "unet").to(device)

    weights = out / "weights"
    write_base(
        weights / "diorama-base",
        unet=base.unet,
        vae=vae,
        text_encoder=base.text_encoder,
        tokenizer=tokenizer,
        scheduler=base.scheduler,
        image_encoder=image_encoder,
    )
    shutil.copy(judge_file, weights / "diorama-judge.safetensors")
    shipped = str(weights / "diorama-base")
    pairs = prepare(
        f"diorama:{arguments.num_pairs}:4000000", out / "pairs", load_base(shipped, device=device)
    )
    steps = read_toml(preset_path("diorama-shipped", "image-prompt"))["train"]["steps"]
    adapter = run_training(
        "image-prompt",
        data=pairs,
        base=shipped,
        output=out / "adapter",
        preset="diorama-shipped",
        settings=[f"train.steps={max(1, int(steps * arguments.factor))}"],
    )
    shutil.copy(adapter, weights / "diorama-ip-adapter.safetensors")

    final, reader = load_base(shipped), load_judge(weights / "diorama-judge.safetensors")
    sampling = Sampling(steps=50)
    figures = {
        "judge": measure_judge(reader, 4 * arguments.num_images),
        "base": measure_base(final, reader, sampling, arguments.num_images),
        "adapter": measure_adapter(
            final, load_adapter(adapter), reader, sampling, arguments.num_images
        ).kept,
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
