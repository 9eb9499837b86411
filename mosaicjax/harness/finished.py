"""Finished tasks on disk: what an evaluation that was killed need not do again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from mosaicjax import storage
from mosaicjax.errors import InputError

FORMAT = 1
TASKS = "tasks"


class Finished:
    """A directory of results, one file a task, each with the settings that it was done with.

    An empty `out` keeps nothing.
    """

    def __init__(self, out: str) -> None:
        self.out = out

    def path(self, task: str) -> str:
        """Where a task's results lie."""
        return storage.join(self.out, TASKS, quote(task, safe="") + ".json")

    def read(self, task: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """A task's results, or None where it has yet to be done.

        Raises:
            InputError: it was done with other settings or another model, or the file cannot be read.
        """
        if not self.out or not storage.exists(self.path(task)):
            return None
        try:
            saved = json.loads(storage.read_text(self.path(task)))
            before, results = dict(saved["settings"]), dict(saved["results"])
            known = saved["format"] == FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path(task)} holds no results of a task", got=error, fix="remove it"
            ) from error
        if not known:
            raise InputError(f"{self.path(task)} was written by another version", expected=f"format {FORMAT}")
        now = json.loads(json.dumps(dict(settings)))
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                raise InputError(
                    f"{self.out} holds {task} done with another {name}",
                    expected=before.get(name),
                    got=now.get(name),
                    fix=f"another --out, the same {name}, or remove {self.path(task)}",
                )
        return results

    def write(self, task: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Keep a task's results, whole or not at all."""
        if self.out:
            content = {"format": FORMAT, "settings": dict(settings), "results": dict(results)}
            storage.write_text(self.path(task), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


class Live:
    """How far the task under way is: told anew with each tenth of its requests."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._told = 0

    def __call__(self, kind: str, done: int, total: int) -> None:
        """See `Progress`."""
        tenth = 10 * done // max(total, 1)
        if tenth < self._told or done == total:
            self._told = 0
        if tenth > self._told and done < total:
            self._told = tenth
            self._say(f"  {kind}: {done:,} of {total:,}")
