"""What a family's file offers: a configuration that builds a decoder, and its place among foreign models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from mosaicjax.errors import InputError
from mosaicjax.models.decoder import Decoder
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.models.model import Model
from mosaicjax.models.names import Names


@dataclass(frozen=True)
class Family:
    """A family's sizes and choices, as a recipe gives them; each family file subclasses it."""

    def build(self) -> Model:
        """The model that they describe."""
        raise TypeError(f"{type(self).__name__} does not say how to build its model")

    def decoder(self) -> Decoder:
        """The model where its layers are needed, as for generation and foreign checkpoints.

        Raises:
            InputError: it is a module of one's own.
        """
        model = self.build()
        if not isinstance(model, Decoder):
            raise InputError(
                f"{type(self).__name__} is a module of one's own, which has no cache of keys and values",
                expected="a model of layers that mosaicjax knows",
                fix="generate with the module itself, from the weights in the run's checkpoint",
            )
        return model

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """The same choices out of a Hugging Face `config.json`.

        Raises:
            InputError: a value that this family cannot express, with its key.
        """
        raise InputError(f"{cls.__module__} has no Hugging Face form")

    def to_hf(self, length: int) -> dict[str, Any]:
        """These choices as a `config.json` that Transformers knows, `architectures` and `model_type` in it.

        `length` is how many positions the model was trained for.

        Raises:
            InputError: a knob that Transformers' architecture lacks, by name.
        """
        raise InputError(f"{type(self).__module__} has no Hugging Face form")

    def names(self) -> Names:
        """Where the weights lie in a Hugging Face checkpoint.

        Raises:
            InputError: the family has no such form.
        """
        raise InputError(f"{type(self).__module__} has no Hugging Face form")
