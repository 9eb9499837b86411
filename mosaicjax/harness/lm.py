"""A model as lm-eval asks for one: log-likelihoods, rolling log-likelihoods, and generation until a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mosaicjax.data.chat import Chat
from mosaicjax.data.conversations import Message
from mosaicjax.errors import InputError
from mosaicjax.generate import Sampling
from mosaicjax.harness.subject import Subject
from mosaicjax.harness.text import Codec, windows
from mosaicjax.harness.until import write_until

MAX_TOKENS = 256
"""Tokens written for a request that does not say how many; lm-eval's own number."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the number of tokens to write; the first that is given counts."""

NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "use_cache": True}
"""Settings of generation that are accepted with these values alone: they change nothing."""

Progress = Callable[[str, int, int], None]
"""Hears the kind of request, how many were answered by now, and how many there are."""


def silent(kind: str, done: int, total: int) -> None:
    """No progress."""


class HarnessModel:
    """`lm_eval.api.model.LM` for a subject; `language_model` makes one that lm-eval takes for its own.

    Contexts, continuations and prompts become ids by the rules of lm-eval's `hf` model, so that both give
    the same scores. With `chat`, lm-eval may have prompts written as conversations, and what ends a turn of
    that template ends what is written.
    """

    rank = 0
    world_size = 1
    device = None

    def __init__(
        self, subject: Subject, seed: int, progress: Progress = silent, chat: Chat | None = None
    ) -> None:
        self.subject, self.seed, self._progress, self._chat = subject, seed, progress, chat
        self.codec = Codec(subject.tokenizer)
        self._ends = [subject.tokenizer.separator_token, *filter(None, chat.turn_end() if chat else ())]
        self.cache_hook: Any = None

    @property
    def max_length(self) -> int:
        """How many tokens are read at once."""
        return self.subject.length

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.subject.tokenizer.separator

    @property
    def prefix_token_id(self) -> int:
        """The id that stands for an empty context."""
        return self.codec.prefix

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer from others."""
        return self.subject.tokenizer.hash

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's cache, which hears each answer."""
        self.cache_hook = cache_hook

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt; without `add_generation_prompt` its last turn is gone on with.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        if self._chat is None:
            raise InputError(
                "no chat template was named", fix="--template tokenizer, or another's name or file"
            )
        return self._chat.text(chat_history, "a task's prompt", prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, which lm-eval records."""
        return self._chat.template if self._chat and chat_template else ""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Nats of each continuation behind its context, and whether it is what greedy decoding writes."""
        asked = [request.args[:2] for request in requests]
        hear = self._heard("loglikelihood", len(asked))
        scores = self.subject.scorer.score(self.codec.pairs(asked), hear)
        answers = [(score.total, score.greedy) for score in scores]
        self._remember("loglikelihood", asked, answers)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, with as much context as the model reads."""
        asked = [request.args[:1] for request in requests]
        texts = self.codec.encode_all([text for (text,) in asked])
        cut = [list(windows(ids, self.codec.prefix, self.max_length)) for ids in texts]
        flat = [pair for pairs in cut for pair in pairs]
        scores = iter(self.subject.scorer.score(flat, self._heard("loglikelihood_rolling", len(flat))))
        answers = [sum((next(scores).total for _ in pairs), 0.0) for pairs in cut]
        self._remember("loglikelihood_rolling", asked, answers)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, before the first of its stop strings.

        Raises:
            InputError: settings of generation that are not known here.
        """
        asked = [request.args[:2] for request in requests]
        prompts = [ids or [self.codec.prefix] for ids in self.codec.encode_all([each[0] for each in asked])]
        alike: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            alike.setdefault(json.dumps(settings, sort_keys=True), []).append(number)
        ways = {key: generation(asked[numbers[0]][1], self.seed) for key, numbers in alike.items()}
        hear = self._heard("generate_until", len(asked))
        answers = [""] * len(asked)
        for key, numbers in alike.items():
            sampling, stop = ways[key]
            stop = [*stop, *self._ends]
            written = write_until(
                self.subject.generator,
                [prompts[number] for number in numbers],
                stop,
                sampling,
                length=self.max_length,
                rows=self.subject.settings.batch,
                done=hear,
            )
            for number, until in zip(numbers, written, strict=True):
                answers[number] = until.text
        self._remember("generate_until", asked, answers)
        return answers

    def _heard(self, kind: str, total: int) -> Callable[[int], None]:
        done = 0

        def hear(count: int) -> None:
            nonlocal done
            done += count
            self._progress(kind, done, total)

        return hear

    def _remember(self, kind: str, asked: Sequence[Any], answers: Sequence[Any]) -> None:
        if self.cache_hook is not None:
            for arguments, answer in zip(asked, answers, strict=True):
                self.cache_hook.add_partial(kind, arguments, answer)


def language_model(
    subject: Subject, seed: int = 0, progress: Progress = silent, chat: Chat | None = None
) -> HarnessModel:
    """A model for `lm_eval.simple_evaluate` and `lm_eval.evaluate`.

    Raises:
        InputError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise InputError(f"evaluation needs lm-eval: {error}", fix="pip install 'mosaicjax[eval]'") from error
    LM.register(HarnessModel)
    return HarnessModel(subject, seed, progress, chat)


def generation(settings: Mapping[str, Any], seed: int) -> tuple[Sampling, list[str]]:
    """How to draw tokens, and which strings end the text, from a task's `generation_kwargs`.

    Tokens are the likeliest ones, unless the task says `do_sample` or gives a temperature above 0.

    Raises:
        InputError: a setting that is not known here, or one that means nothing.
    Source: lm-eval 0.4.13, `normalize_gen_kwargs`.
    """
    left = dict(settings)
    stop = left.pop("until", None) or []
    stop = [stop] if isinstance(stop, str) else list(stop)
    given = [value for value in (left.pop(name, None) for name in LIMITS) if value is not None]
    sample, temperature = left.pop("do_sample", None), float(left.pop("temperature", 0.0) or 0.0)
    if sample and not temperature:
        raise InputError(
            "generation_kwargs: do_sample without a temperature",
            expected="a temperature above 0",
            fix="do_sample: false for the likeliest tokens",
        )
    top_k, top_p = int(left.pop("top_k", 0) or 0), float(left.pop("top_p", 1.0) or 1.0)
    for name, value in left.items():
        if name not in NEUTRAL or value != NEUTRAL[name]:
            known = ["until", LIMITS[0], "do_sample", "temperature", "top_k", "top_p"]
            raise InputError(f"generation_kwargs: {name}", expected=f"one of {', '.join(known)}", got=value)
    sampling = Sampling(
        max_tokens=int(given[0]) if given else MAX_TOKENS,
        temperature=0.0 if sample is False else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    sampling.check()
    return sampling, stop
