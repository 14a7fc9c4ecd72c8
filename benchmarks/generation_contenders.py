"""Who is compared by generation.py: one UNet's weights under three ways of prompting it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter, attention_sites, combine, create_adapter
from imprompt.adapters.attention import CONDITION_KEY
from imprompt.systems.text_to_image import create_unet

# Stable Diffusion 1.5's own numbers are the defaults of diffusers' class, but for these.
CONFIG: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SIZES = {
    "sd15": lambda: UNet2DConditionModel(**CONFIG),
    "narrow": lambda: UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), **CONFIG),
    "diorama": create_unet,
}
TEXT_LENGTH = 77
# What image encoders give: ViT-H's embedding, and its last but one hidden states.
EMBED_DIM, HIDDEN_SHAPE = 1024, (257, 1280)


@dataclass(frozen=True)
class Case:
    """One way of prompting: the adapter's variant, how many images, in regions or everywhere."""

    variant: str
    num_images: int
    masked: bool = False
    scale: float = 1.0

    @property
    def prompts(self) -> str:
        """What the variant is shown."""
        images = "1 image" if self.num_images == 1 else f"{self.num_images} images"
        masks = ", masks" if self.masked else ""
        return f"{images}{masks}" + (", λ = 0" if self.scale == 0 else "")

    def __str__(self) -> str:
        return f"{self.variant}, {self.prompts}"


def build_unet(size: str) -> UNet2DConditionModel:
    unet = SIZES[size]()
    for weight in unet.parameters():
        if weight.ndim > 1 and not weight.is_meta and not weight.any():  # it would hide differences
            torch.nn.init.normal_(weight, std=0.02)
    return unet.eval().requires_grad_(False)


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet on the very same weights, so that it takes no memory."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def published(adapter: ImagePromptAdapter) -> dict[str, dict[str, Tensor]]:
    """The adapter as a published file would hold it, which is how diffusers takes it."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    return parts


class Contenders:
    """The bare UNet, this project's and diffusers', ready to be called with one case's prompts."""

    def __init__(
        self, unet: Any, case: Case, latents: int, batch: int, compiled: bool = False
    ) -> None:
        weight = next(unet.parameters())
        self.case, self.device, self.dtype = case, weight.device, weight.dtype
        self.latent_size = (latents, latents)
        self.latents = self._random(batch, unet.config.in_channels, latents, latents)
        self.text = self._random(batch, TEXT_LENGTH, unet.config.cross_attention_dim)
        self.timestep = torch.tensor(500, device=self.device)
        shape = (EMBED_DIM,) if case.variant == "base" else HIDDEN_SHAPE
        self.features = self._random(batch, case.num_images, *shape)
        self.masks = torch.zeros(case.num_images, latents * 8, latents * 8, device="cpu")
        for number, mask in enumerate(self.masks):
            # A stripe for each image. Quarters are whole at every site: how a site that a mask's edge
            # goes through counts is another thing here than in diffusers.
            quarter = mask.shape[1] // 4
            last = quarter * (number + 1) if number + 1 < case.num_images else mask.shape[1]
            mask[:, quarter * number : last] = 1
        self.masks = self.masks.to(dtype=self.dtype)
        if self.device.type != "meta":  # their values are checked
            self.masks = self.masks.to(self.device)

        self.adapter = create_adapter(unet, case.variant, feature_dim=shape[-1])
        self.adapter.to(dtype=self.dtype).eval().requires_grad_(False)
        self.bare, self.ours, self.theirs = (twin(unet) for _ in range(3))
        self.handle = self.adapter.install(self.ours)
        with torch.device(self.device):
            self.theirs._load_ip_adapter_weights([published(self.adapter)], low_cpu_mem_usage=False)
        self.theirs.eval().requires_grad_(False)
        for processor in self.theirs.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [case.scale]
        self.condition = self.prepare()
        self.call = {"bare": self.bare, "imprompt": self.ours, "diffusers": self.theirs}
        if compiled:
            self.call = {name: torch.compile(unet) for name, unet in self.call.items()}

    def _random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(shape))
        values = torch.randn(shape, generator=generator)
        return values.to(device=self.device, dtype=self.dtype)

    def tokens(self) -> Tensor:
        """Of all images: (batch, images, tokens, dim)."""
        tokens = self.adapter.tokens(self.features.flatten(0, 1))
        return tokens.unflatten(0, self.features.shape[:2])

    def prepare(self) -> dict[str, Any] | None:
        """All that this project computes once per generation."""
        if self.case.scale == 0:
            return None  # as `generate` does with a prompt that cannot act
        tokens = self.tokens()
        if self.case.masked:
            condition = combine(
                *(
                    self.handle.condition(own, self.case.scale, mask)
                    for own, mask in zip(tokens.unbind(1), self.masks, strict=True)
                )
            )
        else:
            condition = self.handle.condition(tokens.flatten(1, 2), self.case.scale)
        return self.handle.prepare([condition], self.text, self.latent_size)[0]

    def project_as_diffusers(self) -> Any:
        """What diffusers computes at every step, whatever the scale."""
        return self.theirs.encoder_hid_proj([self.features])

    def once(self) -> dict[str, Callable[[], Any]]:
        """From features to what the sites read: once per generation here, per step in diffusers."""
        return {"imprompt": self.prepare, "diffusers": self.project_as_diffusers}

    def steps(self) -> dict[str, Callable[[], Tensor]]:
        """One step of each."""
        masks = {"ip_adapter_masks": [self.masks[None]]} if self.case.masked else None

        def step(name: str, **given: Any) -> Callable[[], Tensor]:
            unet = self.call[name]
            inputs = self.latents, self.timestep, self.text
            return lambda: unet(*inputs, **given, return_dict=False)[0]

        return {
            "bare": step("bare"),
            "imprompt": step("imprompt", cross_attention_kwargs=self.condition),
            "diffusers": step(
                "diffusers",
                added_cond_kwargs={"image_embeds": [self.features]},
                cross_attention_kwargs=masks,
            ),
        }

    def generations(self, num_steps: int) -> dict[str, Callable[[], None]]:
        """As many steps, and what comes before them."""

        def generation(name: str) -> Callable[[], None]:
            def run() -> None:
                if name == "imprompt":
                    self.condition = self.prepare()
                step = self.steps()[name]
                for _ in range(num_steps):
                    step()

            return run

        return {name: generation(name) for name in self.call}

    def sites(self) -> dict[str, Callable[[], None]]:
        """All cross-attention layers of each, one after the other, with nothing between them."""
        given: dict[str, list[Callable[[], Any]]] = {name: [] for name in self.call}
        projected = self.project_as_diffusers()
        masks = {"ip_adapter_masks": [self.masks[None]]} if self.case.masked else {}
        shapes = hidden_shapes(self.bare, self.steps()["bare"])
        for (index, site), *others in zip(
            cross_sites(self.bare), cross_sites(self.ours), cross_sites(self.theirs), strict=True
        ):
            hidden = self._random(*shapes[index])
            own = {} if self.condition is None else {CONDITION_KEY: self.condition[CONDITION_KEY]}
            (_, ours), (_, theirs) = others
            given["bare"].append(call_of(site, hidden, self.text))
            given["imprompt"].append(call_of(ours, hidden, self.text, **own))
            given["diffusers"].append(call_of(theirs, hidden, (self.text, projected), **masks))

        def all_of(calls: list[Callable[[], Any]]) -> Callable[[], None]:
            def run() -> None:
                for call in calls:
                    call()

            return run

        return {name: all_of(calls) for name, calls in given.items()}

    def differences(self) -> dict[str, float]:
        """Of this project's output from diffusers' and from the bare UNet's, relative to the largest."""
        outputs = {name: step().float() for name, step in self.steps().items()}
        largest = outputs["bare"].abs().max()
        return {
            f"from_{name}": float((outputs["imprompt"] - outputs[name]).abs().max() / largest)
            for name in ("diffusers", "bare")
        }


def call_of(site: Any, hidden: Tensor, text: Any, **given: Any) -> Callable[[], Tensor]:
    return lambda: site(hidden, encoder_hidden_states=text, **given)


def cross_sites(unet: Any) -> list[tuple[int, Any]]:
    return [(site.index, site.module) for site in attention_sites(unet) if site.is_cross]


def hidden_shapes(unet: Any, step: Callable[[], Any]) -> dict[int, tuple[int, ...]]:
    """The shape of what each site reads during a step."""
    shapes: dict[int, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, index=index: shapes.update({index: tuple(inputs[0].shape)})
        )
        for index, module in cross_sites(unet)
    ]
    step()
    for hook in hooks:
        hook.remove()
    return shapes
