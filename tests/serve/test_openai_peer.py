"""The `openai` client as it is, and bodies that schemathesis makes of the API's own description."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosaicjax.generate import Sampling
from mosaicjax.serve.limits import Keys, Limits
from tests.serve import served
from tests.serve.served import END

pytestmark = pytest.mark.peer

BODIES = int(os.environ.get("MOSAICJAX_FUZZED_BODIES", "500"))
KEY = "a-key-of-ours"
MESSAGES = [{"role": "user", "content": "Where does the river run?"}]


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def open_ai(peer, free_engine):
    free_engine.open()
    with (
        served.running(free_engine, keys=Keys([KEY]), limits=Limits(in_flight=8)) as server,
        peer.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


def of(generator, prompts, **sampling):
    return [
        done.text for done in generator.generate(prompts, Sampling(**sampling), lambda number, text: None)
    ]


def test_models(open_ai):
    (model,) = open_ai.models.list()
    assert model.id == served.NAME == open_ai.models.retrieve(served.NAME).id


def test_completions(open_ai, generator):
    prompts = ["The stone", "größe"]
    made = open_ai.completions.create(model="tiny", prompt=prompts, max_tokens=20, temperature=0)
    assert [choice.text for choice in made.choices] == of(generator, prompts, max_tokens=20, temperature=0.0)
    assert made.usage.prompt_tokens == sum(len(prompt.encode()) + 1 for prompt in prompts)
    stream = open_ai.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    found, used = ["", ""], None
    for chunk in stream:
        for choice in chunk.choices:
            found[choice.index] += choice.text
        used = chunk.usage or used
    assert found == [choice.text for choice in made.choices] and used == made.usage


def test_seeds_and_several_choices(open_ai, generator):
    knobs = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9, "seed": 12}
    made = open_ai.completions.create(model="tiny", prompt="x", n=2, **knobs)
    again = open_ai.completions.create(model="tiny", prompt="x", n=2, extra_body={"top_k": 0}, **knobs)
    texts = [choice.text for choice in made.choices]
    assert texts == [choice.text for choice in again.choices] == of(generator, ["x", "x"], **knobs)
    assert texts[0] != texts[1]


def test_chats(open_ai):
    made = open_ai.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=30,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    (choice,) = made.choices
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    for each in choice.logprobs.content:
        # Greedy: the token is the likeliest.
        assert each.token == each.top_logprobs[0].token and each.logprob == each.top_logprobs[0].logprob
    stream = open_ai.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=30, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    # The client's own object of the turn goes back as the next conversation's.
    short = open_ai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, temperature=0)
    longer = [*MESSAGES, short.choices[0].message, {"role": "user", "content": "And?"}]
    assert open_ai.chat.completions.create(model="tiny", messages=longer, max_tokens=3).choices
    ended = open_ai.chat.completions.create(model="tiny", messages=MESSAGES, logit_bias={str(END): 100})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")


def test_stop(open_ai, generator):
    (plain,) = of(generator, ["Blue"], max_tokens=40, temperature=0.0)
    stop = plain[5:7]
    made = open_ai.completions.create(model="tiny", prompt="Blue", max_tokens=40, temperature=0, stop=[stop])
    assert made.choices[0].text == plain[: plain.find(stop)] and made.choices[0].finish_reason == "stop"


def test_logprobs(open_ai):
    made = open_ai.completions.create(model="tiny", prompt="Blue", max_tokens=9, temperature=0, logprobs=3)
    told = made.choices[0].logprobs
    assert len(told.tokens) == made.usage.completion_tokens == len(told.text_offset)
    for token, logprob, likeliest in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert likeliest[token] == logprob == max(likeliest.values()) and len(likeliest) == 3


def test_errors(open_ai, peer):
    def create(**fields):
        return open_ai.completions.create(**({"model": "tiny", "prompt": "x"} | fields))

    with pytest.raises(peer.NotFoundError) as missing:
        create(model="gpt")
    assert missing.value.code == "model_not_found"
    with pytest.raises(peer.BadRequestError) as wrong:
        create(temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(peer.BadRequestError) as unknown:
        create(extra_body={"beams": 3})
    assert unknown.value.code == "unknown_parameter"
    with pytest.raises(peer.BadRequestError) as long:
        create(prompt="x" * 200)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(peer.AuthenticationError):
        open_ai.with_options(api_key="another-key").models.list()


def test_overload_is_a_rate_limit(peer, model):
    engine = model.engine()
    with (
        served.running(engine, limits=Limits(in_flight=2)) as server,
        peer.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        engine.shut()
        stream = client.completions.create(model="tiny", prompt="x", n=2, max_tokens=5, stream=True)
        with pytest.raises(peer.RateLimitError) as full:
            client.completions.create(model="tiny", prompt="x")
        assert full.value.response.headers["Retry-After"] == "1"
        engine.open()
        assert len(list(stream)) > 2


def test_bodies_that_schemathesis_makes_bring_no_500(model):
    """Of the description's own fields, right and wrong; `MOSAICJAX_FUZZED_BODIES` says how many."""
    schemathesis = pytest.importorskip("schemathesis")
    with served.running(model.engine()) as server, server.client() as client:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        cases = st.one_of(
            operation.as_strategy(generation_mode=mode)
            for operation in operations
            if operation.method.lower() == "post"
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        )
        statuses = {}

        @settings(max_examples=BODIES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(cases)
        def ask(case):
            status = case.call().status_code
            statuses[status] = statuses.get(status, 0) + 1
            assert status < 500, case

        ask()
        assert sum(statuses.values()) >= BODIES and {200, 400} <= set(statuses), statuses
        assert client.get("/health").status_code == 200
        server.engine.wait_idle()
        assert server.engine.pages.held == 0
