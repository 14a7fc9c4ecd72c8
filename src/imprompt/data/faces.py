"""Faces in pairs: who reads them, and finding out before a pair is used that it shows none."""

from __future__ import annotations

from collections.abc import Sequence

from imprompt.core.images import image_to_pixels
from imprompt.data.filters import Unusable
from imprompt.data.pairs import Loaded
from imprompt.data.sources import is_embedded_world
from imprompt.diorama import Scene
from imprompt.encoders.face import INSIGHTFACE, PACKS, loaded_face_encoder

FACE_MISSING = "face missing"
REFERENCE_COLUMNS = frozenset({"id_embeds", "id_lengths", "reference_hidden_states"})
"""Those that read the face of a pair's reference."""


def default_face_encoder(source: str, variant: str) -> str:
    """The embedded world's encoder for its own portraits; for photos the one its adapters are read with."""
    return "diorama" if is_embedded_world(source) else PACKS.get(variant, INSIGHTFACE)


def check_faces(loaded: Loaded, columns: Sequence[str], face_encoder: str) -> None:
    """Raise Unusable if one of these columns reads a face of the pair and there is none.

    Scenes of the embedded world are passed over: what they show is known. So are lessons of Instruct
    about something else than a face, whose vectors are zeros.
    """
    if loaded.condition is not None and not loaded.condition.is_of_face:
        return
    has_reference = loaded.reference is not None
    pictures = {"image": loaded.picture} if "landmarks" in columns else {}
    if not REFERENCE_COLUMNS.isdisjoint(columns):
        name = "reference" if has_reference else "image"
        pictures[name] = loaded.reference if has_reference else loaded.picture
    for name, picture in pictures.items():
        if isinstance(picture, Scene):
            continue
        faces = loaded_face_encoder(face_encoder)
        if not faces.finds_face(image_to_pixels(picture)):  # type: ignore[arg-type]
            raise Unusable(
                FACE_MISSING,
                f"{faces.name} finds no face in the {name}, large enough and not from behind",
            )
