"""Which family reads a `config.json`, by its `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mosaicjax.errors import InputError
from mosaicjax.models import gpt2, gptj, llama, mistral, mixtral, mosaic_gpt, mpt, neox, qwen3
from mosaicjax.models.family import Family

FAMILIES: dict[str, type[Family]] = {
    "gpt2": gpt2.Config,
    "gpt_neox": neox.Config,
    "gptj": gptj.Config,
    "llama": llama.Config,
    "mistral": mistral.Config,
    "mixtral": mixtral.Config,
    "mosaic_gpt": mosaic_gpt.Config,
    "mpt": mpt.Config,
    "qwen3": qwen3.Config,
    "replit_lm": mosaic_gpt.Config,
}


def family_of(values: Mapping[str, Any], where: str = "config.json") -> type[Family]:
    """The family of a configuration.

    Raises:
        InputError: none is known by that name, or there is no name.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{where}: model_type is not known here",
            expected=", ".join(sorted(FAMILIES)),
            got=repr(name),
        )
    return FAMILIES[name]
