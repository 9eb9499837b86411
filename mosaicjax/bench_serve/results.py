"""What a load came to: tokens a second, how soon text came, and what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mosaicjax.bench_serve.client import OK, Answer

QUANTILES = (50, 90, 99)


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures of answers that were asked for in one run.

    Rates are over the time from the first request sent to the last answer's end, and count the tokens of
    whole answers. `first_token` counts from before the connection is made to the first piece of text,
    `between` is the time from one piece to the next, of all answers together; `per_token` is each answer's
    mean behind its first piece, which counts the tokens of a piece that holds several.

    Units: seconds.
    """
    whole = [each for each in answers if each.whole]
    began = min((each.sent for each in answers), default=0.0)
    seconds = max((each.ended for each in answers), default=0.0) - began
    counted = bool(whole) and all(each.tokens >= 0 for each in whole)
    written = sum(_tokens(each) for each in whole)
    read = sum(max(0, each.prompt_tokens) for each in whole)
    gaps = (
        later - sooner for each in whole for sooner, later in zip(each.times, each.times[1:], strict=False)
    )
    means = (
        (each.times[-1] - each.times[0]) / (_tokens(each) - 1)
        for each in whole
        if len(each.times) > 1 and _tokens(each) > 1
    )
    return {
        "requests": len(answers),
        "answered": len(whole),
        "errors": errors(answers),
        "seconds": seconds,
        "prompt_tokens": read,
        "written_tokens": written,
        "tokens_counted_by": "server" if counted else "pieces",
        "written_tokens_per_second": written / seconds if seconds else 0.0,
        "prompt_tokens_per_second": read / seconds if seconds else 0.0,
        "requests_per_second": len(whole) / seconds if seconds else 0.0,
        "first_token_seconds": spread(each.times[0] - each.sent for each in whole if each.times),
        "between_seconds": spread(gaps),
        "per_token_seconds": spread(means),
        "answer_seconds": spread(each.ended - each.sent for each in whole),
    }


def _tokens(answer: Answer) -> int:
    return answer.tokens if answer.tokens >= 0 else len(answer.times)


def errors(answers: Iterable[Answer]) -> dict[str, int]:
    """How many came to no whole answer, by status, or by what happened where that says nothing."""
    failed = (each for each in answers if not each.whole)
    kinds = Counter(str(each.status) if each.status not in (0, OK) else each.failure for each in failed)
    return dict(sorted(kinds.items()))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean and quantiles, between neighbours in proportion; empty where there are no values."""
    found = list(values)
    if not found:
        return {}
    quantiles = np.percentile(found, QUANTILES).tolist()
    named = {f"p{share}": value for share, value in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": float(np.mean(found)), **named}


ROWS = {
    "first token": "first_token_seconds",
    "between pieces": "between_seconds",
    "a token": "per_token_seconds",
    "whole answer": "answer_seconds",
}


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same for a screen."""
    read, pieces = f"{found['prompt_tokens_per_second']:,.1f}", found["tokens_counted_by"] == "pieces"
    said = [
        f"{found['answered']} of {found['requests']} answered in {found['seconds']:.2f} s,"
        f" {found['requests_per_second']:.2f} a second",
        f"{found['written_tokens_per_second']:,.1f} tokens/s written, {read} read"
        + (" (a token a piece: the server does not count)" if pieces else ""),
        f"{'milliseconds':<16}" + "".join(f"{name:>10}" for name in ("p50", "p90", "p99", "mean")),
    ]
    for name, key in ROWS.items():
        values = found[key]
        if values:
            cells = (f"{1_000 * values[each]:>10,.1f}" for each in ("p50", "p90", "p99", "mean"))
            said.append(f"{name:<16}" + "".join(cells))
    said += [f"error {kind}: {count}" for kind, count in found["errors"].items()]
    return said
