"""Stock diffusers pipelines of a few thousand random weights, with all that a call of each needs.

Text comes as states, so no text encoder is needed; pictures are 16 px, latents 8.
"""

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from imprompt.adapters import ImagePromptAdapter, create_adapter

TEXT_DIM = 64  # one head of the published resamplers
POOLED_DIM = 32
SIZE_PX = 16
FEATURE_DIM = 24
ID_DIM = 20


@dataclass
class Stock:
    """A pipeline and the arguments of a call."""

    pipeline: Any
    arguments: dict[str, Any] = field(default_factory=dict)

    def draw(self, **changes: Any) -> torch.Tensor:
        """Pictures (batch, height, width, 3) in [0, 1]: a function of the arguments."""
        arguments = {**self.arguments, **changes}
        arguments.setdefault("generator", torch.Generator().manual_seed(0))
        return torch.from_numpy(self.pipeline(**arguments, output_type="np").images)


def tiny_unet(
    *, is_xl: bool = False, in_channels: int = 4, knows_guidance: bool = False
) -> diffusers.UNet2DConditionModel:
    options: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    if is_xl:
        options = {
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + POOLED_DIM,
        }
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=(2, 4),
        time_cond_proj_dim=32 if knows_guidance else None,
        **options,
    )


def tiny_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=SIZE_PX,
        force_upcast=False,
    )


def tiny_controlnet(unet: diffusers.UNet2DConditionModel) -> diffusers.ControlNetModel:
    """One that acts: the zero convolutions are not zero."""
    network = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "controlnet_" in name and name.endswith("weight"):
                parameter.normal_(std=0.2)
    return network


def tiny_t2i_adapter() -> diffusers.T2IAdapter:
    return diffusers.T2IAdapter(
        in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2
    )


# Name of a pipeline's class → what its call needs beside the text.
PIPELINES: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": (),
    "StableDiffusionImg2ImgPipeline": ("image",),
    "StableDiffusionInpaintPipeline": ("image", "mask"),
    "StableDiffusionControlNetPipeline": ("control",),
    "StableDiffusionControlNetImg2ImgPipeline": ("image", "control"),
    "StableDiffusionControlNetInpaintPipeline": ("image", "mask", "control"),
    "StableDiffusionAdapterPipeline": ("hint",),
    "StableDiffusionPAGPipeline": ("pag",),
    "LatentConsistencyModelPipeline": (),
    "StableDiffusionXLPipeline": (),
    "StableDiffusionXLImg2ImgPipeline": ("image",),
    "StableDiffusionXLInpaintPipeline": ("image", "mask"),
    "StableDiffusionXLControlNetPipeline": ("control",),
    "StableDiffusionXLControlNetImg2ImgPipeline": ("image", "control"),
    "StableDiffusionXLAdapterPipeline": ("hint",),
}


def tiny_pipeline(
    name: str, *, num_texts: int = 1, num_controls: int = 1, in_channels: int = 4, seed: int = 0
) -> Stock:
    """The pipeline of this name.

    Args:
        num_texts: how many texts a call has.
        num_controls: ControlNets or T2I-Adapters; several make a MultiControlNet or MultiAdapter.
        in_channels: 9 makes the UNet one that was trained for inpainting.
        seed: of all weights and inputs.
    """
    is_xl, needed = "XL" in name, PIPELINES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        is_lcm = name.startswith("LatentConsistency")
        unet = tiny_unet(is_xl=is_xl, in_channels=in_channels, knows_guidance=is_lcm)
        parts: dict[str, Any] = {"unet": unet, "vae": tiny_vae()}
        if "control" in needed:
            networks = [tiny_controlnet(unet) for _ in range(num_controls)]
            parts["controlnet"] = networks[0] if num_controls == 1 else networks
        if "hint" in needed:
            networks = [tiny_t2i_adapter() for _ in range(num_controls)]
            multi = diffusers.MultiAdapter
            parts["adapter"] = networks[0] if num_controls == 1 else multi(networks)
        picture, control = torch.rand(2, 1, 3, SIZE_PX, SIZE_PX)
        arguments = {
            "prompt_embeds": torch.randn(num_texts, 7, TEXT_DIM),
            "negative_prompt_embeds": torch.randn(num_texts, 7, TEXT_DIM),
            "num_inference_steps": 3,
            "guidance_scale": 4.0,
        }
        if is_xl:
            arguments["pooled_prompt_embeds"] = torch.randn(num_texts, POOLED_DIM)
            arguments["negative_pooled_prompt_embeds"] = torch.randn(num_texts, POOLED_DIM)
    if "image" in needed:
        arguments |= {"image": picture, "strength": 0.9}
    if "mask" in needed:
        arguments["mask_image"] = (torch.arange(SIZE_PX) < 6).float().expand(1, 1, SIZE_PX, -1)
    if {"control", "hint"} & set(needed):
        controls = control if num_controls == 1 else [control] * num_controls
        scales = 0.8 if num_controls == 1 else [0.8] * num_controls
        word = "control_image" if "image" in needed else "image"
        scale_word = "adapter" if "hint" in needed else "controlnet"
        arguments |= {word: controls, f"{scale_word}_conditioning_scale": scales}
    for network in parts.values():
        for module in network if isinstance(network, list) else [network]:
            module.eval().requires_grad_(False)
    absent = dict.fromkeys(["text_encoder", "tokenizer"])
    if is_xl:
        absent |= dict.fromkeys(["text_encoder_2", "tokenizer_2"])
        extra: dict[str, Any] = {"add_watermarker": False} if "hint" not in needed else {}
    else:
        absent |= dict.fromkeys(["safety_checker", "feature_extractor"])
        extra = {"requires_safety_checker": False}
    if "pag" in needed:
        extra["pag_applied_layers"] = ["mid"]
    if is_lcm:
        del arguments["negative_prompt_embeds"]  # guidance is an input of the UNet, not a batch
        scheduler: Any = diffusers.LCMScheduler(clip_sample=False)
    else:
        scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    pipeline = getattr(diffusers, name)(**parts, **absent, **extra, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return Stock(pipeline, arguments)


def tiny_adapter(unet: nn.Module, variant: str = "base", seed: int = 0) -> ImagePromptAdapter:
    """An adapter whose effect is seen: nothing in it is as at the start of training."""
    adapter = create_adapter(
        unet, variant, feature_dim=FEATURE_DIM, id_dim=ID_DIM, lora_rank=4, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.startswith("ip_adapter."):
                std = 0.3 if "_ip." in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return adapter.requires_grad_(False)


def tiny_features(adapter: ImagePromptAdapter, batch: int = 1, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            (batch, 5, feature.dim) if feature.is_sequence else (batch, feature.dim),
            generator=generator,
        )
        for feature in adapter.projection.features
    ]
