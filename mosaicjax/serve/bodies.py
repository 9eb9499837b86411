"""The bodies of requests: OpenAI's fields, with ours beside them.

A field of OpenAI's that does nothing here takes the value alone with which it does nothing there; any other
field is refused by name. Null is as good as a field that is not there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from mosaicjax.generate import LEAST_TEMPERATURE, Sampling
from mosaicjax.serve.problems import Problem, invalid
from mosaicjax.serve.request import MOST_BIASES, MOST_LOGPROBS, Wishes

COMPLETION_TOKENS = 16
"""How long a completion is where nobody says it: OpenAI's number."""
PREDICT_TOKENS = 256
"""The same of `/predict`."""
STOP_LENGTH = 256

_SEEDS = 2**32


def _expecting(expected: str) -> WrapValidator:
    """One message for a union, in place of one for each of its members."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("union", "expected {expected}", {"expected": expected}) from error

    return WrapValidator(check)


class Body(BaseModel):
    """A JSON object, with these fields and no others, of these types and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Empty = Annotated[list[Any], Field(max_length=0)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=STOP_LENGTH)]
Stop = Annotated[
    StopString | list[StopString], _expecting(f"a string of 1 to {STOP_LENGTH} characters, or a list of them")
]
Bias = Annotated[
    dict[Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MOST_BIASES),
    _expecting(f"numbers from -100 to 100 by token id, {MOST_BIASES} at most"),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1)]


class Drawn(Body):
    """How tokens are drawn: what all kinds of request have in common."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wishes(
        self, *, logprobs: int | None, ends: tuple[int, ...] = (), stops: tuple[str, ...] = ()
    ) -> Wishes:
        """As the engine has them, but for the number of tokens; without a seed one is drawn.

        `ends` and `stops` end a text beside what the request says.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        # The engine divides by it; so near to zero the likeliest token is the only one.
        greedy = temperature < LEAST_TEMPERATURE
        sampling = Sampling(
            temperature=0.0 if greedy else temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=(secrets.randbits(32) if self.seed is None else self.seed) % _SEEDS,
            stop=(*self.stops, *stops),
        )
        past_end = bool(self.ignore_eos)
        return Wishes(
            sampling,
            min_p=self.min_p or 0.0,
            repetition=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence=self.presence_penalty or 0.0,
            frequency=self.frequency_penalty or 0.0,
            bias={int(token): value for token, value in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            ends=ends,
            past_end=past_end,
        )


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Asked(Drawn):
    """What completions and chats have in common."""

    model: str | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return bool(self.stream_options and self.stream_options.include_usage)


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    _expecting("a string, a list of strings, the ids of tokens, or a list of such lists"),
]


class CompletionBody(Asked):
    """Of `/v1/completions`."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: Literal[""] | None = None

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            Problem: 400.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Problem(400, "best_of is supported as n alone", param="best_of", code="unsupported_value")
        if self.echo and self.logprobs is not None:
            raise Problem(400, "echo is not supported with logprobs", param="echo", code="unsupported_value")


class TextPart(Body):
    """A part of a message; others than text are not read."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart], _expecting("a string, or parts of the type text")] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Empty | None = None
    annotations: Empty | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None

    def turn(self) -> dict[str, Any]:
        """As chat templates have it; what OpenAI calls a developer is a system to them."""
        parts = self.content or ""
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        return turn | {name: value for name, value in named.items() if value is not None}


class TextFormat(Body):
    """The form of an answer: text alone."""

    type: Literal["text"]


class ChatBody(Asked):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None

    @property
    def told(self) -> int | None:
        """How many of the likeliest tokens are told with each; None tells nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted(self) -> int | None:
        """How many tokens are asked for at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            Problem: 400.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise Problem(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise Problem(
                400, "max_tokens is the older name of max_completion_tokens: give one", param="max_tokens"
            )


class Parameters(Drawn):
    """How the outputs of `/predict` are written."""

    max_new_tokens: Count | None = None
    max_tokens: Count | None = None
    do_sample: bool | None = None
    use_cache: Literal[True] | None = None


class PredictBody(Body):
    """Of `/predict`: MosaicML's shape."""

    inputs: Annotated[str | list[str], _expecting("a string or a list of strings")]
    parameters: Parameters | None = None


Kind = TypeVar("Kind", bound=Body)


def parsed(kind: type[Kind], data: bytes) -> Kind:
    """A body, read and checked.

    Raises:
        Problem: 400, with the first field that is wrong.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise invalid(found[0]) from error
