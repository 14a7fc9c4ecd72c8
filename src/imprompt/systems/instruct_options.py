"""What is trained of Instruct, and how: the settings of `systems.instruct`."""

from __future__ import annotations

from dataclasses import dataclass

from imprompt.core.config import check_range, check_shares
from imprompt.core.errors import ImpromptError

DROPS = ("drop_image", "drop_text", "drop_instruction", "drop_text_and_instruction", "drop_all")
OF_THE_DENOISER = (
    *(name for name in DROPS if name != "drop_text"),
    *("snr_gamma", "lora_rank"),
    *("likeness", "resemblance", "perceptual", "hold"),
)
"""What stages that learn without the denoiser leave alone."""


@dataclass(frozen=True, kw_only=True)
class InstructOptions:
    """What is trained. The defaults are the paper's where it tells them."""

    num_tokens: int = 16
    """Tokens per image. This and the next two are of a new adapter: one in `start_from` has its own."""
    resampler_dim: int = 0
    """Inner width of the resampler, a multiple of 64; 0 takes the text's width."""
    depth: int = 4
    """Layers of the resampler."""
    positions: bool = False
    """Whether the resampler learns where in the picture each state of the image encoder stands. Not of the
    paper: CLIP ViT-H's states tell it, those of a small encoder may not."""
    instruction_embedding: str = "tokens"
    """`tokens` (a state for each token, as published) or `pooled` (one for the whole instruction)."""
    drop_image: float = 0.05
    """Share of samples that do not see the image."""
    drop_text: float = 0.05
    """Share of samples that see no text."""
    drop_instruction: float = 0.05
    """Share of samples that are not told what to take from the image."""
    drop_text_and_instruction: float = 0.05
    """Share of samples that see the image alone, where guidance by image, text and instruction apart begins."""
    drop_all: float = 0.05
    """Share of samples that see nothing, for classifier-free guidance."""
    snr_gamma: float = 0.0
    """γ of min-SNR weighting (2303.09556); 0 weighs all timesteps alike."""
    lora_rank: int = 0
    """Of low-rank additions at every attention layer, as face-id adapters have them. Not of the paper. 0 is
    none, or that of `start_from`."""
    likeness: float = 0.0
    """Weight of a loss in lessons of faces, beside the noise's: that the face encoder knows the person in what
    is predicted. Not of the paper, nor are the next five. Such data have the columns id_embeds, of what shall
    be drawn, and task_ids."""
    resemblance: float = 0.0
    """Weight of a loss in lessons of *everything*: that to the image encoder what is predicted looks as the
    condition image does. Such data have the column task_ids."""
    perceptual: float = 0.0
    """Weight of a loss in lessons of faces: that to the embedded world's face encoder what is predicted for the
    noisy target looks unlike the target (`systems.perceptual`). Such data have the column task_ids."""
    drawn_steps: int = 0
    """In how many steps a picture is drawn from noise for likeness and resemblance, each as far as one of them, guided as the
    base is, and for resemblance without text; what is predicted there is looked at. 0 looks at what is
    predicted for the noisy target."""
    hold: float = 0.0
    """Weight of a loss in lessons other than faces: that what is predicted moves away from what the adapter in
    `hold_to` predicts. Else they pay for the faces. Such data have the column task_ids."""
    hold_to: str = ""
    """The Instruct adapter that these are held to; empty is that in `start_from`."""
    start_from: str = ""
    """An Instruct adapter to go on from, or a Plus adapter to begin as; empty starts anew."""

    def __post_init__(self) -> None:
        check_shares(self, DROPS)
        check_range(self, ("num_tokens", "depth"), 1)
        check_range(self, ("resampler_dim", "snr_gamma", "lora_rank"), 0)
        check_range(self, ("likeness", "resemblance", "perceptual", "drawn_steps", "hold"), 0)
        if self.drawn_steps and not (self.likeness or self.resemblance):
            raise ImpromptError(
                "drawn_steps is about likeness and resemblance, and the weights of both are 0."
            )
