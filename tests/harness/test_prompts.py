"""Hand cases after llm-foundry's code (2025-07-21): what the model reads, to the character."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.harness import prompts
from mosaicjax.harness.answers import chosen, normalized, right_text
from mosaicjax.harness.prompts import Format, Prompt, prompts_of
from mosaicjax.harness.score import Score
from mosaicjax.harness.text import Codec

SEED = 1234


def asked(examples, form, prefix_space=False):
    """The prompts, whose shown examples are all the others wherever there are no more: in their order."""
    return prompts_of(examples, form, prefix_space=prefix_space, seed=SEED)


LM = [{"context": f" c{i} ", "continuation": f" a{i}"} for i in range(3)]


def test_language_modeling_with_a_space_in_the_delimiter():
    form = Format("language_modeling", num_fewshot=2, continuation_delimiter="\nAnswer: ")
    made = asked(LM, form, prefix_space=True)
    # The context that is asked loses its blank, and the answer that is scored gets one.
    assert made[2] == Prompt("c0\nAnswer: a0\nc1\nAnswer: a1", ("\nc2\nAnswer:",), (" a2",))
    assert made[1] == Prompt("c0\nAnswer: a0\nc2\nAnswer: a2", ("\nc1\nAnswer:",), (" a1",))
    # Without a space of its own in the tokenizer, none is put before the answer.
    assert asked(LM, form)[2].continuations == ("a2",)


def test_zero_shots_begin_with_the_example():
    assert asked(LM, Format("language_modeling"))[1] == Prompt("", ("c1",), ("a1",))
    form = Format("language_modeling", prompt_string="Say it.", prelimiter="Q: ", example_delimiter="###")
    assert asked(LM, form)[1] == Prompt("Say it.", ("###Q: c1",), ("a1",))


def test_blanks_stay_where_the_dataset_is_not_stripped():
    form = Format("language_modeling", num_fewshot=1, strip_dataset=False)
    assert asked(LM[:2], form, prefix_space=True)[1] == Prompt(" c0   a0", ("\n c1  ",), (" a1",))


MC = [{"query": f"q{i}\n", "choices": ["x", " y"], "gold": i % 2} for i in range(3)]


def test_multiple_choice():
    form = Format("multiple_choice", num_fewshot=2, prelimiter="Q: ", continuation_delimiter="\nA: ")
    # Options are shown as they stand, and scored with a space before them.
    assert asked(MC, form, prefix_space=True)[2] == Prompt(
        "Q: q0\nA: x\nQ: q1\nA:  y", ("\nQ: q2\nA:",), (" x", " y")
    )


SCHEMA = [
    {"context_options": [f"it {i}", f"she {i}"], "continuation": "ran .", "gold": i % 2} for i in range(3)
]


def test_schema():
    form = Format("schema", num_fewshot=2, prelimiter="> ")
    made = asked(SCHEMA, form, prefix_space=True)[2]
    # llm-foundry puts the delimiter behind the prelimiter here, and only behind a prelude.
    assert made == Prompt("> it 0 ran .> \nshe 1 ran .", ("> \nit 2", "> \nshe 2"), (" ran .",))
    alone = asked(SCHEMA, Format("schema", prelimiter="> ", continuation_delimiter=" so "))[0]
    assert alone == Prompt("", ("> it 0", "> she 0"), ("ran .",))


QA = [
    {"context": f"q{i}", "answer": str(i), "aliases": [f"no. {i}"], "chain_of_thought": f"( {i} )"}
    for i in range(3)
]


def test_generation_with_a_chain_of_thought():
    form = Format(
        "generation_task_with_answers",
        num_fewshot=1,
        prelimiter="Question: ",
        continuation_delimiter="\n\nA:",
        cot_delimiter="The answer is ",
    )
    made = asked(QA[:2], form, prefix_space=True)[1]
    assert made == Prompt("Question: q0\n\nA:( 0 )The answer is 0", ("\nQuestion: q1\n\nA:",), ())


@given(st.integers(1, 12), st.integers(0, 14), st.data())
def test_shots_are_others_than_the_asked_one(count, wanted, data):
    asked_number = data.draw(st.integers(0, count - 1))
    chosen_numbers = prompts.shots(count, wanted, asked_number, random.Random(data.draw(st.integers(0, 99))))
    assert asked_number not in chosen_numbers
    assert len(chosen_numbers) == min(wanted, count - 1)
    assert chosen_numbers <= set(range(count))


def test_the_seed_and_all_examples_make_the_shots():
    form = Format("language_modeling", num_fewshot=2)
    many = [{"context": f"c{i}", "continuation": f"a{i}"} for i in range(20)]
    all_of_them = prompts_of(many, form, prefix_space=False, seed=1)
    assert prompts_of(many, form, prefix_space=False, seed=1, limit=5) == all_of_them[:5]
    assert prompts_of(many, form, prefix_space=False, seed=2) != all_of_them


def byte_codec(before=(), leading=False):
    """A token a byte, 256 for a space with a letter behind it, 257 to begin a text."""
    tokenizer = Tokenizer(
        encode=lambda text: list(text.encode()),
        encode_batch=lambda texts: [list(text.encode()) for text in texts],
        encoder="bytes",
        pieces=[*(bytes([byte]) for byte in range(256)), b" a", b""],
        separator=(257, "<s>"),
        leading_space=leading,
        files=(),
        special={"<s>": 257},
    )
    tokenizer.before = before
    return Codec(tokenizer)


def test_the_three_parts_are_encoded_apart_and_the_context_is_cut_at_its_left():
    prompt = Prompt("P", ("c1", "c2"), ("xy", "z"))
    codec = byte_codec(before=(257,))
    assert prompts.requests_of(prompt, codec, 100) == [
        ([257, *b"Pc1"], [*b"xy"]),
        ([257, *b"Pc1"], [*b"z"]),
        ([257, *b"Pc2"], [*b"xy"]),
        ([257, *b"Pc2"], [*b"z"]),
    ]
    assert prompts.requests_of(prompt, codec, 4)[0] == ([*b"c1"], [*b"xy"])
    with pytest.raises(InputError, match="an answer to score; expected 1 to 1 tokens; got 2"):
        prompts.requests_of(prompt, codec, 2)
    # With nothing before it, what stands for an empty context is read.
    assert prompts.requests_of(Prompt("", ("",), ("z",)), byte_codec(), 9) == [([257], [*b"z"])]


def test_the_longest_answer_is_what_is_written():
    form = Format("generation_task_with_answers", cot_delimiter=" so ")
    longest = max(len("( 0 ) so no. 0"), len("( 0 ) so 0"))
    assert prompts.longest_answer(QA, form, byte_codec()) == longest + 10
    assert prompts.longest_answer(QA, form, byte_codec(before=(257,))) == longest + 11
    plain = [{"context": "q", "answer": ""}]
    assert prompts.longest_answer(plain, Format("generation_task_with_answers"), byte_codec()) == 1


@pytest.mark.parametrize(
    ("written", "accepted", "form", "right"),
    [
        ("The Eiffel_Tower, in Paris", ["eiffel tower"], {}, True),
        ("It is the Eiffel tower", ["eiffel tower"], {}, False),
        ("Paris", ["London", "paris!"], {}, True),
        ("so 5. The answer is 12\n\nQ", ["12"], {"cot_delimiter": "The answer is "}, True),
        ("12 The answer is 13", ["12"], {"cot_delimiter": "The answer is "}, False),
        ("1 Question: 12", ["12"], {"early_stopping_criteria": ("\n\n", "Question:")}, False),
        ("  12.0", ["12"], {"do_normalization": False}, True),
        ("Twelve", ["twelve"], {"do_normalization": False}, False),
    ],
)
def test_answers_are_right_by_their_beginning(written, accepted, form, right):
    assert right_text(written, accepted, Format("generation_task_with_answers", **form)) is right


def test_normalized_answers():
    assert normalized("  The  ‘Big_Bang’, a theory! ") == "big bang theory"
    assert normalized("Athens and another") == "athens and another"


def test_the_option_of_least_perplexity_a_token_is_chosen():
    scores = [Score(-4.0, False), Score(-3.0, False), Score(-2.0, False)]
    assert chosen(scores, [1, 1, 1]) == 2
    assert chosen(scores, [4, 1, 1]) == 0
    assert chosen(scores, [4, 3, 1]) == 0


def test_examples_that_do_not_fit_are_refused(tmp_path):
    def refusal(kind, *lines):
        path = tmp_path / "task.jsonl"
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        with pytest.raises(InputError) as error:
            prompts.read_examples(str(path), Format(kind))
        return str(error.value)

    assert "line 2 is no JSON" in refusal("language_modeling", LM[0], "{")
    assert "line 1 is no example of schema; expected context_options (list)" in refusal("schema", MC[0])
    assert "gold; expected a number from 0 to 1; got 2" in refusal("multiple_choice", {**MC[0], "gold": 2})
    assert "options; expected strings" in refusal("multiple_choice", {**MC[0], "choices": [1]})
    assert "holds no examples" in refusal("language_modeling")
    assert "cannot read" in str(
        pytest.raises(InputError, prompts.read_examples, "nowhere", Format("schema")).value
    )


def test_a_chain_of_thought_belongs_to_all_examples_or_none(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(QA[0]) + "\n\n" + json.dumps({"context": "q", "answer": "b"}) + "\n")
    form = Format("generation_task_with_answers", cot_delimiter=" so ")
    first, second = prompts.read_examples(str(path), form)
    assert prompts.answer_text(first, "0", form) == "( 0 ) so 0"
    assert prompts.answer_text(second, "b", form) == " so b"
