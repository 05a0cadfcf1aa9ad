"""`generate --input --output`: every line is answered once, in order, whatever happened before."""

import json
from pathlib import Path

import jax
import pytest

from infer import batch
from infer.batch import Settings
from infer.qwen import Qwen
from infer.sampling import Sampling
from qwen_jax.errors import InputError
from qwen_jax.model import init
from tests.infer import tiny

GREEDY = Settings(Sampling(), 8, (), None, raw=True)
TEXTS = ["the rain", "in\u2028there", "when", "the other thing", "inner"]


@pytest.fixture(scope="module")
def qwen() -> Qwen:
    return Qwen(tiny.CONFIG, init(tiny.CONFIG, jax.random.key(0)), tiny.tokenizer())


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_lines_are_answered_in_order_and_once(qwen: Qwen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": text, "id": i}, ensure_ascii=False) + "\n\n" for i, text in enumerate(TEXTS))
    )
    assert batch.run(qwen, source, out, GREEDY, rows=2) == 0
    wanted = [qwen.generate(text, Sampling(), max_tokens=8)[0] for text in TEXTS]
    found = read(out)
    assert [(x["id"], x["prompt"], x["answer"]) for x in found] == [
        (i, text, answer.text) for i, (text, answer) in enumerate(zip(TEXTS, wanted, strict=True))
    ]
    assert [x["finish_reason"] for x in found] == [answer.finish_reason for answer in wanted]

    whole = out.read_bytes()
    third = [at for at, byte in enumerate(whole) if byte == 10][2]
    out.write_bytes(whole[: third + 9])  # killed in the middle of the fourth
    asked = []
    prompt_of = batch._prompt
    monkeypatch.setattr(batch, "_prompt", lambda *args: asked.append(args[1]["id"]) or prompt_of(*args))
    assert batch.run(qwen, source, out, GREEDY, rows=2) == 0
    assert out.read_bytes() == whole and asked == [3, 4]


def test_openais_batches_and_what_cannot_be_answered(qwen: Qwen, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "any", "prompt": "the rain", "max_tokens": 8, "temperature": 0}
    records = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": body | {"temperature": 9}},
        {"custom_id": "c", "method": "POST", "url": "/v1/images", "body": body},
        {"prompt": "the " * 600},
        {"prompt": "when"},
    ]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert batch.run(qwen, source, out, GREEDY) == 3
    a, b, c, long, last = read(out)
    assert a["custom_id"] == "a" and a["error"] is None and a["response"]["status_code"] == 200
    assert a["response"]["body"]["choices"][0]["text"] == qwen.generate("the rain", Sampling(), max_tokens=8)[0].text
    assert (b["response"]["status_code"], c["response"]["status_code"]) == (400, 404)
    assert "temperature" in b["error"]["message"] and "context" in long["error"] and last["answer"]


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "line 1"), ('{"prompt": "a"}\n[1]\n', "line 2"), ('{"text": "a"}', "neither")]
)
def test_files_that_cannot_be_read_are_named(qwen: Qwen, tmp_path: Path, text: str, expected: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    with pytest.raises(InputError, match=expected):
        batch.run(qwen, source, tmp_path / "out.jsonl", GREEDY)
    assert not (tmp_path / "out.jsonl").exists()
