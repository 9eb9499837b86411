"""`/v1/completions` and `/predict`, beside the Generator, the engine by hand and whole forward passes."""

import codecs
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.generate import Sampling
from mosaicjax.layers.context import Context
from mosaicjax.serve.request import Wishes
from tests.serve import served
from tests.serve.served import END, SEPARATOR, TOKENIZER, asked, chunks

PATH = "/v1/completions"
PROMPTS = ["The river", "a", "größe light, seven walks under the quiet market", ""]


def texts(answer):
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def written(generator, prompts, **sampling):
    """The Generator's completions."""
    return generator.generate(prompts, Sampling(**sampling), lambda number, text: None)


@pytest.fixture(scope="module")
def forward(model):
    """`forward(ids)`: log-probabilities [L, V] of what follows each token, by one pass in float32."""

    @jax.jit
    def run(weights, tokens_BL):
        positions = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
        context = Context(model.layout, served.DTYPES, positions, tokens_BL=tokens_BL)
        hidden = model.decoder.hidden(weights, model.decoder.embed(weights, tokens_BL, context), context)
        return model.decoder.logits(model.decoder.head(weights, context), hidden.hidden_BLD, context)

    def logprobs(ids):
        padded = np.zeros((1, served.SIZES.longest), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(run(model.weights, jnp.asarray(padded)))[0, : len(ids), : TOKENIZER.size]
        wide = logits.astype(np.float64)
        return wide - np.log(np.exp(wide).sum(1, keepdims=True))

    return logprobs


def test_greedy_text_is_the_generators(client, generator):
    expected = written(generator, PROMPTS, max_tokens=24, temperature=0.0)
    body = {"model": served.NAME, "prompt": PROMPTS, "max_tokens": 24, "temperature": 0}
    answer = asked(client, PATH, body)
    assert texts(answer) == [done.text for done in expected]
    reasons = {"separator": "stop", "stop": "stop", "length": "length"}
    assert [each["finish_reason"] for each in answer["choices"]] == [
        reasons[done.finish] for done in expected
    ]
    read, made = sum(done.prompt_tokens for done in expected), sum(len(done.tokens) for done in expected)
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
    assert answer["object"] == "text_completion" and answer["model"] == served.NAME
    for prompt, done in zip(PROMPTS, expected, strict=True):
        assert texts(asked(client, PATH, body | {"prompt": prompt})) == [done.text]
    ids = [[SEPARATOR, *prompt.encode()] for prompt in PROMPTS]
    assert texts(asked(client, PATH, body | {"prompt": ids})) == texts(answer)
    assert texts(asked(client, PATH, body | {"prompt": ids[0]})) == texts(answer)[:1]


def test_drawn_text_is_the_generators_and_seeds_repeat(client, generator):
    knobs = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 2**32 + 7, "max_tokens": 20}
    expected = written(generator, ["x"] * 3, **(knobs | {"seed": 7}))
    first = texts(asked(client, PATH, {"prompt": "x", "n": 3, **knobs}))
    assert first == [done.text for done in expected] and len(set(first)) == 3
    assert texts(asked(client, PATH, {"prompt": "x", "n": 3, **knobs})) == first
    free = {"prompt": "x", "n": 2, "max_tokens": 20, "ignore_eos": True}
    drawn = [text for _ in range(3) for text in texts(asked(client, PATH, free))]
    assert len(set(drawn)) == 6, "without a seed one is drawn"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_streams_pieces_make_up_the_whole(client, n, logprobs):
    body = {
        "prompt": ["Stone and light", "b"],
        "n": n,
        "max_tokens": 30,
        "seed": 5,
        "logprobs": logprobs,
        "stop": ["e", "\ufffd\ufffd\ufffd"],
    }
    whole = asked(client, PATH, body)
    usage = {"stream_options": {"include_usage": True}}
    pieces = chunks(client, PATH, body | usage)
    last = pieces.pop()
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {each["usage"] for each in pieces} == {None}
    assert len({each["id"] for each in [*pieces, last]}) == 1
    found = [{"text": "", "tokens": [], "offsets": [], "finish": None} for _ in whole["choices"]]
    for piece in pieces:
        (choice,) = piece["choices"]
        mine = found[choice["index"]]
        assert mine["finish"] is None, "a piece after the end"
        mine["text"] += choice["text"]
        mine["finish"] = choice["finish_reason"]
        if logprobs:
            mine["tokens"] += choice["logprobs"]["tokens"]
            mine["offsets"] += choice["logprobs"]["text_offset"]
    for mine, choice in zip(found, whole["choices"], strict=True):
        assert (mine["text"], mine["finish"]) == (choice["text"], choice["finish_reason"])
        if logprobs:
            assert mine["tokens"] == choice["logprobs"]["tokens"]
            assert mine["offsets"] == choice["logprobs"]["text_offset"]
    without = chunks(client, PATH, body)
    assert len(without) == len(pieces) and not any("usage" in each for each in without)


def shown(token):
    """A token as OpenAI shows it."""
    if token >= SEPARATOR:
        return {number: name for name, number in TOKENIZER.special.items()}[token]
    return chr(token) if token < 128 else f"bytes:\\x{token:02x}"


def test_logprobs_are_those_of_a_forward_pass(client, forward):
    ids = [SEPARATOR, *b"Under the market"]
    body = {"prompt": ids, "max_tokens": 30, "temperature": 0, "ignore_eos": True, "logprobs": 4}
    (choice,) = asked(client, PATH, body)["choices"]
    told = choice["logprobs"]
    expected, tokens = forward(ids), []
    decoder, at = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for step in range(30):
        row = forward([*ids, *tokens])[-1] if tokens else expected[-1]
        token = int(row.argmax())
        assert told["tokens"][step] == shown(token)
        assert told["token_logprobs"][step] == pytest.approx(row[token], abs=2e-4)
        best = {shown(int(each)): row[each] for each in np.argsort(-row)[:4]}
        assert told["top_logprobs"][step] == pytest.approx(best, abs=2e-4)
        assert told["text_offset"][step] == at
        at += len(decoder.decode(TOKENIZER.pieces[token]))
        tokens.append(token)
    assert len(told["tokens"]) == 30
    alone = asked(client, PATH, body | {"logprobs": 0})["choices"][0]["logprobs"]
    assert alone["token_logprobs"] == told["token_logprobs"] and alone["top_logprobs"] is None


def test_a_drawn_token_is_told_beside_the_likeliest(client):
    body = {"prompt": "x", "max_tokens": 60, "temperature": 0.4, "seed": 3, "logprobs": 1}
    told = asked(client, PATH, body)["choices"][0]["logprobs"]
    for token, logprob, likeliest in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert likeliest[token] == logprob == min(likeliest.values())
    assert {len(each) for each in told["top_logprobs"]} == {1, 2}


def test_stop_strings_end_the_text(client, generator):
    (plain,) = written(generator, ["Blue"], max_tokens=40, temperature=0.0)
    stop = plain.text[6:8]
    body = {"prompt": "Blue", "max_tokens": 40, "temperature": 0}
    for given in (stop, ["never there", stop]):
        (choice,) = asked(client, PATH, body | {"stop": given})["choices"]
        assert choice["text"] == plain.text[: plain.text.find(stop)] and choice["finish_reason"] == "stop"
    pieces = chunks(client, PATH, body | {"stop": stop})
    assert "".join(each["choices"][0]["text"] for each in pieces) == plain.text[: plain.text.find(stop)]


def test_the_prompt_is_put_before_its_completion(client):
    body = {"prompt": "größe ", "max_tokens": 7, "temperature": 0, "n": 2}
    plain = texts(asked(client, PATH, body))
    assert texts(asked(client, PATH, body | {"echo": True})) == ["größe " + each for each in plain]
    made = ["", ""]
    for piece in chunks(client, PATH, body | {"echo": True}):
        made[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert made == ["größe " + each for each in plain]
    ids = {"prompt": [SEPARATOR, *"größe ".encode()], "echo": True}
    assert texts(asked(client, PATH, body | ids)) == ["größe " + each for each in plain]


def test_lengths(client):
    (choice,) = asked(client, PATH, {"prompt": "x", "ignore_eos": True, "logprobs": 0})["choices"]
    assert len(choice["logprobs"]["tokens"]) == 16 and choice["finish_reason"] == "length"
    # 90 bytes and the separator leave room for five of 96.
    answer = asked(client, PATH, {"prompt": "x" * 90, "ignore_eos": True})
    assert answer["usage"] == {"prompt_tokens": 91, "completion_tokens": 5, "total_tokens": 96}


def drawn_fields(rng):
    """Random fields, and the wishes that they stand for."""
    fields, wishes, sampling = {}, {}, {"temperature": 1.0, "max_tokens": 12}
    for name, value in {
        "temperature": float(rng.choice([0.0, 0.5, 1.3])),
        "top_k": int(rng.integers(0, 40)),
        "top_p": float(rng.uniform(0.3, 1.0)),
        "max_tokens": int(rng.integers(1, 20)),
    }.items():
        if rng.random() < 0.6:
            fields[name] = sampling[name] = value
    for name, ours, value in (
        ("min_p", "min_p", float(rng.uniform(0, 0.5))),
        ("repetition_penalty", "repetition", float(rng.uniform(0.5, 2))),
        ("presence_penalty", "presence", float(rng.uniform(-2, 2))),
        ("frequency_penalty", "frequency", float(rng.uniform(-2, 2))),
        ("ignore_eos", "past_end", True),
    ):
        if rng.random() < 0.5:
            fields[name] = wishes[ours] = value
    if rng.random() < 0.5:
        bias = {int(token): float(rng.uniform(-9, 9)) for token in rng.integers(0, TOKENIZER.size, 4)}
        fields["logit_bias"], wishes["bias"] = {str(token): value for token, value in bias.items()}, bias
    if rng.random() < 0.5:
        fields["stop"] = [str(rng.choice(list("aeiou"))), "\ufffd\ufffd"]
        sampling["stop"] = tuple(fields["stop"])
    fields["seed"] = sampling["seed"] = int(rng.integers(0, 2**32))
    fields.setdefault("max_tokens", 12)
    return fields, Wishes(Sampling(**sampling), **wishes)


def test_every_field_reaches_the_engine(client, own_engine):
    """Random combinations over HTTP, and the same wishes given to an engine by hand."""
    rng = np.random.default_rng(8)
    own_engine.open()
    for number in range(24):
        fields, wishes = drawn_fields(rng)
        prompt = rng.integers(0, 256, rng.integers(1, 30)).tolist()
        heard = []
        own_engine.submit(prompt, wishes, heard.append)
        while not own_engine.idle:
            own_engine.turn()
        (choice,) = asked(client, PATH, {"prompt": prompt, **fields})["choices"]
        assert choice["text"] == "".join(piece.text for piece in heard), (number, fields)


def test_models(client, server):
    model = {
        "id": "tiny",
        "object": "model",
        "created": server.service.created,
        "owned_by": "mosaicjax",
        "max_model_len": 96,
    }
    assert client.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert client.get("/v1/models/tiny").json() == model


def test_predict_is_mosaicmls_shape(client, generator):
    greedy = written(generator, PROMPTS, max_tokens=9, temperature=0.0)
    for parameters in ({"temperature": 0.0, "max_new_tokens": 9}, {"do_sample": False, "max_tokens": 9}):
        answer = asked(client, "/predict", {"inputs": PROMPTS, "parameters": parameters})
        assert answer == {"outputs": [done.text for done in greedy]}
    drawn = written(generator, ["x"], max_tokens=9, temperature=0.7, top_p=0.8, top_k=30, seed=4)
    parameters = {"temperature": 0.7, "top_p": 0.8, "top_k": 30, "seed": 4, "max_new_tokens": 9}
    parameters |= {"use_cache": True, "do_sample": True}
    answer = asked(client, "/predict", {"inputs": "x", "parameters": parameters})
    assert answer == {"outputs": [drawn[0].text]}
    assert len(asked(client, "/predict", {"inputs": ["x", "y"]})["outputs"]) == 2


def test_the_end_of_the_document_is_no_text(client):
    body = {"prompt": "x", "logit_bias": {str(SEPARATOR): 100}, "logprobs": 0}
    (choice,) = asked(client, PATH, body)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>"]
    # Another special token is no text either, but ends none.
    past = {"logit_bias": {str(END): 100}, "max_tokens": 3, "temperature": 0}
    (choice,) = asked(client, PATH, body | past)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert choice["logprobs"]["tokens"] == ["<|im_end|>"] * 3


def test_the_description_names_every_field(client):
    described = client.get("/openapi.json").json()
    schemas = described["components"]["schemas"]
    for path, name in (
        ("/v1/completions", "CompletionBody"),
        ("/v1/chat/completions", "ChatBody"),
        ("/predict", "PredictBody"),
    ):
        content = described["paths"][path]["post"]["requestBody"]["content"]
        assert content == {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        assert schemas[name]["additionalProperties"] is False
    assert {"prompt", "max_tokens", "logit_bias", "top_k", "stream_options"} <= set(
        schemas["CompletionBody"]["properties"]
    )
    references = set(json.dumps(described).split('"$ref": "')[1:])
    names = {each.partition('"')[0].removeprefix("#/components/schemas/") for each in references}
    assert names <= set(schemas)
