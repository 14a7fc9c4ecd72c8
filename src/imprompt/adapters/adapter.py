"""An image-prompt adapter: a projection, and one K', V' pair per cross-attention site.

    features ── image_proj ──► tokens ── to_k_ip, to_v_ip at each site ──► K', V'

`state_dict()` has exactly the keys of the published checkpoints: `image_proj.*` and
`ip_adapter.{i}.*`, where i counts all attention sites of the UNet.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapters.handle import Handle
from imprompt.adapters.projection import (
    FacePlusProjection,
    FaceProjection,
    FullProjection,
    LinearProjection,
    Projection,
)
from imprompt.adapters.resampler import HEAD_DIM, InstructResampler, Resampler
from imprompt.adapters.sites import Site, attention_sites, family_of, linear_weight
from imprompt.adapters.weights import SiteWeights, weights_for
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import own_randomness

Variant = Literal["base", "plus", "full", "faceid", "faceid-plus", "instruct"]
VARIANTS: tuple[str, ...] = get_args(Variant)
RESAMPLED_VARIANTS = ("plus", "instruct")
FACE_VARIANTS = ("faceid", "faceid-plus")  # these bring low-rank additions to every site


class ImagePromptAdapter(nn.Module):
    """Makes a text-to-image model follow image prompts; the model itself is left as it is.

        handle = adapter.install(unet)
        tokens = adapter.tokens(features)
        noise = unet(x, t, text, cross_attention_kwargs=handle.condition(tokens, scale=0.6)).sample
        handle.remove()

    Make one with `create_adapter` (to train) or `imprompt.load_adapter` (from a file).

    Source: IP-Adapter (2308.06721), section 3.2.
    """

    def __init__(self, image_proj: nn.Module, sites: Mapping[int, SiteWeights]) -> None:
        """Join a projection with the weights of each site, keyed by the site's index."""
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict({str(index): sites[index] for index in sorted(sites)})
        # Written beside the weights; tells where an adapter comes from ("base", "steps", …).
        self.metadata: dict[str, str] = {}

    @property
    def projection(self) -> Projection:
        """`image_proj`, by the face that all variants share."""
        return cast(Projection, self.image_proj)

    @property
    def variant(self) -> str:
        """One of VARIANTS."""
        return self.projection.variant

    @property
    def num_tokens(self) -> int | None:
        """Tokens per image; None where there are as many as the encoder gives (Full)."""
        return self.projection.num_tokens

    @property
    def cross_attention_dim(self) -> int:
        """Width of the tokens, which is that of the base's text states."""
        return self.projection.cross_attention_dim

    @property
    def site_weights(self) -> dict[int, SiteWeights]:
        """The weights of each site, by the site's index."""
        return {int(i): cast(SiteWeights, weights) for i, weights in self.ip_adapter.items()}

    @property
    def lora_rank(self) -> int:
        """Rank of the low-rank additions to every attention layer; 0 for none."""
        return max(weights.lora_rank for weights in self.site_weights.values())

    def tokens(
        self, *features: Float[Tensor, "..."], **options: Any
    ) -> Float[Tensor, "batch tokens cross_attention_dim"]:
        """What the cross-attention reads: tokens of the text states' width.

        Args:
            features: as the variant needs them, in this order. base: image_embeds (batch, dim);
                plus and full: hidden_states (batch, length, dim); faceid: id_embeds (batch, dim);
                faceid-plus: id_embeds, hidden_states; instruct: hidden_states,
                instruction_states, prompt_states.
            options: of faceid-plus, `shortcut` and `shortcut_scale`.

        Raises:
            ImpromptError: features of another number or shape than the variant needs.
        """
        wanted = self.projection.features
        fits = len(features) == len(wanted) and all(
            given.ndim == (3 if feature.is_sequence else 2)
            and given.shape[-1] == feature.dim
            and (feature.length is None or given.shape[1] == feature.length)
            and len(given) == len(features[0])
            for given, feature in zip(features, wanted, strict=True)
        )
        if not fits:
            needed = ", ".join(f"{feature.name} {feature.shape}" for feature in wanted)
            shapes = ", ".join(str(tuple(given.shape)) for given in features) or "nothing"
            raise ImpromptError(f"The {self.variant} adapter reads {needed}; given: {shapes}.")
        if options and self.variant != "faceid-plus":
            raise ImpromptError(f"The {self.variant} adapter has no option {', '.join(options)}.")
        weight = next(self.image_proj.parameters())
        return self.image_proj(*(given.to(weight) for given in features), **options)

    def install(self, unet: nn.Module) -> Handle:
        """Attach to a diffusers UNet, without changing what it computes until it is asked to.

        Any number of adapters may be installed on one UNet.

        Raises:
            ImpromptError: the adapter was made for another UNet.
        """
        sites = attention_sites(unet)
        self.check_fits(sites)
        return Handle(unet, self.site_weights, sites, self.cross_attention_dim)

    def check_fits(self, sites: Iterable[Site]) -> None:
        """Raise an ImpromptError that describes both sides if the weights are for other sites."""
        rank = self.lora_rank
        with torch.device("meta"):
            needed = {s.index: weights_for(s, rank) for s in sites if s.is_cross or rank}
        own = self.site_weights
        differing = [i for i in needed if i in own and needed[i].shapes() != own[i].shapes()]
        if needed.keys() == own.keys() and not differing:
            return
        message = f"This adapter is for {describe(own)}; this UNet has {describe(needed)}."
        if needed.keys() != own.keys():
            missing, excess = sorted(needed.keys() - own.keys()), sorted(own.keys() - needed.keys())
            message += (
                f" Sites without weights: {shorten(missing)}; without a place: {shorten(excess)}."
            )
        elif differing:
            index = differing[0]
            message += (
                f" First difference, site {index}: {own[index].shapes()} against "
                f"{needed[index].shapes()}."
            )
        raise ImpromptError(message + " Use an adapter that was made for this base model.")


def describe(sites: Mapping[int, SiteWeights]) -> str:
    cross = [weights for weights in sites.values() if weights.is_cross]
    if not cross:
        return "no cross-attention sites"
    return f"{len(cross)} cross-attention sites of {family_of(cross[0].to_k_ip.in_features)}"


def shorten(numbers: list[int], limit: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:limit])) or "none"
    return shown + (f" and {len(numbers) - limit} more" if len(numbers) > limit else "")


def create_adapter(
    unet: nn.Module,
    variant: str = "base",
    *,
    feature_dim: int,
    num_tokens: int | None = None,
    resampler_dim: int | None = None,
    depth: int = 4,
    num_positions: int = 0,
    id_dim: int = 512,
    text_dim: int | None = None,
    lora_rank: int = 128,
    seed: int = 0,
) -> ImagePromptAdapter:
    """A new adapter for a UNet, to be trained.

    K' and V' start as copies of the UNet's own K and V at each site: tokens are in the text
    states' space, so the text's way of reading them is the best first guess. All weights are
    float32, on the UNet's device; the same seed gives the same adapter.

    Args:
        variant: one of "base", "plus", "full", "faceid", "faceid-plus", "instruct".
        feature_dim: width of what the image encoder gives: of the embedding for base, of the
            hidden states for the others, of the face embedding for faceid.
        num_tokens: 4 by default for base and the face variants, 16 for plus and instruct; for
            full it is what the encoder gives, and noted only.
        resampler_dim: inner width of plus and instruct; by default the text width, at most 1280.
        depth: layers of a resampler.
        num_positions: of plus and instruct: how many hidden states there are, if each shall be told
            where it stands, by a learned embedding. 0, as published, leaves telling to the encoder.
        id_dim: width of the face embedding, for faceid-plus.
        text_dim: width of the states of instruction and prompt, for instruct. By default the text
            width of the UNet, which is right for a base with one text encoder; Stable Diffusion
            XL's adapters read the first of its two (768).
        lora_rank: of the face variants; `add_lora` gives one to the others.
        seed: of the weights that start at random.

    Raises:
        ImpromptError: unknown variant, positions for one that has none, or a UNet without
            cross-attention.
    """
    if variant not in VARIANTS:
        raise ImpromptError(f'variant is "{variant}"; known are {", ".join(VARIANTS)}.')
    if feature_dim < 1 or (num_tokens is not None and num_tokens < 1):
        raise ImpromptError(
            f"feature_dim={feature_dim} and num_tokens={num_tokens}: both must be at least 1."
        )
    if num_positions and variant not in RESAMPLED_VARIANTS:
        raise ImpromptError(f"The {variant} variant has no positions; num_positions must be 0.")
    sites = attention_sites(unet)
    widths = sorted({site.text_dim for site in sites if site.is_cross})
    if len(widths) != 1:
        raise ImpromptError(
            f"A UNet with one text width is needed; this one has {widths or 'none'}."
        )
    width = widths[0]
    dim = resampler_dim or min(width, 1280)
    resampler_size = {
        "dim": dim,
        "num_heads": max(1, dim // HEAD_DIM),
        "depth": depth,
        "num_positions": num_positions,
    }
    weight = linear_weight(sites[0].module.to_k)

    with own_randomness(seed), torch.device("meta" if weight.is_meta else "cpu"):
        projection: nn.Module
        if variant == "base":
            projection = LinearProjection(feature_dim, width, num_tokens or 4)
        elif variant == "plus":
            projection = Resampler(feature_dim, width, num_tokens or 16, **resampler_size)
        elif variant == "full":
            projection = FullProjection(feature_dim, width, num_tokens)
        elif variant == "faceid":
            projection = FaceProjection(feature_dim, width, num_tokens or 4)
        elif variant == "faceid-plus":
            projection = FacePlusProjection(
                id_dim,
                feature_dim,
                width,
                num_tokens or 4,
                num_heads=max(1, width // HEAD_DIM),
                depth=depth,
            )
        else:
            projection = InstructResampler(
                feature_dim, text_dim or width, width, num_tokens or 16, **resampler_size
            )
        rank = lora_rank if variant in FACE_VARIANTS else 0
        weights = {site.index: weights_for(site, rank) for site in sites if site.is_cross or rank}

    with torch.no_grad():
        for site in sites:
            if site.is_cross:
                weights[site.index].to_k_ip.weight.copy_(linear_weight(site.module.to_k))
                weights[site.index].to_v_ip.weight.copy_(linear_weight(site.module.to_v))
    return ImagePromptAdapter(projection, weights).to(weight.device)


def add_lora(
    adapter: ImagePromptAdapter, unet: nn.Module, rank: int, *, seed: int = 0
) -> ImagePromptAdapter:
    """The adapter with new low-rank additions to every attention layer, to be trained on.

    They begin at zero, so that it does what it did. The projection and K', V' are the adapter's own
    tensors, which both now hold.

    Raises:
        ImpromptError: it was made for another UNet, or has low-rank additions.
    """
    if adapter.lora_rank:
        raise ImpromptError(f"The adapter has a LoRA, of rank {adapter.lora_rank}.")
    sites = attention_sites(unet)
    adapter.check_fits(sites)
    parameter = next(adapter.parameters())
    with own_randomness(seed):
        weights = {site.index: weights_for(site, rank).to(parameter) for site in sites}
    for index, own in adapter.site_weights.items():
        weights[index].to_k_ip, weights[index].to_v_ip = own.to_k_ip, own.to_v_ip
    grown = ImagePromptAdapter(adapter.image_proj, weights)
    grown.metadata = dict(adapter.metadata)
    return grown
