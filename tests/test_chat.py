"""Rendered prompts against the published hashes, the default model's own template and transformers."""

import copy
import hashlib
import json
import random

import pytest

from qwen_jax.chat import (
    default_template,
    generation_of,
    parse_tool_calls,
    render,
    stop_ids,
    turns,
)
from qwen_jax.errors import InputError
from qwen_jax.presets import load_preset, preset_names
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.weights.gguf import read_metadata

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_time", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
PROMPT = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def metadata(default_gguf):
    return read_metadata(default_gguf)


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return Tokenizer.from_gguf_metadata(metadata)


def random_conversation(rng):
    texts = ["", "Hi", "\n\nx\n", "<think>\na\n</think>\n\nb", "<tool_response>\nr\n</tool_response>", "é <b>&'\" 你好"]
    messages = []
    for _ in range(rng.randint(1, 6)):
        message = {
            "role": rng.choice(["user", "assistant", "assistant", "system", "tool"]),
            "content": rng.choice(texts),
        }
        if message["role"] == "assistant" and rng.random() < 0.5:
            call = {"type": "function", "function": {"name": "f", "arguments": {"a": "é<", "b": [1, None]}}}
            message["tool_calls"] = [call] * rng.randint(0, 2)
        messages.append(message)
    return messages


# --- Published defaults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "tools", "options", "length", "sha256"),
    [
        ("qwen2.5", None, {}, 153, "74fdbba9eed4bb2c"),
        ("qwen2.5", TOOLS, {}, 653, "db71035900781401"),
        ("qwen3", None, {"enable_thinking": False}, 74, "13071b0f0e23e976"),
        ("qwen3", TOOLS, {"enable_thinking": False}, 602, "9c31f0145106993e"),
    ],
)
def test_published_render_hashes(generation, tools, options, length, sha256):
    text = render(HELLO, template=default_template(generation), tools=tools, **options)
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()[:16]) == (length, sha256)


SYSTEMS = {
    "qwen1": "You are a helpful assistant.",
    "qwen1.5": "You are a helpful assistant",
    "qwen2": "You are a helpful assistant.",
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2.5-math": r"Please reason step by step, and put your final answer within \boxed{}.",
    "qwq": "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. "
    "You should think step-by-step.",
}


@pytest.mark.parametrize("generation", ["qwen2.5", "qwen2.5-math", "qwq"])
def test_default_is_the_template_in_the_default_model(generation, metadata):
    """Qwen2.5-Math's and QwQ-32B-Preview's differ from it in the system text alone."""
    rng = random.Random(0)
    system = json.dumps(SYSTEMS[generation])[1:-1]
    template = metadata["tokenizer.chat_template"].replace(SYSTEMS["qwen2.5"], system)
    assert template.count(system) == 2
    for _ in range(500):
        messages, options = random_conversation(rng), {"tools": rng.choice([None, TOOLS])}
        options["add_generation_prompt"] = rng.random() < 0.5
        expected = render(messages, template=template, **options)
        assert render(messages, template=default_template(generation), **options) == expected


@pytest.mark.parametrize("generation", ["qwen1", "qwen1.5", "qwen2"])
def test_the_first_generations_write_plain_chatml(generation):
    rng = random.Random(3)
    for _ in range(100):
        messages = [m for m in random_conversation(rng) if m["role"] != "tool" and not m.get("tool_calls")] or HELLO
        turns = [(m["role"], m["content"]) for m in messages]
        if turns[0][0] != "system":
            turns.insert(0, ("system", SYSTEMS[generation]))
        expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + PROMPT
        assert render(messages, template=default_template(generation)) == expected


def test_qwen3_default_is_the_published_template():
    """What Qwen3-0.6B's own template gives for these conversations in `transformers` has this hash."""
    rng, sha256 = random.Random(2), hashlib.sha256()
    for _ in range(1000):
        messages, options = random_conversation(rng), {"tools": rng.choice([None, TOOLS])}
        options |= rng.choice([{}, {"enable_thinking": False}, {"add_generation_prompt": False}])
        sha256.update(render(messages, template=default_template("qwen3"), **options).encode())
    assert sha256.hexdigest()[:16] == "aef728aaf4f72d91"


def test_renders_as_transformers_does(metadata):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rng, template = random.Random(1), metadata["tokenizer.chat_template"]
    tools = [{"type": "function", "function": {"name": "f", "description": "温度 <&'\">", "parameters": {}}}]
    for _ in range(100):
        messages = random_conversation(rng)
        [expected], _ = utils.render_jinja_template(
            [copy.deepcopy(messages)], tools=tools, chat_template=template, add_generation_prompt=True
        )
        assert render(messages, template=template, tools=tools) == expected


def test_tool_calls_and_results():
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"c":"京"}'}} for _ in range(2)]
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    call = '<tool_call>\n{"name": "f", "arguments": {"c": "京"}}\n</tool_call>'
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    expected = f"{PROMPT}{call}\n{call}<|im_end|>\n<|im_start|>user\n{results}<|im_end|>\n{PROMPT}"
    for generation in ("qwen2", "qwen2.5"):
        assert render(messages, template=default_template(generation)).endswith(f"Hello<|im_end|>\n{expected}")


QWEN3 = {
    # reasoning of turns before the last query is dropped
    (("user", "a"), ("assistant", "<think>\nwhy\n</think>\n\nb"), ("user", "c")): (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    ),
    # after it, kept; a lone tool response is no query
    (("user", "a"), ("assistant", "<think>\nwhy\n</think>\n\nb"), ("user", "<tool_response>\n1\n</tool_response>")): (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\nb<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n"
    ),
    # but an earlier turn without reasoning gets no empty block
    (("user", "a"), ("assistant", "b"), ("tool", "1")): (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n"
    ),
    # the last turn always shows a thinking block
    (("user", "a"), ("assistant", "b")): (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n"
    ),
    # the same question twice: the second one is the last query
    (("user", "a"), ("assistant", "<think>x</think>b"), ("user", "a")): (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    ),
}


@pytest.mark.parametrize(("turns", "expected"), QWEN3.items())
def test_qwen3_reasoning(turns, expected):
    messages = [{"role": role, "content": content} for role, content in turns]
    template = default_template("qwen3")
    assert render(messages, template=template, add_generation_prompt=False) == expected
    assert render(messages, template=template, enable_thinking=True) == expected + PROMPT
    assert render(messages, template=template, enable_thinking=False) == f"{expected}{PROMPT}<think>\n\n</think>\n\n"


def test_qwen3_reasoning_content_is_a_thinking_block():
    messages = [*HELLO, {"role": "assistant", "content": "b", "reasoning_content": "\nwhy\n"}]
    text = render(messages, template=default_template("qwen3"), add_generation_prompt=False)
    assert text.endswith(f"{PROMPT}<think>\nwhy\n</think>\n\nb<|im_end|>\n")
    inline = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nb", "reasoning_content": None}
    assert render([*HELLO, inline], template=default_template("qwen3"), add_generation_prompt=False) == text


@pytest.mark.parametrize("name", [n for n in preset_names() if not n.startswith(("codeqwen", "qwq"))])
def test_generation_of_every_preset(name, tokenizer):
    family = name.split("-")[0]
    expected = "qwen1" if family == "qwen" else "qwen2.5-math" if name.startswith("qwen2.5-math") else family
    small = {"qwen1.5", "qwen2"}  # their tokenizer ends before <tool_call>
    if expected in small:
        tokenizer = copy.copy(tokenizer)
        tokenizer.special_tokens = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    assert generation_of(load_preset(name), tokenizer) == expected


def test_stop_ids(tokenizer):
    assert stop_ids(tokenizer, "qwen2.5") == (151645, 151643)
    assert stop_ids(tokenizer, "qwen1") == (151645, 151644, 151643)
    bare = copy.copy(tokenizer)
    bare.special_tokens = {"<|endoftext|>": 151643}
    with pytest.raises(InputError, match=r"no <\|im_end\|>"):
        stop_ids(bare, "qwen2.5")


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "eos", "declared", "chat_format", "is_chat", "stops"),
    [
        (default_template("qwen2.5"), "<|im_end|>", (), None, True, (151645, 151643)),
        (default_template("qwen2.5"), "<|endoftext|>", (151645, 151643), None, True, (151645, 151643)),
        # a base model's folder has the template too
        (default_template("qwen2.5"), "<|endoftext|>", (151643,), None, False, (151645, 151643)),
        (default_template("qwen1"), "<|endoftext|>", (151643,), "chatml", True, (151645, 151643)),
        (default_template("qwen1"), "<|im_end|>", (), "raw", False, (151645, 151643)),
        # a fine-tune's own way to end turns
        (PLAIN, "<|endoftext|>", (), None, True, (151643,)),
        (PLAIN.replace("eos_token", "'<|fim_pad|>'"), "<|endoftext|>", (151662,), None, True, (151662, 151643)),
        (PLAIN.replace("eos_token", "''"), "<|endoftext|>", (), None, False, (151643,)),
        ("{{ raise_exception('no') }}", "<|endoftext|>", (), None, False, (151643,)),
    ],
)
def test_turns(tokenizer, template, eos, declared, chat_format, is_chat, stops):
    tokenizer = copy.copy(tokenizer)
    tokenizer.eos_ids = tuple(dict.fromkeys([tokenizer.special_tokens[eos], 151643]))
    tokenizer.named_tokens = {"eos_token": eos}
    assert turns(tokenizer, "qwen2.5", template, declared, chat_format) == (is_chat, stops)


# --- Other people's templates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("  {% if true %}\n{{ messages[0].content }}\n  {% endif %}\n", "Hello\n"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}{{ 'kept' }}{% endgeneration %}", "kept"),
        ("{{ {'a': '<é>', 'b': [1.5, none]} | tojson }}", '{"a": "<é>", "b": [1.5, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}", '{\n "b": 1,\n "a": 2\n}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }} {{ add_generation_prompt }} {{ flag }}", "True True 7"),
    ],
)
def test_what_templates_may_use(template, expected):
    assert render(HELLO, template=template, flag=7) == expected


@pytest.mark.parametrize(("tools", "expected"), [(None, "default"), ([], "tool_use"), (TOOLS, "tool_use")])
def test_named_templates(tools, expected):
    assert render(HELLO, template={"default": "default", "tool_use": "tool_use"}, tools=tools) == expected
    assert render(HELLO, template={"default": "default"}, tools=tools) == "default"
    with pytest.raises(InputError, match="of the chat templates rag none is the default"):
        render(HELLO, template={"rag": "x"}, tools=tools)


def test_special_tokens_unless_the_caller_has_his_own():
    template = "{{ eos_token }} {{ bos_token }}"
    assert render(HELLO, template=template, special_tokens={"eos_token": "E"}) == "E "
    assert render(HELLO, template=template, special_tokens={"eos_token": "E"}, eos_token="own") == "own "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "refused the messages: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refused the messages: access to attribute 'append'"),
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{{ 'a' + 1 }}", "refused the messages"),
        ("\n{% if %}", "not valid jinja (line 2"),
    ],
)
def test_hostile_and_broken_templates(template, message):
    with pytest.raises(InputError) as error:
        render(HELLO, template=template)
    assert message in str(error.value)


# --- Messages ---------------------------------------------------------------------------------------------------------


def test_content_may_be_text_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    before = copy.deepcopy(messages)
    assert "<|im_start|>user\na\nb<|im_end|>" in render(messages, template=default_template("qwen2.5"))
    assert messages == before


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "robot", "content": "x"}, "message 0 has the unknown role 'robot'; known: system"),
        ({"content": "x"}, "message 0 must be an object with role and content"),
        ({"role": "user"}, "message 0 (user) has no content"),
        ({"role": "assistant", "content": None}, "message 0 (assistant) has no content"),
        ({"role": "user", "content": 3}, "message 0 has content of type int"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content part of type 'image_url'"),
        ({"role": "user", "content": ["x"]}, "content part of type 'str'"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool call without a function name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]},
            "the arguments of 'f' are not a JSON object",
        ),
    ],
)
def test_bad_messages_are_one_sentence(message, expected):
    with pytest.raises(InputError) as error:
        render([message], template=default_template("qwen2.5"))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("role", "shown", "template"),
    [
        ("developer", "system", "{{ messages[0].role }}"),
        ("developer", "developer", "{% if messages[0].role == 'developer' %}{{ messages[0].role }}{% endif %}"),
        ("function", "tool", "{{ messages[0].role }}"),
    ],
)
def test_openais_roles_become_those_of_the_template(role, shown, template):
    text = render([{"role": role, "content": "x"}], template=template)
    assert text == shown


def test_nulls_are_left_out_and_reasoning_has_one_name():
    template = "{{ messages[0].name is defined }} {{ messages[0].reasoning_content }}"
    message = {"role": "assistant", "content": None, "name": None, "thinking": "why"}
    assert render([message], template=template) == "False why"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content is none }}", "True"),  # a template that asks
        ("{{ messages[0].content }}", ""),
    ],
)
def test_no_content_beside_a_call(template, expected):
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert render([message], template=template) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("c.function.arguments | tojson", '{"a": 1}'),
        ("c.function.arguments", '{"a":1}'),  # a template that wants the text
        ("(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson)", '{"a":1}'),
    ],
)
def test_arguments_are_text_or_an_object_as_the_template_wants(written, expected):
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":1}'}}]}
    template = "{% for c in messages[0].tool_calls %}{{ " + written + " }}{% endfor %}"
    assert render([message], template=template) == expected


def test_deeply_nested_arguments_are_one_sentence():
    deep = "[" * 100_000 + "]" * 100_000
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": f'{{"a": {deep}}}'}}]}
    with pytest.raises(InputError, match="the arguments of 'f' are not a JSON object"):
        render([message], template="x")


def test_no_messages():
    with pytest.raises(InputError, match="there are no messages"):
        render([], template=default_template("qwen2.5"))


# --- Tool calls in an answer ------------------------------------------------------------------------------------------


def test_parse_tool_calls_inverts_rendering():
    arguments = [{"city": "北京", "nested": {"a": [1, "}"]}}, {}]
    calls = [{"type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
    message = {"role": "assistant", "content": "Let me look.", "tool_calls": calls}
    text = render([*HELLO, message], template=default_template("qwen2.5"), add_generation_prompt=False)
    answer = text.rsplit(PROMPT, 1)[1].removesuffix("<|im_end|>\n")
    assert parse_tool_calls(answer) == ("Let me look.", [{"name": "f", "arguments": a} for a in arguments])


@pytest.mark.parametrize(
    "text",
    [
        " plain text ",
        '<tool_call>\n{"name": "f", "arguments": {}}',
        '<tool_call>\n{"name": "f", "arguments": {}\n</tool_call>',
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        f"<tool_call>\n{json.dumps({'name': 3, 'arguments': {}})}\n</tool_call>",
    ],
)
def test_what_is_no_tool_call_stays_in_the_content(text):
    assert parse_tool_calls(text) == (text, [])


def test_text_that_ends_a_call_may_stand_in_an_argument():
    arguments = {"text": 'a} </tool_call> b <tool_call> {"name": "g", "arguments": {}} </tool_call>'}
    text = f"<tool_call>\n{json.dumps({'name': 'write', 'arguments': arguments})}\n</tool_call>"
    assert parse_tool_calls(text) == ("", [{"name": "write", "arguments": arguments}])


@pytest.mark.parametrize(
    "value", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "NaN", "9" * 5000]
)
def test_what_no_json_library_reads_is_no_call(value):
    text = f'<tool_call>\n{{"name": "f", "arguments": {{"a": {value}}}}}\n</tool_call>'
    assert parse_tool_calls(text) == (text, [])


def test_a_malformed_call_beside_a_good_one():
    text = '<tool_call>\n{bad}\n</tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert parse_tool_calls(text) == ("<tool_call>\n{bad}\n</tool_call>", [{"name": "f", "arguments": {}}])
