"""The `mosaicjax serve` command: an inference API on a model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from mosaicjax.errors import InputError
from mosaicjax.serve.limits import KEYS_VARIABLE, Keys, Limits

if TYPE_CHECKING:
    from mosaicjax.mesh import Mesh

LONGEST = 2_048
"""Tokens of a request, where the model was made for no fewer and nobody says it."""


def add_serve(commands: Any, command_of: Callable[..., Any]) -> None:
    """Add the command; `command_of` is how the others are made too."""
    text = "an inference API on a model, for clients of OpenAI's and MosaicML's"
    command = command_of(commands, "serve", _serve, text)
    command.add_argument("model", help="a run, an imported model, or a Hugging Face directory")
    command.add_argument("--host", default="127.0.0.1", help="others than this machine's own need a key")
    command.add_argument("--port", type=int, default=8000, help="0: any that is free")
    command.add_argument("--name", default="", help="of the model to clients (default: the directory's)")
    command.add_argument("--step", type=int, default=-1, help="of the checkpoint (default: the newest)")
    command.add_argument(
        "--keys", default="", metavar="FILE", help=f"API keys, one a line; or commas in {KEYS_VARIABLE}"
    )
    command.add_argument(
        "--template", default="", metavar="NAME|FILE", help="of chats (default: the tokenizer's own)"
    )
    command.add_argument(
        "--mesh", default="fsdp=1", metavar="AXIS=N,...", help="of data, fsdp and tensor; -1: the rest"
    )
    command.add_argument(
        "--usd-per-hour", type=float, help="of all chips, for /metrics (default: the list price)"
    )
    command.add_argument("--log-prompts", action="store_true", help="write prompts to the log")
    sizes = command.add_argument_group("what is compiled and held")
    sizes.add_argument("--rows", type=int, default=32, help="completions written at once")
    sizes.add_argument(
        "--widths",
        default="1,8",
        metavar="N,...",
        help="fewer rows, computed where no more write (%(default)s)",
    )
    sizes.add_argument("--chunk", type=int, default=128, help="tokens of a prompt read at once")
    sizes.add_argument("--page", type=int, default=16, help="tokens in a page of the cache")
    sizes.add_argument("--pages", type=int, default=1_024, help="of the cache")
    sizes.add_argument(
        "--longest",
        type=int,
        default=0,
        help=f"tokens of a prompt and its completion (default: what the model was made for, up to {LONGEST})",
    )
    limits = command.add_argument_group("limits")
    for each in fields(Limits):
        option, text = f"--{each.name.replace('_', '-')}", f"{each.metadata['text']} (%(default)s)"
        limits.add_argument(option, type=int, default=each.default, metavar="N", help=text)


def _serve(options: argparse.Namespace) -> int:
    keys = Keys.read(options.keys, os.environ)
    from mosaicjax.serve.command import Wanted, check_wanted, serve_model
    from mosaicjax.serve.engine import Sizes

    limits = Limits(**{each.name: getattr(options, each.name) for each in fields(Limits)})
    check_wanted(options.host, keys, limits)
    wanted = Wanted(
        model=options.model,
        host=options.host,
        port=options.port,
        name=options.name,
        template=options.template,
        step=options.step,
        mesh=mesh_of(options.mesh),
        sizes=Sizes(
            options.rows, options.chunk, options.page, options.pages, _longest(options), _widths(options)
        ),
        limits=limits,
        keys=keys,
        usd_per_hour=options.usd_per_hour,
        log_prompts=options.log_prompts,
    )
    return serve_model(wanted, partial(print, flush=True))


def _longest(options: argparse.Namespace) -> int:
    from mosaicjax.harness.subject import model_length

    longest: int = options.longest or min(model_length(options.model), LONGEST)
    return longest


def _widths(options: argparse.Namespace) -> tuple[int, ...]:
    """The widths below the rows, of which there may be fewer."""
    words = [word for word in options.widths.split(",") if word]
    if not all(word.isdecimal() and int(word) for word in words):
        raise InputError("--widths", expected="numbers from 1 between commas, as 1,8", got=options.widths)
    return tuple(sorted({int(word) for word in words if int(word) < options.rows}))


def mesh_of(text: str) -> Mesh:
    """A mesh as the command line has it.

    Raises:
        InputError: an unknown axis, one that comes twice, or a size that is no number.
    """
    from mosaicjax.mesh import Mesh

    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in ("data", "fsdp", "tensor") or name in sizes or not size.removeprefix("-").isdecimal():
            raise InputError("--mesh", expected="data, fsdp and tensor, as fsdp=2,tensor=4", got=text)
        sizes[name] = int(size)
    return Mesh(data=sizes.get("data", 1), fsdp=(sizes.get("fsdp", 1),), tensor=sizes.get("tensor", 1))
