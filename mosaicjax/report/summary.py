"""What a run came to: tokens, where its time went, held-out loss, and the bill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mosaicjax import storage
from mosaicjax.hardware import Price, cost_usd
from mosaicjax.log import encode
from mosaicjax.report.live import format_count, format_duration, format_usd

SUMMARY = "summary.json"
"""The name of the summary's file within a run directory."""


@dataclass(frozen=True)
class Seconds:
    """Where the wall clock's time went; what no part claims is start-up and the like.

    `total` counts from the start of the process to the end of the run, since that is what is paid for.
    """

    total: float
    compile: float
    evaluate: float
    save: float
    data_wait: float
    train: float

    @property
    def other(self) -> float:
        """Time that none of the parts claims."""
        return self.total - (self.compile + self.evaluate + self.save + self.data_wait + self.train)

    @property
    def goodput(self) -> float:
        """Share of the time that went into steps which the model at hand has behind it.

        Compiling, evaluation, saves, waits for data, start-up and restarts are the rest, and steps that were
        done again after a kill.
        """
        return self.train / self.total if self.total > 0 else math.nan


@dataclass(frozen=True)
class Heldout:
    """Loss on held-out text: nats a token, and how many bytes of text a token stands for."""

    loss: float
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss a token; it depends on the tokenizer."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            # A diverged run must still get its summary.
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss a byte of text, in bits: comparable between tokenizers."""
        return self.loss / math.log(2) / self.bytes_per_token

    def __str__(self) -> str:
        """In a line."""
        return f"{self.loss:.4f}, perplexity {self.perplexity:.2f}, {self.bits_per_byte:.4f} bits/byte"

    def values(self) -> dict[str, float]:
        """What a summary holds of it."""
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True)
class HeldoutPairs:
    """Loss on held-out preference pairs, nats a pair, and what else was measured of them, by name."""

    loss: float
    measures: Mapping[str, float]

    def __str__(self) -> str:
        """In a line."""
        named = (f"{name} {value:.4f}" for name, value in self.measures.items())
        return ", ".join([f"{self.loss:.4f}", *named])

    def values(self) -> dict[str, float]:
        """What a summary holds of it."""
        return {"loss": self.loss, **self.measures}


@dataclass(frozen=True)
class Planned:
    """What `mosaicjax plan` said of the same program before the run.

    Units: tokens a second of all chips, dollars a million tokens while steps run.
    """

    topology: str
    tokens_per_second: float
    usd_per_million_tokens: float


@dataclass(frozen=True)
class Outcome:
    """All that a summary is made of.

    `chip` is the name of the chip and `chips` how many were held; `price` is None where it is unknown, and
    `heldout` where nothing was evaluated, `planned` where no plan of this program is known here.
    Steps, tokens and seconds are those of the whole run, earlier processes included.
    """

    steps: int
    tokens: int
    seconds: Seconds
    train_loss: float
    heldout: Heldout | HeldoutPairs | None
    chip: str
    chips: float
    price: Price | None
    planned: Planned | None = None


def summarize(outcome: Outcome) -> dict[str, Any]:
    """The summary as JSON holds it.

    Units: `seconds` are seconds; `tokens_per_second` is over all chips, `training` over the time in steps and
        waiting for data, `overall` over all that is paid for; losses are nats a token, or a preference pair;
        `cost` is dollars.
    """
    seconds = outcome.seconds
    stepping = seconds.train + seconds.data_wait
    summary: dict[str, Any] = {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": encode(
            {
                "total": seconds.total,
                "compile": seconds.compile,
                "evaluate": seconds.evaluate,
                "save": seconds.save,
                "data_wait": seconds.data_wait,
                "train": seconds.train,
                "other": seconds.other,
            }
        ),
        "tokens_per_second": encode(
            {"training": _rate(outcome.tokens, stepping), "overall": _rate(outcome.tokens, seconds.total)}
        ),
        **encode({"goodput": seconds.goodput}),
        "hardware": {"chip": outcome.chip, "chips": outcome.chips},
        "loss": encode({"train": outcome.train_loss}),
        "cost": None,
        "planned": None if outcome.planned is None else asdict(outcome.planned),
        "heldout": None,
    }
    if outcome.heldout is not None:
        summary["heldout"] = encode(outcome.heldout.values())
    if outcome.price is not None:
        usd = cost_usd(seconds.total, outcome.chips, outcome.price)
        summary["cost"] = {
            "usd": usd,
            "usd_per_million_tokens": usd / outcome.tokens * 1e6 if outcome.tokens else None,
            "usd_per_chip_hour": outcome.price.usd_per_chip_hour,
            "source": outcome.price.source,
            "date": outcome.price.date,
        }
    return summary


def summary_line(outcome: Outcome) -> str:
    """The summary in one line for a terminal."""
    seconds = outcome.seconds
    parts = [
        f"{format_count(outcome.tokens)} tokens in {format_duration(seconds.total)} ({_shares(seconds)})",
        f"{format_count(_rate(outcome.tokens, seconds.train + seconds.data_wait))} tokens/s while training,"
        f" goodput {seconds.goodput:.0%}",
    ]
    if outcome.heldout is None:
        parts.append(f"train loss {outcome.train_loss:.4f}")
    else:
        parts.append(f"held-out loss {outcome.heldout}")
    if outcome.price is None:
        parts.append(f"no price known for {outcome.chip}")
    else:
        parts.append(
            f"{format_usd(cost_usd(seconds.total, outcome.chips, outcome.price))} at"
            f" {format_usd(outcome.price.usd_per_chip_hour)} a chip hour"
            f" ({outcome.price.source}, {outcome.price.date})"
        )
    if outcome.planned is not None:
        parts.append(_beside_plan(outcome, outcome.planned))
    return "; ".join(parts)


def _beside_plan(outcome: Outcome, planned: Planned) -> str:
    """The plan's figures and, of the same kind, the run's: while steps ran."""
    stepping = outcome.seconds.train + outcome.seconds.data_wait
    speed = _rate(outcome.tokens, stepping)
    beside = f"planned on {planned.topology}: {format_count(planned.tokens_per_second)} tokens/s"
    if outcome.price is not None and outcome.tokens:
        usd = cost_usd(stepping, outcome.chips, outcome.price) / outcome.tokens * 1e6
        beside += f" and ${planned.usd_per_million_tokens:.4f} a million, measured in steps ${usd:.4f}"
    return f"{beside} ({planned.tokens_per_second / speed:.2f} x the measured speed)"


def write_summary(run_dir: str, outcome: Outcome) -> None:
    """Write `summary.json` into a run directory, whole or not at all."""
    text = json.dumps(summarize(outcome), indent=2, allow_nan=False, ensure_ascii=False)
    storage.write_text(storage.join(run_dir, SUMMARY), text + "\n")


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else math.nan


def _shares(seconds: Seconds) -> str:
    """Each part's share of the whole time, largest first, what rounds to nothing left out."""
    parts = {
        "training": seconds.train,
        "compile": seconds.compile,
        "evaluation": seconds.evaluate,
        "saving": seconds.save,
        "data wait": seconds.data_wait,
        "other": seconds.other,
    }
    shares = {name: part / seconds.total for name, part in parts.items()} if seconds.total > 0 else {}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.005)
