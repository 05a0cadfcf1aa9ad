"""The server's answers are the model's, in OpenAI's form, and its refusals are sentences."""

import base64
import http.client
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from infer.qwen import Qwen
from infer.server.served import Limits
from qwen_jax.model import Inputs, forward, init, unembed
from tests.infer import tiny
from tests.infer.server.conftest import Live, serving

HI = [{"role": "user", "content": "there"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties,
     "required": sorted(properties), "additionalProperties": False}}}
    for name, properties in (("add", {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}), ("now", {}))
]  # fmt: skip
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def client(live: Live):
    with openai.OpenAI(
        base_url=live.url + "/v1", api_key="x", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def logprobs_of(qwen: Qwen, ids: list[int]) -> np.ndarray:
    """[T - 1] of each token after those before it, by one whole forward."""
    hidden = forward(qwen.config, qwen.params, Inputs.inference(jnp.array([ids]))).hidden
    logits = unembed(qwen.config, qwen.params, hidden)[0, :-1, : len(qwen.tokenizer)]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]


def test_a_chat_is_the_models_answer(live: Live, client) -> None:
    greedy = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 12}
    wanted = live.qwen.generate(
        [live.qwen.chat_prompt(HI)],
        live.qwen.sampling(temperature=0.0),
        max_tokens=12,
        stop_ids=live.qwen.turns.stop_ids,
    )[0]
    whole = client.chat.completions.create(**greedy, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (wanted.text, wanted.finish_reason)
    assert whole.usage.completion_tokens == len(wanted.tokens) and whole.usage.prompt_tokens == wanted.prompt_tokens
    np.testing.assert_allclose([token.logprob for token in choice.logprobs.content], wanted.logprobs, atol=2e-4)
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    bytes_ = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert bytes_ == b"".join(live.qwen.tokenizer.token_bytes(id) for id in wanted.tokens)

    text, tokens, reasons, usage = "", [], [], None
    for chunk in client.chat.completions.create(
        **greedy, stream=True, logprobs=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for part in chunk.choices:
            text += part.delta.content or ""
            reasons += [part.finish_reason] if part.finish_reason else []
            tokens += part.logprobs.content if part.logprobs else []
    assert (text, reasons) == (wanted.text, [wanted.finish_reason]) and usage.completion_tokens == len(wanted.tokens)
    assert [token.logprob for token in tokens] == [token.logprob for token in choice.logprobs.content]


def test_draws_depend_on_the_seed_alone(live: Live, client) -> None:
    asked = {"model": "tiny", "messages": HI, "temperature": 1.0, "max_tokens": 10}
    three = client.chat.completions.create(**asked, seed=5, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    with ThreadPoolExecutor() as pool:  # whoever stands beside
        alone = pool.map(lambda seed: client.chat.completions.create(**asked, seed=seed), (5, 6, 7))
    texts = [choice.message.content for choice in three.choices]
    assert texts == [one.choices[0].message.content for one in alone] and len(set(texts)) == 3


def test_echoed_prompts_are_scored(live: Live) -> None:
    """As lm-eval asks: the log-probabilities are those of one forward over the whole, however long."""
    for text in ("the rain in there", "the other inner thing when in the rain " * 4):
        ids = live.qwen.tokenizer.encode(text)
        body = {"model": "tiny", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
        _, _, answer = live.post(COMPLETE, body)
        (choice,) = answer["choices"]
        scores = choice["logprobs"]
        assert choice["text"] == text == "".join(scores["tokens"]) and scores["token_logprobs"][0] is None
        np.testing.assert_allclose(scores["token_logprobs"][1:], logprobs_of(live.qwen, ids), atol=2e-4)
        assert scores["text_offset"] == np.cumsum([0, *map(len, scores["tokens"][:-1])]).tolist()
        assert answer["usage"]["completion_tokens"] == 0
        again = live.post(COMPLETE, body | {"max_tokens": 3, "temperature": 0})[2]["choices"][0]["logprobs"]
        np.testing.assert_allclose(again["token_logprobs"][1 : len(ids)], scores["token_logprobs"][1:], atol=2e-4)
        assert len(again["tokens"]) == len(ids) + 3


def test_completions_of_many_prompts(live: Live, client) -> None:
    prompts = ["the rain", live.qwen.tokenizer.encode("in there")]
    answer = live.post(COMPLETE, {"model": "tiny", "prompt": "the rain", "temperature": 0, "max_tokens": 6})[2]
    wanted = live.qwen.generate(prompts, live.qwen.sampling(temperature=0.0), max_tokens=6)
    assert answer["choices"][0]["text"] == wanted[0].text
    both = client.completions.create(model="tiny", prompt=["the rain", "in there"], temperature=0, max_tokens=6, n=2)
    assert [choice.text for choice in both.choices] == [wanted[i].text for i in (0, 0, 1, 1)]
    # OpenAI's types of a stream know no reason that is still to come
    lenient = openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0)
    stream = lenient.completions.create(model="tiny", prompt="the rain", temperature=0, max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted[0].text


def test_biases_penalties_and_bans_reach_the_device(live: Live) -> None:
    tokenizer = live.qwen.tokenizer
    (only,) = tokenizer.encode("q")
    body = {"model": "tiny", "prompt": "the", "temperature": 0, "max_tokens": 5}

    def ask(**more) -> str:
        return live.post(COMPLETE, body | more)[2]["choices"][0]["text"]

    assert ask(logit_bias={str(only): 100}) == ask(allowed_token_ids=[only]) == "qqqqq"
    assert len(set(ask(allowed_token_ids=tokenizer.encode("qxzy"), frequency_penalty=2, max_tokens=12))) > 1
    plain = ask(max_tokens=20)
    assert ask(stop=plain[4:6], max_tokens=20) == plain[: plain.index(plain[4:6])]


def test_tools_are_called_in_their_form(live: Live, client) -> None:
    asked = {"model": "tiny", "messages": HI, "tools": TOOLS, "temperature": 0, "max_tokens": 200}
    named = client.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "add"}})
    (call,) = named.choices[0].message.tool_calls
    assert (call.function.name, named.choices[0].finish_reason) == ("add", "stop")
    arguments = json.loads(call.function.arguments)
    assert arguments["a"] in (1, 2) and isinstance(arguments["b"], bool)
    one = {"tool_choice": "required", "parallel_tool_calls": False}
    required = client.chat.completions.create(**asked, **one)
    assert required.choices[0].finish_reason == "tool_calls" and required.choices[0].message.content is None
    (call,) = required.choices[0].message.tool_calls
    found = {"name": "", "arguments": "", "ids": 0}
    for chunk in client.chat.completions.create(**asked, **one, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            found["ids"] += delta.id is not None
            found["name"] += delta.function.name or ""
            found["arguments"] += delta.function.arguments or ""
    assert found == {"name": call.function.name, "arguments": call.function.arguments, "ids": 1}


def test_answers_have_the_form_that_is_asked(live: Live, client) -> None:
    schema = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}, "on": {"type": "boolean"}},
              "required": ["kind", "on"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(5):
        answer = client.chat.completions.create(
            model="tiny", messages=HI, seed=seed, temperature=1.5, max_tokens=100, response_format=form
        )
        found = json.loads(answer.choices[0].message.content)
        assert found["kind"] in "ab" and isinstance(found["on"], bool) and answer.choices[0].finish_reason == "stop"
    more = {"structured_outputs": {"choice": ["rain", "there"]}}
    assert client.chat.completions.create(model="tiny", messages=HI, extra_body=more).choices[0].message.content in (
        "rain",
        "there",
    )


def test_responses_and_their_events(live: Live, client) -> None:
    asked = {"model": "tiny", "input": "there", "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**asked)
    chat = client.chat.completions.create(model="tiny", messages=HI, max_tokens=16, temperature=0).choices[0]
    assert whole.output_text == chat.message.content
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    begun = [event.item.id for event in events if event.type == "response.output_item.added"]
    assert begun == [event.item.id for event in events if event.type == "response.output_item.done"]
    tool = {"type": "function", "strict": False, **TOOLS[0]["function"]}
    called = client.responses.create(
        model="tiny", input="there", tools=[tool, {"type": "web_search"}], tool_choice="required", max_output_tokens=99
    )
    assert called.output[0].type == "function_call" and called.output[0].name == "add"
    history = [
        {"role": "user", "content": "there"},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1, "b": true}'},
        {"type": "function_call_output", "call_id": "c", "output": "3"},
    ]
    assert client.responses.create(**asked | {"input": history}).status in ("completed", "incomplete")


def test_embeddings_are_last_hidden_states(live: Live) -> None:
    texts = ["the rain", "the other inner thing when in the rain " * 3]
    answer = live.post("/v1/embeddings", {"model": "tiny", "input": texts})[2]
    packed = live.post("/v1/embeddings", {"model": "tiny", "input": texts, "encoding_format": "base64"})[2]
    for text, found, bytes_ in zip(texts, answer["data"], packed["data"], strict=True):
        ids = live.qwen.tokenizer.encode(text)
        hidden = forward(live.qwen.config, live.qwen.params, Inputs.inference(jnp.array([ids]))).hidden[0, -1]
        np.testing.assert_allclose(found["embedding"], hidden / np.linalg.norm(hidden), atol=1e-5)
        unpacked = np.frombuffer(base64.b64decode(bytes_["embedding"]), "<f4")
        np.testing.assert_allclose(unpacked, found["embedding"], atol=1e-6)


def chats(**more) -> tuple[str, dict]:
    return CHAT, {"model": "tiny", "messages": HI, "max_tokens": 2} | more


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}
REFUSED = [
    (*chats(model="nope"), 404, "nope"),
    (CHAT, b'{"model":', 400, "JSON"),
    (CHAT, b"[1]", 400, ""),
    (CHAT, {"model": "tiny"}, 400, "messages"),
    (*chats(messages=[]), 400, "messages"),
    (*chats(messages=[{"role": "user"}]), 400, "content"),
    (*chats(messages=[{"role": "king", "content": "x"}]), 400, "king"),
    (*chats(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), 400, "image"),
    (*chats(temperature=3), 400, "temperature"),
    (*chats(temperature=-1), 400, "temperature"),
    (*chats(top_p=0), 400, "top_p"),
    (*chats(max_tokens=0), 400, "max_tokens"),
    (*chats(n=0), 400, "n"),
    (*chats(n=100), 400, "32"),
    (*chats(logit_bias={"999999": 5}), 400, "999999"),
    (*chats(logit_bias={"1": 500}), 400, "logit_bias"),
    (*chats(stop=["a", "b", "c", "d", "e"]), 400, "stop"),
    (*chats(stop=""), 400, "stop"),
    (*chats(top_logprobs=2), 400, "logprobs"),
    (*chats(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (*chats(stream_options={"include_usage": True}), 400, "stream"),
    (*chats(response_format=SCHEMA), 400, "foo"),
    (*chats(response_format={"type": "sound"}), 400, "response_format"),
    (*chats(tools=[]), 400, "tools"),
    (*chats(tool_choice="required"), 400, "tools"),
    (*chats(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "sub"}}), 400, "sub"),
    (*chats(chat_template_kwargs={"chat_template": "{{ x }}"}), 400, "chat_template"),
    (*chats(messages=[{"role": "user", "content": "hi " * 6000}]), 400, "2048"),
    (COMPLETE, {"model": "tiny", "prompt": []}, 400, "prompt"),
    (COMPLETE, {"model": "tiny", "prompt": [[1], [99999]]}, 400, "99999"),
    (COMPLETE, {"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "echo"),
    (COMPLETE, {"model": "tiny", "prompt": "a", "suffix": "b"}, 400, "suffix"),
    (COMPLETE, {"model": "tiny", "prompt": "a", "n": 1, "best_of": 3}, 400, "best_of"),
    ("/v1/responses", {"model": "tiny", "input": "a", "previous_response_id": "resp_1"}, 404, "previous"),
    ("/v1/embeddings", {"model": "tiny", "input": []}, 400, "input"),
    ("/v1/nope", {}, 404, "/v1/nope"),
]


@pytest.mark.parametrize(("path", "body", "status", "expected"), REFUSED)
def test_refusals_are_openais_objects(live: Live, path: str, body, status: int, expected: str) -> None:
    found, _, answer = live.post(path, body)
    assert found == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and expected in error["message"]
    assert error["code"] is None or isinstance(error["code"], str)


def test_what_clients_send_besides_is_taken(live: Live) -> None:
    more = {
        "user": "u",
        "store": True,
        "metadata": {},
        "service_tier": "auto",
        "foo": 1,
        "max_tokens": 32000,
        "stop": "th",
    }
    messages = [{"role": "developer", "content": "in"}, {"role": "user", "content": [{"type": "text", "text": "the"}]}]
    status, _, answer = live.post(*chats(messages=messages, **more, temperature=0))
    assert status == 200 and answer["usage"]["total_tokens"] <= 2048  # cut to what the context leaves


def test_smaller_routes(live: Live) -> None:
    assert live.get("/health")[0] == live.get("/ping")[0] == 200
    model = live.get("/v1/models")[2]["data"][0]
    assert model["id"] == "tiny" and model["max_model_len"] == 2048 and live.get("/v1/models/tiny")[2] == model
    assert live.get("/v1/models/other")[0] == 404
    ids = live.post("/tokenize", {"prompt": "the rain"})[2]["tokens"]
    assert ids == live.qwen.tokenizer.encode("the rain")
    assert live.post("/tokenize", {"messages": HI})[2]["tokens"] == live.qwen.chat_prompt(HI)
    assert live.post("/detokenize", {"tokens": ids})[2]["prompt"] == "the rain"
    live.post(*chats())
    text = live.get("/metrics")[2]
    assert int(re.search(r'qwen_jax:compiled_programs\{model_name="tiny"\} (\d+)', text)[1]) > 1
    for name in ("num_requests_running", "num_requests_waiting", "generation_tokens_total", "prefix_cache_hits_total"):
        assert f'vllm:{name}{{model_name="tiny"}}' in text
    assert "vllm:time_to_first_token_seconds_bucket" in text
    assert live.get("/v1/models", **{"x-request-id": "mine"})[1]["x-request-id"] == "mine"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_gives_pages_back(live: Live, stream: bool) -> None:
    live.settle()
    body = {"model": "tiny", "prompt": "the", "max_tokens": 500, "ignore_eos": True, "stream": stream}
    before = live.running.engine.counts.answer_tokens
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=60)
    connection.request("POST", COMPLETE, json.dumps(body), {"Content-Type": "application/json"})
    while live.running.engine.counts.answer_tokens == before:
        time.sleep(0.005)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    live.settle()
    assert live.running.engine.counts.answer_tokens - before < 490
    assert live.running.engine.pool.held == 0


def test_keys_sizes_queues_and_times(live: Live) -> None:
    limits = Limits(max_waiting=2, timeout=0.5, max_body=20_000)
    with serving(live.qwen, limits, api_keys=["secret", "other"], origins=["https://a.example"]) as guarded:
        path, body = chats(max_tokens=1, temperature=0)
        key = {"Authorization": "Bearer secret"}
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}, {"X-Api-Key": "öther"}):
            wrong = {name: value.encode().decode("latin1") for name, value in wrong.items()}
            status, headers, answer = guarded.post(path, body, **wrong)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        assert guarded.get("/health")[0] == 200 and guarded.get("/v1/models")[0] == 401
        assert guarded.get("/v1/models", **{"X-Api-Key": "other"})[0] == 200
        began = time.monotonic()
        assert guarded.post(path, b"x" * 10_000_000, **key)[0] == 413 and time.monotonic() - began < 5
        long = {"model": "tiny", "prompt": "the", "max_tokens": 400, "ignore_eos": True}
        status, _, answer = guarded.post(COMPLETE, long, **key)
        if status != 200:  # on a fast machine it is there in time
            assert status == 504 and "longer" in answer["error"]["message"]
        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(lambda _: guarded.post(COMPLETE, long, **key), range(24)))
        refused = [(headers, answer) for status, headers, answer in found if status == 429]
        assert refused and all(headers["retry-after"] == "1" for headers, _ in refused)
        assert {status for status, _, _ in found} <= {200, 429, 504}
        assert "access-control-allow-origin" not in guarded.get("/v1/models", **key, Origin="https://b.example")[1]
        allowed = guarded.get("/v1/models", **key, Origin="https://a.example")[1]
        assert allowed["access-control-allow-origin"] == "https://a.example"


@pytest.mark.slow  # its programs are its own
def test_one_request_that_fails_leaves_others(live: Live) -> None:
    """A weight that is no number spoils the answers of those who read its token, and of nobody else."""
    bad = live.qwen.tokenizer.encode("q")[0]
    params = init(tiny.CONFIG, jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"].at[bad].set(jnp.nan)
    spoilt = Qwen(tiny.CONFIG, params, live.qwen.tokenizer)
    with serving(spoilt) as other, ThreadPoolExecutor() as pool:
        told = pool.map(
            lambda prompt: other.post(COMPLETE, {"model": "tiny", "prompt": prompt, "max_tokens": 20}), ["the", "q"]
        )
        (good, _, _), (status, _, answer) = told
        assert good == 200 and status == 500 and "finite" in answer["error"]["message"]
