"""The files that hold a LoRA for a base, as diffusers, PEFT and the training scripts of others write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PARTS = ("unet.", "text_encoder.", "text_encoder_2.")
PEFT_PREFIX = "base_model.model."
PEFT_SETTINGS = "adapter_config.json"


def put_lora(pipeline: Any, source: str, name: str) -> None:
    """Load a LoRA's file or folder, or the hub's repository, into a stock pipeline's networks.

    Names that begin with a network's are diffusers' business, and so are those of the scripts that
    it knows. What PEFT or `unet.save_lora_adapter` saved names layers of the UNet alone.

    Raises:
        ValueError: nothing in it is for these networks; diffusers and PEFT raise others.
    """
    # Only for Stable Diffusion XL diffusers itself asks which blocks the UNet has.
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "text_encoder_2") else {}
    tensors, _, settings = pipeline.lora_state_dict(source, return_lora_metadata=True, **options)
    if any(key.startswith(PARTS) for key in tensors):
        pipeline.load_lora_weights(source, adapter_name=name)
        return
    is_of_peft = any(key.startswith(PEFT_PREFIX) for key in tensors)
    tensors = _of_unet(pipeline.unet, tensors)
    if settings is None:
        settings = _peft_settings(source, is_needed=is_of_peft)
    pipeline.unet.load_lora_adapter(
        tensors, prefix=None, adapter_name=name, metadata=settings, _pipeline=pipeline
    )


def _of_unet(unet: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors by the names of the UNet's own layers."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    if tensors and not any("lora" in key.lower() for key in tensors):
        raise ValueError(f"it holds no LoRA, but tensors such as {min(tensors)!r}")
    tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    if not any(".lora_A." in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
        # The first scripts trained attention processors in the layers' place.
        tensors = {key.replace(".processor.", "."): value for key, value in tensors.items()}
    layers = dict(unet.named_modules())
    # diffusers would only remark that there are layers which are not its own, if that.
    strange = [key for key in tensors if key.partition(".lora_")[0] not in layers]
    if strange or not tensors:
        raise ValueError(
            f"its UNet has no layer for {strange[0]!r}" if strange else "there is nothing in it"
        )
    return tensors


def _peft_settings(source: str, *, is_needed: bool) -> dict[str, Any] | None:
    """What PEFT says beside the tensors: how strongly they count, above all.

    Raises:
        ValueError: it says nothing though it is needed, or what was trained is no LoRA.
    """
    from peft import LoraConfig, PeftConfig

    place = Path(source)
    folder = place.parent if place.is_file() else place
    is_there = (folder / PEFT_SETTINGS).is_file() if folder.exists() else is_needed
    if not is_there:
        if is_needed:
            raise ValueError(
                f"{PEFT_SETTINGS} is not beside it, without which nobody knows how strongly what "
                "PEFT saved shall count"
            )
        return None
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{PEFT_SETTINGS} is of a {type(config).__name__}, not of a LoRA")
    return config.to_dict()
