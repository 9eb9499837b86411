import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.documents import open_sources
from mosaicjax.data.split import is_held_out
from mosaicjax.data.tokenizer import load_tokenizer, train_tokenizer
from mosaicjax.errors import InputError

SPECIAL = "a<|endoftext|>b</s><s><unk><|padding|>"
# blanks, marks and letters side by side, where expressions for splitting differ
unicode_texts = st.one_of(
    st.text(), st.text(alphabet=" \n\r\t'sS.,(=_09aZé漢\u0301\u00a0\u2028\u3000٣²🙂\ufeff\0", max_size=60)
)


@pytest.fixture(scope="session")
def gpt2(shared_data):
    return load_tokenizer(shared_data("gpt2-tokenizer"))


@pytest.fixture(scope="session")
def gpt2_of_hugging_face(shared_data):
    folder = shared_data("gpt2-tokenizer")
    return tokenizers.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))


@pytest.fixture(scope="session")
def neox(shared_data):
    return load_tokenizer(shared_data("gpt-neox-20b-tokenizer"))


@pytest.fixture(scope="session")
def mistral(shared_data):
    return load_tokenizer(shared_data("mistral-v1-spm") / "tokenizer.model.v1")


@pytest.fixture(scope="session")
def hugging_face(tokenizer):
    """The library's own reading of the file that `tokenizer` wrote, with special tokens as plain text."""
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer.files[0]))
    theirs.encode_special_tokens = True
    return theirs


@given(unicode_texts)
def test_ours_is_lossless_and_encodes_as_hugging_face_does(tokenizer, hugging_face, text):
    ids = tokenizer.encode(text)
    assert ids == hugging_face.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@given(st.lists(unicode_texts))
def test_gpt2_encodes_as_hugging_face_does(gpt2, gpt2_of_hugging_face, texts):
    assert gpt2.encoder == "tiktoken"
    assert gpt2.encode_batch(texts) == [row.ids for row in gpt2_of_hugging_face.encode_batch(texts)]


def test_characters_of_all_kinds_are_split_alike(tokenizer, hugging_face):
    codes = [*range(0x3400), *range(0x3400, 0xD800, 11), *range(0xE000, 0x110000, 11)]
    text = "".join(f"{chr(code)}a{chr(code)} 1" for code in codes)
    for part in range(0, len(text), 100_000):
        piece = text[part : part + 100_000]
        assert tokenizer.encode(piece) == hugging_face.encode(piece).ids


def test_long_blanks(tokenizer, hugging_face):
    for blank in (" " * 49_999, "\n" * 50_000):
        assert tokenizer.encode(f"a{blank}b") == hugging_face.encode(f"a{blank}b").ids
    # tiktoken alone dies of this one
    text = f"a{' ' * 1_000_000}b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_real_text_and_code(gpt2, gpt2_of_hugging_face, tokenizer, hugging_face, shared_data, code_folder):
    texts = [(shared_data("wikitext-2") / "valid.txt").read_text(encoding="utf-8")[:300_000]]
    texts += [document.text for document in open_sources([code_folder])]
    assert gpt2.encode_batch(texts) == [row.ids for row in gpt2_of_hugging_face.encode_batch(texts)]
    ours = tokenizer.encode_batch(texts)
    assert ours == [row.ids for row in hugging_face.encode_batch(texts)]
    for text, ids in zip(texts, ours, strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", ["tokenizer", "gpt2", "neox", "mistral"])
def test_special_tokens_never_come_of_text(name, request):
    loaded = request.getfixturevalue(name)
    ids = loaded.encode(SPECIAL)
    assert loaded.separator not in ids
    assert loaded.decode(ids) == SPECIAL
    assert loaded.token_bytes.shape == (loaded.size,)
    assert loaded.token_bytes.dtype == np.int32
    assert loaded.token_bytes[loaded.separator] == 0
    assert loaded.decode([loaded.separator, *ids, loaded.separator]) in (SPECIAL, f" {SPECIAL}")


def test_facts_of_known_tokenizers(gpt2, neox, mistral):
    # GPT-2: 50,000 merges, 256 bytes and <|endoftext|>, the last; NeoX puts it first
    assert (gpt2.size, gpt2.separator) == (50_257, 50_256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (neox.size, neox.separator, neox.encoder) == (50_277, 0, "tokenizers")
    assert neox.encode("Hello world") == [12092, 1533]
    assert (mistral.size, mistral.separator, mistral.encoder) == (32_000, 2, "sentencepiece")
    assert mistral.encode("Hello world") == [22557, 1526]


@given(unicode_texts)
def test_neox_is_lossless_up_to_its_normalization(neox, text):
    text = unicodedata.normalize("NFC", text)
    ids = neox.encode(text)
    assert neox.decode(ids) == text
    assert neox.token_bytes[ids].sum() == len(text.encode())


@given(unicode_texts.filter(lambda text: "▁" not in text and "\0" not in text))
def test_sentencepiece_decodes_as_the_library_does(mistral, shared_data, text):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(mistral.files[0]))
    ids = mistral.encode(text)
    assert ids == library.encode(text)
    assert mistral.decode(ids) == library.decode(ids) == text
    # the one space that it puts before a text
    assert mistral.token_bytes[ids].sum() == len(text.encode()) + (text != "")


def test_byte_fallback_json(shared_data):
    folder = shared_data("tinystories-260k") / "hf"
    llama = load_tokenizer(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Once upon a time,\n Lily said: é 漢"
    assert (llama.size, llama.separator_token, llama.encoder) == (512, "</s>", "tokenizers")
    assert llama.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert llama.decode(llama.encode(text)) == text == theirs.decode(llama.encode(text))


def test_indentation_is_one_token(tokenizer):
    ids = tokenizer.encode("if x:\n        return 12345")
    pieces = [tokenizer.pieces[id_] for id_ in ids]
    assert b"       " in pieces
    assert all(len(piece.strip()) <= 3 for piece in pieces if piece.strip().isdigit())


def test_training_is_the_same_in_another_process(tokenizer, code_folder, tmp_path):
    script = (
        "import sys; from mosaicjax.data.tokenizer import train_tokenizer\n"
        "train_tokenizer([sys.argv[1]], sys.argv[2], vocab=512, held_out=0.0)"
    )
    subprocess.run(
        [sys.executable, "-c", script, code_folder, tmp_path / "t.json"], check=True, cwd=Path.cwd()
    )
    assert (tmp_path / "t.json").read_bytes() == tokenizer.files[0].read_bytes()
    assert load_tokenizer(tmp_path / "t.json").hash == tokenizer.hash


def test_training_never_sees_what_is_held_out(code_folder, tmp_path, write_rows):
    texts = [document.text for document in open_sources([code_folder])]
    training = [text for text in texts if not is_held_out(text, 0.3)]
    assert 0 < len(training) < len(texts)
    everything = write_rows(tmp_path / "all.jsonl", texts)
    train_alone = write_rows(tmp_path / "train.jsonl", training)
    one = train_tokenizer([everything], tmp_path / "one", vocab=400, held_out=0.3)
    other = train_tokenizer([train_alone], tmp_path / "other", vocab=400, held_out=0.0)
    assert one.files[0].read_bytes() == other.files[0].read_bytes()
    assert one.separator == 0
    assert [one.pieces[id_] for id_ in range(1, 257)] != [b""] * 256


def test_training_that_cannot_be(tmp_path, write_rows):
    rows = write_rows(tmp_path / "rows.jsonl", ["hello hello"])
    with pytest.raises(InputError, match=r"expected a vocabulary of 400; got 26\d"):
        train_tokenizer([rows], tmp_path / "out", vocab=400, held_out=0.0)
    with pytest.raises(InputError, match="at least 257"):
        train_tokenizer([rows], tmp_path / "out", vocab=256, held_out=0.0)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="empty corpus"):
        train_tokenizer([tmp_path / "none"], tmp_path / "out", vocab=400, held_out=0.0)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    for name, contents, problem in [
        ("a.json", "{", "is not JSON"),
        ("b.json", "[]", "expected a JSON object; got list"),
        ("c.json", "{}", "cannot be read"),
        ("d.txt", "", "unknown kind"),
        ("e.model", "nonsense", "expected a SentencePiece model"),
        ("vocab.json", "{}", "merges.txt does not exist"),
    ]:
        (tmp_path / name).write_text(contents)
        with pytest.raises(InputError, match=problem):
            load_tokenizer(tmp_path / name)


def test_separator_is_told_or_asked_for(tokenizer, tmp_path):
    settings = json.loads(tokenizer.files[0].read_text())
    settings["added_tokens"].append({**settings["added_tokens"][0], "id": 512, "content": "</s>"})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="which special token ends a text.*got </s>, <|endoftext|>"):
        load_tokenizer(path)
    assert load_tokenizer(path, separator="</s>").separator == 512
    with pytest.raises(InputError, match="which special token"):
        load_tokenizer(path, separator="hello")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(tmp_path).separator == 512


def test_missing_sentencepiece_is_named(shared_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"pip install 'mosaicjax\[sentencepiece\]'"):
        load_tokenizer(shared_data("mistral-v1-spm"))
