"""Prompts of in-context-learning tasks, to the character as llm-foundry makes them.

Source: llm-foundry, `llmfoundry/eval/datasets/in_context_learning_evaluation.py` (2025-07-21).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.harness.score import Request
from mosaicjax.harness.text import Codec

Kind = Literal["multiple_choice", "schema", "language_modeling", "generation_task_with_answers"]
KINDS: tuple[str, ...] = get_args(Kind)

ROOM_FOR_THOUGHT = 10
"""Tokens more than the longest answer, where a chain of thought comes before it."""

THOUGHT = "chain_of_thought"
"""The key of what is thought before an answer; where one example has it, all have."""

Example = Mapping[str, Any]

_KEYS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
    "generation_task_with_answers": {"context": str, "answer": str},
}


@dataclass(frozen=True)
class Format:
    """How a task's examples are written out.

    Examples are divided by `example_delimiter`, a question and its answer by `continuation_delimiter`;
    `prelimiter` comes before each question and `prompt_string` once before all. Answers end behind
    `cot_delimiter`, where they have a chain of thought, and before one of `early_stopping_criteria`.
    `strip_dataset` takes blanks off both ends of each example's strings.
    """

    kind: Kind
    num_fewshot: int = 0
    prompt_string: str = ""
    example_delimiter: str = "\n"
    continuation_delimiter: str = " "
    prelimiter: str = ""
    cot_delimiter: str = ""
    early_stopping_criteria: tuple[str, ...] = ()
    do_normalization: bool = True
    strip_dataset: bool = True


@dataclass(frozen=True)
class Prompt:
    """One example asked: few-shot examples, then each context with each continuation.

    There are several contexts in a schema, several continuations in a multiple choice, none in generation.
    """

    prelude: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]


def read_examples(path: str, form: Format) -> list[dict[str, Any]]:
    """The examples of a `.jsonl` file.

    Raises:
        InputError: no such file, a line that is no JSON object, or keys that the kind of task needs.
    """
    examples = []
    for number, line in enumerate(storage.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is no JSON", got=error) from error
        _check(example, form, f"{path}, line {number}")
        examples.append(example)
    if not examples:
        raise InputError(f"{path} holds no examples")
    if any(THOUGHT in example for example in examples):
        examples = [{THOUGHT: "", **example} for example in examples]
    return examples


def _check(example: Any, form: Format, where: str) -> None:
    wanted = _KEYS[form.kind]
    if not isinstance(example, dict):
        raise InputError(where, expected="a JSON object", got=type(example).__name__)
    for key, kind in wanted.items():
        if not isinstance(example.get(key), kind):
            raise InputError(
                f"{where} is no example of {form.kind}",
                expected=", ".join(f"{name} ({each.__name__})" for name, each in wanted.items()),
                got=", ".join(f"{name} ({type(each).__name__})" for name, each in example.items()),
            )
    if "gold" in wanted:
        options = example["choices" if "choices" in wanted else "context_options"]
        if not options or not all(isinstance(option, str) for option in options):
            raise InputError(f"{where}: options", expected="strings, one or more", got=options)
        if not 0 <= example["gold"] < len(options):
            raise InputError(
                f"{where}: gold", expected=f"a number from 0 to {len(options) - 1}", got=example["gold"]
            )


def shots(count: int, wanted: int, excluded: int, rng: random.Random) -> set[int]:
    """Numbers of few-shot examples, without the one that is asked; of a small set, all others.

    The order in which a set gives numbers is that of the prompt, as in llm-foundry.
    """
    wanted = min(count - 1, wanted)
    chosen = set(rng.sample(range(count), wanted))
    if excluded in chosen:
        chosen.remove(excluded)
        if len(chosen) >= count - 1:
            return chosen
        other = rng.choice(range(count))
        while other in chosen or other == excluded:
            other = rng.choice(range(count))
        chosen.add(other)
    return chosen


def prompts_of(
    examples: Sequence[Example], form: Format, *, prefix_space: bool, seed: int, limit: int = 0
) -> list[Prompt]:
    """What is asked for the first `limit` examples (0: all), with few-shot examples out of all of them.

    `prefix_space` puts a space before answers that are scored (`needs_prefix_space`).
    """
    rng = random.Random(seed)
    if form.strip_dataset:
        examples = [_stripped(example) for example in examples]
    made = []
    for number, example in enumerate(examples[: limit or None]):
        prelude = form.prompt_string
        if form.num_fewshot:
            for shot in shots(len(examples), form.num_fewshot, number, rng):
                prelude += _shown(examples[shot], prelude, form)
        contexts, answers = _asked(example, prelude, form)
        if prefix_space:
            answers = [answer if answer.startswith(" ") else f" {answer}" for answer in answers]
        made.append(Prompt(prelude, tuple(contexts), tuple(answers)))
    return made


def _stripped(example: Example) -> Example:
    return {key: each.strip() if isinstance(each, str) else each for key, each in example.items()}


def _shown(example: Example, before: str, form: Format) -> str:
    """An example with its answer, behind the text before it."""
    delimiter = form.example_delimiter if before else ""
    if form.kind == "schema":
        context = f"{delimiter}{example['context_options'][example['gold']]}"
        return f"{form.prelimiter}{context}{form.continuation_delimiter}{example['continuation']}"
    question = f"{delimiter}{form.prelimiter}{example[_question(form)]}{form.continuation_delimiter}"
    match form.kind:
        case "multiple_choice":
            return question + str(example["choices"][example["gold"]])
        case "language_modeling":
            return question + str(example["continuation"])
        case _:
            return question + answer_text(example, str(example["answer"]), form)


def _asked(example: Example, prelude: str, form: Format) -> tuple[list[str], list[str]]:
    """Contexts and continuations of the example that is asked."""
    delimiter = form.example_delimiter if prelude else ""
    if form.kind == "schema":
        end = form.continuation_delimiter.rstrip() if form.strip_dataset else form.continuation_delimiter
        # llm-foundry puts its delimiters around contexts behind a prelude alone.
        around = (form.prelimiter + delimiter, end) if prelude else (form.prelimiter, "")
        return [around[0] + option + around[1] for option in example["context_options"]], [
            example["continuation"]
        ]
    context = f"{delimiter}{form.prelimiter}{example[_question(form)]}{form.continuation_delimiter}"
    context = context.rstrip() if form.strip_dataset else context
    match form.kind:
        case "multiple_choice":
            return [context], list(example["choices"])
        case "language_modeling":
            return [context], [example["continuation"]]
        case _:
            return [context], []


def _question(form: Format) -> str:
    return "query" if form.kind == "multiple_choice" else "context"


def answer_text(example: Example, answer: str, form: Format) -> str:
    """An answer as the model is to write it, behind its chain of thought where the example has one."""
    thought = example.get(THOUGHT)
    return answer if thought is None else f"{thought}{form.cot_delimiter}{answer}"


def answers(example: Example) -> list[str]:
    """All answers that count as right."""
    return [example["answer"], *example.get("aliases", [])]


def longest_answer(examples: Sequence[Example], form: Format, codec: Codec) -> int:
    """How many tokens to write: as many as the longest answer has, and some more for a chain of thought."""
    texts = [answer_text(example, answer, form) for example in examples for answer in answers(example)]
    longest = max(map(len, codec.encode_all(texts)))
    return max(1, longest + (ROOM_FOR_THOUGHT if form.cot_delimiter else 0))


def needs_prefix_space(codec: Codec) -> bool:
    """Whether a space belongs to the word behind it, as in GPT-2's tokenizer."""
    return len(codec.encode(" a", begin=False)) == 1


def context_ids(prompt: Prompt, codec: Codec) -> list[list[int]]:
    """Ids of the prelude, with what the model expects before a text, and of each context behind it."""
    prelude = codec.encode(prompt.prelude)
    return [
        (prelude + context) or [codec.prefix] for context in codec.encode_all(prompt.contexts, begin=False)
    ]


def requests_of(prompt: Prompt, codec: Codec, length: int) -> list[Request]:
    """Ids to score: every context with every continuation, together at most `length` tokens.

    The parts are made ids of one by one; a long context loses tokens at its left.
    """
    continuations = codec.encode_all(prompt.continuations, begin=False)
    found: list[Request] = []
    for context in context_ids(prompt, codec):
        for continuation in continuations:
            room = length - len(continuation)
            if room < 1 or not continuation:
                raise InputError(
                    "an answer to score",
                    expected=f"1 to {length - 1} tokens",
                    got=f"{len(continuation)} of {prompt.continuations}",
                )
            found.append((context[-room:], continuation))
    return found


def digest(examples: Mapping[str, Sequence[Example]]) -> str:
    """SHA-256 of a task's examples."""
    return hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()
