"""Who may ask, how much, and how many at once."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from mosaicjax.errors import InputError
from mosaicjax.serve.problems import Problem, full, unready

KEYS_VARIABLE = "MOSAICJAX_API_KEYS"
LEAST_KEY = 8

Key = int | None
"""Which of the keys; None where there are none."""


def _limit(default: int, text: str) -> int:
    made: int = field(default=default, metadata={"text": text})
    return made


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, how many may be in flight, and how long anything may take.

    Tokens are limited by the engine's `longest` too. In flight are completions that are written or wait for
    it: a request counts once for each that it asks for.
    """

    body_bytes: int = _limit(2**20, "of a request's body")
    prompt_tokens: int = _limit(131_072, "of a prompt")
    max_tokens: int = _limit(131_072, "of a completion")
    choices: int = _limit(64, "completions of a request: n times its prompts")
    stops: int = _limit(16, "stop strings")
    in_flight: int = _limit(256, "completions at once; beyond them the answer is 429")
    in_flight_per_key: int = _limit(128, "completions of one API key at once")
    request_seconds: int = _limit(600, "until a request is broken off")
    read_seconds: int = _limit(30, "that a client may take to send a request")
    write_seconds: int = _limit(30, "that a client may read nothing of what waits for it")

    def check(self) -> None:
        """Refuse limits that mean nothing.

        Raises:
            InputError: with the limit, expected and got.
        """
        for each in fields(self):
            if getattr(self, each.name) < 1:
                raise InputError(f"the limit {each.name}", expected="1 or more", got=getattr(self, each.name))


DEFAULTS = Limits()


class Keys:
    """API keys, kept as digests; without any everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        for key in keys:
            if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError("an API key", expected=f"{LEAST_KEY} or more visible ASCII characters")
        self._digests = [_digest(key) for key in dict.fromkeys(keys)]

    @classmethod
    def read(cls, path: str, environment: Mapping[str, str]) -> Keys:
        """Those of a file, one a line (# begins a comment), or of the environment, between commas.

        Raises:
            InputError: no such file, none in it, both places, or keys that are too short.
        """
        named = environment.get(KEYS_VARIABLE, "")
        if not path:
            return cls([key for each in named.split(",") if (key := each.strip())])
        if named:
            raise InputError(f"API keys come from --keys and {KEYS_VARIABLE}", fix="one of them")
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the API keys of {path} cannot be read", got=error) from error
        keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
        if not keys:
            raise InputError(f"{path} holds no API key", expected="one a line")
        return cls(keys)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._digests)

    def number(self, authorization: str | None) -> Key:
        """Which key a request's `Authorization` shows; all are compared, however soon one fits.

        Raises:
            Problem: 401, none that is known.
        """
        if not self._digests:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = _digest(key.strip()), None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = number
        if found is None or scheme.lower() != "bearer":
            raise Problem(
                401,
                "no valid API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


NO_KEYS = Keys(())


def _digest(key: str) -> bytes:
    # Of one length, so that the comparison's time tells nothing of the keys'.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, keys: Keys) -> None:
    """Refuse to serve other machines without keys.

    Raises:
        InputError: no key.
    """
    if not len(keys) and not is_loopback(host):
        raise InputError(
            f"--host {host} serves other machines, and there is no API key",
            fix=f"--keys FILE or {KEYS_VARIABLE}; or --host 127.0.0.1",
        )


def check_named(host: str | None) -> None:
    """Refuse a request that names another host: a web page that had its own name point here.

    Raises:
        Problem: 403.
    """
    name = (host or "").rpartition("]")[0].removeprefix("[") or (host or "").partition(":")[0]
    if not is_loopback(name):
        raise Problem(403, "without API keys only requests to localhost are answered", code="wrong_host")


class InFlight:
    """How many completions are in flight, in all and by key; of the event loop's thread alone."""

    def __init__(self, limits: Limits) -> None:
        self.total = 0
        self.draining = False
        self.when_empty: Callable[[], None] = lambda: None
        self._limits = limits
        self._by_key: Counter[Key] = Counter()

    def hold(self, key: Key) -> Held:
        """One place, for a request that has come.

        Raises:
            Problem: 503 where none is taken any more, 429 where there is no place.
        """
        if self.draining:
            raise unready("the server is stopping", "draining")
        self._add(key, 1)
        return Held(self, key)

    def drain(self) -> None:
        """Take no more; `when_empty` is called once the last has left."""
        self.draining = True
        if not self.total:
            self.when_empty()

    def _add(self, key: Key, count: int) -> None:
        if self.total + count > self._limits.in_flight:
            raise full(f"{self.total} of {self._limits.in_flight} completions are in flight")
        most = self._limits.in_flight_per_key
        if key is not None and self._by_key[key] + count > most:
            raise full(f"{self._by_key[key]} of {most} completions of this API key are in flight")
        self.total += count
        self._by_key[key] += count

    def _leave(self, key: Key, count: int) -> None:
        self.total -= count
        self._by_key[key] -= count
        if self.draining and not self.total:
            self.when_empty()


class Held:
    """A request's places, free again at the end of the `with`."""

    def __init__(self, of: InFlight, key: Key) -> None:
        self._of, self._key, self._count = of, key, 1

    def grow(self, count: int) -> None:
        """Have so many places, one at least.

        Raises:
            Problem: 429, there are not so many.
        """
        self._of._add(self._key, count - self._count)
        self._count = count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._of._leave(self._key, self._count)
