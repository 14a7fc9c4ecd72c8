"""Well-known ways to spread λ over a UNet's attention sites, by name.

Blocks of a UNet do different work: some carry the look of a picture, others its layout. Switching
the image prompt on in some of them only lets it give its style and not its content, or the reverse.

Source: InstantStyle (2404.02733), section 3.2, for Stable Diffusion XL; for Stable Diffusion 1.x the
split that ComfyUI's users know as "style transfer" and "composition"; the curves over depth have the
same names there. For the embedded base: measured, see docs/results.md.
"""

from collections.abc import Callable, Sequence

from imprompt.adapters.sites import Number, Site
from imprompt.core.errors import ImpromptError

# Parts of the UNet and their factor; what is not listed is 0. By width of the text states.
STYLE = {
    128: {"down_blocks": 0.2, "mid_block": 0.2, "up_blocks": 0.2, "up_blocks.2": 1.0},
    768: {
        "down_blocks.0": 1.0,
        "down_blocks.1": 1.0,
        "up_blocks.1.attentions.2": 1.0,
        "up_blocks.2": 1.0,
        "up_blocks.3": 1.0,
    },
    2048: {"up_blocks.0.attentions.1": 1.0},
}
COMPOSITION = {
    768: {"down_blocks.2.attentions.0": 0.25, "down_blocks.2.attentions.1": 1.0},
    2048: {"down_blocks.2.attentions.1": 1.0},
}
BLOCK_PRESETS = {
    "style": (STYLE,),
    "composition": (COMPOSITION,),
    "style and composition": (STYLE, COMPOSITION),
}

# Factor of a site from its depth in [0, 1): 0 is executed first.
CURVES: dict[str, Callable[[float], float]] = {
    "ease in": lambda depth: 0.05 + 0.95 * (1 - depth),
    "ease out": lambda depth: 0.05 + 0.95 * depth,
    "ease in-out": lambda depth: 0.05 + 0.95 * (1 - abs(2 * depth - 1)),
    "reverse in-out": lambda depth: 0.05 + 0.95 * abs(2 * depth - 1),
}

WEAK = 0.2
PART_FACTORS = {
    "weak input": {"down": WEAK},
    "weak middle": {"mid": WEAK},
    "weak output": {"up": WEAK},
    "strong middle": {"down": WEAK, "up": WEAK},
}

SITE_PRESETS = (*BLOCK_PRESETS, *CURVES, *PART_FACTORS)


def preset_scales(name: str, sites: Sequence[Site], scale: Number = 1.0) -> list[float]:
    """λ for each of the given cross-attention sites, in their order: a preset's factor times `scale`.

    The presets of style and composition are known for Stable Diffusion 1.x and XL, that of style for
    the embedded base, too; the others fit any UNet.

    Raises:
        ImpromptError: no such preset, or none for this UNet.
    """
    if name in BLOCK_PRESETS:
        factors = _block_factors(name, sites)
    elif name in CURVES:
        factors = [CURVES[name](depth) for depth in depths(sites)]
    elif name in PART_FACTORS:
        parts = PART_FACTORS[name]
        factors = [parts.get(site.name.split("_", 1)[0], 1.0) for site in sites]
    else:
        raise ImpromptError(
            f"There is no preset {name!r} of weights; choose one of: {', '.join(SITE_PRESETS)}."
        )
    return [float(scale) * factor for factor in factors]


def execution_order(sites: Sequence[Site]) -> list[int]:
    """Positions in `sites` (down, up, mid) in the order in which the UNet runs them."""
    parts = ("down_blocks", "mid_block", "up_blocks")
    return sorted(range(len(sites)), key=lambda i: parts.index(sites[i].name.split(".", 1)[0]))


def depths(sites: Sequence[Site]) -> list[float]:
    """How deep in the UNet each site stands, from 0 to less than 1: which transformer it is in, of all.

    Those of Stable Diffusion XL have up to ten sites each.
    """
    transformers = [site.name.partition(".transformer_blocks.")[0] for site in sites]
    in_order = list(dict.fromkeys(transformers[index] for index in execution_order(sites)))
    return [in_order.index(transformer) / len(in_order) for transformer in transformers]


def _block_factors(name: str, sites: Sequence[Site]) -> list[float]:
    width = sites[0].text_dim
    tables = [table.get(width) for table in BLOCK_PRESETS[name]]
    by_part: dict[str, float] = {}
    for table in tables:
        by_part |= table or {}
    factors = [
        max((f for part, f in by_part.items() if site.name.startswith(f"{part}.")), default=0.0)
        for site in sites
    ]
    if None in tables or not any(factors):
        raise ImpromptError(
            f"The preset {name!r} is known for Stable Diffusion 1.x and XL, not for a UNet with text "
            f"states of width {width}: give `scale` a mapping from parts of the UNet to numbers."
        )
    return factors
