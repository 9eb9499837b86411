"""Our model beside lm-eval's own `hf`, to the last example."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from mosaicjax.data.chat import Chat
from mosaicjax.errors import InputError
from mosaicjax.harness.lm import language_model
from mosaicjax.harness.subject import Settings, Subject
from mosaicjax.harness.tasks import Wanted, evaluate_tasks
from tests.harness import local_tasks

LIMIT = 12

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def folder(shared_data):
    pytest.importorskip("lm_eval")
    return str(shared_data("tinystories-260k") / "hf")


@pytest.fixture(scope="module")
def peer(folder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="module")
def peer_without_cache(peer):
    """Its cache takes the wrong logits where equal tokens are divided in two ways (lm-eval 0.4.13)."""
    return type(peer)(pretrained=peer.model, tokenizer=peer.tokenizer, batch_size=8, logits_cache=False)


@pytest.fixture(scope="module")
def ours(folder):
    return Subject(folder, Settings(batch=8))


@pytest.mark.parametrize("kind", local_tasks.KINDS)
def test_tasks_have_the_same_scores_to_the_last_example(kind, ours, peer, tmp_path, shared_data):
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    file = local_tasks.write(kind, tmp_path, shared_data("eval"))
    shots = 2 if kind == "choice" else 0
    manager = TaskManager(include_defaults=False)

    def results_of(model):
        loaded = manager.load([file])
        loaded["tasks"][kind].set_config("num_fewshot", shots)
        loaded["tasks"][kind].set_fewshot_seed(7)
        return evaluate(lm=model, task_dict=loaded, limit=LIMIT, bootstrap_iters=0)

    theirs, mine = results_of(peer), results_of(language_model(ours, 7))
    pairs = list(zip(mine["samples"][kind], theirs["samples"][kind], strict=True))
    assert len(pairs) == LIMIT
    for one, other in pairs:
        assert one["arguments"] == other["arguments"]
        if kind == "written":
            assert one["resps"] == other["resps"]
            continue
        # Log-likelihoods, and with them whether greedy decoding writes the continuation.
        got, expected = (np.array([resp[0] for resp in sample["resps"]], float) for sample in (one, other))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    # By the command's own way there, too.
    again = evaluate_tasks(ours, Wanted((file,), shots=shots, limit=LIMIT, seed=7), lambda line: None)
    for results in (mine, again):
        for name, value in theirs["results"][kind].items():
            if "stderr" not in name:
                expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
                assert results["results"][kind][name] == expected, name
        assert results["n-shot"] == theirs["n-shot"] and results["versions"] == theirs["versions"]


TEMPLATES = {
    "keeps": "{% for m in messages %}<s>[{{ m.role }}]\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>[assistant]\n{% endif %}",
    "trims": "{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
}


@pytest.mark.parametrize("kind", ["choice", "last_word", "written"])
@pytest.mark.parametrize(
    ("template", "single_turn", "system", "begun"),
    [("keeps", False, "Be brief.", ""), ("trims", True, "", "It is "), ("keeps", True, "", "Well,")],
)
def test_conversations_have_the_same_scores_to_the_last_example(
    kind, template, single_turn, system, begun, ours, peer, tmp_path, shared_data
):
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    file = local_tasks.write(
        kind, tmp_path, shared_data("eval"), gen_prefix=begun or None, fewshot_split="test"
    )
    (tmp_path / "its.jinja").write_text(TEMPLATES[template])
    loaded = TaskManager(include_defaults=False).load([file])
    loaded["tasks"][kind].set_config("num_fewshot", 2)
    loaded["tasks"][kind].set_fewshot_seed(7)
    peer.tokenizer.chat_template = TEMPLATES[template]
    theirs = evaluate(
        lm=peer,
        task_dict=loaded,
        limit=LIMIT,
        bootstrap_iters=0,
        system_instruction=system or None,
        apply_chat_template=True,
        fewshot_as_multiturn=not single_turn,
    )
    wanted = Wanted(
        (file,),
        str(tmp_path / "out"),
        shots=2,
        limit=LIMIT,
        seed=7,
        template=str(tmp_path / "its.jinja"),
        single_turn=single_turn,
        system=system,
    )
    results = evaluate_tasks(ours, wanted, lambda line: None)
    lines = (tmp_path / "out" / f"samples_{kind}.jsonl").read_text().splitlines()
    assert len(lines) == LIMIT
    for one, other in zip(map(json.loads, lines), theirs["samples"][kind], strict=True):
        assert one["arguments"] == json.loads(json.dumps(other["arguments"]))
        if kind == "written":
            assert one["resps"] == other["resps"]
            continue
        got, expected = (np.array([resp[0] for resp in each["resps"]], float) for each in (one, other))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert results["chat_template"] == TEMPLATES[template]
    with pytest.raises(InputError, match="done with another template|done with another single_turn"):
        evaluate_tasks(ours, replace(wanted, template="", single_turn=False), lambda line: None)


def test_what_ends_a_turn_ends_an_answer(ours, tmp_path):
    """As if the request had named it; where lm-eval's model would need it as the tokenizer's own end."""
    from lm_eval.api.instance import Instance

    template = tmp_path / "its.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{{ ' the' if m.role == 'assistant' }}{% endfor %}"
    )
    chatting = language_model(ours, chat=Chat.of(str(template), ours.tokenizer))

    def written(model, *stops):
        return model.generate_until(
            [
                Instance("generate_until", {}, (start, {"until": list(stops), "max_gen_toks": 40}), 0)
                for start in ("Once upon a time", "Lily and Tom went to", "One day, a cat")
            ]
        )

    plain = language_model(ours)
    assert written(chatting, "zz") == written(plain, "zz", " the")
    assert written(chatting, "zz") != written(plain, "zz")


def test_random_requests_have_the_same_answers(ours, peer_without_cache):
    """Blanks, special tokens, empty contexts, texts longer than the model, and stops in many places."""
    from lm_eval.api.instance import Instance

    rng = random.Random(8)
    words = ["Once", "upon", "a", "time", " ", "  ", "\n", "Lily", "<s>", "</s>", "é", "cat.", "\n\n", "tree"]

    def text(most):
        return rng.choice(["", " "]).join(rng.choice(words) for _ in range(rng.randint(0, most)))

    def asked(kind, *arguments):
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    # lm-eval's model fails on continuations without tokens, of which ours says what is wrong.
    scored = [(text(12), text(5) + rng.choice("xyz")) for _ in range(50)]
    scored += [("word " * 700, "at the end"), ("", "<s>Lily"), ("Once", "\n" + "word " * 90)]
    rolled = [text(40) + "." for _ in range(8)] + ["word " * 800, "x"]
    stops = [["."], ["\n", "the"], ["Lily was", " a "], [" "], ["e t", "the"]]
    written = [(text(8) + "Lily", {"until": list(rng.choice(stops)), "max_gen_toks": 24}) for _ in range(16)]
    written += [("word " * 700, {"until": [".."], "max_gen_toks": 16})]
    model, peer = language_model(ours), peer_without_cache
    for kind, requests in (
        ("loglikelihood", scored),
        ("loglikelihood_rolling", [(each,) for each in rolled]),
    ):
        got, expected = (getattr(each, kind)([asked(kind, *r) for r in requests]) for each in (model, peer))
        np.testing.assert_allclose(
            np.array(got, float), np.array(expected, float), rtol=1e-4, atol=1e-4, err_msg=kind
        )
    # One by one: in a batch, hf writes on behind a stop as long as others do, and may find another.
    theirs = [
        peer.generate_until([asked("generate_until", context, dict(settings))])[0]
        for context, settings in written
    ]
    mine = model.generate_until([asked("generate_until", context, dict(s)) for context, s in written])
    assert mine == theirs
