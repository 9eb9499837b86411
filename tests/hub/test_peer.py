import json

import numpy as np
import pytest

from mosaicjax.data.tokenizer import load_tokenizer
from mosaicjax.errors import InputError
from mosaicjax.generate import Generator, Sampling, load_run
from mosaicjax.hub import export_model, import_model
from mosaicjax.hub.export_tokens import write_tokenizer
from tests import tiny
from tests.models.peer import torch, transformers

pytestmark = pytest.mark.peer


def loaded(path):
    """Transformers' model and tokenizer, with nothing missing, unexpected or made up."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def ignore(number, text):
    pass


def assert_the_same_greedy_tokens(ours, theirs, prompts, count):
    """From a directory of ours and one of Transformers', through both sides' own tokenizers."""
    writer = Generator(*load_run(ours))
    model, tokenizer = loaded(theirs)
    settings = Sampling(max_tokens=count, temperature=0.0)
    for prompt in prompts:
        (done,) = writer.generate([prompt], settings, ignore)
        asked = tokenizer(prompt, return_tensors="pt")
        asked.pop("token_type_ids", None)
        with torch.no_grad():
            written = model.generate(**asked, max_new_tokens=count, do_sample=False)
        assert done.prompt_tokens == asked["input_ids"].shape[1]
        assert list(done.tokens) == written[0, done.prompt_tokens :].tolist(), prompt
        text = tokenizer.decode(written[0], skip_special_tokens=True)
        assert text.startswith((prompt + done.text).strip("\N{REPLACEMENT CHARACTER}"))


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ("--model.mlp", 128, "--steps", 40, "--seq", 96, "--optimizer.lr.peak", 1e-2)
    tiny.train(tiny_recipe, out, *options)
    return out


def test_a_run_exported_goes_on_the_same_in_transformers(run, tmp_path):
    export_model(str(run), str(tmp_path / "hf"), shard_bytes=30_000)
    prompts = ["Document 7:", "the river", "größe 🙂", ""]
    assert_the_same_greedy_tokens(run, tmp_path / "hf", prompts, 64)
    import_model(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert_the_same_greedy_tokens(tmp_path / "back", tmp_path / "hf", prompts[:2], 64)


def test_an_exported_tokenizer_gives_the_same_ids(run, tmp_path):
    export_model(str(run), str(tmp_path / "hf"))
    ours, theirs = (
        load_tokenizer(run / "tokenizer"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    for text in ("the river walks", "  größe\n\n\tunder 12345", "🙂", ""):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.separator, *ours.encode(text)]
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.separator, ours.separator)
    assert theirs.model_max_length == 96


@pytest.mark.parametrize("name", ["gpt2-tokenizer", "gpt-neox-20b-tokenizer", "mistral-v1-spm"])
def test_tokenizers_of_others_give_the_same_ids(shared_data, tmp_path, name):
    ours = load_tokenizer(shared_data(name))
    write_tokenizer(ours, 128, tmp_path, lambda line: None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Once upon a time", "größe\n\nunder 12345  two", "a b", " " * 37 + "x", "", "🙂 don't"):
        assert theirs(text)["input_ids"] == [ours.separator, *ours.encode(text)], text


def test_the_real_llama_writes_200_tokens_as_in_transformers(shared_data, tmp_path):
    source = shared_data("tinystories-260k") / "hf"
    import_model(str(source), str(tmp_path / "run"))
    export_model(str(tmp_path / "run"), str(tmp_path / "hf"), shard_bytes=300_000)
    assert_the_same_greedy_tokens(tmp_path / "run", source, ["Once upon a time", "Lily's mom said"], 200)
    assert_the_same_greedy_tokens(source, tmp_path / "hf", ["One day"], 50)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_are_read_as_safetensors_are(tmp_path, dtype, shards):
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    state = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(state), old / "pytorch_model.bin")
    else:
        places = {}
        for i in range(shards):
            file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
            torch.save(dict(state[i::shards]), old / file)
            places |= {name: file for name, _ in state[i::shards]}
        (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for name in ("new", "old"):
        import_model(str(tmp_path / name), str(tmp_path / f"run-{name}"))
    ours, theirs = (tiny.arrays(tmp_path / f"run-{name}", 0) for name in ("old", "new"))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.dtype.name, array.tobytes()) == (dtype, theirs[name].tobytes())
    some = np.asarray(theirs["trainable.stacks.0.0.layer.attention.query"][1], np.float32)
    torch_one = model.model.layers[1].self_attn.q_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(some.reshape(24, 24), torch_one.T)


def test_a_missing_bin_shard_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(transformers.MptConfig(d_model=8, n_heads=2).to_dict()))
    index = {"weight_map": {"transformer.wte.weight": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="pytorch_model-00001-of-00001.bin is missing"):
        import_model(str(tmp_path), str(tmp_path / "run"))
