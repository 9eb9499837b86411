"""The `mosaicjax eval` command: tasks of lm-eval, or the Gauntlet."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from mosaicjax.errors import InputError


def add_eval(commands: Any, command_of: Callable[..., Any]) -> None:
    """Add the command; `command_of` is how the others are made too."""
    command = command_of(commands, "eval", _eval, "a model's scores on lm-eval's tasks, or the Gauntlet")
    command.add_argument("model", help="a run, an imported model, or a Hugging Face directory")
    command.add_argument(
        "--tasks", default="", metavar="A,B,...", help="names of lm-eval's tasks, or .yaml files of one's own"
    )
    command.add_argument("--include", action="append", default=[], metavar="DIR", help="with more such files")
    command.add_argument(
        "--out", default="", help="keep results here; what is finished there is not done again"
    )
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
    from mosaicjax.harness.subject import Settings, Subject
    from mosaicjax.harness.tasks import Wanted, evaluate_tasks, table
    from mosaicjax.mesh import REST, Mesh

    if options.devices < 0:
        raise InputError("--devices", expected="1 or more, or 0 (all here)", got=options.devices)
    say = partial(print, flush=True)
    wanted = Wanted(
        names=tuple(options.tasks.split(",")),
        out=options.out,
        shots=options.num_fewshot,
        limit=options.limit,
        seed=options.seed,
        include=tuple(options.include),
    )
    wanted.check()
    settings = Settings(
        options.batch, options.max_length, Mesh(fsdp=(options.devices if options.devices else REST,))
    )
    subject = Subject(options.model, settings)
    say(table(evaluate_tasks(subject, wanted, say)))
    return 0
