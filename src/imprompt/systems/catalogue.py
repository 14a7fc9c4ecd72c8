"""What can be trained, by the name that the command line knows."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from imprompt.core.errors import ImpromptError


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Where a system stands, and what becomes of it."""

    module: str
    """Its module here, with `build(options, base, columns)`; imported when it is needed."""
    options: str
    """The class of its options, in that module."""
    title: str = ""
    """What it makes, as a model card says it; empty is the system's name."""
    export: str = "export"
    """The file or folder of a run that users load."""
    faces: str | None = None
    """The variant whose model reads the faces in photos, where a system reads faces."""

    def load(self) -> tuple[ModuleType, type]:
        """The module, and the class of its options."""
        module = importlib.import_module(f"imprompt.systems.{self.module}")
        return module, getattr(module, self.options)


_ADAPTER = "adapter.safetensors"
TRAINABLES = {
    "image-prompt": Trainable(
        module="image_prompt",
        options="ImagePromptOptions",
        title="Image-prompt adapter",
        export=_ADAPTER,
    ),
    "instruct": Trainable(
        module="instruct", options="InstructOptions", title="Instruct adapter", export=_ADAPTER
    ),
    "instruct-words": Trainable(
        module="instruct_words",
        options="InstructWordsOptions",
        title="Instruct adapter, first stage",
        export=_ADAPTER,
    ),
    "instruct-faces": Trainable(
        module="instruct_faces",
        options="InstructFacesOptions",
        title="Instruct adapter, first stage for faces",
        export=_ADAPTER,
        faces="identity",
    ),
    "concatenation": Trainable(
        module="concatenation", options="ConcatenationOptions", export="tokens.safetensors"
    ),
    "controlnet": Trainable(
        module="controlnet", options="ControlNetOptions", title="ControlNet", export="control"
    ),
    "t2i-adapter": Trainable(
        module="t2i_adapter", options="T2IAdapterOptions", title="T2I-Adapter", export="control"
    ),
    "map-reader": Trainable(
        module="map_reader", options="MapReaderOptions", export="map-reader.safetensors"
    ),
    "text-to-image": Trainable(module="text_to_image", options="TextToImageOptions"),
    "autoencoder": Trainable(module="autoencoder", options="AutoencoderOptions"),
    "contrastive": Trainable(module="contrastive", options="ContrastiveOptions"),
    "classifier": Trainable(
        module="classifier", options="ClassifierOptions", export="judge.safetensors"
    ),
    "face-encoder": Trainable(
        module="face_encoder", options="FaceEncoderOptions", export="face-encoder.safetensors"
    ),
    "face-id": Trainable(
        module="face_id",
        options="FaceIdOptions",
        title="Face-id adapter",
        export=_ADAPTER,
        faces="faceid",
    ),
    "identity": Trainable(
        module="identity",
        options="IdentityOptions",
        title="Identity",
        export="identity",
        faces="identity",
    ),
}


def trainable(name: str) -> Trainable:
    """The system of this name.

    Raises:
        ImpromptError: there is none; the message lists what there is.
    """
    if name not in TRAINABLES:
        raise ImpromptError(f"There is no system {name!r}; choose one of: {', '.join(TRAINABLES)}.")
    return TRAINABLES[name]
