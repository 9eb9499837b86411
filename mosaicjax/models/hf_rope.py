"""Rotary positions in a Hugging Face `config.json`, as Transformers 5 spells them and as it did before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mosaicjax.errors import InputError
from mosaicjax.layers.position import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    Rotary,
)
from mosaicjax.models.hf_config import HfConfig

KNOWN = ("default", "linear", "dynamic", "llama3")
"""The kinds of scaling that can be expressed here."""

BESIDE = ("rope_theta", "partial_rotary_factor")
"""Keys beside `rope_parameters` that hold its values in older files; GPT-NeoX has others."""


def rotary_from_hf(
    config: HfConfig,
    head_dim: int,
    theta: float = 10_000.0,
    fraction: float = 1.0,
    length: int = 2_048,
    beside: tuple[str, str] = BESIDE,
) -> Rotary:
    """The rotary positions that a configuration describes.

    `theta`, `fraction` and `length` are what missing keys mean: Transformers' defaults for the architecture.
    Under dynamic scaling Transformers rotates all rows of a batch as the longest of them; here each row has
    the angles of its own length, as it would have there alone.

    Raises:
        InputError: a kind of scaling, or a key of it, that cannot be expressed here.
    """
    older = dict(zip(BESIDE, (config.get(beside[0], theta), config.get(beside[1], fraction)), strict=True))
    # Transformers prefers the older name where a file has both, and what stands in it to keys beside it.
    older_values, values = config.get("rope_scaling", {}), config.get("rope_parameters", {})
    name, values = ("rope_scaling", older_values) if older_values else ("rope_parameters", values)
    if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
        raise InputError(
            f"{config.where}: {name} differs from layer to layer",
            expected="one for all layers",
            got=repr(values),
        )
    rope = HfConfig({**older, **values}, f"{config.where}, {name}")
    rotary = Rotary(
        theta=float(rope.get("rope_theta", theta)),
        scaling=scaling_from_hf(rope, config.get("max_position_embeddings", length)),
        fraction=int(head_dim * rope.get("partial_rotary_factor", fraction)) / head_dim,
    )
    if rope.unread():
        raise InputError(
            f"{rope.where} has keys that its rope_type does not use",
            expected="none",
            got=", ".join(rope.unread()),
        )
    return rotary


def scaling_from_hf(rope: HfConfig, length: int) -> RopeScaling:
    """The kind of scaling that `rope_parameters` or `rope_scaling` names; `length` is the model's own.

    Raises:
        InputError: another kind, by name.
    """
    older = rope.get("type", "default")
    kind = rope.get("rope_type", older)
    match kind:
        case "default" | "no_scaling":
            rope.skip("factor")
            return RopeScaling()
        case "linear":
            return LinearScaling(float(rope.need("factor")))
        case "dynamic":
            # Transformers takes the length from max_position_embeddings, even where the other key stands.
            rope.only("original_max_position_embeddings", length)
            return DynamicScaling(float(rope.need("factor")), int(length))
        case "llama3":
            return Llama3Scaling(
                factor=float(rope.need("factor")),
                low=float(rope.need("low_freq_factor")),
                high=float(rope.need("high_freq_factor")),
                original=int(rope.get("original_max_position_embeddings", length)),
            )
    raise InputError(
        f"{rope.where}: rope_type is of a kind that is not known here",
        expected=", ".join(KNOWN),
        got=repr(kind),
    )


def rope_to_hf(
    rotary: Rotary, head_dim: int, length: int, beside: tuple[str, str] = BESIDE
) -> dict[str, Any]:
    """The keys that say `rotary`, in both spellings, and `max_position_embeddings`.

    Transformers reads from that key the length at which dynamic scaling sets in: there it is not `length`.
    Transformers before 5 reads theta and fraction beside, and would take its defaults for them in silence.

    Raises:
        InputError: pairs of neighbouring dims, or dims that are no fraction of the head.
    """
    if rotary.pairs != "halves":
        raise InputError("Rotary.pairs has no key in Transformers", expected="'halves'", got=rotary.pairs)
    kind: dict[str, Any]
    match rotary.scaling:
        case LinearScaling(factor):
            kind = {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor, original):
            kind, length = {"rope_type": "dynamic", "factor": factor}, original
        case Llama3Scaling(factor, low, high, original):
            kind = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case _ if type(rotary.scaling) is RopeScaling:
            kind = {"rope_type": "default"}
        case _:
            raise InputError("Rotary.scaling has no name in Transformers", got=type(rotary.scaling).__name__)
    parameters = {**kind, "rope_theta": rotary.theta}
    keys: dict[str, Any] = {"max_position_embeddings": length, beside[0]: rotary.theta}
    # GPT-NeoX has a default of its own that turns a part of the head.
    if rotary.turned(head_dim) != head_dim or beside != BESIDE:
        keys[beside[1]] = parameters["partial_rotary_factor"] = _factor(rotary, head_dim)
    keys["rope_parameters"] = parameters
    return keys if kind["rope_type"] == "default" else keys | {"rope_scaling": parameters}


def _factor(rotary: Rotary, head_dim: int) -> float:
    """A share of the head that is the turned dims when Transformers rounds it down."""
    turned = rotary.turned(head_dim)
    for factor in (rotary.fraction, turned / head_dim):
        if int(head_dim * factor) == turned:
            return factor
    return (turned + 0.5) / head_dim
