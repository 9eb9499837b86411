import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.errors import InputError
from mosaicjax.generate import load_run
from mosaicjax.harness.lm import HarnessModel
from mosaicjax.harness.subject import Settings, Subject, identity, model_length
from mosaicjax.layers.context import Context


class Asked:
    """A request as lm-eval makes it."""

    def __init__(self, *arguments):
        self.args = arguments


@pytest.mark.slow
def test_a_run_is_scored_as_its_weights_are(tiny_run):
    decoder, weights, layout, dtypes, tokenizer = load_run(tiny_run)
    subject = Subject(str(tiny_run), Settings(batch=2))
    assert subject.length == model_length(str(tiny_run)) == 32
    texts = ["Document 3: river stone.", "the quiet market", "größe"]
    got = HarnessModel(subject, 0).loglikelihood_rolling([Asked(text) for text in texts])

    def naive(text):
        # What comes before a text is read twice, as lm-eval has it: as prefix, and as the text's first token.
        ids = [tokenizer.separator, *tokenizer.encode(text)]
        tokens_BL = jnp.asarray([[tokenizer.separator, *ids][:-1]], jnp.int32)
        about = Context(
            layout, dtypes, jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None], tokens_BL=tokens_BL
        )
        hidden_BLD = decoder.hidden(weights, decoder.embed(weights, tokens_BL, about), about).hidden_BLD
        logits_LV = decoder.logits(decoder.head(weights, about), hidden_BLD, about)[0]
        logs_LV = np.asarray(jax.nn.log_softmax(logits_LV))
        return sum(logs_LV[place, token] for place, token in enumerate(ids))

    np.testing.assert_allclose(got, [naive(text) for text in texts], rtol=1e-2)


@pytest.mark.slow
def test_weights_are_told_apart_wherever_they_lie(tiny_run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_run, moved)
    assert identity(str(moved)) == identity(str(tiny_run))
    steps = sorted(int(path.name) for path in (moved / "checkpoints").iterdir() if path.name.isdecimal())
    shutil.rmtree(moved / "checkpoints" / str(steps[-1]))
    assert identity(str(moved)) != identity(str(tiny_run))


def test_foreign_weights_are_told_apart(shared_data, tmp_path):
    source = shared_data("tinystories-260k") / "hf"
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert identity(str(copy)) == identity(str(source))
    path = copy / "model.safetensors"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert identity(str(copy)) != identity(str(source))
    assert model_length(str(source)) == 512


def test_a_length_that_the_model_does_not_reach_is_refused(shared_data, tmp_path):
    with pytest.raises(InputError, match="nowhere holds no model"):
        Subject("nowhere")
    subject = Subject(str(shared_data("tinystories-260k") / "hf"), Settings(length=100))
    assert subject.identity["max_length"] == subject.length == 100
