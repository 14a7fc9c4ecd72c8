"""Conditions in the UNet's precision: cast once, and not anew at every site and step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from imprompt.adapters.attention import CONDITION_KEY, KeyValue, LowRank, SiteCondition, SiteLora


def cast_conditions(conditions: Sequence[Mapping[str, Any]], like: Tensor) -> list[dict[str, Any]]:
    """The same conditions with all keys, values, masks and LoRA where and as `like` is.

    For what `Handle.condition` or `combine` returned, before `Handle.prepare`. Each tensor is cast
    once, so what sites and conditions share stays shared; one that is as `like` already is kept.
    """
    known: dict[int, Tensor] = {}  # by identity: a mask stands at every site, LoRA at every step

    def cast(x: Tensor) -> Tensor:
        if id(x) not in known:
            known[id(x)] = x.to(like)
        return known[id(x)]

    def of_prompt(prompt: KeyValue) -> KeyValue:
        mask = None if prompt.mask is None else cast(prompt.mask)
        return prompt._replace(key=cast(prompt.key), value=cast(prompt.value), mask=mask)

    def of_site(site: SiteCondition) -> SiteCondition:
        return site._replace(
            prompts=tuple(of_prompt(prompt) for prompt in site.prompts),
            loras=tuple(cast_lora(lora, cast) for lora in site.loras),
        )

    done: list[dict[str, Any]] = []
    for condition in conditions:
        sites: Mapping[int, SiteCondition] = condition[CONDITION_KEY]
        done.append(
            {**condition, CONDITION_KEY: {index: of_site(site) for index, site in sites.items()}}
        )
    return done


def cast_lora(lora: SiteLora, cast: Callable[[Tensor], Tensor]) -> SiteLora:
    """All of a site's LoRA cast; its `source` still tells whose it is."""

    def of_layer(layer: LowRank) -> LowRank:
        return LowRank(cast(layer.down), cast(layer.up))

    return lora._replace(
        query=of_layer(lora.query),
        key=of_layer(lora.key),
        value=of_layer(lora.value),
        out=of_layer(lora.out),
    )
