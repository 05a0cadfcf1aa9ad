"""`qwen-jax chat`, with what a person types and without a terminal."""

import builtins
import itertools
import json
import re

import pytest

import infer.arguments
from infer import chat
from infer.arguments import SamplingArguments
from infer.qwen import Qwen, Stream
from tests.infer import tiny

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}?"  # ends where `scripted` begins
ANSWER = "ABCDEFGH"


@pytest.fixture(scope="module")
def model():
    model = tiny.scripted(ANSWER)
    model.chat_template = TEMPLATE
    return model


@pytest.fixture
def prompts(model, monkeypatch):
    """Collects the text of every prompt that reaches the model."""
    seen = []
    original = Qwen.stream

    def stream(self, ids, *args, **kwargs):
        seen.append(self.tokenizer.decode(ids[0]))
        return original(self, ids, *args, **kwargs)

    monkeypatch.setattr(Qwen, "stream", stream)
    return seen


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """Runs the command with typed lines (an exception stands for a key), then Ctrl-D; returns what it printed."""

    def run(*lines, argv=("--temperature", "0")):
        left = [*lines, EOFError]

        def typed(prompt=""):
            line = left.pop(0)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", typed)
        monkeypatch.setattr(infer.arguments.ModelArguments, "load_each", lambda self: [("", model)])
        assert chat.main(list(argv)) == 0
        run.left = left
        return capsys.readouterr().out

    return run


def test_the_history_is_sent(talk, prompts):
    out = talk("hi", "", "  more ")
    assert prompts == ["u:hi;?", f"u:hi;a:{ANSWER};u:more;?"]
    assert out.count(ANSWER) == 2


def test_system_starts_over(talk, prompts):
    out = talk("/system", "hi", "/system be kind", "hi", "/system", argv=["--temperature=0", "--system", "be brief"])
    assert prompts == ["s:be brief;u:hi;?", "s:be kind;u:hi;?"]
    assert re.findall("system: .*", out) == ["system: be brief", "system: be kind", "system: be kind"]


def test_clear_forgets(talk, prompts):
    talk("hi", "/clear", "again")
    assert prompts[1] == "u:again;?"


def test_retry_asks_the_same_again(talk, prompts):
    out = talk("/retry", "hi", "more", "/retry")
    assert "there is no message to answer again." in out
    assert prompts[2] == prompts[1] == f"u:hi;a:{ANSWER};u:more;?"


def test_retry_takes_another_seed(talk, monkeypatch):
    seeds = []
    plain = SamplingArguments.sampling
    monkeypatch.setattr(SamplingArguments, "sampling", lambda self, qwen: seeds.append(self.seed) or plain(self, qwen))
    talk("hi", "/retry", "/retry")
    assert seeds == [0, 1, 2]


def test_set(talk, prompts):
    out = talk("/set max_tokens 3", "hi", "/set top_p 0.5")
    assert "ABC\n" in out and "ABCD" not in out
    assert "top_p = 0.5" in out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set top_p 2", "top_p=2.0 is not possible; it must be in (0, 1]."),
        ("/set temperature hot", "temperature needs a number, not 'hot'."),
        ("/set top_k 1.5", "top_k needs a number, not '1.5'."),
        ("/set temperature", "temperature needs a number, not ''."),
        ("/set max_tokens 0", "max_tokens=0 leaves nothing to generate; it must be at least 1."),
        ("/set colour 1", "there is no setting 'colour'; /help lists them."),
        ("/set stop x", "there is no setting 'stop'; /help lists them."),
        ("/set", "there is no setting ''; /help lists them."),
        ("/dance", "there is no command /dance; /help lists them."),
        ("/save", "give a file name: /save FILE."),
        ("x" * 600, "a prompt of 604 tokens does not fit the context of 512"),
    ],
)
def test_bad_lines_are_said_and_change_nothing(model, capsys, line, sentence):
    settings = SamplingArguments(temperature=0.0)
    conversation = chat.Conversation({"": model}, settings, None)
    assert conversation.line(line)
    assert capsys.readouterr().out.startswith(sentence)
    assert (conversation.settings, conversation.messages) == (settings, [])


def test_save(talk, tmp_path):
    file = tmp_path / "talk.json"
    out = talk("/system héllo", "hi", f"/save {file}", f"/save {tmp_path / 'no' / 'folder'}")
    roles = [("system", "héllo"), ("user", "hi"), ("assistant", ANSWER)]
    assert json.loads(file.read_text(encoding="utf-8")) == [{"role": r, "content": c} for r, c in roles]
    assert "could not be written (No such file or directory)." in out


def test_stats(talk):
    out = talk("/stats", "hi", "/stats")
    assert "no answer yet" in out
    assert re.search(r"^6 prompt \+ 9 answer tokens \| prefill [\d.]+ tok/s \| decode [\d.]+ tok/s \| first", out, re.M)


def test_help_lists_every_command(talk):
    out = talk("/help")
    assert all(
        f"/{name}" in out for name in ("help", "system", "clear", "retry", "set", "adapter", "save", "stats", "exit")
    )


@pytest.mark.parametrize("line", ["/exit", "/quit"])
def test_exit(talk, line):
    talk(line, "never read")
    assert talk.left[0] == "never read"


def test_ctrl_d_leaves(talk):
    talk()
    assert talk.left == []


def test_ctrl_c_at_the_prompt_stays(talk, prompts):
    assert "Ctrl-D leaves" in talk(KeyboardInterrupt, "hi")
    assert prompts == ["u:hi;?"]


def test_ctrl_c_in_an_answer_keeps_what_was_said(talk, prompts, monkeypatch):
    original = Stream._run
    interrupted = []

    def until_interrupted(self):
        pieces = original(self)
        if not interrupted:
            interrupted.append(True)
            yield from itertools.islice(pieces, 3)
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(Stream, "_run", until_interrupted)
    out = talk("hi", "more", "/stats")
    partial = re.search(r"^(\w*) \[stopped\]$", out, re.M)[1]
    assert partial and ANSWER.startswith(partial) and partial != ANSWER
    assert prompts[1] == f"u:hi;a:{partial};u:more;?"
    assert ANSWER in out.partition("[stopped]")[2]


def test_ctrl_c_before_the_first_token(talk, prompts, monkeypatch):
    original = Stream._prefill

    def interrupted(self):
        monkeypatch.setattr(Stream, "_prefill", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "_prefill", interrupted)
    out = talk("hi", "more")
    assert "[stopped]" in out
    assert prompts[1] == "u:hi;a:;u:more;?"


def test_a_base_model_is_named_one(talk, model, monkeypatch):
    assert "base model" not in talk()
    monkeypatch.setattr(Qwen, "is_chat_model", False)
    assert "This is a base model" in talk()
