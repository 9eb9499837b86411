"""The `mosaicjax bench-serve` command: a load for any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from mosaicjax import storage
from mosaicjax.errors import InputError

KEY = "MOSAICJAX_API_KEY"


def add_bench_serve(commands: Any, command_of: Callable[..., Any]) -> None:
    """Add the command; `command_of` is how the others are made too."""
    text = "how fast a server writes, and how soon: any that speaks OpenAI's HTTP"
    command = command_of(commands, "bench-serve", _bench_serve, text)
    command.add_argument("url", metavar="URL", help="as http://127.0.0.1:8000")
    command.add_argument("--requests", type=int, default=64, metavar="N")
    command.add_argument("--clients", type=int, default=8, metavar="N", help="each asks again once answered")
    command.add_argument(
        "--rate", type=float, default=0.0, metavar="PER_SECOND", help="Poisson arrivals instead of clients"
    )
    command.add_argument(
        "--prompt-length", default="128", metavar="N|A:B", help="in words; drawn from A to B"
    )
    command.add_argument(
        "--vocabulary", type=int, default=0, metavar="N", help="prompts of token ids below N instead of words"
    )
    command.add_argument("--max-tokens", default="64", metavar="N|A:B", help="to write; drawn from A to B")
    command.add_argument(
        "--prompts",
        default="",
        metavar="FILE",
        help='.jsonl lines of {"prompt": ...} or {"messages": [...]}, with "max_tokens" or without',
    )
    command.add_argument("--api", choices=("completions", "chat"), default="completions")
    command.add_argument("--model", default="", help="(default: the first that the server names)")
    command.add_argument(
        "--key", default="", metavar="FILE", help=f"a file with the API key (default: ${KEY}, or none)"
    )
    command.add_argument("--temperature", type=float, default=0.0)
    command.add_argument(
        "--extra", default="{}", metavar="JSON", help="""more fields of each request, as '{"top_k": 40}'"""
    )
    command.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals")
    command.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of one request")
    command.add_argument("--json", default="", metavar="FILE", help="all figures, as JSON")


def _bench_serve(options: argparse.Namespace) -> int:
    from mosaicjax.bench_serve.command import Wanted, bench_serve

    if options.seed < 0:
        raise InputError("--seed", expected="0 or more", got=options.seed)
    wanted = Wanted(
        url=options.url,
        prompts=options.prompts,
        prompt_length=options.prompt_length,
        max_tokens=options.max_tokens,
        vocabulary=options.vocabulary,
        requests=options.requests,
        clients=options.clients,
        rate=options.rate,
        api=options.api,
        model=options.model,
        key=_key(options.key),
        temperature=options.temperature,
        extra=_object(options.extra),
        seed=options.seed,
        timeout_seconds=options.timeout,
        json=options.json,
    )
    return bench_serve(wanted, partial(print, flush=True))


def _key(path: str) -> str:
    if not path:
        return os.environ.get(KEY, "")
    words = storage.read_text(path).split()
    if len(words) != 1:
        raise InputError(f"{path}", expected="one API key", got=f"{len(words)} words")
    return words[0]


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError("--extra", expected="a JSON object", got=error) from error
    if not isinstance(found, dict):
        raise InputError("--extra", expected="a JSON object", got=text)
    return found
