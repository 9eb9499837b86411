"""A GPT in PyTorch: plain modules, or Transformers' GPT-2; its settings as `cost_per_token.py` gives them.

    python benchmarks/peers/pytorch_gpt.py WORK SETTINGS      # WORK/shape.json, weights.npz, rows.npy

Prints one JSON object a line: the count of parameters, then each step's loss and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, embed: int, heads: int, mlp: int, math_attention: bool) -> None:
        super().__init__()
        self.heads, self.math_attention = heads, math_attention
        self.attention_norm, self.mlp_norm = nn.LayerNorm(embed), nn.LayerNorm(embed)
        self.qkv, self.out = nn.Linear(embed, 3 * embed), nn.Linear(embed, embed)
        self.up, self.down = nn.Linear(embed, mlp), nn.Linear(mlp, embed)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x and the result [B, L, D]."""
        batch, length, embed = x.shape
        parts = self.qkv(self.attention_norm(x)).split(embed, dim=-1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        backend = (
            torch.nn.attention.SDPBackend.MATH
            if self.math_attention
            else torch.nn.attention.SDPBackend.FLASH_ATTENTION
        )
        with torch.nn.attention.sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Gpt(nn.Module):
    """Learned positions, biases, tied embeddings; gives the mean loss."""

    def __init__(self, shape: dict[str, int], math_attention: bool) -> None:
        super().__init__()
        embed = shape["embed"]
        self.tokens, self.positions = (
            nn.Embedding(shape["vocab"], embed),
            nn.Embedding(shape["positions"], embed),
        )
        self.blocks = nn.ModuleList(
            Block(embed, shape["heads"], shape["mlp"], math_attention) for _ in range(shape["layers"])
        )
        self.norm = nn.LayerNorm(embed)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Shapes: both [B, L]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain(shape: dict[str, int], weights: dict[str, np.ndarray], settings: dict[str, Any]) -> nn.Module:
    """The plain model with the given weights."""
    model = Gpt(shape, settings.get("attention") == "math")
    named = {
        "tokens.weight": weights["tokens"],
        "positions.weight": weights["positions"],
        "norm.weight": weights["norm/scale"],
        "norm.bias": weights["norm/bias"],
    }
    for n in range(shape["layers"]):
        at = {name.removeprefix("layers/"): x[n] for name, x in weights.items() if name.startswith("layers/")}
        named |= {
            f"blocks.{n}.qkv.weight": np.concatenate([at[p] for p in ("query", "key", "value")], axis=1).T,
            f"blocks.{n}.qkv.bias": np.concatenate([at[f"{p}_bias"] for p in ("query", "key", "value")]),
        }
        for part in ("out", "up", "down"):
            named |= {f"blocks.{n}.{part}.weight": at[part].T, f"blocks.{n}.{part}.bias": at[f"{part}_bias"]}
        for norm in ("attention_norm", "mlp_norm"):
            named |= {
                f"blocks.{n}.{norm}.weight": at[f"{norm}/scale"],
                f"blocks.{n}.{norm}.bias": at[f"{norm}/bias"],
            }
    load(model, named)
    return model


class Transformers(nn.Module):
    """Transformers' GPT-2 with the loss of plain rows."""

    def __init__(self, shape: dict[str, int], attention: str) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        config = GPT2Config(
            vocab_size=shape["vocab"],
            n_positions=shape["positions"],
            n_embd=shape["embed"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_inner=shape["mlp"],
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        config._attn_implementation = attention
        self.inner = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Shapes: both [B, L]. The targets are shifted already, as `shift_labels` wants them."""
        loss: Tensor = self.inner(tokens, labels=targets, shift_labels=targets).loss
        return loss


def transformers(
    shape: dict[str, int], weights: dict[str, np.ndarray], settings: dict[str, Any]
) -> nn.Module:
    """Transformers' model with the given weights."""
    model = Transformers(shape, settings["attention"])
    named = {
        "wte.weight": weights["tokens"],
        "wpe.weight": weights["positions"],
        "ln_f.weight": weights["norm/scale"],
        "ln_f.bias": weights["norm/bias"],
    }
    for n in range(shape["layers"]):
        at = {name.removeprefix("layers/"): x[n] for name, x in weights.items() if name.startswith("layers/")}
        named |= {
            f"h.{n}.attn.c_attn.weight": np.concatenate([at[p] for p in ("query", "key", "value")], axis=1),
            f"h.{n}.attn.c_attn.bias": np.concatenate([at[f"{p}_bias"] for p in ("query", "key", "value")]),
        }
        for theirs, part in (("attn.c_proj", "out"), ("mlp.c_fc", "up"), ("mlp.c_proj", "down")):
            named |= {f"h.{n}.{theirs}.weight": at[part], f"h.{n}.{theirs}.bias": at[f"{part}_bias"]}
        for theirs, part in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            named |= {
                f"h.{n}.{theirs}.weight": at[f"{part}/scale"],
                f"h.{n}.{theirs}.bias": at[f"{part}/bias"],
            }
    load(model.inner.transformer, named)
    return model


def load(model: nn.Module, named: dict[str, np.ndarray]) -> None:
    """Give every parameter its array.

    Raises:
        KeyError: a parameter without one.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(named[name])))


def main() -> None:
    """Train on the rows, a step a row of the file."""
    work, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    shape = json.loads((work / "shape.json").read_text())
    torch.set_num_threads(shape["threads"])
    if settings.get("flush_denormal"):
        torch.set_flush_denormal(True)
    with np.load(work / "weights.npz") as weights:
        make = transformers if settings["peer"] == "transformers" else plain
        model = make(shape, dict(weights), settings)
    parameters = list(model.parameters())
    print(json.dumps({"parameters": sum(p.numel() for p in parameters)}), flush=True)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=shape["lr"],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        fused=settings["adamw"] == "fused",
        foreach=settings["adamw"] == "foreach",
    )
    run = torch.compile(model, mode=settings["compile"]) if settings.get("compile") else model
    rows = torch.from_numpy(np.load(work / "rows.npy")).long()
    for step in range(shape["steps"]):
        began = time.perf_counter()
        loss = run(rows[step, :, :-1].contiguous(), rows[step, :, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(json.dumps({"loss": loss.item(), "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
