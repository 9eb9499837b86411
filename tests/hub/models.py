"""Small foreign models for tests, written with the safetensors library and numpy alone."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mosaicjax.layers.norm import LayerNorm
from mosaicjax.models import mpt
from mosaicjax.models.names import foreign_tensors
from tests import jobs

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

CONFIG = {
    "model_type": "mpt",
    "architectures": ["MptForCausalLM"],
    "d_model": 24,
    "n_heads": 6,
    "n_layers": 3,
    "expansion_ratio": 4,
    "max_seq_len": 64,
    "vocab_size": 40,
    "no_bias": True,
    "eos_token_id": 0,
}
FAMILY = mpt.Config(
    layers=3, embed=24, heads=6, mlp=96, vocab=40, norm=LayerNorm(bias=False, low_precision=True)
)


def tensors(family=FAMILY, dtype="float32", seed=0):
    """Random numbers for every foreign tensor of a family."""
    rng = np.random.default_rng(seed)
    wanted = foreign_tensors(family.decoder(), family.names())
    return {foreign.name: rng.normal(size=foreign.shape).astype(DTYPES[dtype]) for foreign in wanted}


def write(folder, arrays, config=CONFIG, shards=1):
    """A directory with `config.json` and safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: array for i, (name, array) in enumerate(arrays.items()) if i % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def expected(arrays, family=FAMILY):
    """Our weights by leaf, put together from foreign tensors by the table alone."""
    decoder = family.decoder()
    spec = decoder.spec()
    kind = next(iter(arrays.values())).dtype
    leaves = {name: np.zeros(param.shape(spec.dims), kind) for name, param in spec.items()}
    for foreign in foreign_tensors(decoder, family.names()):
        for piece in foreign.pieces:
            leaves[piece.leaf][piece.index] = foreign.view(arrays[foreign.name], piece)
    return leaves


LIMITED = """
import resource, signal, sys
from mosaicjax import cli
# A write beyond the limit kills the process as it stands.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(cli.main(sys.argv[2:]))
"""


def killed_at(size, *arguments):
    """The command in a process that is killed when a file of its grows beyond a size."""
    command = [sys.executable, "-c", LIMITED, str(size), *map(str, arguments)]
    return subprocess.run(command, env=jobs.environment(1), capture_output=True, text=True)
