"""Decoupled cross-attention: how image prompts enter a diffusion model.

    Z = Attn(Q, K, V) + Σ_j λ_j · m_j · Attn(Q, K'_j, V'_j)

K, V come from the text as ever; K'_j, V'_j from the tokens of image prompt j through the adapter's
own weights; λ_j is its scale and m_j ∈ [0, 1] its mask over the picture. Each attention has its
own softmax, so the image does not take attention away from the text.

K'_j and V'_j do not depend on the timestep. `Handle.condition` computes them once per prompt,
folds λ_j into V'_j, leaves out what has λ_j = 0, and the result travels to every site through
diffusers' `cross_attention_kwargs`. What stands in the model is a `DecoupledAttention` per site: it
holds no weights and no prompts, so one set of them serves any number of adapters.

Neither do the text's K and V. A condition may bring them as well (`Handle.prepare`); they are used
where the UNet is called with the very text states that they were computed of, and nowhere else.

Source: IP-Adapter (2308.06721), equations 3 to 5.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, linear, scaled_dot_product_attention

from imprompt.core.errors import ImpromptError

# The key under which a condition travels in `cross_attention_kwargs`.
CONDITION_KEY = "image_prompts"

# Processors that compute softmax(QKᵀ/√d)V and nothing else, by different means: where one of these
# stands, `attend` may compute the text's part in its stead.
PLAIN_PROCESSORS = frozenset(
    ["AttnProcessor2_0", "AttnProcessor", "XFormersAttnProcessor", "SlicedAttnProcessor"]
    + ["FusedAttnProcessor2_0"]
)

# Between the aspect ratios of a mask and of the grid that a site's positions are taken to be: only
# their number is known there, and every halving has rounded the sides (64 x 65 becomes 8 x 9).
# Where the picture's own shape is known, `preparation` asks for more.
MAX_GRID_DEVIATION = 1.3


class KeyValue(NamedTuple):
    """One image prompt at one attention site."""

    key: Float[Tensor, "batch heads tokens head_dim"]
    value: Float[Tensor, "batch heads tokens head_dim"]  # multiplied by λ already
    mask: Float[Tensor, "mask_batch 1 height width"] | None = None  # in [0, 1], at any resolution
    record: Callable[[Tensor, Tensor], None] | None = None  # is shown text's and image's attention
    # The mask at sites of so many positions, (mask_batch, positions), as far as computed beforehand.
    mask_at: Mapping[int, Tensor] | None = None
    # A number by which the prompt counts more or less at some steps, which share K' and V' with the others.
    factor: Float[Tensor, ""] | None = None


class TextKeyValue(NamedTuple):
    """A site's own K and V of text states that are known before the UNet is called with them."""

    states: Float[Tensor, "batch length dim"]  # what they were computed of
    version: int | None  # of `states`; see `version_of`
    key: Float[Tensor, "batch heads length head_dim"]
    value: Float[Tensor, "batch heads length head_dim"]


class LowRank(NamedTuple):
    """An addition to a linear layer: x → up(down(x))."""

    down: Float[Tensor, "rank in_dim"]
    up: Float[Tensor, "out_dim rank"]


class SiteLora(NamedTuple):
    """Additions to a site's four linear layers, as face-id adapters bring them."""

    query: LowRank
    key: LowRank
    value: LowRank
    out: LowRank
    # The adapter's own weight, by which LoRA is known to be the same, scaled and cast or not.
    source: Float[Tensor, "rank in_dim"]


class SiteCondition(NamedTuple):
    """All that is to happen at one attention site."""

    prompts: tuple[KeyValue, ...] = ()
    loras: tuple[SiteLora, ...] = ()
    text: TextKeyValue | None = None  # with the additions of `loras`


class DecoupledAttention:
    """Stands at one attention site in place of the processor it found there.

    Where a call brings nothing for this site (no condition, λ = 0, self-attention), the original
    processor does all the work, so the output is the bare model's, to the bit.

    Deliberately no `nn.Module`: the model's parameters, state dict and repr stay what they were.
    """

    def __init__(self, original: Callable[..., Tensor], site: int) -> None:
        self.original = original
        self.site = site
        self.is_plain = type(original).__name__ in PLAIN_PROCESSORS
        # The handles that still need it; one that was lost without `remove` leaves by itself.
        self.holders: WeakSet[Any] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # The handles of this model are not those of its copy.
        return {name: value for name, value in self.__dict__.items() if name != "holders"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.holders = WeakSet()

    # diffusers reads this signature: what is not named here it drops, with a warning.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,
        image_prompts: Mapping[int, SiteCondition] | None = None,
    ) -> Tensor:
        here = image_prompts.get(self.site) if image_prompts else None
        if here is not None and self.is_plain:
            return attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb, here)

        others: dict[str, Any] = {"temb": temb, "ip_adapter_masks": ip_adapter_masks}
        with lora_hooks(attn, here.loras) if here and here.loras else nullcontext():
            output = self.original(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **{name: value for name, value in others.items() if value is not None},
            )
        if here is None or not here.prompts:
            return output
        return output + image_residual(attn, hidden_states, temb, here)


def attend(
    attn: Any,
    hidden_states: Tensor,
    text_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    condition: SiteCondition,
) -> Tensor:
    """A whole attention layer with image prompts: norm, Q K V, Z, output, residual.

    `attn` is a diffusers `Attention`, known here only by its parts. Without prompts this computes
    what diffusers' own `AttnProcessor2_0` does, operation by operation.
    """
    residual, flat = hidden_states, to_sequence(attn, hidden_states, temb)
    batch = len(flat)
    if attention_mask is not None:
        length = flat.shape[1] if text_states is None else text_states.shape[1]
        prepared: Tensor = attn.prepare_attention_mask(attention_mask, length, batch)
        attention_mask = prepared.view(batch, attn.heads, -1, prepared.shape[-1])

    loras = condition.loras
    query = split_heads(with_loras(attn.to_q, flat, [lora.query for lora in loras]), attn.heads)
    query = query if attn.norm_q is None else attn.norm_q(query)
    if condition.text is not None and is_text_of(condition.text, attn, text_states):
        key, value = condition.text.key.to(query), condition.text.value.to(query)
    else:
        key, value = own_key_value(attn, flat, text_states, loras)

    is_recorded = any(prompt.record is not None for prompt in condition.prompts)
    attended = text = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    for prompt in condition.prompts:
        image = image_attention(query, prompt)
        if prompt.record is not None:
            prompt.record(text, image)
        attended = plus(attended, image, keep=attended is text and is_recorded)

    joined = join_heads(attended).to(query.dtype)
    output = with_loras(attn.to_out[0], joined, [lora.out for lora in loras])
    output = from_sequence(attn.to_out[1](output), residual)
    if attn.residual_connection:
        output = output + residual
    return output / attn.rescale_output_factor


def own_key_value(
    attn: Any, flat: Tensor | None, text_states: Tensor | None, loras: tuple[SiteLora, ...]
) -> tuple[Tensor, Tensor]:
    """K and V of the layer itself, in heads: of the text, or without one of the hidden states."""
    states: Any = flat
    if text_states is not None:
        states = attn.norm_encoder_hidden_states(text_states) if attn.norm_cross else text_states
    key = split_heads(with_loras(attn.to_k, states, [lora.key for lora in loras]), attn.heads)
    value = split_heads(with_loras(attn.to_v, states, [lora.value for lora in loras]), attn.heads)
    return key if attn.norm_k is None else attn.norm_k(key), value


def is_text_of(text: TextKeyValue, attn: Any, states: Tensor | None) -> bool:
    """Whether K and V computed beforehand are those of this call's text states.

    They are if it is the same tensor and nobody has written into it since. Comparing the numbers
    would cost a wait for the device at every site.
    """
    if states is None or states is not text.states or not can_be_kept(attn):
        return False
    # A compiler cannot look at versions.
    return torch.compiler.is_compiling() or version_of(states) == text.version


def can_be_kept(attn: Any) -> bool:
    """Whether a site's own K and V depend on nothing but text states and weights.

    A LoRA that wraps the layer (PEFT) may be scaled or switched at every call.
    """
    return not hasattr(attn.to_k, "base_layer") and not hasattr(attn.to_v, "base_layer")


def version_of(states: Tensor) -> int | None:
    """Counts the writes into a tensor; None where torch does not (inference mode)."""
    return None if states.is_inference() else states._version


def image_residual(
    attn: Any, hidden_states: Tensor, temb: Tensor | None, condition: SiteCondition
) -> Tensor:
    """What image prompts add to the output of a processor whose inside is not known.

    The output layer is affine: out(text + image) = out(text) + [out(image) - out(0)]. Costs a
    second Q and a second output layer, which `attend` does not.
    """
    loras = condition.loras
    states = to_sequence(attn, hidden_states, temb)
    query = split_heads(with_loras(attn.to_q, states, [lora.query for lora in loras]), attn.heads)
    query = query if attn.norm_q is None else attn.norm_q(query)
    attended = torch.zeros_like(query)
    for prompt in condition.prompts:
        attended = plus(attended, image_attention(query, prompt))
    joined = join_heads(attended)
    output = with_loras(attn.to_out[0], joined, [lora.out for lora in loras])
    output = output - attn.to_out[0](torch.zeros_like(joined[:1, :1]))
    return from_sequence(output, hidden_states) / attn.rescale_output_factor


@contextmanager
def lora_hooks(attn: Any, loras: Sequence[SiteLora]) -> Generator[None, None, None]:
    """LoRA within a processor whose inside is not known: added to the layers while it runs."""

    def added(addition: LowRank) -> Callable[..., Tensor]:
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            down, up = (weight.to(inputs[0]) for weight in addition)
            return output + linear(linear(inputs[0], down), up)

        return add

    layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    hooks = [
        layer.register_forward_hook(added(addition))
        for lora in loras
        for layer, addition in zip(
            layers, (lora.query, lora.key, lora.value, lora.out), strict=True
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def image_attention(
    query: Float[Tensor, "batch heads length head_dim"], prompt: KeyValue
) -> Float[Tensor, "batch heads length head_dim"]:
    """λ · m · Attn(Q, K', V'), times the factor of the step."""
    batch, _, length, _ = query.shape
    key, value = (repeat_to(x.to(query), batch) for x in (prompt.key, prompt.value))
    attended = scaled_dot_product_attention(query, key, value)
    if prompt.factor is not None:
        attended = times(attended, prompt.factor)
    if prompt.mask is None:
        return attended
    mask = None if prompt.mask_at is None else prompt.mask_at.get(length)
    if mask is None:
        mask = mask_at_site(prompt.mask.to(query), length)
    return times(attended, repeat_to(mask.to(query), batch)[:, None, :, None])


def times(attended: Tensor, factor: Tensor) -> Tensor:
    """Their product, written over the first unless its gradient is needed."""
    return attended * factor if attended.requires_grad else attended.mul_(factor)


def plus(attended: Tensor, image: Tensor, *, keep: bool = False) -> Tensor:
    """Their sum, written over the first unless it is still needed: half the cost on a CPU."""
    if keep or attended.requires_grad or image.requires_grad:
        return attended + image
    return attended.add_(image)


def repeat_to(prompts: Tensor, batch: int) -> Tensor:
    """Give each of `batch` samples its prompt: sample j gets prompt j modulo the number given.

    So a batch that was repeated whole, as classifier-free guidance does, keeps each sample with
    its own prompt, and one prompt serves all.
    """
    num_prompts = len(prompts)
    if num_prompts == batch:
        return prompts
    if num_prompts == 1:
        return prompts.expand(batch, *prompts.shape[1:])  # a view; the rest copies
    if batch % num_prompts:
        raise ImpromptError(
            f"The condition holds image prompts for {num_prompts} samples, but the UNet was called "
            f"with a batch of {batch}: give tokens for 1, for {batch}, or for a divisor of {batch}."
        )
    return prompts.repeat(batch // num_prompts, *[1] * (prompts.ndim - 1))


def mask_at_site(
    mask: Float[Tensor, "batch 1 height width"], length: int
) -> Float[Tensor, "batch length"]:
    """The mask at the resolution of a site with `length` positions, as covered fraction of each."""
    height_px, width_px = mask.shape[-2:]
    height, width = grid_of(length, height_px / width_px)
    if (height, width) != (height_px, width_px):
        mask = adaptive_avg_pool2d(mask, (height, width))
    return mask.flatten(1)


def grid_of(length: int, aspect: float) -> tuple[int, int]:
    """(height, width) with height · width = length whose ratio is nearest to `aspect`.

    A site sees its positions as one row; only the mask knows the shape of the picture.
    """
    ideal = min(max(int(math.sqrt(length * aspect)), 1), length)
    # The nearest divisors on both sides.
    lower = next(height for height in range(ideal, 0, -1) if length % height == 0)
    higher = next((h for h in range(ideal + 1, length + 1) if length % h == 0), lower)
    height = min(lower, higher, key=lambda height: abs(math.log(height * height / length / aspect)))
    if deviates(height * height / length, aspect, MAX_GRID_DEVIATION):
        raise ImpromptError(
            f"A mask of height/width {aspect:.3f} does not fit a picture with {length} positions "
            f"(nearest: {height} x {length // height}): give the mask the picture's aspect ratio."
        )
    return height, length // height


def deviates(aspect: float, wanted: float, limit: float) -> bool:
    """Whether one aspect ratio is more than `limit` times the other."""
    return abs(math.log(aspect / wanted)) > math.log(limit)


def with_loras(layer: Callable[[Tensor], Tensor], x: Tensor, additions: list[LowRank]) -> Tensor:
    """layer(x) + Σ up(down(x))."""
    output = layer(x)
    for down, up in additions:
        output = output + linear(linear(x, down.to(x)), up.to(x))
    return output


def split_heads(
    x: Float[Tensor, "batch length inner"], num_heads: int
) -> Float[Tensor, "batch heads length head_dim"]:
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def join_heads(
    x: Float[Tensor, "batch heads length head_dim"],
) -> Float[Tensor, "batch length inner"]:
    return x.transpose(1, 2).flatten(2)


def to_sequence(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    """A picture or a sequence → a normed sequence (batch, length, channels)."""
    sequence = hidden_states
    if attn.spatial_norm is not None:
        sequence = attn.spatial_norm(sequence, temb)
    if sequence.ndim == 4:
        sequence = sequence.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        sequence = attn.group_norm(sequence.transpose(1, 2)).transpose(1, 2)
    return sequence


def from_sequence(output: Tensor, like: Tensor) -> Tensor:
    """Back from (batch, length, channels) to the shape that came in."""
    return output.transpose(-1, -2).reshape(like.shape) if like.ndim == 4 else output
