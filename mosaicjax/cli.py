"""The `mosaicjax` command: parse, call one function, print.

What takes long to import is imported by the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from mosaicjax.cli_bench import add_bench_serve
from mosaicjax.cli_data import add_data
from mosaicjax.cli_eval import add_eval
from mosaicjax.cli_serve import add_serve
from mosaicjax.errors import Diverged, InputError

STARTED = time.time()

SUMMARY = "Train language models on your own data, at the lowest cost per token, and own the weights."
EXIT_INPUT = 2
EXIT_DIVERGED = 1


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise InputError(f"{self.prog}: {message}", fix=f"`{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        options, rest = parser().parse_known_args([word for word in given if word != "--debug"])
        if rest and not options.overrides:
            raise InputError(f"unknown argument {rest[0]}", fix=f"`mosaicjax {options.command} --help`")
        options.rest = rest
        code: int = options.run(options)
        return code
    except (InputError, Diverged) as error:
        if debug:
            raise
        print(f"mosaicjax: {error}", file=sys.stderr, flush=True)
        return EXIT_DIVERGED if isinstance(error, Diverged) else EXIT_INPUT


def parser() -> Parser:
    """All commands and their options."""
    top = Parser(prog="mosaicjax", description=SUMMARY, allow_abbrev=False)
    top.add_argument("--debug", action="store_true", help="print the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_train(commands)
    _add_show(commands)
    _add_plan(commands)
    _add_sweep(commands)
    _add_generate(commands)
    add_serve(commands, _command)
    _add_evaluate(commands)
    add_eval(commands, _command)
    _add_report(commands)
    _add_import(commands)
    _add_export(commands)
    add_bench_serve(commands, _command)
    add_data(commands, _command)
    return top


def _command(commands: argparse._SubParsersAction[Parser], name: str, run: object, text: str) -> Parser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run, overrides=False, command=name)
    return command


def _add_train(commands: argparse._SubParsersAction[Parser]) -> None:
    command = _command(commands, "train", _train, "train a recipe, or go on with a run")
    command.set_defaults(overrides=True)
    command.epilog = "Any field of the recipe is an option too: --steps 20 --optimizer.lr.peak 3e-4"
    command.add_argument("recipe", help="a recipe's .py file, or a run directory")
    command.add_argument(
        "--out", default="", help="the run directory (default: runs/NAME); s3:// and gs:// too"
    )
    command.add_argument("--profile", default="", metavar="FIRST:LAST", help="trace these steps, from 1")
    command.add_argument("--show-overrides", action="store_true", help="list the recipe's fields and stop")
    _add_processes(command)


def _add_processes(command: Parser) -> None:
    group = command.add_argument_group("several processes")
    group.add_argument("--processes", type=int, default=1, help="how many there are")
    group.add_argument("--process", type=int, default=0, help="which one this is, from 0")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--cluster", action="store_true", help="find all three out (TPU pod, Slurm, Open MPI)")
    group.add_argument("--cpu-devices", type=int, default=0, help="split this CPU into so many devices")


def _add_show(commands: argparse._SubParsersAction[Parser]) -> None:
    command = _command(commands, "show", _show, "a recipe's weights, memory per chip and first batch")
    command.set_defaults(overrides=True)
    command.add_argument("recipe", help="a recipe's .py file, or a run directory")
    command.add_argument(
        "--devices", type=int, default=0, help="chips to lay it out on (default: those here)"
    )


def _add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "what a recipe's step takes and costs on TPUs that need not be there"
    command = _command(commands, "plan", _plan, text)
    command.set_defaults(overrides=True)
    command.epilog = "Any field of the recipe is an option too, as in `mosaicjax train`."
    command.add_argument("recipe", help="a recipe's .py file, or a run directory")
    command.add_argument("--topology", default="", metavar="CHIP:GRID", help="as v5e:16x16 or v5p:4x4x4")
    command.add_argument("--topologies", default="", metavar="A,B,C", help="rank several by dollars a token")
    command.add_argument("--slices", type=int, default=1, help="so many of it, joined by the network")
    command.add_argument("--usd-per-chip-hour", type=float, help="(default: the recipe's, or the list price)")
    command.add_argument("--fit", action="store_true", help="find the remat policy and microbatch that fit")
    command.add_argument("--json", default="", metavar="FILE", help="all figures, as JSON")
    command.add_argument(
        "--picture", default="", metavar="FILE", help="of the step's time, or the cheapest's"
    )
    command.add_argument("--no-cache", action="store_true", help="compile what was compiled before, too")


def _add_sweep(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "train a recipe with every combination of some values, and compare"
    command = _command(commands, "sweep", _sweep, text)
    command.set_defaults(overrides=True)
    command.epilog = (
        "Any field of the recipe is an option too, as in `mosaicjax train`: the same in all runs."
    )
    command.add_argument("recipe", help="a recipe's .py file, or a run directory")
    command.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="FIELD=A,B,...",
        help="as optimizer.lr.peak=1e-3,2e-3; may be repeated; seeds are averaged over",
    )
    command.add_argument("--out", required=True, help="the directory to make, on this machine")


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    command = _command(commands, "generate", _generate, "go on with a prompt")
    command.add_argument("model", help="a run, an imported model, or a Hugging Face directory")
    command.add_argument("--prompt", action="append", required=True, help="give it again for a batch")
    command.add_argument("--max-tokens", type=int, default=200)
    command.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token each time")
    command.add_argument("--top-k", type=int, default=0, help="0: no limit")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")


def _add_evaluate(commands: argparse._SubParsersAction[Parser]) -> None:
    command = _command(commands, "evaluate", _evaluate, "held-out bits of a run, beside gzip -9")
    command.add_argument("model", help="a run directory")


def _add_report(commands: argparse._SubParsersAction[Parser]) -> None:
    command = _command(commands, "report", _report, "runs beside each other on one page of HTML")
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, finished or not")
    command.add_argument("--out", default="report.html", help="the page; replaced where it is there")
    command.add_argument("--title", default="", help="(default: the runs' names)")


def _add_import(commands: argparse._SubParsersAction[Parser]) -> None:
    command = _command(commands, "import", _import, "a Hugging Face model into a directory to start from")
    command.add_argument("source", help="a directory with config.json and .safetensors or .bin files")
    command.add_argument("--out", required=True, help="the directory to make; s3:// and gs:// too")
    _add_dtype(command)
    _add_processes(command)


def _add_export(commands: argparse._SubParsersAction[Parser]) -> None:
    command = _command(commands, "export", _export, "a run or imported model for Hugging Face Transformers")
    command.add_argument("model", help="a run directory, or an imported model")
    command.add_argument("--out", required=True, help="the directory to make; s3:// and gs:// too")
    command.add_argument("--step", type=int, default=-1, help="of the checkpoint (default: the newest)")
    command.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file, as 500MB or 5GB")
    command.add_argument("--adapter", action="store_true", help="a run's adapters alone, as PEFT reads them")
    command.add_argument("--base", default="", metavar="MODEL", help="what PEFT is to put them beside")
    _add_dtype(command)


def _add_dtype(command: Parser) -> None:
    names = ("own", "float32", "bfloat16", "float16")
    command.add_argument(
        "--dtype", choices=names, default="own", help="of the weights (default: as they are)"
    )


def _train(options: argparse.Namespace) -> int:
    profile = _profile(options.profile)
    if not options.show_overrides:
        _start(options)
    from mosaicjax import processes, recipe_file

    with processes.refused_by_all("the recipe"):
        loaded = recipe_file.load(options.recipe, options.rest)
    if options.show_overrides:
        print("\n".join(f"{option} {value}" for option, value in recipe_file.options(loaded.recipe)))
        return 0
    out = options.out or (options.recipe if not options.recipe.endswith(".py") else f"runs/{loaded.name}")
    from mosaicjax.finish import train_and_finish

    scores: Any = None
    if loaded.recipe.tasks.names:
        from mosaicjax.harness.in_loop import InLoop as scores

    return train_and_finish(loaded, out, started=STARTED, profile=profile, scores=scores)


def _profile(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError("--profile", expected="FIRST:LAST, steps from 1, as 10:13", got=text)
    return int(first), int(last)


def _start(options: argparse.Namespace) -> None:
    """Join the other processes and set the CPU's devices, before anything asks for one."""
    import jax

    if options.cpu_devices:
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if options.cpu_devices <= 1:
        # A CPU is no faster for steps that are sent ahead, and holds two steps' temporaries for it.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    from mosaicjax import processes

    if options.cluster:
        processes.start_on_cluster()
    else:
        processes.start(options.coordinator, options.processes, options.process)


def _show(options: argparse.Namespace) -> int:
    from mosaicjax import recipe_file
    from mosaicjax.show import show

    recipe = recipe_file.load(options.recipe, options.rest).recipe
    if not options.devices:
        import jax

        options.devices = len(jax.devices())
    for line in show(recipe, options.devices):
        print(line)
    return 0


def _plan(options: argparse.Namespace) -> int:
    # A plan needs no device, and must not take one from a run.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from mosaicjax.plan.command import Wanted, plan

    wanted = Wanted(
        topologies=tuple(filter(None, [options.topology, *options.topologies.split(",")])),
        slices=options.slices,
        usd_per_chip_hour=options.usd_per_chip_hour,
        json=options.json,
        picture=options.picture,
        cached=not options.no_cache,
        fit=options.fit,
    )
    return plan(options.recipe, options.rest, wanted, print)


def _sweep(options: argparse.Namespace) -> int:
    environment = dict(os.environ)
    # The runs' processes are to have the devices: this one must take none.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from mosaicjax.sweep.command import sweep

    return sweep(
        options.recipe, options.over, options.rest, options.out, environment, partial(print, flush=True)
    )


def _generate(options: argparse.Namespace) -> int:
    from mosaicjax.finish import write_completions
    from mosaicjax.generate import Sampling

    settings = Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=tuple(options.stop),
    )
    write_completions(options.model, options.prompt, settings, sys.stdout)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from mosaicjax.finish import evaluate_run

    for line in evaluate_run(options.model):
        print(line)
    return 0


def _report(options: argparse.Namespace) -> int:
    from mosaicjax import storage
    from mosaicjax.report.page import names_of, page
    from mosaicjax.report.shown import read

    names = names_of(options.runs)
    shown = [read(run, name) for run, name in zip(options.runs, names, strict=True)]
    storage.write_text(options.out, page(shown, options.title or ", ".join(names)))
    print(f"{options.out}: {len(shown)} run{'s' if len(shown) > 1 else ''}")
    return 0


def _import(options: argparse.Namespace) -> int:
    _start(options)
    from mosaicjax import processes
    from mosaicjax.hub import import_model

    primary = processes.current().primary
    import_model(
        options.source, options.out, dtype=options.dtype, say=print if primary else lambda line: None
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    size = _bytes(options.shard_size)
    from mosaicjax.hub import export_adapter, export_model

    if options.adapter:
        export_adapter(options.model, options.out, base=options.base, step=options.step, say=print)
        return 0
    if options.base:
        raise InputError("--base is of adapters", fix="--adapter")
    export_model(
        options.model, options.out, step=options.step, dtype=options.dtype, shard_bytes=size, say=print
    )
    return 0


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().isdecimal() or int(number) < 1:
        raise InputError("--shard-size", expected="a whole number of KB, MB or GB, as 5GB", got=text)
    return int(number) * units[unit]


if __name__ == "__main__":
    sys.exit(main())
