"""What others train for a base (LoRA, textual inversion), put on it through diffusers' own loaders.

DreamBooth trains the base itself: its result is a base like any other and is loaded as one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imprompt.bases.folder import quiet_libraries
from imprompt.bases.lora_files import put_lora
from imprompt.bases.protocol import Base
from imprompt.core.errors import ImpromptError, first_line

FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")
A1111_VECTORS = {"emb_params"}
XL_VECTORS = {"clip_l", "clip_g"}


def add_lora(base: Base, source: str | Path, weight: int | float = 1.0, name: str = "lora") -> None:
    """Put a LoRA on a base: a file or folder as diffusers or PEFT's users save it. It stays there.

    Several may be put on under several names; `weight` 0 silences this one. What PEFT itself saved
    (`adapter_model.safetensors`) needs its `adapter_config.json` beside it.

    Raises:
        ImpromptError: it cannot be read, does not fit the base, or the name is taken.

    Source: Hu et al. (2106.09685).
    """
    pipeline = pipeline_of(base)
    if name in _loras_on(pipeline):
        raise ImpromptError(f"{base.name} has a LoRA {name!r} already: give this one another name.")
    kept: dict[str, float] = dict(getattr(base.unet, "imprompt_lora_weights", {}))
    try:
        put_lora(pipeline, _place(source), name)
        if name not in _loras_on(pipeline):
            raise ValueError("nothing in it is for any of its networks")
        kept[name] = float(weight)
        base.unet.imprompt_lora_weights = kept
    except Exception as error:
        if name in _loras_on(pipeline):  # in one network, when another did not take its part
            pipeline.delete_adapters(name)
        raise ImpromptError(
            f"The LoRA {source} does not go on {base.name}: {first_line(error)}."
        ) from error
    finally:
        # Loading one switches off the others, in the UNet and in every text encoder that it is for.
        if names := _loras_on(pipeline):
            pipeline.set_adapters(names, [kept.get(one, 1.0) for one in names])
        _freeze(base)


def _loras_on(pipeline: Any) -> list[str]:
    """The names of all LoRAs, in whichever network they are."""
    return sorted({name for names in pipeline.get_list_adapters().values() for name in names})


def _freeze(base: Base) -> None:
    for network in base.parts().values():
        network.requires_grad_(False)


def add_textual_inversion(base: Base, source: str | Path, token: str | None = None) -> None:
    """Teach a base's text encoder the word of a textual inversion; prompts may then use it.

    `token` is the word, if the file shall not say it. Files that hold vectors without a word, as
    A1111 writes them ("emb_params", or "clip_l" and "clip_g" for Stable Diffusion XL), teach their
    own name: EasyNegative.safetensors teaches "EasyNegative".

    Raises:
        ImpromptError: it cannot be read, or is made for another text encoder.

    Source: Gal et al. (2208.01618).
    """
    pipeline = pipeline_of(base)
    try:
        _teach(pipeline, _place(source), token)
    except Exception as error:
        raise ImpromptError(
            f"The textual inversion {source} does not go on {base.name}: {first_line(error)}."
        ) from error
    _freeze(base)


def _teach(pipeline: Any, source: str, token: str | None) -> None:
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    [found] = load_textual_inversion_state_dicts([source])
    names = set(found) if isinstance(found, dict) else set()
    own_name = token or Path(source).stem
    if names == XL_VECTORS:
        _teach_both(pipeline, found, own_name)
    elif names == A1111_VECTORS:
        pipeline.load_textual_inversion(found, token=own_name)
    elif len(names) > 1 and "string_to_param" not in names:
        raise ValueError(f"it holds {', '.join(sorted(names)[:3])}, … instead of one word")
    else:
        pipeline.load_textual_inversion(found, token=token)


def _teach_both(pipeline: Any, vectors: dict[str, Any], token: str) -> None:
    """One word for both text encoders of Stable Diffusion XL."""
    if not hasattr(pipeline, "text_encoder_2"):
        raise ValueError("it is made for the two text encoders of Stable Diffusion XL")
    pairs = {
        "clip_l": (pipeline.tokenizer, pipeline.text_encoder),
        "clip_g": (pipeline.tokenizer_2, pipeline.text_encoder_2),
    }
    # Asked of both before one of them has learned anything.
    for name, (_, encoder) in pairs.items():
        width = encoder.get_input_embeddings().weight.shape[-1]
        if vectors[name].shape[-1] != width:
            raise ValueError(
                f"its {name} is {vectors[name].shape[-1]} wide, and that text encoder's words {width}"
            )
    for name, (tokenizer, encoder) in pairs.items():
        pipeline.load_textual_inversion(
            vectors[name], token=token, tokenizer=tokenizer, text_encoder=encoder
        )


def pipeline_of(base: Base) -> Any:
    """A stock pipeline of a base's own networks: what is done to it is done to the base."""
    with quiet_libraries():  # which remark on what they import
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts: dict[str, Any] = {
        "unet": base.unet,
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "scheduler": base.scheduler,
    }
    if hasattr(base, "text_encoder_2"):
        second: Any = base
        return StableDiffusionXLPipeline(
            **parts, text_encoder_2=second.text_encoder_2, tokenizer_2=second.tokenizer_2
        )
    pipeline_class: Any = StableDiffusionPipeline  # its signature forbids what it allows
    return pipeline_class(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _place(source: str | Path) -> str:
    is_file = isinstance(source, Path) or Path(source).suffix in FILE_SUFFIXES
    if is_file and not Path(source).exists():  # other words name a model on the hub
        raise FileNotFoundError(f"there is no such file or folder as {source}")
    return str(source)
