"""What a server is asked: prompts of a file, or random ones of a seed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mosaicjax import storage
from mosaicjax.errors import InputError

Prompt = str | list[int] | list[dict[str, str]]
"""Text, token ids, or the messages of a conversation."""

WORDS = (
    "the a of and to in that it was for on with as his they at be this from have or by one had not but what"
    " all were when we there can an your which their said if do will each about how up out them then she many"
    " some so these would other into has more her two like him see time could no make than first been its who"
    " now people my made over did down only way find use may water long little very after words called just"
).split()
"""What prompts are made of; most are one token in most vocabularies."""


@dataclass(frozen=True)
class Ask:
    """A prompt, and how many tokens are wanted at most."""

    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True)
class Range:
    """A whole number from `least` to `most`, each as likely."""

    least: int
    most: int

    @classmethod
    def parse(cls, name: str, text: str) -> Range:
        """From `64` or `64:256`.

        Raises:
            InputError: it is neither; `name` is the option's.
        """
        first, colon, last = text.partition(":")
        last = last if colon else first
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise InputError(name, expected="a number from 1, or LEAST:MOST, as 64:256", got=text)
        return cls(int(first), int(last))

    def draw(self, rng: np.random.Generator) -> int:
        """One of them."""
        return int(rng.integers(self.least, self.most, endpoint=True))


@dataclass(frozen=True)
class Synthetic:
    """Random prompts of so many words, or with a `vocabulary` of exactly so many of its token ids.

    Two prompts begin alike by chance alone, so a server that shares beginnings gains nothing.
    """

    length: Range
    max_tokens: Range
    vocabulary: int = 0

    def draw(self, count: int, seed: int) -> list[Ask]:
        """So many asks."""
        rng = np.random.default_rng(seed)
        return [self._one(rng) for _ in range(count)]

    def _one(self, rng: np.random.Generator) -> Ask:
        length = self.length.draw(rng)
        prompt: Prompt
        if self.vocabulary:
            prompt = rng.integers(0, self.vocabulary, length).tolist()
        else:
            prompt = " ".join(WORDS[number] for number in rng.integers(0, len(WORDS), length))
        return Ask(prompt, self.max_tokens.draw(rng))


def read(path: str, count: int, max_tokens: Range, seed: int) -> list[Ask]:
    """So many asks of a file with a JSON object a line, from the beginning again where it has fewer.

    A line has `prompt`, text or token ids, or `messages`; where it has no `max_tokens` they are drawn.

    Raises:
        InputError: there is no such file, nothing in it, or a line that is none of these.
    """
    lines = [
        _line(text, f"{path}:{number}")
        for number, text in enumerate(storage.read_text(path).splitlines(), 1)
        if text.strip()
    ]
    if not lines:
        raise InputError(f"{path} holds no prompts", expected='lines as {"prompt": "Once upon a time"}')
    rng = np.random.default_rng(seed)
    return [
        Ask(prompt, own or max_tokens.draw(rng))
        for prompt, own in itertools.islice(itertools.cycle(lines), count)
    ]


def _line(text: str, place: str) -> tuple[Prompt, int]:
    """A line's prompt, and its `max_tokens` or 0."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is no JSON", got=error) from error
    if not isinstance(row, Mapping) or ("prompt" in row) == ("messages" in row):
        raise InputError(place, expected="an object with `prompt` or `messages`", got=text[:80])
    prompt = row.get("prompt", row.get("messages"))
    if not (_is_text(prompt) or _is_ids(prompt) if "prompt" in row else _is_messages(prompt)):
        raise InputError(place, expected="text, token ids, or messages of role and content", got=text[:80])
    own = row.get("max_tokens", 0)
    if not isinstance(own, int) or own < 0:
        raise InputError(f"{place}: max_tokens", expected="1 or more", got=own)
    return prompt, own


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and all(type(each) is int for each in prompt)


def _is_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and bool(prompt)
        and all(
            isinstance(each, Mapping) and all(isinstance(each.get(key), str) for key in ("role", "content"))
            for each in prompt
        )
    )
