"""The Gauntlet: tasks by category, each above what guessing gives, and averages of categories.

Source: llm-foundry, `llmfoundry/callbacks/eval_gauntlet_callback.py` (2025-07-21).
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any, Literal, get_args

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.harness.prompts import KINDS, Format

Weighting = Literal["EQUAL", "SAMPLE_SZ", "LOG_SAMPLE_SZ"]

NAMED = {"v0.3": "gauntlet_v03.yaml"}
"""The Gauntlets that come with mosaicjax, whose task files come with llm-foundry."""

LOCAL_DATA = "local_data/"

_OF_A_TASK = {each.name for each in fields(Format)} - {"kind", "num_fewshot"}
_OTHER = {"label", "dataset_uri", "num_fewshot", "icl_task_type", "has_categories", "question_prelimiter"}
_UNREAD = {"metric_names", "batch_size"}


@dataclass(frozen=True)
class Task:
    """A task with its number of few-shot examples; `by_category`: accuracy is averaged over its own ones."""

    label: str
    path: str
    form: Format
    by_category: bool = False

    @property
    def name(self) -> str:
        """Its name in the Gauntlet, as `arc_easy/3-shot`."""
        return benchmark_name(self.label, self.form.num_fewshot)


@dataclass(frozen=True)
class Benchmark:
    """A task's place in a category: guessing is right in a share `random_baseline` of the cases."""

    name: str
    random_baseline: float


@dataclass(frozen=True)
class Gauntlet:
    """Categories of benchmarks, and named averages of categories.

    A task's score is (accuracy - baseline) / (1 - baseline): 0 is guessing, 1 all right.
    `subtract_random_baseline` and `rescale_accuracy` leave either half away where false.
    """

    categories: Mapping[str, tuple[Benchmark, ...]]
    averages: Mapping[str, tuple[str, ...]]
    tasks: Mapping[str, Task] = field(default_factory=dict)
    weighting: Weighting = "EQUAL"
    subtract_random_baseline: bool = True
    rescale_accuracy: bool = True

    @property
    def names(self) -> list[str]:
        """All benchmarks, each once."""
        return list(dict.fromkeys(each.name for some in self.categories.values() for each in some))


@dataclass(frozen=True)
class Average:
    """A weighted mean of scores; partial where something is missing, and then no score of the whole.

    `present` is the mean over what is there, None where nothing is.
    """

    present: float | None
    missing: tuple[str, ...] = ()

    @property
    def score(self) -> float | None:
        """The score, None where it is partial."""
        return None if self.missing else self.present


def benchmark_name(label: str, num_fewshot: int) -> str:
    """As `arc_easy/3-shot`."""
    return f"{label}/{num_fewshot}-shot"


def above_guessing(accuracy: float, baseline: float, gauntlet: Gauntlet) -> float:
    """A task's score."""
    score = accuracy - baseline if gauntlet.subtract_random_baseline else accuracy
    return score / (1.0 - baseline) if gauntlet.rescale_accuracy else score


def weight(count: int, weighting: Weighting) -> float:
    """What a task of so many examples counts in its category."""
    match weighting:
        case "EQUAL":
            return 1.0
        case "SAMPLE_SZ":
            return float(max(count, 1))
        case "LOG_SAMPLE_SZ":
            return max(math.log2(max(count, 1)), 1.0)


def averages(
    gauntlet: Gauntlet, accuracies: Mapping[str, float], counts: Mapping[str, int]
) -> tuple[dict[str, Average], dict[str, Average]]:
    """The scores of categories and named averages, from accuracies and numbers of examples by benchmark.

    A category that lacks a benchmark is partial, and so is each average with it: neither is made of what
    happens to be there.
    """
    categories: dict[str, Average] = {}
    for name, benchmarks in gauntlet.categories.items():
        there = [each for each in benchmarks if each.name in accuracies]
        weights = [weight(counts.get(each.name, 0), gauntlet.weighting) for each in there]
        scores = [above_guessing(accuracies[each.name], each.random_baseline, gauntlet) for each in there]
        missing = tuple(each.name for each in benchmarks if each.name not in accuracies)
        categories[name] = Average(_mean(scores, weights), missing)
    named = {}
    for name, parts in gauntlet.averages.items():
        scores = [score for part in parts if (score := categories[part].score) is not None]
        missing = tuple(part for part in parts if categories[part].score is None)
        named[name] = Average(_mean(scores, [1.0] * len(scores)), missing)
    return categories, named


def _mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if values else None


def load_gauntlet(name: str, data: str = "") -> Gauntlet:
    """A Gauntlet by name, or out of a YAML file with llm-foundry's keys `eval_gauntlet` and `icl_tasks`.

    Paths of task files are looked for in `data`, by what stands behind `local_data/`; without it, beside the
    YAML file.

    Raises:
        InputError: no such Gauntlet or file, keys that are missing or not known, or values that mean nothing.
    """
    import yaml

    if name in NAMED:
        text = resources.files("mosaicjax.harness").joinpath(NAMED[name]).read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        text = storage.read_text(name)
    else:
        raise InputError("--gauntlet", expected=f"{', '.join(NAMED)}, or a .yaml file", got=name)
    if name in NAMED and not data:
        raise InputError(
            f"--gauntlet {name} needs its task files",
            fix="--gauntlet-data DIR, as scripts/eval/local_data of llm-foundry",
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{name} is no YAML", got=storage.one_line(error)) from error
    return gauntlet_of(values, name, data or posixpath.dirname(name) or ".")


def gauntlet_of(values: Any, where: str, folder: str) -> Gauntlet:
    """A Gauntlet from what a file of it says.

    Raises:
        InputError: as `load_gauntlet`.
    """
    top = _object(values, where, needed=("eval_gauntlet", "icl_tasks"))
    spec = _object(top["eval_gauntlet"], f"{where}: eval_gauntlet", needed=("categories",))
    known = {"weighting", "subtract_random_baseline", "rescale_accuracy", "averages", "categories"}
    _refuse_unknown(spec, known | {"benchmark_sizes"}, f"{where}: eval_gauntlet")
    weighting = spec.get("weighting", "EQUAL")
    if weighting not in get_args(Weighting):
        raise InputError(f"{where}: weighting", expected=", ".join(get_args(Weighting)), got=weighting)
    subtract, rescale = spec.get("subtract_random_baseline", True), spec.get("rescale_accuracy", True)
    if rescale and not subtract:
        raise InputError(
            f"{where}: rescale_accuracy without subtract_random_baseline",
            fix="both, or rescale_accuracy: false",
        )
    categories: dict[str, tuple[Benchmark, ...]] = {}
    for category in _list(spec["categories"], f"{where}: categories"):
        part = _object(category, f"{where}: a category", needed=("name", "benchmarks"))
        at = f"{where}: category {part['name']}"
        if part["name"] in categories:
            raise InputError(f"{at} stands there twice")
        categories[part["name"]] = tuple(_benchmark(each, at) for each in _list(part["benchmarks"], at))
    named = spec.get("averages") or {"default_average": list(categories)}
    for name, parts in _object(named, f"{where}: averages").items():
        lost = [part for part in parts if part not in categories]
        if name in categories or lost or not parts:
            raise InputError(
                f"{where}: average {name}",
                expected=f"another name than a category's, of some of {', '.join(categories)}",
                got=parts,
            )
    tasks = [
        task
        for each in _list(top["icl_tasks"], f"{where}: icl_tasks")
        for task in _tasks(each, f"{where}: icl_tasks", folder)
    ]
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise InputError(f"{where}: icl_tasks", expected="each label and num_fewshot once")
    return Gauntlet(
        categories,
        {name: tuple(parts) for name, parts in named.items()},
        by_name,
        weighting,
        subtract,
        rescale,
    )


def _benchmark(values: Any, where: str) -> Benchmark:
    part = _object(values, where, needed=("name", "num_fewshot", "random_baseline"))
    baseline = part["random_baseline"]
    if not isinstance(baseline, int | float) or not 0 <= baseline < 1:
        raise InputError(f"{where}: random_baseline of {part['name']}", expected="0 to below 1", got=baseline)
    return Benchmark(benchmark_name(part["name"], part["num_fewshot"]), float(baseline))


def _tasks(values: Any, where: str, folder: str) -> list[Task]:
    part = _object(values, where, needed=("label", "dataset_uri", "num_fewshot", "icl_task_type"))
    label = part["label"]
    _refuse_unknown(part, _OF_A_TASK | _OTHER | _UNREAD, f"{where}: {label}")
    if part["icl_task_type"] not in KINDS:
        raise InputError(
            f"{where}: {label}: icl_task_type", expected=", ".join(KINDS), got=part["icl_task_type"]
        )
    counts = _list(part["num_fewshot"], f"{where}: {label}: num_fewshot")
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise InputError(f"{where}: {label}: num_fewshot", expected="numbers, 0 or more", got=counts)
    form = {name: value for name, value in part.items() if name in _OF_A_TASK}
    for name, value in form.items():
        kind: type | tuple[type, ...] = {"do_normalization": bool, "strip_dataset": bool}.get(name, str)
        kind = (list, type(None)) if name == "early_stopping_criteria" else kind
        if not isinstance(value, kind):
            raise InputError(f"{where}: {label}: {name}", expected=kind, got=value)
    if "question_prelimiter" in part:
        if "prelimiter" in part:
            raise InputError(f"{where}: {label}: prelimiter and question_prelimiter are the same", fix="one")
        form["prelimiter"] = part["question_prelimiter"]
    if "early_stopping_criteria" in form:
        form["early_stopping_criteria"] = tuple(form["early_stopping_criteria"] or ())
    path = str(part["dataset_uri"]).rpartition(LOCAL_DATA)[2]
    return [
        Task(
            label,
            path if storage.is_remote(path) else storage.join(folder, path),
            Format(kind=part["icl_task_type"], num_fewshot=count, **form),
            bool(part.get("has_categories", False)),
        )
        for count in counts
    ]


def _object(values: Any, where: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(values, dict) or any(name not in values for name in needed):
        raise InputError(
            where,
            expected=f"an object with {', '.join(needed)}" if needed else "an object",
            got=", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__,
        )
    return values


def _list(values: Any, where: str) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise InputError(where, expected="a list that is not empty", got=values)
    return values


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"{where}: {', '.join(unknown)}", expected=f"keys among {', '.join(sorted(known))}")
