import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.byte_level import (
    BYTE_CHARACTERS,
    CL100K_PATTERN,
    GPT2_PATTERN,
    TIKTOKEN_PATTERNS,
    piece_bytes,
    tiktoken_ranks,
)
from mosaicjax.data.tokenizer import load_tokenizer


@pytest.fixture
def settings(tokenizer):
    return json.loads(tokenizer.files[0].read_text())


def load(settings, folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(settings))
    return load_tokenizer(path)


def test_byte_characters_are_those_of_hugging_face():
    assert set(BYTE_CHARACTERS) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in (0, 0x20, 0x41, 0x7F, 0x80, 0xAD, 0xE9, 0x3000, 0x1F600):
        ((piece, _),) = split.pre_tokenize_str(chr(code))
        assert piece_bytes(piece) == chr(code).encode()


@pytest.mark.parametrize("pattern", sorted(TIKTOKEN_PATTERNS))
def test_known_expressions_give_the_same_ids(settings, tmp_path_factory, pattern):
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    folder = tmp_path_factory.mktemp("pattern")
    ours = load(settings, folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert ours.encoder == "tiktoken"

    @given(st.text() | st.text(alphabet=" \n\r\t'SſsKK.,(=_09aZé\u0301\u00a0\u2028٣²İ", max_size=60))
    def check(text):
        assert ours.encode(text) == theirs.encode(text).ids

    check()


def test_byte_level_alone_is_the_expression_of_gpt2(settings, tmp_path):
    settings["pre_tokenizer"] = settings["pre_tokenizer"]["pretokenizers"][1] | {"use_regex": True}
    byte_level = load(settings, tmp_path)
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    split = load(settings, tmp_path)
    text = "def f(x):\n\n    return x+1234  # it's\t 'quoted' é\n"
    assert byte_level.encoder == split.encoder == "tiktoken"
    assert byte_level.encode(text) == split.encode(text)


def change_normalizer(settings):
    settings["normalizer"] = {"type": "NFC"}


def change_expression(settings):
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = CL100K_PATTERN + "|x"


def change_behavior(settings):
    settings["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"


def add_prefix_space(settings):
    settings["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def add_plain_token(settings):
    settings["added_tokens"].append(
        {**settings["added_tokens"][0], "id": 512, "content": "  ", "special": False}
    )


def swap_merges(settings):
    merges = settings["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def ignore_merges(settings):
    settings["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    "change",
    [
        change_normalizer,
        change_expression,
        change_behavior,
        add_prefix_space,
        add_plain_token,
        swap_merges,
        ignore_merges,
    ],
)
def test_any_other_structure_is_left_to_tokenizers(settings, tmp_path, change):
    assert load(settings, tmp_path).encoder == "tiktoken"
    change(settings)
    assert load(settings, tmp_path).encoder == "tokenizers"


def test_entry_that_its_own_bytes_do_not_merge_into(settings):
    # 'b c' comes first, so that 'ab' + 'c' is never met in 'abc', but tiktoken would join 'a' + 'bc'
    vocabulary = {character: id_ for id_, character in enumerate(BYTE_CHARACTERS)}
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    vocabulary |= {left + right: 256 + rank for rank, (left, right) in enumerate(merges)}
    settings["model"] |= {"vocab": vocabulary, "merges": merges}
    settings["added_tokens"] = []
    assert tiktoken_ranks(settings) is None
    reachable = {"vocab": {key: id_ for key, id_ in vocabulary.items() if key != "abc"}, "merges": merges[:2]}
    settings["model"] |= reachable
    ranks = tiktoken_ranks(settings)
    assert ranks is not None
    assert (ranks[b"bc"], ranks[b"ab"], len(ranks)) == (256, 257, 258)
