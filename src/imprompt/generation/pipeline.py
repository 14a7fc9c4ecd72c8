"""Images from text and image prompts: the whole way in one call."""

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapters.sites import Number
from imprompt.bases import Base, ClipImageEncoder, TextStates
from imprompt.bases.words import unread_part
from imprompt.core.errors import ImpromptError
from imprompt.core.images import pixels_to_images
from imprompt.core.progress import say
from imprompt.diffusion.samplers import Sampler
from imprompt.generation.branches import Guidance
from imprompt.generation.conditions import check_finite
from imprompt.generation.controls import Control, map_control, placed
from imprompt.generation.explanation import Explanation
from imprompt.generation.identity import IdentityPrompt, read_person
from imprompt.generation.init_image import InitImage, start_of
from imprompt.generation.instructed import words_of
from imprompt.generation.prompts import ImagePrompt, installed, token_prompt
from imprompt.generation.sampler import default_batch_size, sample_latents


def generate(
    base: Base,
    prompt: str | Sequence[str] = "",
    image_prompts: Sequence[ImagePrompt] | ImagePrompt = (),
    *,
    negative_prompt: str | Sequence[str | None] | None = None,
    num_images: int = 1,
    steps: int = 50,
    guidance_scale: Number | None = None,
    image_guidance_scale: Number | None = None,
    instruction_guidance_scale: Number | None = None,
    guidance_rescale: Number = 0.0,
    seed: int = 0,
    sampler: str | Sampler = "ddim",
    size_px: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    image_encoder: ClipImageEncoder | None = None,
    progress: bool = True,
    explanation: Explanation | None = None,
    controls: Sequence[Control] | Control = (),
    identities: Sequence[IdentityPrompt] | IdentityPrompt = (),
    init_image: InitImage | None = None,
) -> list[Image.Image]:
    """Draws images that follow a text, image prompts, or both.

    Args:
        base: a model from `load_base`. Adapters are installed on it for the duration of the call.
        prompt: a text, or one for each image. Empty, the image prompts alone decide. What is too
            long for the base's text encoder is not read, which is told once on stderr.
        image_prompts: any number, each with its adapter, weight, mask and time span. Adapters are
            moved to the base's device, and stay there.
        negative_prompt: what to get away from: one text, or one for each image. None, what the
            base takes for no text, differs from the empty text for Stable Diffusion XL.
        num_images: how many images of one prompt. With several prompts it is their number.
        steps: of the sampler; the cost is proportional to them.
        guidance_scale: how far to go beyond what the prompts say; 1 is not at all, at half the
            cost. By default as the base is best guided: 7.5, 5 for Stable Diffusion XL, and 3 for
            "diorama".
        image_guidance_scale: the same for the image prompts alone, if it shall differ; half more
            cost.
        instruction_guidance_scale: the same for what image prompts of an Instruct adapter are told,
            if it shall differ; it doubles the cost. `published_guidance` says what the authors take.
        guidance_rescale: in [0, 1], against the overexposure of strong guidance.
        seed: image k is a function of it, of k and of what is asked for, not of num_images or
            batch_size.
        sampler: "ddim", "dpm-solver++", "pndm", "euler", "euler-ancestral", "ddpm" or "lcm"; or a `Sampler`
            that says more than the name.
        size_px: side of the square images, or (height, width); as the base was made by default.
        batch_size: how many images are drawn at once; set it lower if memory does not suffice.
        image_encoder: by default the base's own.
        progress: whether to show a bar with the time left.
        explanation: is filled with where each image prompt acted.
        controls: any number of maps that the images shall obey, each with its network and weight.
        identities: persons who shall be drawn.
        init_image: a picture to begin from, and with a mask, of which to draw a part anew.

    Raises:
        ImpromptError: something given cannot be used; the message says what could.

    Source: IP-Adapter (2308.06721) section 3.2, eq. 7 (guidance) and eq. 8 (λ).
    """
    if not isinstance(base, Base):
        raise ImpromptError(
            f"generate() begins with a base, and a {type(base).__name__} was given: "
            'imprompt.generate(imprompt.load_base("diorama"), "a red house").'
        )
    prompts, negative_prompts = _texts(prompt, negative_prompt, num_images)
    check_finite(
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        instruction_guidance_scale=instruction_guidance_scale,
        guidance_rescale=guidance_rescale,
    )
    _check_seed(seed)
    _tell_what_is_not_read(base, [*prompts, *negative_prompts])
    image_prompts = _listed(image_prompts, ImagePrompt, "image_prompts")
    controls = _listed(controls, Control, "controls")
    identities = _listed(identities, IdentityPrompt, "identities")
    if instruction_guidance_scale is not None and not any(
        image_prompt.adapter.variant == "instruct" for image_prompt in image_prompts
    ):
        raise ImpromptError(
            "instruction_guidance_scale is about what an Instruct adapter is told, but there is no "
            "image prompt of one: leave it out, or give one."
        )
    guidance_scale = base.guidance_scale if guidance_scale is None else guidance_scale
    if guidance_scale == 0:
        _say_once(
            "guidance_scale=0 draws what nobody asked for; models that go without guidance (Turbo, Lightning) "
            "are drawn from with 1"
        )
    if explanation is not None:
        explanation.num_image_prompts = len(image_prompts)
    start = None
    if init_image is not None:
        [init_image] = _listed(init_image, InitImage, "init_image")
        start = start_of(init_image, base, size_px)
    map_controls = [map_control(control, base, size_px) for control in controls]
    effective = {n: prompt for n, prompt in enumerate(image_prompts) if prompt.is_effective}
    encoder = base.image_encoder if image_encoder is None else image_encoder
    adapters = [image_prompt.adapter for image_prompt in effective.values()]
    adapters += [person.identity.adapter for person in identities if person.is_beside_the_text]
    # Moved outside inference mode, so that they may be trained afterwards.
    for adapter in adapters:
        adapter.to(base.device)
    for person in identities:
        if person.is_in_the_net:
            placed(person.identity.net, base)
    with (
        torch.inference_mode(),
        installed(base.unet, adapters) as handles,
    ):
        # In one go: equal texts are encoded once, and offloaded encoders fetched once.
        text_states = _encode_texts(base, [*prompts, *negative_prompts])
        # Only Instruct adapters read words, for which some bases encode the texts once more.
        words = None
        if any(adapter.variant == "instruct" for adapter in adapters):
            words = words_of(base, prompts, text_states[: len(prompts)], negative_prompts)
        guidance = Guidance(
            scale=guidance_scale, image=image_guidance_scale, instruction=instruction_guidance_scale
        )
        is_guided = "unconditional" in guidance.branches(has_prompts=True)
        token_prompts = [
            token_prompt(
                image_prompt,
                handles[image_prompt.adapter],
                encoder,
                words,
                number,
                is_guided=is_guided,
            )
            for number, image_prompt in effective.items()
        ]
        for number, person in enumerate(identities, start=len(image_prompts)):
            handle = handles.get(person.identity.adapter)
            read = read_person(person, base, handle, encoder, size_px, number)
            token_prompts += [] if read.prompt is None else [read.prompt]
            map_controls += [] if read.control is None else [read.control]
        latents = sample_latents(
            base,
            text_states[: len(prompts)],
            text_states[len(prompts) :],
            token_prompts,
            steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            instruction_guidance_scale=instruction_guidance_scale,
            guidance_rescale=guidance_rescale,
            seed=seed,
            sampler=sampler,
            size_px=size_px,
            batch_size=batch_size,
            show_progress=progress,
            explanation=explanation,
            controls=map_controls,
            start=start,
        )
    images = latents_to_images(base, latents, batch_size)
    return images if start is None else start.completed(images)


@torch.inference_mode()
def latents_to_images(
    base: Base, latents: Tensor, batch_size: int | None = None
) -> list[Image.Image]:
    """Decodes latents, a few at a time."""
    if batch_size is None:
        batch_size = default_batch_size(base, latents.shape[-2], latents.shape[-1])
    images: list[Image.Image] = []
    for chunk in latents.split(batch_size):
        images += pixels_to_images(base.decode_image(chunk))
    return images


Given = TypeVar("Given")


def _listed(given: Sequence[Given] | Given, kind: type[Given], name: str) -> list[Given]:
    """One or several of a kind as a list, an ImpromptError if there is something else among them."""
    listed = [given] if isinstance(given, kind) else given
    if isinstance(listed, Sequence) and not isinstance(listed, str):
        others = [one for one in listed if not isinstance(one, kind)]
        if not others:
            return list(cast(Sequence[Given], listed))
        given = others[0]
    raise ImpromptError(
        f"{name} takes {kind.__name__} objects, and a {type(given).__name__} is among them: make "
        f"one of it, imprompt.{kind.__name__}(…)."
    )


def _texts(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str | None] | None,
    num_images: int,
) -> tuple[list[str], list[str | None]]:
    """One text and one negative text for each image; a single negative one stands for all."""
    if not isinstance(num_images, Integral) or num_images < 1:
        raise ImpromptError(f"num_images is {num_images}, but must be a whole number, at least 1.")
    if not isinstance(prompt, str | Sequence):
        raise ImpromptError(f"prompt is {prompt!r}; give a text, or a list of texts.")
    prompts = [prompt] * num_images if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ImpromptError("An empty list of prompts was given; for no text give the empty text.")
    if num_images not in (1, len(prompts)):
        raise ImpromptError(
            f"{len(prompts)} prompts were given with num_images={num_images}: a list of prompts "
            "makes one image of each."
        )
    if negative_prompt is None or isinstance(negative_prompt, str):
        return prompts, [negative_prompt]
    if len(negative_prompt) != len(prompts):
        raise ImpromptError(
            f"{len(negative_prompt)} negative prompts were given for {len(prompts)} images: give "
            "one text, or one for each image."
        )
    return prompts, list(negative_prompt)


def _check_seed(seed: object) -> None:
    if not isinstance(seed, Integral):
        raise ImpromptError(f"seed is {seed!r}, but must be one whole number for all images.")


def _tell_what_is_not_read(base: Base, texts: Sequence[str | None]) -> None:
    length = base.text_encoder.config.max_position_embeddings
    for text in dict.fromkeys(texts):
        if text and (rest := unread_part(base.tokenizer, text, length)):
            _say_once(f"the text is too long: of {text[:40]!r}… this is not read: {rest!r}")


@lru_cache(maxsize=1024)
def _say_once(message: str) -> None:
    say(message)


def _encode_texts(base: Base, texts: Sequence[str | None]) -> TextStates:
    """Text states, of equal texts computed once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    states = base.encode_text(list(rows))
    return states[[rows[text] for text in texts]]
