"""Text to the ids that a task is scored on: special tokens, what comes before a text, pairs and windows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError

CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside a tokenizer that may name the token that begins a text; the first that does is heeded."""

Pair = tuple[list[int], list[int]]
"""Ids of a context and of its continuation."""


class Codec:
    """A tokenizer as evaluation reads text with it.

    Other than in training, names of special tokens in a text are those tokens, as Transformers and so lm-eval
    have it. `prefix` is the id that stands for an empty context.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prefix = first_token(tokenizer)
        names = sorted(tokenizer.special, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None
        self._prefix_name = next(
            (name for name, token in tokenizer.special.items() if token == self.prefix), None
        )

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """The ids of one text; see `encode_all`."""
        return self.encode_all([text], begin=begin)[0]

    def encode_all(self, texts: Sequence[str], *, begin: bool = True) -> list[list[int]]:
        """The ids of texts.

        With `begin`, what the model expects before a text comes before it, unless the text begins with the
        name of the first token itself.
        """
        parts = [self._parts(text) for text in texts]
        plain = list(dict.fromkeys(part for split in parts for part in split if isinstance(part, str)))
        known = dict(zip(plain, self.tokenizer.encode_batch(plain), strict=True)) if plain else {}
        encoded = []
        for text, split in zip(texts, parts, strict=True):
            begun = self._prefix_name is not None and text.startswith(self._prefix_name)
            ids = list(self.tokenizer.before) if begin and not begun else []
            for part in split:
                ids += known[part] if isinstance(part, str) else [part]
            encoded.append(ids)
        return encoded

    def _parts(self, text: str) -> list[str | int]:
        """Plain texts, and ids of the special tokens between them."""
        if self._names is None or not self._names.search(text):
            return [text] if text else []
        parts: list[str | int] = []
        end = 0
        for found in self._names.finditer(text):
            parts += [text[end : found.start()], self.tokenizer.special[found.group()]]
            end = found.end()
        return [part for part in [*parts, text[end:]] if part != ""]

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[Pair]:
        """Ids of contexts and continuations, split where the context's own ids end.

        Blanks at the end of a context are read as the continuation's. An empty context is `prefix`; where the
        continuation begins with that id, this is its context.

        Raises:
            InputError: a continuation of no tokens.
        Source: lm-eval 0.4.13, `TemplateLM.loglikelihood` and `_encode_pair`.
        """
        moved = [_blanks_moved(*request) for request in requests]
        whole = self.encode_all([context + rest for context, rest in moved])
        contexts = self.encode_all([context for context, _ in moved])
        bare = self.encode_all([continuation for _, continuation in requests], begin=False)
        found = []
        for request, ids, before, alone in zip(requests, whole, contexts, bare, strict=True):
            if request[0]:
                pair = (before or [self.prefix], ids[len(before) :])
            elif alone and alone[0] == self.prefix:
                pair = (alone[:1], alone[1:])
            else:
                pair = ([self.prefix], alone)
            if not pair[1]:
                raise InputError(
                    "a request has nothing to score",
                    expected="a continuation of one token or more",
                    got=f"context {_shown(request[0])}, continuation {_shown(request[1])}",
                    fix="the task's doc_to_text, doc_to_target or target_delimiter",
                )
            found.append(pair)
        return found


def _blanks_moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"...{text[-57:]}")


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[Pair]:
    """A text's ids as contexts and continuations that together predict each id once.

    Each window is `length` inputs long, but for a shorter text; the last one reaches back into what was
    predicted before, so as to be as long.

    Source: lm-eval 0.4.13, `get_rolling_token_windows` and `make_disjoint_window`, with `context_len` 1.
    """
    inputs = [prefix, *ids]
    done = 0
    while done < len(ids):
        end = min(done + length, len(ids))
        begin = max(0, end - length)
        yield inputs[begin : done + 1], list(ids[done:end])
        done = end


def first_token(tokenizer: Tokenizer) -> int:
    """The id that stands for an empty context.

    It is what the model expects before a text, else the `bos_token` that the tokenizer's files name, else the
    separator.
    """
    if tokenizer.before:
        return tokenizer.before[0]
    for name in CONFIGS if tokenizer.files else ():
        path = Path(tokenizer.files[0]).with_name(name)
        named: Any = json.loads(path.read_text(encoding="utf-8")).get("bos_token") if path.exists() else None
        token = named.get("content") if isinstance(named, dict) else named
        if token is not None:
            if token not in tokenizer.special:
                raise InputError(
                    f"{path}: bos_token is no special token of the tokenizer",
                    expected=", ".join(sorted(tokenizer.special)),
                    got=token,
                )
            return tokenizer.special[token]
    return tokenizer.separator
