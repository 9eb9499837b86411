"""The one kind of error that a user can put right."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; one line says what, and the way out.

    The command line prints the message alone and exits with code 2; `--debug` adds the traceback.
    Any other exception is a defect of ours and keeps its traceback.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(" ".join(str(part).split()) for part in parts))


class Diverged(Exception):
    """A loss or gradient that is not finite; the run stopped before it touched the weights.

    The command line prints the message alone and exits with code 1.
    """
