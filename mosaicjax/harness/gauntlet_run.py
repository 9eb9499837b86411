"""The Gauntlet's tasks on a model, one after the other, and the scores that they come to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.generate import Sampling
from mosaicjax.harness import prompts
from mosaicjax.harness.answers import chosen, right_text
from mosaicjax.harness.finished import Finished, Live
from mosaicjax.harness.gauntlet import Average, Gauntlet, Task, averages
from mosaicjax.harness.prompts import Prompt
from mosaicjax.harness.subject import Subject
from mosaicjax.harness.text import Codec
from mosaicjax.harness.until import write_until

RESULTS = "gauntlet.json"
EVERYTHING = ""
"""The category of examples that are not told apart."""

Say = Callable[[str], None]
Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """`limit` is the first so many examples of each task, or of each category of it (0: all).

    `seed` is of few-shot examples.
    """

    out: str = ""
    limit: int = 0
    seed: int = 1234

    def check(self) -> None:
        """Raises: InputError: with the option, expected and got."""
        if self.limit < 0:
            raise InputError("--limit", expected="0 (all) or more", got=self.limit)


def run_gauntlet(subject: Subject, gauntlet: Gauntlet, wanted: Wanted, say: Say) -> dict[str, Any]:
    """Do what is not done yet and return all scores.

    A benchmark without a task, or whose file is not there, is missing: its category is partial.

    Raises:
        InputError: no task at all is there, a file of examples that cannot be read, or results of other
            settings in the directory `out`.
    """
    wanted.check()
    finished = Finished(wanted.out)
    tasks, examples, settings, done = {}, {}, {}, {}
    for name in gauntlet.names:
        task = gauntlet.tasks.get(name)
        if task is None or not storage.exists(task.path):
            say(f"{name}: missing ({'no such task' if task is None else task.path})")
            continue
        tasks[name], examples[name] = task, _by_category(task)
        settings[name] = {
            **subject.identity,
            **{f"format.{key}": value for key, value in asdict(task.form).items()},
            "limit": wanted.limit,
            "seed": wanted.seed,
            "examples": prompts.digest(examples[name]),
        }
        done[name] = finished.read(name, settings[name])
    if not tasks:
        raise InputError("no task of the Gauntlet is there", fix="--gauntlet-data, the folder of its files")
    if wanted.out:
        storage.check_writable(wanted.out)
    results: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        before = done[name]
        if before is not None:
            say(f"{name}: finished before")
            results[name] = before
            continue
        started = time.time()
        results[name] = evaluate(subject, task, examples[name], wanted, Live(say))
        finished.write(name, settings[name], results[name])
        accuracy, asked = results[name]["accuracy"], results[name]["asked"]
        say(f"{name}: {accuracy:.4f} of {asked:,} examples in {time.time() - started:.1f} s")
    whole = scores(gauntlet, results) | {"model": subject.path, "model_identity": subject.identity}
    if wanted.out:
        storage.write_text(storage.join(wanted.out, RESULTS), json.dumps(whole, indent=2) + "\n")
    return whole


def _by_category(task: Task) -> dict[str, Examples]:
    """A task's examples, told apart by their key `category` where the task says so."""
    examples = prompts.read_examples(task.path, task.form)
    if not task.by_category:
        return {EVERYTHING: examples}
    apart: dict[str, Examples] = {}
    for example in examples:
        if not isinstance(example.get("category"), str):
            raise InputError(f"{task.path}: an example without a category", expected="a string", got=example)
        apart.setdefault(example["category"], []).append(example)
    return {name: apart[name] for name in sorted(apart)}


def evaluate(
    subject: Subject, task: Task, examples: Mapping[str, Examples], wanted: Wanted, live: Live
) -> dict[str, Any]:
    """A task's accuracy, in each category and on the mean of them, and which examples were right."""
    codec = Codec(subject.tokenizer)
    space = prompts.needs_prefix_space(codec)
    asked = {
        name: prompts.prompts_of(some, task.form, prefix_space=space, seed=wanted.seed, limit=wanted.limit)
        for name, some in examples.items()
    }
    flat = [
        (example, prompt)
        for name in asked
        for example, prompt in zip(examples[name], asked[name], strict=False)
    ]
    if task.form.kind == "generation_task_with_answers":
        right = _written(subject, codec, task, examples, flat, live)
    else:
        right = _scored(subject, codec, task, flat, live)
    hits = iter(right)
    by_category = {name: list(islice(hits, len(some))) for name, some in asked.items()}
    accuracies = {name: sum(some) / len(some) for name, some in by_category.items()}
    return {
        "accuracy": sum(accuracies.values()) / len(accuracies),
        "asked": len(right),
        "examples": sum(map(len, examples.values())),
        "categories": {} if EVERYTHING in accuracies else accuracies,
        "right": {name: "".join("01"[hit] for hit in some) for name, some in by_category.items()},
    }


def _scored(
    subject: Subject, codec: Codec, task: Task, asked: list[tuple[dict[str, Any], Prompt]], live: Live
) -> list[bool]:
    requests = [prompts.requests_of(prompt, codec, subject.length) for _, prompt in asked]
    flat = [request for some in requests for request in some]
    told = 0

    def hear(count: int) -> None:
        nonlocal told
        told += count
        live(task.name, told, len(flat))

    scores = iter(subject.scorer.score(flat, hear))
    right = []
    for (example, _), some in zip(asked, requests, strict=True):
        mine = list(islice(scores, len(some)))
        if task.form.kind == "language_modeling":
            right.append(mine[0].greedy)
        else:
            right.append(chosen(mine, [len(answer) for _, answer in some]) == example["gold"])
    return right


def _written(
    subject: Subject,
    codec: Codec,
    task: Task,
    examples: Mapping[str, Examples],
    asked: list[tuple[dict[str, Any], Prompt]],
    live: Live,
) -> list[bool]:
    told = 0

    def hear(count: int) -> None:
        nonlocal told
        told += count
        live(task.name, told, len(asked))

    every = [example for some in examples.values() for example in some]
    written = write_until(
        subject.generator,
        [prompts.context_ids(prompt, codec)[0] for _, prompt in asked],
        task.form.early_stopping_criteria,
        Sampling(max_tokens=prompts.longest_answer(every, task.form, codec), temperature=0.0),
        length=subject.length,
        rows=subject.settings.batch,
        done=hear,
    )
    return [
        right_text(until.text, prompts.answers(example), task.form)
        for (example, _), until in zip(asked, written, strict=True)
    ]


def scores(gauntlet: Gauntlet, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of tasks, categories and averages, as `gauntlet.json` holds them; a partial one is null."""
    accuracies = {name: result["accuracy"] for name, result in results.items()}
    counts = {name: result["examples"] for name, result in results.items()}
    categories, named = averages(gauntlet, accuracies, counts)

    def told(average: Average) -> dict[str, Any]:
        partial = {"missing": list(average.missing), "present": average.present} if average.missing else {}
        return {"score": average.score, **partial}

    return {
        "tasks": {name: dict(result) for name, result in results.items()},
        "categories": {name: told(average) for name, average in categories.items()},
        "averages": {name: told(average) for name, average in named.items()},
    }


def table(whole: Mapping[str, Any]) -> str:
    """What a person reads of the scores."""
    lines = []
    for name, found in [*whole["categories"].items(), *whole["averages"].items()]:
        if found["score"] is not None:
            lines.append(f"{name:<32} {found['score']:.4f}")
            continue
        present = "nothing" if found["present"] is None else f"{found['present']:.4f} of what is there"
        lines.append(f"{name:<32} partial, {present}; missing: {', '.join(found['missing'])}")
    return "\n".join(lines)
