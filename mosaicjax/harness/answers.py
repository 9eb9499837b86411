"""Whether answers to in-context-learning tasks are right, as llm-foundry counts it.

Source: llm-foundry, `llmfoundry/eval/metrics/nlp.py` (2025-07-21).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from mosaicjax.harness.prompts import Format
from mosaicjax.harness.score import Score

_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(answer: str) -> str:
    """In small letters, without punctuation, articles and blanks that say nothing."""
    text = answer.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def right_text(written: str, accepted: Sequence[str], form: Format) -> bool:
    """Whether a text begins with an accepted answer, once what is around the answer is taken off.

    The answer ends before the first of the strings that stop it, and begins behind the last delimiter of a
    chain of thought.
    """
    for stop in form.early_stopping_criteria:
        written = written.split(stop)[0]
    if form.cot_delimiter:
        written = written.split(form.cot_delimiter)[-1]
    clean = normalized if form.do_normalization else str.strip
    return any(clean(written).startswith(clean(answer)) for answer in accepted)


def chosen(scores: Sequence[Score], tokens: Sequence[int]) -> int:
    """The number of the option with the least perplexity a token; the first of equals."""
    per_token = [-score.total / count for score, count in zip(scores, tokens, strict=True)]
    return per_token.index(min(per_token))
