"""What an Instruct adapter begins as: new, as a file has it, as a Plus adapter, or larger than it was.

Made out of another one it begins with what it has of that; what is new in it learns then.
"""

from __future__ import annotations

import torch
from torch import nn

from imprompt.adapters import ImagePromptAdapter, add_lora, create_adapter
from imprompt.bases import Base, image_encoder_of
from imprompt.checkpoints import load_adapter
from imprompt.core.errors import ImpromptError
from imprompt.encoders.instruction import EMBEDDINGS, METADATA_KEY
from imprompt.systems.instruct_options import InstructOptions

NEARLY_NOTHING = 1e-4


def instruct_adapter(options: InstructOptions, base: Base) -> ImagePromptAdapter:
    """The adapter that the options ask for: new, read from a file, or begun as a Plus adapter.

    Raises:
        ImpromptError: a base without image encoder, or a file that does not fit.
    """
    if options.instruction_embedding not in EMBEDDINGS:
        raise ImpromptError(
            f"instruction_embedding is {options.instruction_embedding!r}; choose "
            f"{' or '.join(EMBEDDINGS)}."
        )
    encoder = image_encoder_of(base)
    num_positions = encoder.zero_hidden_states().shape[1] if options.positions else 0
    if options.start_from:
        adapter = load_adapter(options.start_from)
        if adapter.variant == "plus":
            adapter = begun_as_plus(adapter, base)
        elif adapter.variant != "instruct":
            raise ImpromptError(
                f"{options.start_from} is a {adapter.variant} adapter; Instruct goes on from "
                "instruct or begins as plus."
            )
        width = adapter.projection.features[1].dim
        if width != text_width(base):
            raise ImpromptError(
                f"{options.start_from} reads texts in states of {width} numbers, and the first text "
                f"encoder of {base.name} gives {text_width(base)}: it was made for another base."
            )
        told = adapter.metadata.get(METADATA_KEY, options.instruction_embedding)
        if told != options.instruction_embedding:
            raise ImpromptError(
                f"{options.start_from} reads instructions as {told}; set "
                f"system.instruction_embedding={told}."
            )
        if num_positions and adapter.projection.features[0].length is None:
            adapter = with_positions(adapter, base, num_positions)
    else:
        adapter = create_adapter(
            base.unet,
            "instruct",
            feature_dim=encoder.hidden_dim,
            num_tokens=options.num_tokens,
            resampler_dim=options.resampler_dim or None,
            depth=options.depth,
            num_positions=num_positions,
            text_dim=text_width(base),
        )
    if options.lora_rank and options.lora_rank != adapter.lora_rank:
        adapter = add_lora(adapter, base.unet, options.lora_rank)
    adapter.metadata[METADATA_KEY] = options.instruction_embedding
    return adapter.to(base.device)


def text_width(base: Base) -> int:
    """Width of the states of texts and instructions that an Instruct adapter for this base reads."""
    return base.text_encoder.config.hidden_size


def new_like(
    adapter: ImagePromptAdapter,
    base: Base,
    *,
    more_tokens: int = 0,
    more_layers: int = 0,
    num_positions: int = 0,
) -> ImagePromptAdapter:
    """A new Instruct adapter of the shape of this Plus or Instruct adapter, or larger by what is told.

    It has as many tokens and layers more, and the positions if the adapter has none of its own. A LoRA is
    of the same rank.
    """
    _, num_tokens, dim = adapter.state_dict()["image_proj.latents"].shape
    hidden_states = adapter.projection.features[0]
    new = create_adapter(
        base.unet,
        "instruct",
        feature_dim=hidden_states.dim,
        num_tokens=num_tokens + more_tokens,
        resampler_dim=dim,
        depth=len(adapter.image_proj.get_submodule("layers")._modules) + more_layers,
        num_positions=hidden_states.length or num_positions,
        text_dim=text_width(base),
    )
    return add_lora(new, base.unet, adapter.lora_rank) if adapter.lora_rank else new


def with_positions(
    adapter: ImagePromptAdapter, base: Base, num_positions: int
) -> ImagePromptAdapter:
    """The same Instruct adapter with positions to learn, which disturb its tokens a little at first."""
    grown = new_like(adapter, base, num_positions=num_positions)
    grown.load_state_dict({**grown.state_dict(), **adapter.state_dict()})
    grown.metadata.update(adapter.metadata)
    return grown


@torch.no_grad()
def begun_as_plus(plus: ImagePromptAdapter, base: Base) -> ImagePromptAdapter:
    """An Instruct adapter whose tokens are at first, but for nearly nothing, those of a Plus adapter.

    Raises:
        ImpromptError: the Plus adapter has other heads than one of its width has here.
    """
    weights = plus.state_dict()
    query = weights["image_proj.layers.0.0.to_q.weight"]
    adapter = new_like(plus, base)
    own = adapter.state_dict()
    if query.shape != own["image_proj.layers.0.0.to_q.weight"].shape:
        raise ImpromptError(
            "This Plus adapter has other heads than its width has, so it cannot grow."
        )
    adapter.load_state_dict({**own, **weights})
    generator = torch.Generator().manual_seed(0)
    for name in ("prompt_layers", "new_input_layers"):
        for layer in adapter.image_proj.get_submodule(name).children():
            leaving = layer.get_submodule("0.to_out")
            assert isinstance(leaving, nn.Linear)
            noise = torch.randn(leaving.weight.shape, generator=generator)
            leaving.weight.copy_(NEARLY_NOTHING * noise)
    return adapter


@torch.no_grad()
def with_more_tokens(adapter: ImagePromptAdapter, base: Base, count: int) -> ImagePromptAdapter:
    """The same Instruct adapter with `count` tokens more, new ones, after its own."""
    weights = adapter.state_dict()
    latents = weights["image_proj.latents"]
    grown = new_like(adapter, base, more_tokens=count)
    new = grown.state_dict()["image_proj.latents"][:, -count:].to(latents)
    grown.load_state_dict({**weights, "image_proj.latents": torch.cat([latents, new], dim=1)})
    grown.metadata.update(adapter.metadata)
    return grown.to(latents.device)


@torch.no_grad()
def with_more_layers(adapter: ImagePromptAdapter, base: Base, count: int) -> ImagePromptAdapter:
    """The same Instruct adapter with `count` layers more, new ones after its own that change nothing yet."""
    weights = adapter.state_dict()
    grown = new_like(adapter, base, more_layers=count)
    grown.load_state_dict({**grown.state_dict(), **weights})
    for name, weight in grown.named_parameters():
        # What a layer adds to the latents: the last map of its attention, and of its feed-forward.
        if name not in weights and name.endswith(("to_out.weight", "1.3.weight")):
            nn.init.zeros_(weight)
    grown.metadata.update(adapter.metadata)
    return grown.to(weights["image_proj.latents"].device)
