"""Transformers' `generate`, a prompt at a time or in batches, greedy, on the CPU.

    python benchmarks/peers/transformers_generate.py MODEL ATTENTION

Reads a JSON object a line: `prompts` (token ids), `max_tokens`, `batch` (rows of a call), `threads`. Writes
one for each: `calls`, a list of {"began", "times", "ended"} in seconds from the first call's beginning, and
`tokens`, those written behind each prompt. What else is said goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class Times(BaseStreamer):
    """When each token came; the first thing that a streamer is given is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        """See `BaseStreamer.put`."""
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        """See `BaseStreamer.end`."""


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with padding in front, and which of it is none."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def work(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """One job."""
    torch.set_num_threads(job["threads"])
    prompts, size = job["prompts"], job["batch"]
    calls, tokens = [], []
    start = time.perf_counter()
    for first in range(0, len(prompts), size):
        ids, mask = padded(prompts[first : first + size])
        heard, began = Times(), time.perf_counter() - start
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=job["max_tokens"],
                do_sample=False,
                pad_token_id=0,
                streamer=heard,
            )
        ended = time.perf_counter() - start
        calls.append({"began": began, "times": [at - start for at in heard.times], "ended": ended})
        tokens += written[:, ids.shape[1] :].tolist()
    return {"calls": calls, "tokens": tokens}


def main() -> None:
    folder, attention = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    )
    model.eval()
    said, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ready": True}), file=said, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(model, json.loads(line))), file=said, flush=True)


if __name__ == "__main__":
    main()
