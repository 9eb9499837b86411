"""From a model's directory to a server."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from mosaicjax.errors import InputError
from mosaicjax.generate import load_run
from mosaicjax.hardware import Price, find_chip
from mosaicjax.hub.model_dir import Kind, kind_of
from mosaicjax.mesh import Layout, Mesh
from mosaicjax.serve.chatting import chatter_of
from mosaicjax.serve.engine import Engine, Sizes
from mosaicjax.serve.limits import Keys, Limits, check_host

if TYPE_CHECKING:
    from mosaicjax.serve.service import Service

NEEDED = ("fastapi", "httptools", "uvicorn")
"""Packages of the extra `serve`."""


@dataclass(frozen=True)
class Wanted:
    """A server as the command line says it; `usd_per_hour` None is the chips' list price."""

    model: str
    host: str
    port: int
    name: str
    template: str
    step: int
    mesh: Mesh
    sizes: Sizes
    limits: Limits
    keys: Keys
    usd_per_hour: float | None
    log_prompts: bool


def check_wanted(host: str, keys: Keys, limits: Limits) -> None:
    """Refuse what cannot be served, before any device starts.

    Raises:
        InputError: packages that are not there, other machines without a key, or limits that mean nothing.
    """
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(f"serving needs {', '.join(lacking)}", fix="pip install 'mosaicjax[serve]'")
    check_host(host, keys)
    limits.check()


def serve_model(wanted: Wanted, say: Callable[[str], None]) -> int:
    """Serve a model until SIGTERM or Ctrl-C; the exit code.

    Raises:
        InputError: no model there, or one that does not fit what is wanted.
    """
    check_wanted(wanted.host, wanted.keys, wanted.limits)
    wanted.sizes.check()
    if wanted.usd_per_hour is not None:
        Price(wanted.usd_per_hour, "the command line", "")
    from mosaicjax.serve.server import bind, serve

    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("mosaicjax.serve").setLevel(logging.INFO)
    with bind(wanted.host, wanted.port) as sock:
        serve(_service(wanted), sock, say)
    return 0


def _service(wanted: Wanted) -> Service:
    """The model, with all that is asked of it; the weights as they were read are not kept beside it."""
    from mosaicjax.serve.service import Service

    decoder, weights, layout, dtypes, tokenizer = load_run(wanted.model, wanted.mesh, wanted.step)
    # A run reads documents behind a separator, conversations too; templates of others bring their own.
    before = tokenizer.before if kind_of(wanted.model) is Kind.RUN else ()
    return Service(
        Engine(decoder, weights, layout, dtypes, tokenizer, wanted.sizes),
        wanted.name or PurePosixPath(wanted.model).name or wanted.model,
        chatter=chatter_of(wanted.template, tokenizer, before),
        limits=wanted.limits,
        keys=wanted.keys,
        usd_per_hour=_price(layout) if wanted.usd_per_hour is None else wanted.usd_per_hour,
        log_prompts=wanted.log_prompts,
    )


def _price(layout: Layout) -> float | None:
    """What the chips of a layout cost an hour, by their list price; None where there is none."""
    devices = list(layout.mesh.devices.flat)
    chip = find_chip(devices[0].device_kind)
    if chip is None or chip.price is None:
        return None
    return chip.price.usd_per_chip_hour * chip.chips(len(devices))
