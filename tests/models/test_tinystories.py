"""A trained Llama of 260 thousand weights: read from its checkpoint, it goes on as in Transformers."""

import json

import jax
import numpy as np
import pytest

from mosaicjax.data.tokenizer import load_tokenizer
from mosaicjax.generate import Generator, Sampling
from mosaicjax.mesh import Mesh
from mosaicjax.models import llama
from mosaicjax.models.families import family_of
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.spec import Dtypes
from tests.models.llama_like import imported

PROMPT, TOKENS = "Once upon a time", 200

# What SOURCE.txt beside the checkpoint says of it.
CONTINUATION = ", there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data("tinystories-260k") / "hf"


@pytest.fixture(scope="module")
def completion(folder):
    from safetensors.numpy import load_file

    values = json.loads((folder / "config.json").read_text())
    config = HfConfig(values)
    family = family_of(values).from_hf(config)
    assert isinstance(family, llama.Config) and config.unread() == []
    decoder = family.build()
    assert decoder.spec().count() == 260_032
    weights = jax.device_put(imported(family, load_file(folder / "model.safetensors")))
    # Documents of this model begin with <s> and end with nothing: the next one begins.
    tokenizer = load_tokenizer(folder, separator="<s>")
    generator = Generator(decoder, weights, Mesh(fsdp=(1,)).build(jax.devices()[:1]), Dtypes(), tokenizer)
    (found,) = generator.generate([PROMPT], Sampling(max_tokens=TOKENS, temperature=0.0), lambda *_: None)
    return found


def test_it_tells_its_story(completion):
    assert completion.text.startswith(CONTINUATION)
    assert len(completion.tokens) == TOKENS and completion.finish == "length"


@pytest.mark.peer
def test_token_for_token_as_transformers(completion, folder):
    from tests.models import peer

    tokenizer = peer.transformers.AutoTokenizer.from_pretrained(folder)
    model = peer.transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    assert prompt["input_ids"].shape[1] == completion.prompt_tokens
    written = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS)[0]
    np.testing.assert_array_equal(completion.tokens, written[completion.prompt_tokens :].numpy())
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert text == PROMPT + completion.text
