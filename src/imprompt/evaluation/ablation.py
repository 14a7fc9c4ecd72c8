"""The paper's ablation: decoupled against concatenated attention, trained against untrained.

Both are trained alike, on the same pairs, with as many parameters; then each is given unseen image
prompts alone. Beside them stands the decoupled one that began with the projection fitted to captions.

Source: Ye et al. (2308.06721), section 4.4.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from imprompt.adapters import create_adapter
from imprompt.bases import Base, TextStates, image_encoder_of
from imprompt.checkpoints import load_adapter
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.diorama import render
from imprompt.evaluation.judge import read, shares, truth
from imprompt.evaluation.measure import Sampling, decoded, measure_adapter, unseen_scenes
from imprompt.generation.sampler import sample_latents
from imprompt.systems.classifier import Judge
from imprompt.systems.concatenation import (
    ConcatenatedTokens,
    ConcatenationOptions,
    build,
    with_tokens,
)
from imprompt.training.run import run_training

FIRST_SEED = 3_000_000
PRESET = "diorama-image-prompt"


def measure_ablation(
    load: Callable[[], Base],
    judge: Judge,
    sampling: Sampling,
    output: Path,
    count: int,
    *,
    num_pairs: int = 4000,
    settings: list[str] | None = None,
) -> dict[str, float]:
    """Shares kept by each of the four, and the sizes of the two kinds that train.

    `load` brings the base anew: each training begins with one that nothing is put on.
    """
    data = prepare(f"diorama:{num_pairs}:{FIRST_SEED}", output / "data", load())

    def trained(system: str, name: str, fit_to_captions: str) -> Path:
        return run_training(
            system,
            data=data,
            base=load(),
            output=output / name,
            preset=PRESET,
            settings=[f"system.fit_to_captions={fit_to_captions}", *(settings or [])],
        )

    decoupled_file = trained("image-prompt", "decoupled", "false")
    fitted_file = trained("image-prompt", "decoupled-fitted", "true")
    concatenated_file = trained("concatenation", "concatenated", "false")
    base = load()
    untrained = create_adapter(base.unet, feature_dim=image_encoder_of(base).embed_dim)
    concatenated = build(ConcatenationOptions(), base, Columns.open(data)).module
    concatenated.load_state_dict(load_file(concatenated_file))
    decoupled = load_adapter(decoupled_file)
    figures: dict[str, float] = {
        "decoupled: parameters": sum(p.numel() for p in decoupled.parameters()),
        "concatenated: parameters": sum(p.numel() for p in concatenated.parameters()),
    }
    fitted = load_adapter(fitted_file)
    for name, kept in (
        ("decoupled, trained", measure_adapter(base, decoupled, judge, sampling, count).kept),
        (
            "decoupled, fitted and trained",
            measure_adapter(base, fitted, judge, sampling, count).kept,
        ),
        (
            "concatenated, trained",
            _measure_concatenated(
                base, cast(ConcatenatedTokens, concatenated), judge, sampling, count
            ),
        ),
        ("decoupled, untrained", measure_adapter(base, untrained, judge, sampling, count).kept),
    ):
        figures |= {f"{name}: {attribute}": share for attribute, share in kept.items()}
    return figures


@torch.inference_mode()
def _measure_concatenated(
    base: Base, module: ConcatenatedTokens, judge: Judge, sampling: Sampling, count: int
) -> dict[str, float]:
    """As `measure_adapter`, with image tokens appended to the empty text's states."""
    scenes = unseen_scenes(count, first=10_000)
    references = render(scenes, base.image_size_px).pixels
    embeds = image_encoder_of(base).embeds(references)
    empty = base.encode_text([""])

    def joined(embeds: Tensor) -> TextStates:
        return with_tokens(empty.expand(len(embeds)), module.tokens(embeds))

    latents = sample_latents(
        base,
        joined(embeds),
        joined(torch.zeros_like(embeds[:1])),
        steps=sampling.steps,
        guidance_scale=sampling.guidance(base),
        sampler=sampling.sampler,
        seed=sampling.seed,
        show_progress=True,
    )
    return shares(read(judge, decoded(base, latents)), truth(scenes))
