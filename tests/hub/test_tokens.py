import json
from dataclasses import replace

import pytest

from mosaicjax import cli
from mosaicjax.errors import InputError
from mosaicjax.generate import load_run_tokenizer
from mosaicjax.hub import export_model, import_model
from mosaicjax.hub.export_tokens import write_tokenizer
from mosaicjax.hub.tokens import around, load, special_ids
from tests import tiny
from tests.hub import models

SPECIAL = ("<|endoftext|>", "<s>", "</s>")


def folder(path, processor=None, config=None):
    """A byte-level tokenizer without merges and with three special tokens."""
    from tokenizers import pre_tokenizers

    path.mkdir(parents=True, exist_ok=True)
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    settings = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(SPECIAL)],
        "pre_tokenizer": byte_level,
        "post_processor": processor,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []},
    }
    (path / "tokenizer.json").write_text(json.dumps(settings))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def template(before, after=()):
    tokens = [*before, *after]
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in before] + [piece]
    single += [{"SpecialToken": {"id": name, "type_id": 0}} for name in after]
    special = {name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in tokens}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("processor", "before"),
    [
        (None, ()),
        (BYTES, ()),
        (template(["<s>"]), (1,)),
        (template(["</s>", "<s>"]), (2, 1)),
        ({"type": "Sequence", "processors": [BYTES, template(["<s>"])]}, (1,)),
    ],
)
def test_what_comes_before_a_prompt_is_what_the_file_says(tmp_path, processor, before):
    # As in Transformers, where this file is, add_bos_token says nothing.
    path = folder(tmp_path, processor, {"add_bos_token": True, "eos_token": "</s>"})
    found = around(path, {"eos_token_id": 2})
    assert (found.before, found.ends, found.separator) == (before, (2,), "</s>")
    tokenizer = load(path, found)
    assert (tokenizer.before, tokenizer.ends, tokenizer.separator) == (before, (2,), 2)


def test_ends_are_the_generations_before_the_models(tmp_path):
    path = folder(tmp_path, None, {"eos_token": "</s>"})
    ids = special_ids({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": [0, 2]})
    assert ids == {"eos_token_id": [0, 2], "bos_token_id": 1, "pad_token_id": None}
    assert around(path, ids).ends == (0, 2)
    # Where neither names one, the tokenizer's own.
    assert around(path, special_ids({}, {})).ends == (2,)


def test_tokens_behind_a_text_are_refused(tmp_path):
    path = folder(tmp_path, template(["<s>"], ["</s>"]), {"eos_token": "</s>"})
    with pytest.raises(InputError, match="puts tokens behind a text"):
        around(path, {})


def test_an_imported_tokenizer_rests_with_its_model(tmp_path, capsys):
    config = models.CONFIG | {"vocab_size": 320, "eos_token_id": 2, "bos_token_id": 1}
    arrays = models.tensors(replace(models.FAMILY, vocab=320))
    source = models.write(tmp_path / "hf", arrays, config)
    folder(source, template(["<s>"]), {"eos_token": "</s>", "chat_template": "{{ messages }}"})
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "top_k": 5}))
    import_model(str(source), str(tmp_path / "run"))
    for path in (source, tmp_path / "run"):
        tokenizer = load_run_tokenizer(path)
        assert (tokenizer.before, tokenizer.ends) == ((1,), (2, 0))
    export_model(str(tmp_path / "run"), str(tmp_path / "out"))
    kept, out = tiny.contents(source), tiny.contents(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert out[name] == kept[name]
    config = json.loads(out["config.json"])
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 0])
    assert tiny.run("generate", tmp_path / "run", "--prompt", "a", "--max-tokens", 3) == 0
    assert capsys.readouterr().out.startswith("a")


def test_an_exported_tokenizer_puts_the_separator_before_a_text(tmp_path):
    path = folder(tmp_path / "own", BYTES, {"eos_token": "</s>"})
    tokenizer = load(path, None)
    write_tokenizer(tokenizer, 64, tmp_path / "out", lambda line: None)
    assert around(tmp_path / "out", {}).before == tokenizer.before == (2,)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 64


def test_a_real_llama_goes_on(shared_data, tmp_path, capsys):
    source = shared_data("tinystories-260k") / "hf"
    assert cli.main(["import", str(source), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    order = ["--prompt", "Once upon a time", "--max-tokens", "40", "--temperature", "0"]
    assert cli.main(["generate", str(tmp_path / "run"), *order]) == 0
    # Source: what Transformers writes, in the corpus's SOURCE.txt.
    expected = ", there was a little girl named Lily. She loved to play outside in the park."
    assert capsys.readouterr().out.startswith("Once upon a time" + expected)
