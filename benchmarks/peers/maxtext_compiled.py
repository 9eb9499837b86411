"""MaxText's own train step, compiled for TPUs that are not there; run by a Python that has MaxText.

    PYTHON benchmarks/peers/maxtext_compiled.py OUT key=value ...

The key=value are MaxText's. Goes the way of MaxText 0.2.5's `train_compile.main`, whose functions it calls.
Writes OUT/program.txt, the program after the compiler's last pass, and prints one JSON object: parameters,
bytes of one device, versions, and what of the configuration the kernels' work depends on.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

# What libtpu wants to find without a TPU; the argument is the one that `train_compile` gives it.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "LIBTPU_INIT_ARGS": "--xla_tpu_spmd_rng_bit_generator_unsafe=true",
}

import jax  # noqa: E402 after the environment
import jax.experimental.xla_metadata as xla_metadata  # noqa: E402

# Imported by MaxText where it is never called here; jax has it from 0.11 on.
if not hasattr(xla_metadata, "must_fuse_call"):
    xla_metadata.must_fuse_call = None

import maxtext  # noqa: E402
from flax.core.spmd import logical_axis_rules  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.trainers.pre_train import train, train_compile  # noqa: E402
from maxtext.utils import maxtext_utils, sharding  # noqa: E402

BLOCKS = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")


def main() -> None:
    """Compile, write the program down, print what it takes."""
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    with tempfile.TemporaryDirectory() as dump:
        base = Path(maxtext.__file__).parent / "configs" / "base.yml"
        fixed = {
            "run_name": "compiled",
            "compile_topology_num_slices": "1",
            "enable_checkpointing": "false",
            "dataset_type": "synthetic",
            "log_config": "false",
            "jax_cache_dir": "",
            "compile_xla_flags": f"--xla_dump_to={dump} --xla_dump_hlo_as_text=True",
        }
        config = pyconfig.initialize(["", str(base), *(f"{k}={v}" for k, v in fixed.items()), *overrides])
        train_compile.validate_config(config)
        mesh = train_compile.get_topology_mesh(config)
        args, kwargs, state_shardings, _, model = train_compile.get_shaped_inputs(mesh, config)
        param_shardings, state_shardings = sharding.maybe_update_params_sharding_with_opt(
            config, state_shardings
        )
        inputs = sharding.build_zero1_input_state_mesh_shardings(config, state_shardings, param_shardings)
        function, into, outof, static, donated = maxtext_utils.get_functional_train_with_signature(
            train.train_step,
            sharding.get_input_data_sharding(config, mesh),
            inputs,
            model,
            config,
            param_shardings,
        )
        began = time.perf_counter()
        compiled = train_compile.jit_and_compile(
            function,
            args,
            kwargs,
            mesh,
            into,
            outof,
            static,
            donated,
            config,
            logical_axis_rules(config.logical_axis_rules),
        )
        seconds = time.perf_counter() - began
        programs = sorted(Path(dump).glob("*after_codegen.txt"), key=lambda path: path.stat().st_size)
        (out / "program.txt").write_bytes(programs[-1].read_bytes())
    memory = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    leaves = jax.tree_util.tree_flatten_with_path(args[0])[0]
    weights = [leaf for path, leaf in leaves if "model" in jax.tree_util.keystr(path[:1])]
    found = {
        "parameters": sum(math.prod(leaf.shape) for leaf in weights if leaf.dtype == "float32"),
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in names},
        "seconds": seconds,
        "packages": {
            name: importlib.metadata.version(name) for name in ("maxtext", "jax", "jaxlib", "libtpu")
        },
        "heads": config.num_query_heads,
        "head_dim": config.head_dim,
        "seq": config.max_target_length,
        "rows": config.micro_batch_size_to_train_on // mesh.size,
        "blocks": {name: getattr(config, f"sa_block_{name}") for name in BLOCKS},
        "fused_backward": config.sa_use_fused_bwd_kernel,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
