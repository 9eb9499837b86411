"""MosaicGPT, as MPT was called before May 2023, and replit-code-v1-3b as it came out: flat keys, other names.

The network is MPT's, weight for weight: only reading differs. Replit's later release of the same weights,
and all that goes out from here, are in MPT's own form.

Source: mosaicml/examples `MosaicGPTConfig`; `config.json`, `replit_lm.py`, `attention.py` and `gpt_blocks.py`
in the history of github.com/replit/ReplitLM (`model_type` "mosaic_gpt", then "replit_lm", then "mpt").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from mosaicjax.errors import InputError
from mosaicjax.models import mpt
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.models.names import Names, Tensor

INIT = (
    "param_init_fn",
    "init_div_is_residual",
    "init_std",
    "emb_init_std",
    "emb_init_uniform_lim",
    "init_gain",
    "fan_mode",
    "init_nonlinearity",
)

RENAMED = {
    ".norm_1.": ".ln_1.",
    ".norm_2.": ".ln_2.",
    ".norm_f.": ".ln_f.",
    ".ffn.up_proj.": ".mlp.mlp_up.",
    ".ffn.down_proj.": ".mlp.mlp_down.",
}
"""MPT's names and those before."""


@dataclass(frozen=True)
class Config(mpt.Config):
    """Sizes and choices of a MosaicGPT; `mpt.Config` with the same knobs is the same model."""

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`."""
        config.only("prefix_lm", False)
        config.only("tie_word_embeddings", True)
        config.skip(*INIT, "attn_pdrop", "resid_pdrop", "emb_pdrop")
        config.skip("attn_impl", "attn_uses_sequence_id", "init_device", "verbose", "loss_fn")
        low_precision = config.get("low_precision_layernorm", True)
        heads, alibi = config.need("n_heads"), config.get("alibi", False)
        if alibi and heads & (heads - 1):
            raise InputError(
                f"{config.where}: MosaicGPT's versions differ in ALiBi's slopes for these heads",
                expected="a power of 2",
                got=heads,
            )
        nested = {
            "d_model": config.need("d_model"),
            "n_heads": heads,
            "n_layers": config.need("n_layers"),
            "vocab_size": config.need("vocab_size"),
            "max_seq_len": config.get("max_seq_len", 2_048),
            "expansion_ratio": config.get("mlp_ratio", 4),
            "no_bias": config.get("no_bias", False),
            "norm_type": "low_precision_layernorm" if low_precision else "layernorm",
            "logit_scale": config.get("logit_scale", None),
            "embedding_fraction": config.get("embedding_fraction", 1.0),
            "attn_config": {
                "alibi": alibi,
                "alibi_bias_max": config.get("alibi_bias_max", 8),
                "clip_qkv": config.get("attn_clip_qkv", None),
                "qk_ln": config.get("attn_qk_ln", False),
                "softmax_scale": config.get("softmax_scale", None),
            },
        }
        return super().from_hf(HfConfig(nested, config.where))

    def to_hf(self, length: int) -> dict[str, Any]:
        """Refused: the form is gone.

        Raises:
            InputError: always, with the way out.
        """
        raise InputError("nothing reads MosaicGPT's form any more", fix="mpt.Config with the same knobs")

    def names(self) -> Names:
        """See `Family.names`."""
        names = super().names()
        return replace(names, tensors=tuple(_renamed(tensor) for tensor in names.tensors))


def _renamed(tensor: Tensor) -> Tensor:
    name = tensor.name
    for later, before in RENAMED.items():
        name = name.replace(later, before)
    return replace(tensor, name=name)
