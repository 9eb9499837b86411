"""What a server knows: its model, and how requests become completions of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mosaicjax.errors import InputError
from mosaicjax.serve.answers import ChatAnswer, Shape, TextAnswer, Vocabulary
from mosaicjax.serve.bodies import (
    COMPLETION_TOKENS,
    PREDICT_TOKENS,
    ChatBody,
    CompletionBody,
    Parameters,
    PredictBody,
)
from mosaicjax.serve.chatting import Chatter, lacking
from mosaicjax.serve.driver import Driver
from mosaicjax.serve.engine import Engine
from mosaicjax.serve.limits import DEFAULTS, NO_KEYS, InFlight, Keys, Limits
from mosaicjax.serve.metrics import Metrics
from mosaicjax.serve.problems import Problem, refused
from mosaicjax.serve.request import Wishes

OVER = "context_length_exceeded"


@dataclass(frozen=True)
class Plan:
    """What a request comes to: a prompt and wishes for each completion, and the shape of the answer.

    `prompt_tokens` counts each prompt once; `text` is what may be logged of it.
    """

    asked: Sequence[tuple[Sequence[int], Wishes]]
    prompt_tokens: int
    text: object
    shape: Shape | None
    stream: bool = False
    with_usage: bool = False


class Service:
    """An engine with all that is asked of it by clients; see the functions.

    `name` is what the model is called, `log_prompts` whether prompts may be written to the log, `open_host`
    whether requests may name any host.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        chatter: Chatter | None = None,
        limits: Limits = DEFAULTS,
        keys: Keys = NO_KEYS,
        usd_per_hour: float | None = None,
        log_prompts: bool = False,
    ) -> None:
        self.engine, self.name, self.chatter = engine, name, chatter
        self.limits, self.keys, self.log_prompts = limits, keys, log_prompts
        self.driver = Driver(engine)
        self.in_flight = InFlight(limits)
        self.metrics = Metrics(self.driver, self.in_flight, usd_per_hour)
        self.created = int(time.time())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Tokens as clients see them."""
        return Vocabulary(self.engine.tokenizer)

    def model(self) -> dict[str, object]:
        """The model, as `/v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mosaicjax",
            "max_model_len": self.engine.sizes.longest,
        }

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here.

        Raises:
            Problem: 404.
        """
        if name is not None and name != self.name:
            raise Problem(
                404, f"no such model here; there is {self.name}", param="model", code="model_not_found"
            )

    def completion(self, body: CompletionBody) -> Plan:
        """What `/v1/completions` comes to.

        Raises:
            Problem: 400 or 404.
        """
        self.check_model(body.model)
        body.check()
        self._check_stops(body.stops)
        choices = body.n or 1
        given, texts = self._prompts(body.prompt, choices)
        wishes = body.wishes(logprobs=body.logprobs)
        asked = [
            (ids, one)
            for ids in given
            for one in [self._cut(ids, wishes, body.max_tokens, COMPLETION_TOKENS, "prompt")]
            for _ in range(choices)
        ]
        shape = TextAnswer(
            self.name,
            self.vocabulary,
            logprobs=body.logprobs,
            echoes=[text if body.echo else "" for text in texts for _ in range(choices)],
            with_usage=body.with_usage,
        )
        return Plan(asked, sum(map(len, given)), body.prompt, shape, bool(body.stream), body.with_usage)

    def chat(self, body: ChatBody) -> Plan:
        """What `/v1/chat/completions` comes to.

        Raises:
            Problem: 400 or 404.
        """
        self.check_model(body.model)
        body.check()
        self._check_stops(body.stops)
        if self.chatter is None:
            raise lacking()
        choices = body.n or 1
        self._check_choices(choices, "n")
        wishes = body.wishes(logprobs=body.told, ends=self.chatter.ends, stops=self.chatter.stops)
        try:
            ids = self.chatter.ids([message.turn() for message in body.messages])
        except InputError as error:
            raise refused(error, "messages") from error
        wishes = self._cut(ids, wishes, body.wanted, self.engine.sizes.longest, "messages")
        shape = ChatAnswer(
            self.name,
            self.vocabulary,
            logprobs=body.told,
            stream=bool(body.stream),
            with_usage=body.with_usage,
        )
        text = [message.turn() for message in body.messages]
        return Plan([(ids, wishes)] * choices, len(ids), text, shape, bool(body.stream), body.with_usage)

    def predict(self, body: PredictBody) -> Plan:
        """What `/predict` comes to.

        Raises:
            Problem: 400.
        """
        inputs = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        parameters = body.parameters or Parameters()
        self._check_stops(parameters.stops)
        given, _ = self._prompts(inputs, 1)
        if parameters.do_sample is False:
            parameters = parameters.model_copy(update={"temperature": 0.0})
        wishes = parameters.wishes(logprobs=None)
        wanted = parameters.max_new_tokens or parameters.max_tokens
        asked = [(ids, self._cut(ids, wishes, wanted, PREDICT_TOKENS, "inputs")) for ids in given]
        return Plan(asked, sum(map(len, given)), inputs, None)

    def _prompts(
        self, prompt: str | list[str] | list[int] | list[list[int]], choices: int
    ) -> tuple[list[list[int]], list[str]]:
        """Prompts as ids and as texts."""
        alone = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        many: Sequence[Any] = [prompt] if alone else prompt
        self._check_choices(len(many) * choices, "prompt")
        tokenizer = self.engine.tokenizer
        texts = [each for each in many if isinstance(each, str)]
        if texts:
            encoded = tokenizer.encode_batch(texts)
            return [[*tokenizer.before, *each] or [tokenizer.separator] for each in encoded], texts
        given = [each for each in many if isinstance(each, list)]
        for each in given:
            if not all(0 <= token < tokenizer.size for token in each):
                raise Problem(
                    400, f"prompt: expected ids of tokens, 0 to {tokenizer.size - 1}", param="prompt"
                )
        return given, [tokenizer.decode(each) for each in given]

    def _check_choices(self, count: int, param: str) -> None:
        limits = self.limits
        most = min(limits.choices, limits.in_flight)
        if len(self.keys):
            most = min(most, limits.in_flight_per_key)
        if not 1 <= count <= most:
            raise Problem(
                400, f"{param}: expected 1 to {most} completions of a request, got {count}", param=param
            )

    def _check_stops(self, stops: Sequence[str]) -> None:
        if len(stops) > self.limits.stops:
            raise Problem(400, f"stop: expected at most {self.limits.stops} strings", param="stop")

    def _cut(
        self, ids: Sequence[int], wishes: Wishes, wanted: int | None, default: int, param: str
    ) -> Wishes:
        """The wishes with a number of tokens that goes with the prompt, checked as the engine will."""
        limits, longest = self.limits, self.engine.sizes.longest
        if wanted is not None and wanted > limits.max_tokens:
            message = f"max_tokens: expected at most {limits.max_tokens}, got {wanted}"
            raise Problem(400, message, param="max_tokens")
        if len(ids) > limits.prompt_tokens:
            message = f"a prompt has at most {limits.prompt_tokens} tokens here, and this {len(ids)}"
            raise Problem(400, message, param=param, code=OVER)
        room = longest - len(ids)
        if room < (wanted or 1):
            message = f"prompt and completion have at most {longest} tokens here; the prompt has {len(ids)}"
            if wanted is not None:
                message += f", and max_tokens is {wanted}"
            raise Problem(400, message, param=param, code=OVER)
        tokens = wanted or min(default, room, limits.max_tokens)
        made = replace(wishes, sampling=replace(wishes.sampling, max_tokens=tokens))
        try:
            self.engine.check(ids, made)
        except InputError as error:
            raise refused(error, param) from error
        return made
