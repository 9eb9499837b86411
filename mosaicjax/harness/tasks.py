"""Tasks of lm-eval on a model, one after the other, with results in lm-eval's own format."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaicjax import storage
from mosaicjax.data.chat import Chat
from mosaicjax.errors import InputError
from mosaicjax.harness.finished import Finished, Live
from mosaicjax.harness.lm import HarnessModel, language_model
from mosaicjax.harness.subject import Subject

BOOTSTRAP = 1_000
"""Resamplings for the standard error of metrics that have no formula for it."""

RESULTS = "results.json"
SUFFIXES = (".yaml", ".yml")

# Where a task's data lie on this machine says nothing of the data, which are told apart by their digest.
UNTOLD = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What is to be evaluated: tasks and groups of lm-eval by name, or `.yaml` files of one's own.

    `shots` None is what each task says; `limit` the first so many documents of each (0: all). `include` are
    directories with more tasks. `seed` is of few-shot examples and of sampled completions. `template` is the
    name or file of a chat template by which prompts are written ("": as plain text), with few-shot examples
    as turns of their own unless `single_turn`; `system` is said before each prompt.
    """

    names: tuple[str, ...]
    out: str = ""
    shots: int | None = None
    limit: int = 0
    seed: int = 1234
    include: tuple[str, ...] = ()
    template: str = ""
    single_turn: bool = False
    system: str = ""

    def check(self) -> None:
        """Raises: InputError: with the option, expected and got."""
        if not self.names or not all(self.names):
            raise InputError("--tasks", expected="names of tasks, or .yaml files, with commas between")
        for name, value in (("--limit", self.limit), ("--num-fewshot", self.shots or 0)):
            if value < 0:
                raise InputError(name, expected="0 or more", got=value)
        if not 0 <= self.seed < 2**32:
            raise InputError("--seed", expected="0 to 2**32 - 1", got=self.seed)
        for folder in self.include:
            if not Path(folder).is_dir():
                raise InputError("--include", expected="a directory with .yaml files of tasks", got=folder)
        if self.single_turn and not self.template:
            raise InputError("--single-turn", expected="--template with it", got="prompts as plain text")


def evaluate_tasks(subject: Subject, wanted: Wanted, say: Say) -> dict[str, Any]:
    """Do what is not done yet and return all results, as lm-eval has them.

    Each task's results are kept in the directory `out` as soon as they are there, and its documents with the
    model's answers beside them; a task that is there is not done again.

    Raises:
        InputError: tasks that are not known or cannot be loaded, or that were done with other settings.
    """
    wanted.check()
    began = time.time()
    chat = Chat.of(wanted.template, subject.tokenizer) if wanted.template else None
    model = language_model(subject, wanted.seed, Live(say), chat)
    loaded = load_tasks(wanted)
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    finished = Finished(wanted.out)
    if wanted.out:
        storage.check_writable(wanted.out)
    for task in tasks.values():
        configure(task, wanted)
    settings = {name: settings_of(model, task, wanted) for name, task in tasks.items()}
    done = {name: finished.read(name, settings[name]) for name in tasks}
    for name, task in tasks.items():
        if done[name] is not None:
            say(f"{name}: finished before")
            continue
        started = time.time()
        results = evaluate_one(model, task, wanted)
        if wanted.out:
            _write_samples(wanted.out, name, results.pop("samples"))
        results.pop("samples", None)
        finished.write(name, settings[name], results)
        done[name] = json.loads(json.dumps(results))
        say(f"{name}: {results['n-samples'][name]['effective']:,} documents in {time.time() - started:.1f} s")
    whole = merged([result for result in done.values() if result is not None], groups)
    whole |= _about(model, wanted, began)
    if wanted.out:
        storage.write_text(
            storage.join(wanted.out, RESULTS), json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        )
    return whole


def load_tasks(wanted: Wanted) -> dict[str, Any]:
    """lm-eval's tasks and groups.

    Raises:
        InputError: a name that is not known, or a task that cannot be loaded.
    """
    import datasets
    import yaml
    from lm_eval.tasks import TaskManager

    files = [name for name in wanted.names if name.endswith(SUFFIXES)]
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"task file {file} does not exist")
    # lm-eval's own thousands of files take long to read.
    manager = TaskManager(
        include_path=list(wanted.include) or None, include_defaults=len(files) < len(wanted.names)
    )
    for name in set(wanted.names) - set(files):
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise InputError(
                f"no task is called {name}",
                expected=f"one like {', '.join(near)}" if near else "one that `lm-eval ls tasks` lists",
                fix="a .yaml file of a task is given by its path, a directory of them by --include",
            )
    try:
        loaded: dict[str, Any] = dict(manager.load(list(wanted.names)))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        yaml.YAMLError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise InputError(
            f"{', '.join(wanted.names)} cannot be loaded", got=storage.one_line(error)
        ) from error
    return loaded


def configure(task: Any, wanted: Wanted) -> None:
    """Set few-shot examples and seeds; a task that says 0 of itself stays without.

    Source: lm-eval 0.4.13, `simple_evaluate`.
    """
    own = task.get_config("num_fewshot")
    if wanted.shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=wanted.shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=wanted.seed)


def settings_of(model: HarnessModel, task: Any, wanted: Wanted) -> dict[str, Any]:
    """All that a task's results depend on."""
    config = {name: value for name, value in task.dump_config().items() if name not in UNTOLD}
    shots = task.get_config("num_fewshot")
    return {
        **model.subject.identity,
        "num_fewshot": shots,
        "limit": wanted.limit,
        "seed": wanted.seed,
        "task": _digest([config]),
        "documents": _digest(task.eval_docs),
        "examples": _digest(task.fewshot_docs() or []) if shots else "",
        "lm_eval": importlib.metadata.version("lm_eval"),
        **_prompted(model, wanted),
    }


def _prompted(model: HarnessModel, wanted: Wanted) -> dict[str, Any]:
    """What of the settings says how prompts are written, where it is not as plain text alone."""
    found: dict[str, Any] = {"system": wanted.system} if wanted.system else {}
    if wanted.template:
        found |= {"template": _digest([model.chat_template(True)]), "single_turn": wanted.single_turn}
    return found


def _digest(values: Iterable[Any]) -> str:
    whole = hashlib.sha256()
    for value in values:
        whole.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return whole.hexdigest()


def evaluate_one(model: HarnessModel, task: Any, wanted: Wanted) -> dict[str, Any]:
    """One task's results, as lm-eval gives them.

    Raises:
        InputError: its documents do not fit what it says of them.
    """
    import random

    import jinja2
    import numpy as np
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import handle_non_serializable

    # Of the seeds that a task may read; each begins anew, so that tasks do not depend on those before them.
    random.seed(wanted.seed)
    np.random.seed(wanted.seed)
    # By processes that are forked, which one that runs JAX must not be.
    os.environ["DISABLE_MULTIPROC"] = "1"
    name = task.task_name
    try:
        results = evaluate(
            lm=model,
            task_dict={"tasks": {name: task}, "groups": {}},
            limit=wanted.limit or None,
            bootstrap_iters=BOOTSTRAP,
            system_instruction=wanted.system or None,
            apply_chat_template=bool(wanted.template),
            fewshot_as_multiturn=bool(wanted.template) and not wanted.single_turn,
        )
    except jinja2.TemplateError as error:
        raise InputError(
            f"{name}: its documents do not fit its configuration",
            got=f"{type(error).__name__}: {storage.one_line(error)}",
            fix="the keys that its doc_to_text, doc_to_target and doc_to_choice name",
        ) from error
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def merged(parts: Sequence[Mapping[str, Any]], groups: Mapping[str, Any]) -> dict[str, Any]:
    """The results of several tasks as lm-eval gives them for one call, with those of their groups."""
    whole: dict[str, Any] = {
        key: {name: value for part in parts for name, value in part[key].items()}
        for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    }
    tasks = dict(whole["results"])
    for name, group in groups.items():
        whole["results"][name] = dict(group.aggregate(tasks))
        whole["versions"][name] = group.version
    aggregated = {name: whole["results"][name] for name, group in groups.items() if group.has_aggregation}
    whole |= {"groups": aggregated} if aggregated else {}
    return whole | {"group_subtasks": {name: group.child_names for name, group in groups.items()}}


def _about(model: HarnessModel, wanted: Wanted, began: float) -> dict[str, Any]:
    """What lm-eval says of a call beside its results."""
    subject = model.subject
    return {
        "config": {
            "model": "mosaicjax",
            "model_args": {"pretrained": subject.path, "max_length": subject.length},
            "batch_size": subject.settings.batch,
            "limit": wanted.limit or None,
            "bootstrap_iters": BOOTSTRAP,
            "gen_kwargs": None,
            "random_seed": wanted.seed,
            "numpy_seed": wanted.seed,
            "fewshot_seed": wanted.seed,
        },
        "system_instruction": wanted.system or None,
        "chat_template": model.chat_template(True) or None,
        "fewshot_as_multiturn": bool(wanted.template) and not wanted.single_turn,
        "date": began,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "model_source": "mosaicjax",
        "model_name": subject.path,
        "model_identity": subject.identity,
        "total_evaluation_time_seconds": str(time.time() - began),
    }


def _write_samples(out: str, task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A task's documents with the model's answers, one JSON object a line."""
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples[task]]
    path = os.path.basename(Finished(out).path(task)).removesuffix(".json")
    storage.write_text(storage.join(out, f"samples_{path}.jsonl"), "".join(f"{line}\n" for line in lines))


def table(results: Mapping[str, Any]) -> str:
    """What a person reads of the results: lm-eval's own table, and one of groups where there are any."""
    from lm_eval.utils import make_table

    shown = [make_table(results)]
    if "groups" in results:
        shown.append(make_table(results, "groups"))
    return "\n".join(text.rstrip() for text in shown)
