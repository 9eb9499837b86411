"""Continuous batching: requests join and leave between steps, on pages that they share where they can.

The engine is driven from one thread, a `turn` at a time: parts of prompts are read, then every row that
writes gets a token. All programs have one shape each and are compiled by `warm_up`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.generate import TextStream
from mosaicjax.mesh import Layout
from mosaicjax.models import paged
from mosaicjax.models.decode import NOT_FINITE
from mosaicjax.models.decoder import Decoder
from mosaicjax.models.unrolled import loops_copy, unrolled, unrolled_weights
from mosaicjax.serve.pages import NoRoom, Pages
from mosaicjax.serve.request import NOTHING, Finish, Hear, Piece, Told, Wishes
from mosaicjax.serve.rows import Request, Sizes, Work, arrays, placed
from mosaicjax.serve.sampler import Drawn, Penalties, row_set
from mosaicjax.serve.step import stepped
from mosaicjax.spec import Dtypes

SIZES = Sizes()


@dataclass
class Counts:
    """What an engine has done since it began; `shared_tokens` are those that a row found read already."""

    requests: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    written_tokens: int = 0
    turns: int = 0
    put_back: int = 0


class Engine:
    """A model that serves many requests; see the module."""

    def __init__(
        self,
        decoder: Decoder,
        weights: Any,
        layout: Layout,
        dtypes: Dtypes,
        tokenizer: Tokenizer,
        sizes: Sizes = SIZES,
    ) -> None:
        """Nothing is compiled yet.

        Raises:
            InputError: sizes that mean nothing, more tokens than the model has positions, or a tokenizer
                with ids that the model lacks.
        """
        sizes.check()
        decoder.check(sizes.longest)
        if tokenizer.size > decoder.dims["vocab"]:
            raise InputError(
                "the tokenizer is larger than the model's vocabulary",
                expected=f"at most {decoder.dims['vocab']} ids",
                got=tokenizer.size,
                fix="the tokenizer that the model was trained with",
            )
        if loops_copy(layout):
            decoder, weights = unrolled(decoder), unrolled_weights(decoder, weights, layout)
        self.sizes, self.tokenizer, self.counts = sizes, tokenizer, Counts()
        self._weights, self._layout = weights, layout
        self._pages = Pages(sizes.pages, sizes.page)
        self._rows: list[Request | None] = [None] * sizes.rows
        self._waiting: deque[Request] = deque()
        self._numbers = itertools.count()
        # What a call gives goes into the next one: in the same places from the first call on, or the program
        # would be compiled twice.
        whole = layout.sharding()
        kept = layout.sharding(None, None, "kv_heads", None, None)
        empty = paged.empty_pages(decoder, sizes.pages, sizes.page, layout, dtypes)
        self._cache = jax.device_put(empty, kept)
        self._penalties = jax.device_put(Penalties.none(sizes.rows, decoder.dims["vocab"]), whole)
        self._bent: set[int] = set()
        step = partial(paged.paged_step, decoder, layout=layout, dtypes=dtypes)
        self._step: Any = jax.jit(
            partial(stepped, step, tokenizer.size),
            donate_argnames=("pages", "penalties"),
            out_shardings=(whole, kept, whole),
        )
        # As an object of its own: jax keeps the programs of one function together, whoever asked for them.
        self._set_row: Any = jax.jit(partial(row_set), donate_argnames="penalties", out_shardings=whole)

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(each is not None for each in self._rows)

    @property
    def pages(self) -> Pages:
        """The pages' bookkeeping; not to be changed."""
        return self._pages

    @property
    def idle(self) -> bool:
        """Whether a turn would do nothing."""
        return not self._waiting and not self.running

    @property
    def programs(self) -> int:
        """How many programs were compiled."""
        return int(self._step._cache_size() + self._set_row._cache_size())

    def warm_up(self) -> None:
        """Compile all programs: afterwards none is compiled."""
        for shape in self.sizes.shapes:
            self._call([], shape)
        self._set_penalties(0, (), Wishes(), ())

    def check(self, prompt: Sequence[int], wishes: Wishes) -> None:
        """Refuse what `submit` would; any thread may ask.

        Raises:
            InputError: wishes that mean nothing, no token, one that the model lacks, or too many.
        """
        wishes.check(self.tokenizer.size)
        most = self.sizes.longest - wishes.sampling.max_tokens
        if not 1 <= len(prompt) <= most:
            raise InputError(
                "a prompt's tokens",
                expected=f"1 to {most}, {self.sizes.longest} less max_tokens {wishes.sampling.max_tokens}",
                got=len(prompt),
            )
        if not all(0 <= token < self.tokenizer.size for token in prompt):
            raise InputError("a prompt's tokens", expected=f"ids below {self.tokenizer.size}")

    def submit(self, prompt: Sequence[int], wishes: Wishes, hear: Hear, choice: int = 0) -> Request:
        """Take a request of token ids; `hear` is called from `turn` with each piece of news.

        `choice` tells several completions of one prompt apart.

        Raises:
            InputError: as `check`.
        """
        self.check(prompt, wishes)
        stream = TextStream(wishes.sampling.stop)
        request = Request(next(self._numbers), tuple(prompt), wishes, hear, stream, choice)
        self.counts.requests += 1
        self.counts.prompt_tokens += len(prompt)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request at the next turn; its pages and row are free then."""
        request.cancelled = True

    def turn(self) -> None:
        """Read parts of prompts, and write one token of each row that has read its own."""
        self.counts.turns += 1
        self._drop_cancelled()
        self._admit()
        self._read_some()
        self._write()

    def _drop_cancelled(self) -> None:
        for request in [each for each in (*self._rows, *self._waiting) if each is not None]:
            if request.cancelled and request.finish is None:
                self._finish(request, "cancelled")

    def _admit(self) -> None:
        """Give rows and pages to those that have waited longest, in their order, as far as both go."""
        while self._waiting and None in self._rows:
            request = self._waiting[0]
            tokens = request.tokens
            # Those that write need a page more now and then: without any to spare they would be put back.
            if self.running and self._pages.needed(len(tokens)) + self.running > self._pages.free:
                return
            try:
                request.table = self._pages.begin(tokens)
            except NoRoom:
                return
            self._waiting.popleft()
            request.row = self._rows.index(None)
            self._rows[request.row] = request
            request.read = request.table.shared
            self.counts.shared_tokens += request.table.shared
            # A row keeps what the one before it wished for.
            if request.wishes.penalised or request.row in self._bent:
                self._bent.add(request.row)
                self._set_penalties(request.row, request.prompt, request.wishes, request.written)

    def _read_some(self) -> None:
        """The next chunk of the oldest prompt; of more where more requests wait for it than for a token.

        A chunk keeps those waiting that write, and all whose prompts stand behind. So long as there are fewer
        of the former than of the latter a chunk more is read; one long prompt alone is read a chunk a turn.
        """
        chunks = 0
        while reading := [each for each in self._rows if each is not None and each.pending is None]:
            writing = self.running - len(reading)
            if chunks * max(writing, 1) >= len(reading):
                return
            self._read(min(reading, key=lambda each: each.number))
            chunks += 1

    def _read(self, request: Request) -> None:
        """The next chunk of a prompt, up to a multiple of a chunk: cuts are always at the same places."""
        assert request.table is not None and request.row is not None
        tokens = request.table.tokens
        end = min((request.read // self.sizes.chunk + 1) * self.sizes.chunk, len(tokens))
        drawn, (place,) = self._run([(request, tokens[request.read : end])], (1, self.sizes.chunk))
        request.read = end
        self._pages.written(request.table, end)
        if end == len(tokens):
            self._take(request, drawn, place)

    def _write(self) -> None:
        """A token more of each row that has one pending, whose keys are not in the cache yet."""
        writing = [each for each in self._rows if each is not None and each.pending is not None]
        for request in sorted(writing, key=lambda each: each.number):
            if request.row is not None:
                self._make_slot(request)
        writing = [each for each in writing if each.row is not None and each.pending is not None]
        if not writing:
            return
        work = [(each, [each.pending]) for each in writing if each.pending is not None]
        drawn, places = self._run(work, (self.sizes.width(len(work)), 1))
        for request, place in zip(writing, places, strict=True):
            assert request.table is not None
            request.read += 1
            self._pages.written(request.table, request.read)
            self._take(request, drawn, place)

    def _make_slot(self, request: Request) -> None:
        """A slot for the pending token; the youngest requests wait again where no page is left."""
        assert request.table is not None and request.pending is not None
        while True:
            try:
                self._pages.add(request.table, request.pending)
                return
            except NoRoom:
                youngest = max(
                    (each for each in self._rows if each is not None), key=lambda each: each.number
                )
                self._put_back(youngest)
                if youngest is request:
                    return

    def _put_back(self, request: Request) -> None:
        """Take a request's pages and row: it waits again, as the first, and reads its own text again."""
        self._release(request)
        request.pending, request.read = None, 0
        self._waiting.appendleft(request)
        self.counts.put_back += 1

    def _release(self, request: Request) -> None:
        if request.table is not None:
            self._pages.end(request.table)
            request.table = None
        if request.row is not None:
            self._rows[request.row] = None
            request.row = None

    def _run(self, work: Work, shape: tuple[int, int]) -> tuple[Drawn, list[int]]:
        """One call; what was drawn, and each request's place in that."""
        return self._call(work, shape), placed(work, shape, self.sizes)

    def _call(self, work: Work, shape: tuple[int, int]) -> Drawn:
        drawn, self._cache, self._penalties = self._step(
            self._weights,
            pages=self._cache,
            penalties=self._penalties,
            **arrays(work, shape, self.sizes, self.tokenizer.size),
        )
        fetched: Any = jax.device_get(drawn)
        return Drawn(*fetched)

    def _take(self, request: Request, drawn: Drawn, i: int) -> None:
        """A drawn token becomes the request's; `i` is its place in the call."""
        token = int(drawn.tokens_B[i])
        if token == NOT_FINITE:
            self._finish(request, "broken")
            return
        request.written.append(token)
        self.counts.written_tokens += 1
        told = self._told(request, drawn, i)
        ends = (*self.tokenizer.ends, *request.wishes.ends)
        if token in ends and not request.wishes.past_end:
            self._finish(request, "separator", Piece("", (token,), told))
            return
        text = request.stream.push(self.tokenizer.pieces[token])
        piece = Piece(text, (token,), told)
        if request.stream.stopped:
            self._finish(request, "stop", piece)
        elif len(request.written) >= request.wishes.sampling.max_tokens:
            self._finish(request, "length", piece)
        else:
            request.pending = token
            request.hear(piece)

    def _told(self, request: Request, drawn: Drawn, i: int) -> tuple[Told, ...]:
        wanted = request.wishes.logprobs
        if wanted is None:
            return ()
        ids, values = drawn.likeliest_BN[i, :wanted], drawn.logprobs_BN[i, :wanted]
        likeliest = [(int(token), float(value)) for token, value in zip(ids, values, strict=True)]
        return (Told(float(drawn.logprob_B[i]), likeliest),)

    def _finish(self, request: Request, finish: Finish, last: Piece = NOTHING) -> None:
        request.finish, request.pending = finish, None
        self._release(request)
        if request in self._waiting:
            self._waiting.remove(request)
        self.counts.finished += 1
        rest = "" if finish == "stop" else request.stream.close()
        request.hear(Piece(last.text + rest, last.tokens, last.told, finish))

    def _set_penalties(self, row: int, prompt: Sequence[int], wishes: Wishes, written: Sequence[int]) -> None:
        vocabulary = self._penalties.bias_BV.shape[1]
        seen_V, written_V = (np.zeros(vocabulary, np.int32) for _ in range(2))
        np.add.at(seen_V, np.array([*prompt, *written], np.int64), 1)
        np.add.at(written_V, np.array(written, np.int64), 1)
        bias_V = np.zeros(vocabulary, np.float32)
        for token, value in wishes.bias.items():
            bias_V[token] = value
        numbers = np.array([wishes.repetition, wishes.presence, wishes.frequency], np.float32)
        self._penalties = self._set_row(
            self._penalties, np.int32(row), seen_V, written_V, bias_V, numbers, np.bool_(wishes.penalised)
        )
