"""Reading another framework's `config.json`: what is read, what is refused, and what is left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mosaicjax.errors import InputError
from mosaicjax.layers.mlp import Activation

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
        self._parts: dict[str, HfConfig] = {}
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def get(self, key: str, default: Any) -> Any:
        """The key's value; the default where it is missing or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def null(self, key: str) -> bool:
        """Whether the key is there and null, which need not mean what its absence means."""
        self._read.add(key)
        return key in self._values and self._values[key] is None

    def need(self, key: str) -> Any:
        """The key's value, a size or another number above 0.

        Raises:
            InputError: it is missing, or something else.
        """
        value = self.get(key, None)
        if value is None:
            raise InputError(f"{self.where} lacks {key!r}", expected="a value", got="none")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InputError(f"{self.where}: {key}", expected="a number above 0", got=repr(value))
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
        """A nested mapping; empty where it is missing.

        Raises:
            InputError: something else stands there.
        """
        values = self.get(key, {})
        if not isinstance(values, Mapping):
            raise InputError(f"{self.where}: {key}", expected="a mapping", got=repr(values))
        return self._parts.setdefault(key, HfConfig(values, f"{self.where}, {key}"))

    def skip(self, *keys: str) -> None:
        """Count keys as read that change no logits: those of training, or of other kinds of model."""
        self._read.update(keys)

    def unread(self) -> list[str]:
        """Keys with a value that nobody has read and that may matter; those of parts after a dot."""
        mine = (
            key
            for key, value in self._values.items()
            if value is not None and key not in self._read and key not in IRRELEVANT
        )
        nested = (f"{name}.{key}" for name, part in self._parts.items() for key in part.unread())
        return sorted((*mine, *nested))


def refuse_others(model: str, knobs: Mapping[str, tuple[object, object]]) -> None:
    """Refuse knobs that `model` lacks; each comes with its value and the only one that can be said there.

    Raises:
        InputError: naming the first such knob.
    """
    for knob, (got, expected) in knobs.items():
        if got != expected:
            raise InputError(
                f"{knob} is a knob that Transformers' {model} lacks", expected=repr(expected), got=repr(got)
            )


_ACTIVATIONS = {
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_python_tanh": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_accurate": Activation.GELU_TANH,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "relu": Activation.RELU,
    "relu2": Activation.RELU_SQUARED,
    "sigmoid": Activation.SIGMOID,
}
"""Transformers' names, where several name one function: the first is its usual name."""


def activation_from_hf(config: HfConfig, key: str, default: str) -> Activation:
    """The activation that a key names; `default` is what a missing key means.

    Raises:
        InputError: one that is not known here.
    """
    name = config.get(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise InputError(
            f"{config.where}: {key} names an activation that is not known here",
            expected=", ".join(_ACTIVATIONS),
            got=repr(name),
        )
    return _ACTIVATIONS[name]


def activation_to_hf(activation: Activation) -> str:
    """Transformers' usual name of an activation."""
    return next(name for name, same in _ACTIVATIONS.items() if same is activation)
