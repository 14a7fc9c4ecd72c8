"""Which row of a pipeline's batch reads which image prompt.

A diffusers pipeline stacks its batch: without guidance the images to draw; with classifier-free
guidance all of them twice, [unconditional…, conditional…]; with perturbed-attention guidance
three times, the first part unconditional again. Within a part the images of one text stand
together: [a, a, b, b] for two texts with two images each. Every part is made of the same latents,
and that is how the parts are known here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from imprompt.adapters.attention import KeyValue, SiteCondition
from imprompt.adapters.casting import cast_lora
from imprompt.core.errors import ImpromptError


def parts_of_batch(sample: Tensor, guidance: bool | None) -> int:
    """How many times a batch holds the same images: 1 without guidance.

    Args:
        sample: what the UNet is called with.
        guidance: None to find out from the sample. It is wrong only where a pipeline without
            guidance draws several images from one and the same noise.
    """
    if guidance is not None:
        return 2 if guidance else 1
    for num_parts in (2, 3):
        if len(sample) % num_parts == 0:
            first, *others = sample.chunk(num_parts)
            if all(torch.equal(first, other) for other in others):
                return num_parts
    return 1


def rows_of_batch(batch: int, num_parts: int, num_prompts: int) -> list[int]:
    """For each row of a batch its row in [zero tokens of each prompt…, tokens of each prompt…].

    Raises:
        ImpromptError: the images cannot be shared out among the prompts.
    """
    num_images = batch // num_parts
    if batch % num_parts or num_images % num_prompts:
        raise ImpromptError(
            f"The image prompt has tokens for {num_prompts} samples, but the UNet was called with "
            f"a batch of {batch}, which is {num_parts} x {batch / num_parts:g} images: give tokens "
            "for 1, for each image, or for each text; and guidance=True or False if that is not "
            "what the pipeline does."
        )
    prompts = [image * num_prompts // num_images for image in range(num_images)]
    shown = [num_prompts + prompt for prompt in prompts]
    return shown if num_parts == 1 else prompts + shown * (num_parts - 1)


def select_rows(
    condition: Mapping[int, SiteCondition], rows: list[int], like: Tensor
) -> dict[int, SiteCondition]:
    """The condition of a batch whose row j reads prompt rows[j], where and as `like` is."""
    index = torch.tensor(rows)

    def select(x: Tensor) -> Tensor:
        return x[index.to(x.device)].to(like)

    def of_prompt(prompt: KeyValue) -> KeyValue:
        mask = prompt.mask
        if mask is not None:
            mask = select(mask) if len(mask) > 1 else mask.to(like)
        return prompt._replace(key=select(prompt.key), value=select(prompt.value), mask=mask)

    return {
        index_of_site: site._replace(
            prompts=tuple(of_prompt(prompt) for prompt in site.prompts),
            loras=tuple(cast_lora(lora, lambda x: x.to(like)) for lora in site.loras),
        )
        for index_of_site, site in condition.items()
    }
