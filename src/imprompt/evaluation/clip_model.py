"""A whole CLIP model, which sees pictures and texts in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from imprompt.bases import ClipImageEncoder
from imprompt.bases.folder import check_complete, load_tokenizer, quiet_libraries
from imprompt.core.errors import ImpromptError, first_line
from imprompt.encoders.clip import load_clip

AT_ONCE = 16
PUBLISHED = "openai/clip-vit-large-patch14"
"""What IP-Adapter's figures were measured with (2308.06721, section 4.2)."""


class ClipModel:
    """Directions of pictures and texts in the space that both share.

    Source: Radford et al. (2103.00020).
    """

    def __init__(self, images: ClipImageEncoder, texts: Any, tokenizer: Any) -> None:
        """`texts` is a transformers `CLIPTextModelWithProjection`."""
        self._images, self._texts, self._tokenizer = images, texts.eval(), tokenizer

    @torch.no_grad()
    def of_images(self, pixels: Tensor) -> Tensor:
        """Directions of pictures (batch, 3, height, width) in [-1, 1]: (batch, dim)."""
        parts = [self._images.embeds(part) for part in pixels.split(AT_ONCE)]
        return functional.normalize(torch.cat(parts).float().cpu(), dim=1)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Directions of texts, of which the model reads the beginning: (batch, dim)."""
        ids = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self._texts.config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        parts = [
            self._texts(part.to(self._texts.device)).text_embeds for part in ids.split(AT_ONCE)
        ]
        return functional.normalize(torch.cat(parts).float().cpu(), dim=1)


def load_clip_model(name: str | Path, device: torch.device | str = "cpu") -> ClipModel:
    """A model of transformers' `CLIPModel` from a folder, or by its id on the hub.

    Raises:
        ImpromptError: there is none, or it is damaged.
    """
    from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

    source = Path(name) if Path(name).is_dir() else str(name)
    images = load_clip(name, device=device)
    tokenizer = load_tokenizer(source, str(name), "")
    kind: Any = CLIPTextModelWithProjection
    try:
        with quiet_libraries():
            texts, info = kind.from_pretrained(
                str(source),
                use_safetensors=True,
                local_files_only=isinstance(source, Path),
                output_loading_info=True,
            )
    except Exception as error:  # the library raises many kinds
        raise ImpromptError(
            f"{name}: its text model could not be read ({first_line(error)})."
        ) from error
    check_complete(info, f"{name}: its text model")
    return ClipModel(images, texts.to(device), tokenizer)
