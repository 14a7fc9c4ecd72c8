"""Classifier-free guidance: its fixed points."""

import torch

from imprompt.diffusion.guidance import guide, guide_separately, rescale


def three() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 4, 8, 8, generator=generator).unbind(0)


def test_scale_one_is_the_conditional_and_zero_the_unconditional_prediction() -> None:
    unconditional, conditional, _ = three()
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional)
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)


def test_equal_separate_scales_are_joint_guidance() -> None:
    unconditional, image_only, conditional = three()
    separate = guide_separately(unconditional, image_only, conditional, 5.0, 5.0)
    torch.testing.assert_close(separate, guide(unconditional, conditional, 5.0))


def test_rescaling_fully_restores_the_spread() -> None:
    unconditional, conditional, _ = three()
    guided = guide(unconditional, conditional, 7.5)
    rescaled = rescale(guided, conditional, 1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
    assert torch.equal(rescale(guided, conditional, 0.0), guided)
