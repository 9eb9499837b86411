"""Generation until a text: requests of all lengths, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.generate import CACHE_BUCKET, Finish, Generator, Sampling, Shape
from mosaicjax.harness.shapes import lengths_up_to, padded


class Until:
    """What is written behind one prompt, until one of some strings stands in it.

    The string and all behind it is left out of `text`. Special tokens stand for no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.finish: Finish | None = None
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._stop = [term for term in stop if term]
        self._data, self._at_start = b"", True
        self._longest = max((len(term.encode()) for term in self._stop), default=0)

    def add(self, token: int) -> None:
        """See `Taker.add`."""
        self.tokens.append(token)
        if token in self._tokenizer.ends:
            self.finish = "separator"
            return
        piece = self._tokenizer.pieces[token]
        if self._at_start and piece:
            piece, self._at_start = self._tokenizer.decode_bytes([token]), False
        self._data += piece
        new = self._data[-(len(piece) + self._longest) :]
        if any(term.encode() in new for term in self._stop):
            self.finish = "stop"

    @property
    def text(self) -> str:
        """The text before the first of the strings.

        Source: lm-eval 0.4.13, `postprocess_generated_text`: each string in turn cuts what the ones before
        it have left.
        """
        text = self._tokenizer.decode(self.tokens)
        for term in self._stop:
            text = text.split(term)[0]
        return text


def write_until(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str],
    sampling: Sampling,
    *,
    length: int,
    rows: int,
    done: Callable[[int], None] | None = None,
) -> list[Until]:
    """What the model writes behind each prompt of ids, in their order, `sampling.max_tokens` at most.

    Prompt and completion are together at most `length` tokens: a longer prompt loses tokens at its left.
    `rows` are written side by side; `done(number)` hears how many were written with each batch.

    Raises:
        InputError: no room is left for a prompt, or settings that mean nothing.
    """
    sampling.check()
    room = length - sampling.max_tokens
    if room < 1:
        raise InputError(
            "max_gen_toks leaves no room for a prompt",
            expected=f"fewer than the {length} tokens that the model has positions for",
            got=sampling.max_tokens,
        )
    if rows < 1 or rows % generator.layout.batch_shards:
        raise InputError("--batch", expected=f"a multiple of {generator.layout.batch_shards}", got=rows)
    generator.decoder.check(length)
    sizes = lengths_up_to(room)
    takers = [Until(generator.tokenizer, stop) for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
    for first in range(0, len(order), rows):
        some = order[first : first + rows]
        kept = [list(prompts[i])[-room:] for i in some]
        longest = padded(max(map(len, kept)), sizes)
        slots = -(-(longest + sampling.max_tokens) // CACHE_BUCKET) * CACHE_BUCKET
        generator.write(kept, sampling, [takers[i] for i in some], Shape(rows, longest, slots), some)
        if done is not None:
            done(len(some))
    for taker in takers:
        taker.finish = taker.finish or "length"
    return takers
