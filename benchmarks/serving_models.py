"""Models of GPT-2's shape with random weights, in Hugging Face's format, that need no download."""

from __future__ import annotations

import itertools
import string
from pathlib import Path

from mosaicjax.layers.position import Learned
from mosaicjax.models import gpt2

LENGTH = 1_024
SIZES = {
    "124M": gpt2.Config(position=Learned(LENGTH)),
    "quickstart": gpt2.Config(layers=4, embed=256, heads=4, mlp=1_024, vocab=4_096, position=Learned(LENGTH)),
}
SEPARATOR = "<|endoftext|>"


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level BPE of so many tokens: the separator, the bytes, then letters in twos and threes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a, b in itertools.product(string.ascii_letters, repeat=2)]
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, string.ascii_letters))
    merges = list(itertools.islice(itertools.chain(pairs, triples), vocabulary - 1 - len(alphabet)))
    tokens = [SEPARATOR, *alphabet, *("".join(pair) for pair in merges)]
    assert len(set(tokens)) == vocabulary, len(set(tokens))
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SEPARATOR])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{SEPARATOR}"}}\n'
    )


def write_model(folder: Path, size: str, seed: int = 0) -> str:
    """Random weights of a size as an imported model would lie, exported; the Hugging Face directory.

    No token ends a text there, so that all write as many as they are asked for.
    """
    import jax

    from mosaicjax.checkpoint import Checkpoints
    from mosaicjax.hub import export_model
    from mosaicjax.hub.model_dir import TOKENIZER_DIR, Imported, save_imported
    from mosaicjax.hub.tokens import IDS, Around
    from mosaicjax.mesh import Mesh, shardings

    config, run, out = SIZES[size], folder / "imported", folder / size
    spec = config.decoder().spec()
    layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
    weights = spec.init(jax.random.key(seed), "float32", shardings(spec, layout))
    around = Around((), (0,), SEPARATOR)
    save_imported(run, Imported(config, "float32", LENGTH, around, dict.fromkeys(IDS), {"name": size}))
    write_tokenizer(run / TOKENIZER_DIR, config.vocab)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(0, {"trainable": weights}, {"step": 0})
    export_model(str(run), str(out))
    return str(out)


def step_bytes(size: str) -> int:
    """Bytes of weights that a step reads: all but the table of positions, of which it takes rows."""
    config = SIZES[size]
    return 4 * (config.decoder().spec().count() - LENGTH * config.embed)
