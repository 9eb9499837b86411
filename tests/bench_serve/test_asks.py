"""What is asked, drawn and from files."""

import json

import pytest

from mosaicjax.bench_serve.asks import Ask, Range, Synthetic, read
from mosaicjax.errors import InputError


def test_lengths_are_those_asked_for_and_all_of_them_come():
    words = Synthetic(Range(3, 6), Range(2, 4)).draw(200, seed=1)
    assert {len(ask.prompt.split()) for ask in words} == {3, 4, 5, 6}
    assert {ask.max_tokens for ask in words} == {2, 3, 4}
    ids = Synthetic(Range(5, 5), Range(1, 1), vocabulary=7).draw(200, seed=1)
    assert {len(ask.prompt) for ask in ids} == {5}
    assert {token for ask in ids for token in ask.prompt} == set(range(7))


def test_a_seed_draws_the_same_and_prompts_do_not_begin_alike():
    drawn = Synthetic(Range(40, 60), Range(8, 9))
    first, again, other = (drawn.draw(50, seed=seed) for seed in (4, 4, 5))
    assert first == again != other
    assert len({ask.prompt[:40] for ask in first}) == 50


def test_a_range_is_one_number_or_two():
    assert Range.parse("--x", "64") == Range(64, 64)
    assert Range.parse("--x", "1:256") == Range(1, 256)
    for text in ("", "0", "a", "5:4", "1:", ":3", "1:2:3", "-1"):
        with pytest.raises(InputError, match="--x; expected a number from 1, or LEAST:MOST"):
            Range.parse("--x", text)


def test_a_file_is_read_again_from_its_beginning(tmp_path):
    messages = [{"role": "user", "content": "größe"}]
    rows = [{"prompt": "a b"}, {"prompt": [1, 2], "max_tokens": 9}, {"messages": messages}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    asks = read(str(path), 7, Range(5, 5), seed=0)
    once = [Ask("a b", 5), Ask([1, 2], 9), Ask(messages, 5)]
    assert asks == [*once, *once, once[0]]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "prompts.jsonl:2 is no JSON"),
        ("[]", "prompts.jsonl:2; expected an object with `prompt` or `messages`"),
        ("{}", "prompts.jsonl:2; expected an object with `prompt` or `messages`"),
        ('{"prompt": "a", "messages": []}', "expected an object with `prompt` or `messages`"),
        ('{"prompt": 3}', "expected text, token ids, or messages"),
        ('{"prompt": []}', "expected text, token ids, or messages"),
        ('{"prompt": [true]}', "expected text, token ids, or messages"),
        ('{"messages": [{"role": "user"}]}', "expected text, token ids, or messages"),
        ('{"messages": "hello"}', "expected text, token ids, or messages"),
        (
            '{"prompt": "a", "max_tokens": "many"}',
            "prompts.jsonl:2: max_tokens; expected 1 or more; got many",
        ),
    ],
)
def test_a_line_that_is_none_is_refused_by_its_number(tmp_path, line, what):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=what):
        read(str(path), 3, Range(1, 1), seed=0)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no prompts"):
        read(str(path), 3, Range(1, 1), seed=0)
