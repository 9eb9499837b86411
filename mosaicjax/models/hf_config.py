"""Reading another framework's `config.json`: what is read, what is refused, and what is left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mosaicjax.errors import InputError

IRRELEVANT = frozenset(
    """_name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
    gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder label2id model_type
    name output_attentions output_hidden_states pad_token_id problem_type return_dict sep_token_id
    task_specific_params tokenizer_class tokenizer_name torch_dtype transformers_version use_cache""".split()
)
"""Keys that every configuration may have and that say nothing of the network."""


class HfConfig:
    """A `config.json`, that remembers which of its keys a family has read."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = dict(values)
        self._read: set[str] = set()
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def get(self, key: str, default: Any) -> Any:
        """The key's value; the default where it is missing or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The key's value.

        Raises:
            InputError: it is missing.
        """
        value = self.get(key, None)
        if value is None:
            raise InputError(f"{self.where} lacks {key!r}", expected="a value", got="none")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse any value but these; the first is what a missing key means.

        Raises:
            InputError: naming the key.
        """
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise InputError(
                f"{self.where}: {key} is a knob that this family lacks",
                expected=" or ".join(map(repr, allowed)),
                got=repr(value),
            )

    def part(self, key: str) -> HfConfig:
        """A nested mapping; empty where it is missing."""
        return HfConfig(self.get(key, {}), f"{self.where}, {key}")

    def skip(self, *keys: str) -> None:
        """Count keys as read that change no logits: those of training, or of other kinds of model."""
        self._read.update(keys)

    def unread(self) -> list[str]:
        """Keys with a value that nobody has read and that may matter."""
        return sorted(
            key
            for key, value in self._values.items()
            if value is not None and key not in self._read and key not in IRRELEVANT
        )
