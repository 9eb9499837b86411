"""The `mosaicjax eval` command: tasks of lm-eval, or the Gauntlet."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from mosaicjax.errors import InputError

if TYPE_CHECKING:
    from mosaicjax.harness.subject import Subject


def add_eval(commands: Any, command_of: Callable[..., Any]) -> None:
    """Add the command; `command_of` is how the others are made too."""
    command = command_of(commands, "eval", _eval, "a model's scores on lm-eval's tasks, or the Gauntlet")
    command.add_argument("model", help="a run, an imported model, or a Hugging Face directory")
    command.add_argument(
        "--tasks", default="", metavar="A,B,...", help="names of lm-eval's tasks, or .yaml files of one's own"
    )
    command.add_argument(
        "--gauntlet", default="", metavar="NAME|FILE", help="v0.3, or a .yaml file with llm-foundry's keys"
    )
    command.add_argument(
        "--gauntlet-data", default="", metavar="DIR", help="its task files, as local_data of llm-foundry"
    )
    command.add_argument("--include", action="append", default=[], metavar="DIR", help="with more such files")
    command.add_argument(
        "--out", default="", help="keep results here; what is finished there is not done again"
    )
    command.add_argument(
        "--template",
        default="",
        metavar="NAME|FILE",
        help="write prompts as conversations: tokenizer (its own), chatml, dolly, llama3, or a Jinja file",
    )
    command.add_argument(
        "--single-turn", action="store_true", help="with --template: examples and question in one turn"
    )
    command.add_argument("--system", default="", metavar="TEXT", help="said before each prompt")
    command.add_argument("--num-fewshot", type=int, metavar="N", help="(default: what each task says)")
    command.add_argument(
        "--limit", type=int, default=0, metavar="N", help="the first N documents of each task"
    )
    command.add_argument("--seed", type=int, default=1234, help="of few-shot examples and sampled text")
    command.add_argument("--batch", type=int, default=32, metavar="ROWS", help="at once")
    command.add_argument(
        "--max-length", type=int, default=0, metavar="TOKENS", help="read at once (default: the model's)"
    )
    command.add_argument(
        "--devices", type=int, default=1, help="to split the weights and rows over (0: all here)"
    )


def _eval(options: argparse.Namespace) -> int:
    if bool(options.tasks) == bool(options.gauntlet):
        raise InputError(
            "eval", expected="one of --tasks and --gauntlet", got="both" if options.tasks else "none"
        )
    say = partial(print, flush=True)
    return _gauntlet(options, say) if options.gauntlet else _tasks(options, say)


def _tasks(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    from mosaicjax.harness import tasks

    if options.gauntlet_data:
        raise InputError("--gauntlet-data", expected="--gauntlet with it", got="--tasks")
    wanted = tasks.Wanted(
        names=tuple(options.tasks.split(",")),
        out=options.out,
        shots=options.num_fewshot,
        limit=options.limit,
        seed=options.seed,
        include=tuple(options.include),
        template=options.template,
        single_turn=options.single_turn,
        system=options.system,
    )
    wanted.check()
    say(tasks.table(tasks.evaluate_tasks(_subject(options), wanted, say)))
    return 0


def _gauntlet(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    from mosaicjax.harness import gauntlet, gauntlet_run

    for name, value in (
        ("--num-fewshot", options.num_fewshot),
        ("--include", options.include or None),
        ("--template", options.template or None),
        ("--single-turn", options.single_turn or None),
        ("--system", options.system or None),
    ):
        if value is not None:
            raise InputError(name, expected="--tasks with it: a Gauntlet says this itself", got=value)
    wanted = gauntlet_run.Wanted(out=options.out, limit=options.limit, seed=options.seed)
    wanted.check()
    loaded = gauntlet.load_gauntlet(options.gauntlet, options.gauntlet_data)
    say(gauntlet_run.table(gauntlet_run.run_gauntlet(_subject(options), loaded, wanted, say)))
    return 0


def _subject(options: argparse.Namespace) -> Subject:
    from mosaicjax.harness.subject import Settings, Subject
    from mosaicjax.mesh import REST, Mesh

    if options.devices < 0:
        raise InputError("--devices", expected="1 or more, or 0 (all here)", got=options.devices)
    mesh = Mesh(fsdp=(options.devices or REST,))
    return Subject(options.model, Settings(options.batch, options.max_length, mesh))
