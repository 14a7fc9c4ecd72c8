"""Whose identity vectors an adapter for faces learns from: those of one face encoder, from the beginning."""

from __future__ import annotations

from imprompt.adapters import ImagePromptAdapter
from imprompt.core.errors import ImpromptError
from imprompt.data.rows import Rows
from imprompt.encoders.face import pack_with, published_encoder_of


def learn_faces_of(adapter: ImagePromptAdapter, columns: Rows, start: str) -> None:
    """Note in the adapter which face encoder read the persons of the data.

    `start` is the file or folder that it goes on from, empty for a new adapter.

    Raises:
        ImpromptError: it knows persons by another encoder's vectors, to which these are noise.
    """
    of_data = str(columns.meta.get("face_encoder", ""))
    of_start = adapter.metadata.get("face_encoder", "")
    # Published files do not tell, but all were trained with insightface.
    if not of_start and (pack := pack_with(of_data)):
        published = published_encoder_of(adapter.variant, adapter.metadata.get("published", ""))
        of_start = of_data if pack == published else published
    if start and of_start not in ("", of_data):
        raise ImpromptError(
            f"{start} knows persons by another face encoder ({of_start}) than the one that read those of "
            f"{columns.path} ({pack_with(of_data) or of_data}): prepare data with the adapter's own."
        )
    adapter.metadata["face_encoder"] = of_data
