"""The model card of an export: what is known of the model, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mosaicjax.hub.model_dir import Imported
from mosaicjax.hub.origin import Origin, Trained
from mosaicjax.methods.dpo import ACCURACY
from mosaicjax.report.live import format_duration, format_usd
from mosaicjax.spec import DtypeName

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mosaicjax
---
"""

_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))
```
"""


def card(origin: Origin, dtype: DtypeName) -> str:
    """The text of a `README.md`: front matter, a table of facts, and how it was made."""
    history = origin.history
    named = history.loaded.name if isinstance(history, Trained) else str(history.source.get("name", "model"))
    spec = origin.family.decoder().spec()
    facts = {
        "Family": type(origin.family).__module__.rsplit(".", 1)[-1],
        "Parameters": f"{spec.count():,}",
        "Weights in": dtype,
        "Positions": f"{origin.length:,}" if origin.length else "",
    }
    if isinstance(history, Trained):
        facts |= _trained(origin, history)
        rest = "\n".join(_recipe(origin, history))
    else:
        facts |= _imported(history)
        rest = "The weights were imported and exported again with mosaicjax; they were not trained by it.\n"
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items() if value)
    return f"{_FRONT}\n# {named}\n\n| | |\n|---|---|\n{table}\n\n{rest}\n{_USE}"


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


def _trained(origin: Origin, history: Trained) -> dict[str, str]:
    """The facts of a run, as far as its directory has them."""
    recipe, ran, summary = history.loaded.recipe, history.surroundings, history.summary
    tokens = origin.cursor.get("tokens")
    phases = [phase for phase, _ in recipe.in_phases]
    stores = [path for phase in phases for path in phase.data.stores().values()]
    shapes = ", then ".join(f"{phase.batch:,} rows of {phase.seq:,} tokens" for phase in phases)
    # The summary is of the run's end; of an earlier step it says nothing.
    ended = summary if summary.get("steps") == origin.step else {}
    hardware, devices = ended.get("hardware") or {}, ran.get("devices") or {}
    seconds = (ended.get("seconds") or {}).get("total")
    return {
        "Data": ", ".join(dict.fromkeys(f"token store {path}" for path in stores)),
        "Digest of the training tokens": str(ran.get("data", "")),
        "Trained on": "" if tokens is None else f"{tokens:,} tokens",
        "Steps": f"{origin.step:,} of {shapes}",
        "Started from": recipe.init_from or f"random weights, seed {recipe.seed}",
        **_losses(origin, history, ended),
        "Tasks": _tasks(origin, history),
        "Optimizer": str(recipe.optimizer),
        "Methods": ", ".join(map(str, recipe.methods)),
        "Computed in": recipe.dtypes.compute,
        "Hardware": _hardware(hardware, devices),
        "Time": "" if not isinstance(seconds, int | float) else format_duration(seconds),
        "Goodput": _goodput(ended.get("goodput")),
        "Cost": _cost(ended.get("cost")),
        "Commit": str(ran.get("git", "")),
        "Python": str(ran.get("python", "")),
        "Packages": ", ".join(f"{name} {version}" for name, version in (ran.get("packages") or {}).items()),
    }


def _losses(origin: Origin, history: Trained, ended: Mapping[str, Any]) -> dict[str, str]:
    """Losses at the exported step: the summary's at the end, else the rows of metrics of that step."""
    rows = {row["kind"]: row for row in history.rows if row["step"] == origin.step}
    held = ended.get("heldout") or {}
    nats, bits = held.get("loss"), held.get("bits_per_byte")
    trained = (ended.get("loss") or {}).get("train", rows.get("train", {}).get("loss"))
    losses = {}
    if ACCURACY in {**held, **rows.get("train", {})}:
        return _of_pairs(trained, held)
    if isinstance(trained, int | float):
        losses["Training loss"] = f"{trained:.4f} nats a token (last step)"
    if isinstance(nats, int | float):
        losses["Held-out loss"] = f"{nats:.4f} nats a token, perplexity {math.exp(min(nats, 700)):.2f}"
    if isinstance(bits, int | float):
        losses["Held-out bits"] = f"{bits:.4f} bits a byte"
    return losses


def _of_pairs(trained: Any, held: Mapping[str, Any]) -> dict[str, str]:
    """Losses of preference pairs."""
    losses = {}
    if isinstance(trained, int | float):
        losses["Training loss"] = f"{trained:.4f} nats a preference pair (last step)"
    if isinstance(held.get("loss"), int | float):
        told = f", {held[ACCURACY]:.1%} of pairs told apart"
        losses["Held-out loss"] = f"{held['loss']:.4f} nats a preference pair{told}"
    return losses


def _tasks(origin: Origin, history: Trained) -> str:
    """The scores that the loop took at the exported step."""
    rows = [row for row in history.rows if (row["kind"], row["step"]) == ("tasks", origin.step)]
    scores = {name: value for row in rows for name, value in row.items() if "/" in name}
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(scores.items()))


def _hardware(hardware: Mapping[str, Any], devices: Mapping[str, Any]) -> str:
    if hardware:
        return f"{hardware['chips']:g} x {hardware['chip']}"
    return f"{devices['count']} x {devices['kind']}" if devices else ""


def _goodput(share: Any) -> str:
    return f"{share:.1%} of the time in steps" if isinstance(share, int | float) else ""


def _cost(cost: Mapping[str, Any] | None) -> str:
    if not cost:
        return "unknown: no price was given for this hardware"
    rate = format_usd(cost["usd_per_chip_hour"])
    per_million = cost.get("usd_per_million_tokens")
    each = "" if per_million is None else f", {format_usd(per_million)} a million tokens"
    return f"{format_usd(cost['usd'])}{each}, at {rate} a chip hour ({cost['source']}, {cost['date']})"


def _recipe(origin: Origin, history: Trained) -> Iterator[str]:
    """How a prompt begins, and the recipe's file."""
    tokenizer = origin.tokenizer
    if tokenizer is not None:
        yield (
            f"Each training document came after the token `{tokenizer.separator_token}`, and so does a"
            " prompt: the tokenizer puts it there.\n"
        )
    if history.loaded.source:
        yield "## Recipe\n"
        yield f"```python\n{history.loaded.source.rstrip()}\n```\n"


def _imported(imported: Imported) -> dict[str, str]:
    """What is known of a model that was not trained here."""
    source = imported.source
    return {
        "Imported from": str(source.get("name", "")),
        "Model type there": str(source.get("model_type", "")),
        "Digest of the files there": str(source.get("digest", "")),
        "Imported with": f"mosaicjax {source.get('mosaicjax', '')} on {source.get('imported', '')}",
        "Keys of its config.json that were not read": ", ".join(source.get("unread", [])),
    }
