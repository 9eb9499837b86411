"""MaxText's own train step, as `cost_per_token.py` asks for it; run by a Python that has MaxText.

    PYTHON benchmarks/peers/maxtext_gpt.py WORK SETTINGS      # WORK/shape.json

Its `gpt3` block is a GPT with learned positions, LayerNorm, biases and tied embeddings; its GELU is by tanh,
its rows are synthetic, its weights are drawn here. Goes the way of MaxText 0.2.5's `train_loop`: that is
`setup_train_loop`, `jit_train_and_eval_step`, then a step at a time. Prints one JSON object a line: the count
of parameters, then each step's loss and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import jax.experimental.xla_metadata as xla_metadata

# Imported by MaxText where it is never called here; jax has it from 0.11 on.
if not hasattr(xla_metadata, "must_fuse_call"):
    xla_metadata.must_fuse_call = None

import maxtext  # noqa: E402
from flax import nnx  # noqa: E402
from flax.core.spmd import logical_axis_rules  # noqa: E402
from maxtext.common.goodput import create_goodput_recorder  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.trainers.pre_train import train  # noqa: E402
from maxtext.utils import sharding, train_utils  # noqa: E402


def main() -> None:
    """Train on its own rows."""
    work, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    shape = json.loads((work / "shape.json").read_text())
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    heads = shape["heads"]
    chosen = {
        "decoder_block": "gpt3",
        "mlp_activations": "['gelu']",
        "logits_via_embedding": "true",
        "normalize_embedding_logits": "false",
        "normalization_layer_epsilon": "1e-5",
        "enable_dropout": "false",
        "base_num_decoder_layers": shape["layers"],
        "base_emb_dim": shape["embed"],
        "base_num_query_heads": heads,
        "base_num_kv_heads": heads,
        "head_dim": shape["embed"] // heads,
        "base_mlp_dim": shape["mlp"],
        "vocab_size": shape["vocab"],
        "trainable_position_size": shape["positions"],
        "max_target_length": shape["seq"],
        "per_device_batch_size": shape["batch"],
        "learning_rate": shape["lr"],
        "steps": 1_000,
        "run_name": "cost_per_token",
        "base_output_directory": str(work / "maxtext"),
        "hardware": "cpu",
        "dtype": "float32",
        "weight_dtype": "float32",
        "attention": "dot_product",
        "dataset_type": "synthetic",
        "packing": "false",
        "enable_checkpointing": "false",
        "log_config": "false",
        "enable_goodput_recording": "false",
        "skip_jax_distributed_system": "true",
        "jax_cache_dir": "",
    } | settings
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config = pyconfig.initialize(["", str(base), *(f"{name}={value}" for name, value in chosen.items())])
    jax.config.update("jax_use_shardy_partitioner", config.shardy)
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", config.remove_size_one_mesh_axis_from_type)
    recorder = create_goodput_recorder(config)
    made = train_utils.setup_train_loop(config, recorder)
    _, _, state_shardings, model, mesh, _, _, loader, rampup, _, state = made
    graph, state = nnx.split(state)
    param_shardings, state_shardings = sharding.maybe_update_params_sharding_with_opt(config, state_shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, state_shardings, train.train_step, train.eval_step, None, param_shardings
    )
    _, params, _ = nnx.split(state.model, nnx.Param, ...)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(json.dumps({"parameters": int(count)}), flush=True)
    del model, params
    for _ in range(shape["steps"]):
        began = time.perf_counter()
        batch = loader.load_next_batch(rampup_manager=rampup)
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = step(state, batch)
        loss = float(metrics["scalar"]["learning/loss"])
        print(json.dumps({"loss": loss, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
