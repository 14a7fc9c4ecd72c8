"""A face encoder: pictures of one person come close to each other, those of others far away.

Every training person has a direction; a picture's vector must be nearer to its person's than to all
others', by an angle. What it learns to see serves for persons it never saw. Beside it, the same
features learn where eyes, nose and mouth are, as recognisers for photos tell both.

Source: ArcFace (Deng et al., 1801.07698), section 3.1, equation 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int
from torch import Tensor, nn

from imprompt.bases import Base
from imprompt.core.config import check_range
from imprompt.core.errors import ImpromptError
from imprompt.core.images import pixels_of_bytes
from imprompt.core.randomness import Randomness
from imprompt.data.rows import FirstRows, Rows
from imprompt.encoders.face_network import FaceNetwork, load_face_network
from imprompt.encoders.small_network import save_small_network
from imprompt.systems.decoded_look import as_if_decoded
from imprompt.systems.protocol import Figures

MIRRORED = (1, 0, 2, 4, 3)  # left and right change places
MAX_SHIFT, MAX_ZOOM = 0.10, 0.18  # of the picture's half width; as a factor


@dataclass(frozen=True, kw_only=True)
class FaceEncoderOptions:
    """What is trained. Margin and scale are smaller than ArcFace's (0.5 and 64): so are the data."""

    width: int = 32
    """Channels of the first layer."""
    embed_dim: int = 512
    """Width of the identity vector; recognisers for photos give 512 numbers."""
    margin: float = 0.3
    """Angle in radians by which a picture must be nearer to its own person than to others."""
    scale: float = 24.0
    """Factor on the cosines before the softmax."""
    landmark_weight: float = 0.3
    """Of the landmarks' error in pixels beside the loss of equation 3."""
    start_from: str = ""
    """A face encoder to go on from; empty starts anew. Each person's direction then begins as the
    mean of what it says of the person's pictures."""

    def __post_init__(self) -> None:
        check_range(self, ("width", "embed_dim"), 1)
        check_range(self, ("margin", "landmark_weight"), 0)
        check_range(self, ("margin",), below=math.pi)
        check_range(self, ("scale",), 1)


def build(options: FaceEncoderOptions, base: Base, columns: Rows) -> FaceEncoderSystem:
    """The system for columns of portraits; of the base only where it computes matters."""
    columns.require(["character"])
    # Those held out have directions, too: they are more to be told from.
    columns = columns.whole if isinstance(columns, FirstRows) else columns
    numbers = columns.rows(range(len(columns)), ["character"])["character"].unique()
    if len(numbers) < 2:
        raise ImpromptError(f"{columns.path} shows one person; to tell persons apart takes two.")
    network: Any = FaceNetwork(options.width, options.embed_dim)
    if options.start_from:
        network = load_face_network(Path(options.start_from)).requires_grad_(True)
    network.to(memory_format=torch.channels_last)
    system = FaceEncoderSystem(network, numbers, replace(options, embed_dim=network.embed_dim))
    system.module.to(base.device)
    if options.start_from:
        system.set_directions(columns)
    return system


class _WithDirections(nn.Module):
    def __init__(self, network: nn.Module, num_persons: int, embed_dim: int) -> None:
        super().__init__()
        self.network = network
        self.directions = nn.Parameter(torch.randn(num_persons, embed_dim) * embed_dim**-0.5)


class FaceEncoderSystem:
    """Trains on `pixels` (uint8), `character` and `landmarks`; validates on the last rows' persons."""

    columns = ("pixels", "character", "landmarks")
    rows_are_coupled = True  # normalised together

    def __init__(
        self, network: nn.Module, characters: Int[Tensor, " persons"], options: FaceEncoderOptions
    ) -> None:
        """`characters` are the sorted numbers of all who are in the data."""
        self.module = _WithDirections(network, len(characters), options.embed_dim)
        self.options = options
        self._characters = characters

    @torch.no_grad()
    def set_directions(self, columns: Rows) -> None:
        """Let each person's direction be the mean of what the network says of the person's pictures."""
        self.module.eval()
        directions = torch.zeros_like(self.module.directions)
        for start in range(0, len(columns), 128):
            some = range(start, min(start + 128, len(columns)))
            rows = columns.rows(some, ["pixels", "character"])
            pixels = pixels_of_bytes(rows["pixels"].to(directions.device))
            embeds, _ = self.module.network(pixels)
            persons = torch.searchsorted(self._characters, rows["character"])
            directions.index_add_(
                0, persons.to(directions.device), functional.normalize(embeds, dim=1)
            )
        self.module.directions.copy_(functional.normalize(directions, dim=1))

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        """Equation 3, and the landmarks' distance in pixels."""
        pixels, landmarks = varied(pixels_of_bytes(batch["pixels"]), batch, randomness)
        embeds, found = self.module.network(pixels.contiguous(memory_format=torch.channels_last))
        persons = torch.searchsorted(self._characters.to(embeds.device), batch["character"])
        cosines = functional.normalize(embeds, dim=1) @ (
            functional.normalize(self.module.directions, dim=1).T
        )
        logits = with_margin(cosines, persons, self.options.margin) * self.options.scale
        told_apart = functional.cross_entropy(logits.float(), persons)
        error_px = (found - landmarks).norm(dim=2).mean() * pixels.shape[-1]
        right = (cosines.argmax(1) == persons).float().mean()
        return told_apart + self.options.landmark_weight * error_px, {
            "margin_loss": told_apart.detach(),
            "landmark_error_px": error_px.detach(),
            "right": right.detach(),
        }

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """Is the nearest other picture one of the same person? And how far off are landmarks?"""
        embeds, found = self.module.network(pixels_of_bytes(batch["pixels"]))
        embeds = functional.normalize(embeds, dim=1)
        similar = embeds @ embeds.T - 2 * torch.eye(len(embeds), device=embeds.device)
        same = batch["character"][similar.argmax(1)] == batch["character"]
        error = (found - batch["landmarks"]).norm(dim=2).mean() * batch["pixels"].shape[-1]
        return {"nearest_is_same": same.float().mean().item(), "landmark_error_px": error.item()}

    def export(self, path: Path) -> None:
        """Write the network, without the training persons' directions, in half precision."""
        save_small_network(self.module.network, path, "diorama-face-encoder")


def with_margin(
    cosines: Float[Tensor, "batch persons"], persons: Int[Tensor, " batch"], margin: int | float
) -> Float[Tensor, "batch persons"]:
    """cos(θ + m) for each picture's own person, cos θ for the others; falling in θ throughout."""
    own = cosines.gather(1, persons[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
    moved = torch.cos(torch.acos(own) + margin)
    # Beyond π - m the cosine would rise again.
    moved = torch.where(own > math.cos(math.pi - margin), moved, own - margin * math.sin(margin))
    return cosines.scatter(1, persons[:, None], moved)


def varied(
    pixels: Float[Tensor, "batch 3 h w"], batch: dict[str, Tensor], randomness: Randomness
) -> tuple[Float[Tensor, "batch 3 h w"], Float[Tensor, "batch 5 2"]]:
    """Mirrored, shifted, zoomed, softened and noisy pictures, for drawn ones differ so, too."""
    mirrored = randomness.uniform("mirror") < 0.5
    sign = torch.where(mirrored, -1.0, 1.0)
    zoom = 1 + MAX_ZOOM * (2 * randomness.uniform("zoom") - 1)
    shift = torch.stack([randomness.uniform("shift x"), randomness.uniform("shift y")], 1)
    shift = MAX_SHIFT * (2 * shift - 1)
    # Picture coordinates in [-1, 1]: what is seen at `to` stood at sign · to / zoom + shift.
    matrix = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = sign / zoom, 1 / zoom, shift
    grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
    pixels = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    points = (batch["landmarks"] * 2 - 1 - shift[:, None]) * zoom[:, None, None]
    points = torch.stack([points[..., 0] * sign[:, None], points[..., 1]], 2)
    points = torch.where(mirrored[:, None, None], points[:, MIRRORED], points)
    return as_if_decoded(pixels, randomness, 1.0), (points + 1) / 2
