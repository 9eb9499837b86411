"""MPT in a `config.json`: what llm-foundry and Transformers write there, and where the weights lie.

The keys mean what they mean in llm-foundry, whose model has all these knobs. Transformers' own MPT is
narrower, whatever its `config.json` says: ALiBi with `alibi_bias_max` 8 in place of any other position, as
many key heads as heads, no biases, exact GELU of 4 times the width, no `qk_ln`, no `logit_scale`.

Source: llm-foundry `MPTConfig`, `MPTModel`, `GroupedQueryAttention`, `config_defaults` (commit 8c8dd48 of
2025); Transformers 5 `MptConfig` and `modeling_mpt`.
"""

from __future__ import annotations

import math

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.mlp import Activation, Glu, Mlp
from mosaicjax.layers.norm import LayerNorm, Norm, RmsNorm
from mosaicjax.layers.position import Alibi, Learned, Position, Rotary
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.models.hf_rope import scaling_from_hf
from mosaicjax.models.names import Part, Tensor, whole

TRAINING = (
    "resid_pdrop",
    "emb_pdrop",
    "init_device",
    "init_config",
    "fc_type",
    "verbose",
    "loss_fn",
    "use_pad_tok_in_ffn",
)
"""Keys of training, and of how products are computed: the logits are the same."""

FOUNDRY = ("init_config", "ffn_config", "fc_type", "block_overrides", "final_logit_softcapping")
FOUNDRY_ATTENTION = ("rope", "qk_gn", "fused_qkv", "kv_n_heads", "sliding_window_size", "nope")
"""Keys that only llm-foundry writes. What a missing key means depends on whose file it is."""

_NORMS = {
    "layernorm": (LayerNorm, False),
    "low_precision_layernorm": (LayerNorm, True),
    "rmsnorm": (RmsNorm, False),
    "low_precision_rmsnorm": (RmsNorm, False),
    "triton_rmsnorm": (RmsNorm, False),
}


def from_foundry(config: HfConfig) -> bool:
    """Whether the file has keys that Transformers' MPT does not write."""
    attention = config.part("attn_config")
    return any(key in config for key in FOUNDRY) or any(key in attention for key in FOUNDRY_ATTENTION)


def refuse_unknown(config: HfConfig) -> None:
    """Refuse what llm-foundry can do and this family cannot.

    Raises:
        InputError: naming the key.
    """
    config.only("block_overrides", None)
    config.only("fuse_norm_attn_norm", False)
    attention = config.part("attn_config")
    attention.skip("attn_pdrop", "attn_impl", "attn_uses_sequence_id", "seq_parallel_world_size")
    attention.only("prefix_lm", False)
    attention.only("fused_qkv", True)
    attention.only("kv_dim", None)
    attention.only("nope", False)
    attention.only("reuse_kv_layer_idx", None)
    attention.only("reuse_kv_x_layer_idx", None)
    tuning = attention.part("attn_temperature_tuning")
    tuning.skip("floor_scale")
    tuning.only("attn_scale", 0.0)


def kv_heads_from_hf(attention: HfConfig, heads: int) -> int:
    """How many key heads the kind of attention has; 0 for as many as heads."""
    kind = str(attention.get("attn_type", "multihead_attention")).removesuffix("_attention")
    match kind:
        case "multihead":
            attention.only("kv_n_heads", None, heads)
            return 0
        case "multiquery":
            attention.only("kv_n_heads", None, 1)
            return 1
        case "grouped_query":
            shared: int = attention.need("kv_n_heads")
            return shared
    raise InputError(
        f"{attention.where}: attn_type is not known here",
        expected="multihead_attention, multiquery_attention or grouped_query_attention",
        got=repr(kind),
    )


def position_from_hf(config: HfConfig, foundry: bool) -> Position:
    """ALiBi or rotary where they are on; else learned positions, unless those are off."""
    attention = config.part("attn_config")
    alibi, rope = attention.get("alibi", not foundry), attention.get("rope", False)
    learned, length = config.get("learned_pos_emb", True), config.get("max_seq_len", 2_048)
    max_bias = attention.get("alibi_bias_max", 8)
    if alibi and rope:
        raise InputError(f"{attention.where}: positions", expected="alibi or rope", got="both")
    rotary = _rotary_from_hf(attention, length)
    if alibi:
        return Alibi(float(max_bias))
    if rope:
        return rotary
    return Learned(length) if learned else Position()


def _rotary_from_hf(attention: HfConfig, length: int) -> Rotary:
    """What `rope` would turn on: the keys stand in files without it too."""
    attention.skip("rope_dail_config", "rope_hf_config")
    theta = float(attention.get("rope_theta", 10_000.0))
    which, rope = attention.get("rope_impl", "dail"), attention.get("rope", False)
    if not rope:
        return Rotary()
    if which == "hf":
        return Rotary(theta, scaling_from_hf(attention.part("rope_hf_config"), length))
    attention.only("rope_impl", "dail")
    flash = attention.part("rope_dail_config")
    flash.skip("pos_idx_in_fp32", "xpos_scale_base")
    flash.only("type", "original")
    return Rotary(theta)


def norm_from_hf(config: HfConfig, bias: bool) -> Norm:
    """The norms of layers and the last one."""
    name = str(config.get("norm_type", "low_precision_layernorm")).lower()
    if name not in _NORMS:
        raise InputError(f"{config.where}: norm_type", expected=", ".join(_NORMS), got=repr(name))
    eps = config.get("norm_eps", config.get("layer_norm_epsilon", 1e-5))
    config.only("layer_norm_epsilon", eps)
    kind, low = _NORMS[name]
    return LayerNorm(eps, bias, low) if kind is LayerNorm else RmsNorm(eps)


def qk_norm_from_hf(attention: HfConfig, bias: bool) -> QkNorm | None:
    """llm-foundry gives queries and keys this one norm, whatever `norm_type` and `norm_eps` are."""
    whole_row, per_head = attention.get("qk_ln", False), attention.get("qk_gn", False)
    if whole_row and per_head:
        raise InputError(
            f"{attention.where}: norm of queries and keys", expected="qk_ln or qk_gn", got="both"
        )
    if not (whole_row or per_head):
        return None
    return QkNorm(LayerNorm(bias=bias, low_precision=True), per_head=per_head)


def window_from_hf(attention: HfConfig) -> int:
    """llm-foundry counts the positions before the query's own, and has -1 for no window."""
    size: int = attention.get("sliding_window_size", -1)
    if size < -1:
        raise InputError(f"{attention.where}: sliding_window_size", expected="-1 or more", got=size)
    return size + 1


def ffn_from_hf(config: HfConfig, embed: int) -> tuple[Mlp, int]:
    """The MLP and its width."""
    ffn = config.part("ffn_config")
    ffn.skip("fc_type")
    ratio = config.get("expansion_ratio", 4)
    width = ffn.get("ffn_hidden_size", int(embed * ratio))
    if "ffn_hidden_size" not in ffn and width != embed * ratio:
        raise InputError(
            f"{config.where}: expansion_ratio", expected=f"a whole number times {embed} dims", got=ratio
        )
    kinds = {"mptmlp": Mlp, "mptglu": Glu}
    ffn.only("ffn_type", *kinds)
    return kinds[ffn.get("ffn_type", "mptmlp")](_activation_from_hf(ffn)), width


def _activation_from_hf(ffn: HfConfig) -> Activation:
    """`ffn_act_fn` names a function of torch.nn.functional and its arguments."""
    function = ffn.part("ffn_act_fn")
    name, approximate = function.get("name", "gelu"), function.get("approximate", "none")
    if name == "gelu":
        function.only("approximate", "none", "tanh")
        return Activation.GELU if approximate == "none" else Activation.GELU_TANH
    known = {kind.value: kind for kind in (Activation.SILU, Activation.RELU, Activation.SIGMOID)}
    if name not in known:
        raise InputError(f"{function.where}: name", expected=f"gelu, {', '.join(known)}", got=repr(name))
    return known[name]


def above_zero(config: HfConfig, key: str) -> float:
    """The key's value; 0, which here means none, where it is missing.

    Raises:
        InputError: a value that would mean something else here.
    """
    value = float(config.get(key, 0.0))
    if key in config and value <= 0:
        raise InputError(f"{config.where}: {key}", expected="above 0, or null", got=value)
    return value


def logit_scale_from_hf(config: HfConfig, embed: int) -> float:
    """A number, or `inv_sqrt_d_model`."""
    scale = config.get("logit_scale", 1.0)
    if isinstance(scale, str):
        config.only("logit_scale", "inv_sqrt_d_model")
        return 1 / math.sqrt(embed)
    return float(scale)


def _normed(name: str, weight: str, *dims: str) -> tuple[Tensor, Tensor]:
    return whole(f"{name}.weight", f"{weight}/scale", *dims), whole(f"{name}.bias", f"{weight}/bias", *dims)


def _linear(name: str, weight: str, rows: str, columns: str) -> tuple[Tensor, Tensor]:
    return whole(f"{name}.weight", weight, rows, columns), whole(f"{name}.bias", f"{weight}_bias", rows)


def _joined(name: str, suffix: str, *dims: str) -> Tensor:
    """Queries of all heads, keys of all key heads, values of all key heads."""
    rows = {"query": "heads head_dim", "key": "kv_heads head_dim", "value": "kv_heads head_dim"}
    return Tensor(name, tuple(Part(f"attention/{part}{suffix}", (row, *dims)) for part, row in rows.items()))


_LAYER = "transformer.blocks.{layer}"

TENSORS = (
    whole("transformer.wte.weight", "embed/tokens", "vocab", "embed"),
    whole("transformer.wpe.weight", "embed/positions", "position", "embed"),
    *_normed("transformer.norm_f", "norm", "embed"),
    whole("lm_head.weight", "head", "vocab", "embed"),
    *_normed(f"{_LAYER}.norm_1", "attention_norm", "embed"),
    _joined(f"{_LAYER}.attn.Wqkv.weight", "", "embed"),
    _joined(f"{_LAYER}.attn.Wqkv.bias", "_bias"),
    *_linear(f"{_LAYER}.attn.out_proj", "attention/out", "embed", "heads head_dim"),
    *_normed(f"{_LAYER}.norm_2", "mlp_norm", "embed"),
    *_linear(f"{_LAYER}.ffn.gate_proj", "mlp/gate", "mlp", "embed"),
    *_linear(f"{_LAYER}.ffn.up_proj", "mlp/up", "mlp", "embed"),
    *_linear(f"{_LAYER}.ffn.down_proj", "mlp/down", "embed", "mlp"),
)
"""Where the weights lie in a checkpoint of llm-foundry or Transformers."""

QK_NORM = (
    *_normed(f"{_LAYER}.attn.q_ln", "attention/query_norm", "heads head_dim"),
    *_normed(f"{_LAYER}.attn.k_ln", "attention/key_norm", "kv_heads head_dim"),
)
QK_NORM_PER_HEAD = (
    *_normed(f"{_LAYER}.attn.q_ln", "attention/query_norm", "head_dim"),
    *_normed(f"{_LAYER}.attn.k_ln", "attention/key_norm", "head_dim"),
)
"""Norms of queries and keys, over all heads together or over each alone."""

BUFFERS = ("*attn_bias", "*rotary_embedding.*")
"""Patterns of tensors that hold no weights."""
