"""Text from a model: prompts in, completions out, streamed as they are written."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mosaicjax import storage
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.hub import start
from mosaicjax.mesh import BATCH, REST, Layout, Mesh, shardings
from mosaicjax.models.decode import NOT_FINITE, Caches, Choice, choose, decode_step, prefill, sequence_keys
from mosaicjax.models.decoder import Decoder
from mosaicjax.spec import Dtypes

PROMPT_BUCKET = 64
"""Prompts are padded to a multiple of so many tokens: each length that results is compiled once."""

CACHE_BUCKET = 256
"""Caches have a multiple of so many slots."""

LEAST_TEMPERATURE = 1e-6
"""Below it a division by the temperature leaves float32."""

LATEST = start.NEWEST
"""A run's newest checkpoint."""

Finish = Literal["separator", "stop", "length"]
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Sampling:
    """How completions are written.

    `temperature` 0 always takes the likeliest token. `top_k` (0: all) keeps so many of the likeliest tokens,
    `top_p` then the fewest that together have that share. Text ends before the first of the strings `stop`,
    after `max_tokens`, or where the model ends the document. A prompt's randomness depends on `seed`, its
    number in the list, and the position alone.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: with the setting, expected and got.
        """
        if self.max_tokens < 1:
            raise InputError("max_tokens", expected="1 or more", got=self.max_tokens)
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            least = f"0 (the likeliest token) or {LEAST_TEMPERATURE} up"
            raise InputError("temperature", expected=least, got=self.temperature)
        if self.top_k < 0:
            raise InputError("top_k", expected="0 (all) or more", got=self.top_k)
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", expected="above 0, at most 1 (all)", got=self.top_p)
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", expected="0 to 2**32 - 1", got=self.seed)
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise InputError("stop", expected="a tuple of strings, none of them empty", got=repr(self.stop))


@dataclass(frozen=True)
class Completion:
    """What was written behind one prompt.

    `tokens` are all that were drawn, the separator or those of a stop string at the end too. `finish` says
    what ended the text: the model (`separator`), a `stop` string, or max_tokens (`length`). Bytes at the end
    that are no whole character are left out of the text; others that are no UTF-8 are U+FFFD.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: Finish


class TextStream:
    """Bytes to text that may be shown at once: whole characters, and nothing that could begin a stop string.

    Of several stop strings the one that is complete first ends the text, however the bytes were cut.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stopped = False
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """The text that these bytes bring to light; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data)
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        begun = (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size]))
        shown = len(text) - max(begun, default=0)
        self._held = text[shown:]
        return text[:shown]

    def close(self) -> str:
        """The text that was held back, once no more bytes come."""
        rest, self._held = self._held, ""
        return rest


class Taker(Protocol):
    """What takes the tokens that are written behind one prompt; `finish` is None as long as it wants more."""

    finish: Finish | None
    tokens: list[int]

    def add(self, token: int) -> None:
        """Take the next one."""
        ...


@dataclass(frozen=True)
class Shape:
    """What a call is compiled for: rows, prompts padded to `length` tokens, caches of so many slots."""

    rows: int
    length: int
    slots: int


class _Writer:
    """One completion on its way."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: tuple[str, ...], emit: Callable[[str], None]):
        self.finish: Finish | None = None
        self.tokens: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._stream = TextStream(stop)
        self._emit = emit
        # Some tokenizers put a space before a text, which is none of the text's.
        self._at_start = not prompt

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._tokenizer.ends:
            self.end("separator")
            return
        data = self._tokenizer.pieces[token]
        if self._at_start and data:
            data, self._at_start = self._tokenizer.decode_bytes([token]), False
        self._show(self._stream.push(data))
        if self._stream.stopped:
            self.finish = "stop"

    def end(self, finish: Finish) -> None:
        self.finish = finish
        self._show(self._stream.close())

    def _show(self, text: str) -> None:
        if text:
            self.text += text
            self._emit(text)


class Generator:
    """A model ready to write; what it compiles for one call serves the next ones of the same shapes."""

    def __init__(
        self, decoder: Decoder, weights: Any, layout: Layout, dtypes: Dtypes, tokenizer: Tokenizer
    ) -> None:
        """Nothing is compiled yet.

        Raises:
            InputError: the tokenizer has ids that the model lacks.
        """
        if tokenizer.size > decoder.dims["vocab"]:
            raise InputError(
                "the tokenizer is larger than the model's vocabulary",
                expected=f"at most {decoder.dims['vocab']} ids",
                got=tokenizer.size,
                fix="the tokenizer that the model was trained with",
            )
        self.decoder, self.weights, self.tokenizer = decoder, weights, tokenizer
        self.layout, self.dtypes = layout, dtypes
        self._first = jax.jit(self._prefill, static_argnames="slots")
        self._next = jax.jit(self._step, donate_argnames="caches")

    def generate(self, prompts: Sequence[str], settings: Sampling, on_text: OnText) -> list[Completion]:
        """One completion a prompt, all written side by side; see `generate`."""
        settings.check()
        if not prompts:
            return []
        separator = self.tokenizer.separator
        encoded = self.tokenizer.encode_batch(prompts)
        ids = [[*self.tokenizer.before, *prompt] or [separator] for prompt in encoded]
        self._check_lengths(ids, settings.max_tokens)
        writers = [
            _Writer(self.tokenizer, prompt, settings.stop, partial(on_text, i))
            for i, prompt in enumerate(prompts)
        ]
        longest = max(map(len, ids))
        shape = Shape(
            rows=_up_to(len(ids), self.layout.batch_shards),
            length=_up_to(longest, PROMPT_BUCKET),
            slots=_up_to(longest + settings.max_tokens, CACHE_BUCKET),
        )
        self.write(ids, settings, writers, shape, range(len(ids)))
        for writer in writers:
            if writer.finish is None:
                writer.end("length")
        return [
            Completion(writer.text, tuple(writer.tokens), len(row), writer.finish or "length")
            for writer, row in zip(writers, ids, strict=True)
        ]

    def write(
        self,
        ids: Sequence[Sequence[int]],
        settings: Sampling,
        takers: Sequence[Taker],
        shape: Shape,
        numbers: Sequence[int],
    ) -> None:
        """Draw tokens behind prompts of ids until each taker has finished, `max_tokens` at most.

        The prompts' `numbers` are what their randomness depends on, beside the seed and the position. A lone
        separator, whose tokens nobody takes, fills each row left over.

        Raises:
            InputError: logits that are not finite.
        """
        assert 0 < len(ids) <= shape.rows and max(map(len, ids)) <= shape.length, shape
        rows = [*ids, *[[self.tokenizer.separator]] * (shape.rows - len(ids))]
        tokens_BL, lengths_B = self._padded(rows, shape.length)
        choice = self._choice(settings, [*numbers, *[0] * (shape.rows - len(ids))])
        tokens_B, caches = self._first(self.weights, tokens_BL, lengths_B, choice, slots=shape.slots)
        for left in reversed(range(settings.max_tokens)):
            drawn_B = tokens_B
            if left:
                # Under way before this step's tokens are read, so that the device does not wait for the host.
                tokens_B, caches = self._next(self.weights, tokens_B, caches, choice)
            self._take(np.asarray(drawn_B), takers)
            if all(taker.finish for taker in takers):
                break

    def _take(self, tokens_B: np.ndarray, writers: Sequence[Taker]) -> None:
        for i, (writer, token) in enumerate(zip(writers, tokens_B.tolist(), strict=False)):
            if writer.finish is None:
                if token == NOT_FINITE:
                    raise InputError(
                        f"the model's logits are not finite (prompt {i}, token {len(writer.tokens)})",
                        fix="other weights: these are broken, or overflow in the compute dtype",
                    )
                writer.add(token)

    def _check_lengths(self, ids: Sequence[Sequence[int]], max_tokens: int) -> None:
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        # The last token drawn is not read again, so it needs no position.
        needed = len(ids[longest]) + max_tokens - 1
        try:
            self.decoder.check(needed)
        except InputError as error:
            raise InputError(
                f"prompt {longest} of {len(ids[longest])} tokens with max_tokens {max_tokens}: {error}"
            ) from error

    def _padded(self, rows: Sequence[Sequence[int]], length: int) -> tuple[Array, Array]:
        tokens_BL = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            tokens_BL[i, : len(row)] = row
        lengths_B = np.array([len(row) for row in rows], np.int32)
        place = self.layout.sharding
        return jax.device_put(tokens_BL, place(BATCH, None)), jax.device_put(lengths_B, place(BATCH))

    def _choice(self, settings: Sampling, numbers: Sequence[int]) -> Choice:
        rows = len(numbers)
        choice = Choice(
            sequence_keys(settings.seed, numbers),
            jnp.full(rows, settings.temperature, jnp.float32),
            jnp.full(rows, min(settings.top_k, self.tokenizer.size), jnp.int32),
            jnp.full(rows, settings.top_p, jnp.float32),
        )
        placed: Choice = jax.device_put(choice, self.layout.sharding(BATCH))
        return placed

    def _prefill(
        self, weights: Any, tokens_BL: Array, lengths_B: Array, choice: Choice, slots: int
    ) -> tuple[Array, Caches]:
        logits_BV, caches = prefill(
            self.decoder, weights, tokens_BL, lengths_B, slots, self.layout, self.dtypes
        )
        return self._chosen(logits_BV, caches, choice)

    def _step(self, weights: Any, tokens_B: Array, caches: Caches, choice: Choice) -> tuple[Array, Caches]:
        logits_BV, caches = decode_step(self.decoder, weights, tokens_B, caches, self.layout, self.dtypes)
        return self._chosen(logits_BV, caches, choice)

    def _chosen(self, logits_BV: Array, caches: Caches, choice: Choice) -> tuple[Array, Caches]:
        tokens_B = choose(logits_BV, caches[0].lengths_B, choice, self.tokenizer.size)
        return self.layout.constrain(tokens_B, BATCH), caches


def generate(
    decoder: Decoder,
    weights: Any,
    layout: Layout,
    dtypes: Dtypes,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: Sampling,
    on_text: OnText,
) -> list[Completion]:
    """One completion a prompt, in their order; `on_text(i, text)` gets prompt i's text as it is written.

    A prompt is read as the beginning of a document: what the tokenizer says comes before it, which is the
    separator for models trained here. An empty one is that alone. The texts given to `on_text` make up the
    completion's text. To write several times with one model, keep a `Generator`: this compiles anew.

    Raises:
        InputError: settings that mean nothing, prompts with `max_tokens` longer than the model's positions,
            a tokenizer of another model, or weights that give no finite logits.
    """
    return Generator(decoder, weights, layout, dtypes, tokenizer).generate(prompts, settings, on_text)


ONE_DEVICE = Mesh(fsdp=(1,))

Run = tuple[Decoder, Any, Layout, Dtypes, Tokenizer]
"""What `load_run` finds: the first arguments of `generate`."""


def load_run(run_dir: storage.PathLike, mesh: Mesh = ONE_DEVICE, step: int = LATEST) -> Run:
    """The model and tokenizer of a run, an imported model or a Hugging Face directory, ready to generate.

    Weights come from the checkpoint of `step` (a Hugging Face directory has none) and are cast to the compute
    dtype, as every layer would cast them; for models not trained here that is the dtype that they rest in.
    They are placed on `mesh`, whatever mesh they had: on as many of this process's devices as its sizes
    multiply to, on all of them with `REST`.

    Raises:
        InputError: no model, no checkpoint, or no tokenizer there, or they do not fit each other.
    """
    model, dtypes = start.described(run_dir)
    layout = mesh.build(_devices(mesh))
    decoder = model.decoder()
    spec = decoder.spec()
    layout.check(spec)
    tokenizer = load_run_tokenizer(run_dir)
    abstract = spec.abstract(dtypes.compute, shardings(spec, layout))
    return decoder, start.weights(run_dir, step, abstract), layout, dtypes, tokenizer


def load_run_tokenizer(run_dir: storage.PathLike) -> Tokenizer:
    """The tokenizer whose files a model's directory keeps.

    From a remote store they are copied to a temporary folder, that lives as long as the tokenizer.

    Raises:
        InputError: there is none.
    """
    return start.tokenizer(run_dir)


def _devices(mesh: Mesh) -> list[jax.Device]:
    sizes = (mesh.data, *mesh.fsdp, mesh.tensor)
    devices: list[jax.Device] = jax.local_devices()
    return devices if REST in sizes else devices[: math.prod(sizes)]


def _up_to(number: int, multiple: int) -> int:
    """The next multiple that is no smaller."""
    return -(-number // multiple) * multiple
