"""What a request asks for, checked before it is taken, and what it is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mosaicjax.errors import InputError
from mosaicjax.generate import Sampling

MOST_LOGPROBS = 20
"""So many of the likeliest tokens can be told with their log-probabilities: OpenAI's limit."""

MOST_BIASES = 1_024
"""Tokens that a request may favour or forbid: more than OpenAI's 300."""


@dataclass(frozen=True)
class Wishes:
    """How a request's text is written: `sampling`, and what the Generator's does not have.

    `min_p` keeps tokens that are at least so likely, as a share of the likeliest one's. `repetition` divides
    the positive logits of tokens that the prompt or the text has by it, and multiplies the negative ones;
    `presence` is taken off the logits of tokens that the text has, and `frequency` for each time that it has
    them. `bias` is added to the logits of tokens by id. `logprobs` of the likeliest tokens are told with each
    token, by the model's own logits, before all of this; None tells none, 0 that of the token alone.
    `ends` are tokens that end the text beside the tokenizer's; `past_end` goes on behind all of them.

    Source: repetition: Keskar et al. 2019, arXiv 1909.05858, as Transformers has it; presence, frequency and
    bias: OpenAI's API reference; min-p: Nguyen et al. 2024, arXiv 2407.01082.
    """

    sampling: Sampling = Sampling()
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ends: tuple[int, ...] = ()
    past_end: bool = False

    @property
    def penalised(self) -> bool:
        """Whether a token's logits depend on those before it, or on a bias."""
        return bool(self.repetition != 1 or self.presence or self.frequency or self.bias)

    def check(self, vocabulary: int) -> None:
        """Refuse what means nothing.

        Raises:
            InputError: with the setting, expected and got.
        """
        self.sampling.check()
        if not 0 <= self.min_p <= 1:
            raise InputError("min_p", expected="0 to 1", got=self.min_p)
        if not 0 < self.repetition < math.inf:
            raise InputError("repetition_penalty", expected="above 0", got=self.repetition)
        for name, value in (("presence_penalty", self.presence), ("frequency_penalty", self.frequency)):
            if not -2 <= value <= 2:
                raise InputError(name, expected="-2 to 2", got=value)
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InputError("logprobs", expected=f"0 to {MOST_LOGPROBS}", got=self.logprobs)
        if len(self.bias) > MOST_BIASES:
            raise InputError("logit_bias", expected=f"at most {MOST_BIASES} tokens", got=len(self.bias))
        for token, value in self.bias.items():
            if not 0 <= token < vocabulary or not -100 <= value <= 100:
                raise InputError(
                    "logit_bias",
                    expected=f"-100 to 100 of tokens 0 to {vocabulary - 1}",
                    got=f"{value} of {token}",
                )


Finish = Literal["separator", "stop", "length", "cancelled", "broken"]


class Told(NamedTuple):
    """The log-probability of a token, and the likeliest tokens with theirs; ids."""

    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """News of a request: text that may be shown, the tokens drawn for it, and at the end why it ended."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    told: tuple[Told, ...] = ()
    finish: Finish | None = None


NOTHING = Piece()

Hear = Callable[[Piece], None]
