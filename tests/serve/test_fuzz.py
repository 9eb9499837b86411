"""Bodies of the API's fields with values of any kind: answered or refused, and never a fault."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.serve.bodies import ChatBody, CompletionBody, Parameters, PredictBody

BODIES = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody, "/predict": PredictBody}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["x", "", "stop", "text", "user", "65", "<|im_end|>", "\ufffd", "auto", "none"])
    | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LIKELY = {
    "prompt": st.text(max_size=40) | st.lists(st.integers(0, 258), min_size=1, max_size=40),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "assistant"]), "content": st.text(max_size=20)}
        ),
        min_size=1,
        max_size=3,
    ),
    "inputs": st.lists(st.text(max_size=20), min_size=1, max_size=3),
    "parameters": st.dictionaries(st.sampled_from(sorted(Parameters.model_fields)), VALUES, max_size=4),
    "temperature": st.floats(0, 100),
    "top_p": st.floats(1e-6, 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 100),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 258).map(str), st.floats(-100, 100), max_size=4),
    "max_tokens": st.integers(1, 12),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
}


@st.composite
def asked(draw):
    path = draw(st.sampled_from(sorted(BODIES)))
    kind = BODIES[path]
    needed = [name for name, field in kind.model_fields.items() if field.is_required()]
    others = draw(st.lists(st.sampled_from(sorted(kind.model_fields)), max_size=5, unique=True))
    # The most part of it right, so that the engine sees something of it.
    wild = draw(st.sets(st.sampled_from([*needed, *others]), max_size=1))
    body = {
        name: draw(VALUES if name in wild else LIKELY.get(name, VALUES | st.none()))
        for name in dict.fromkeys([*needed, *others])
    }
    body.setdefault(
        "parameters" if kind is PredictBody else "max_tokens", {"max_tokens": 4} if kind is PredictBody else 4
    )
    return path, body


def test_no_body_is_a_fault(client, server):
    statuses = set()

    @settings(max_examples=150)
    @given(asked())
    def ask(case):
        path, body = case
        content = json.dumps(body)
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        statuses.add(response.status_code)
        assert response.status_code in (200, 400, 404), (path, body, response.text)

    ask()
    assert {200, 400} <= statuses
    assert client.get("/health").status_code == 200
    server.engine.wait_idle()
    assert server.engine.pages.held == 0
