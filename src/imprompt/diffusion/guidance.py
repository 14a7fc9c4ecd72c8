"""Classifier-free guidance: away from what the model draws anyway, towards what was asked for."""

from jaxtyping import Float
from torch import Tensor


def guide(
    unconditional: Float[Tensor, "batch *shape"],
    conditional: Float[Tensor, "batch *shape"],
    scale: float,
) -> Float[Tensor, "batch *shape"]:
    """The guided prediction; `scale` 1 is the conditional one itself, 0 the unconditional one.

    Text and image are guided jointly: "unconditional" is the negative prompt with the tokens of no
    image.

    Source: Ho & Salimans (2207.12598) eq. 6, with their w = scale - 1; IP-Adapter (2308.06721)
    eq. 7.
    """
    return unconditional + scale * (conditional - unconditional)


def guide_separately(
    unconditional: Float[Tensor, "batch *shape"],
    image_only: Float[Tensor, "batch *shape"],
    conditional: Float[Tensor, "batch *shape"],
    text_scale: float,
    image_scale: float,
) -> Float[Tensor, "batch *shape"]:
    """Guidance with one strength for the image prompt and another for the text.

    `image_only` has the image prompt with the negative text, `conditional` has both. With equal
    scales it is the same as `guide`.

    Source: Brooks et al. (2211.09800) eq. 3.
    """
    towards_image = image_scale * (image_only - unconditional)
    towards_text = text_scale * (conditional - image_only)
    return unconditional + towards_image + towards_text


def guide_by_instruction(
    unconditional: Float[Tensor, "batch *shape"],
    image_only: Float[Tensor, "batch *shape"],
    uninstructed: Float[Tensor, "batch *shape"],
    conditional: Float[Tensor, "batch *shape"],
    text_scale: float,
    image_scale: float,
    instruction_scale: float,
) -> Float[Tensor, "batch *shape"]:
    """Guidance with one strength each for the image, for the text, and for the instruction.

    `uninstructed` has tokens of image, text and the instruction "everything", `image_only` has
    tokens of the image without text and instruction. Beside its tokens the denoiser reads the text
    in `conditional` alone; in the other three, `uninstructed` too, it reads the negative text, as
    published (but Stable Diffusion XL's pooled state is the text's in all but `unconditional`).
    With equal scales it is the same as `guide`.

    Source: the published pipelines of IP-Adapter-Instruct (2408.03209).
    """
    towards_image = image_scale * (image_only - unconditional)
    towards_text = text_scale * (uninstructed - image_only)
    towards_instruction = instruction_scale * (conditional - uninstructed)
    return unconditional + towards_image + towards_text + towards_instruction


def rescale(
    guided: Float[Tensor, "batch *shape"],
    conditional: Float[Tensor, "batch *shape"],
    amount: float,
) -> Float[Tensor, "batch *shape"]:
    """Takes back the growth in contrast that strong guidance brings, by `amount` in [0, 1].

    Source: Lin et al. (2305.08891) section 3.4, eq. 15 and 16.
    """
    dimensions = list(range(1, guided.ndim))
    wanted = conditional.std(dim=dimensions, keepdim=True)
    grown = guided.std(dim=dimensions, keepdim=True)
    return guided * (amount * wanted / grown + (1 - amount))
