"""`qwen-jax generate`: answers to prompts from the command line or standard input."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from infer.arguments import ModelArguments, SamplingArguments, closing_line
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from infer.qwen import Qwen


@dataclasses.dataclass(frozen=True)
class Arguments(ModelArguments):
    """Answers prompts. A chat model gets each prompt as a user's message, a base model continues it."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """The prompts, decoded together; without any, one is read from standard input."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingArguments] = dataclasses.field(default_factory=SamplingArguments)
    system: str | None = None
    """A system message, for chat models."""
    raw: bool = False
    """Continue the prompt as it stands, without a chat template."""
    logprobs: int | None = None
    """With --json: report each token's log-probability and this many likeliest alternatives."""
    json: bool = False
    """Print one JSON object per prompt instead of text."""
    input: Path | None = None
    """A file of prompts instead, one JSON object a line: {"prompt": text}, {"messages": [...]}, or OpenAI's batches."""
    output: Path | None = None
    """With --input: the file for their answers, one JSON object a line. Run again, the command goes on where it was."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Arguments, args=argv, prog="qwen-jax generate")
    if (options.input is None) != (options.output is None) or (options.input and (options.prompts or options.json)):
        raise InputError("--input and --output go together, and without prompts or --json.")
    if options.input is not None and options.output is not None:
        return _batch(options, options.input, options.output)
    prompts = list(options.prompts) or [sys.stdin.read()]
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("the prompt is empty; give one as an argument or on standard input.")
    if options.logprobs is not None and not 0 <= options.logprobs <= 20:
        raise InputError(f"--logprobs {options.logprobs} is not possible; it must be between 0 and 20.")
    options.sampling.check()
    each = options.load_each()
    for name, qwen in each:
        if len(each) > 1 and not options.json:
            print(f"=== {name}")
        _answer(options, name, qwen, prompts)
    return 0


def _batch(options: Arguments, source: Path, out: Path) -> int:
    from infer.batch import Settings, run

    options.sampling.check()
    qwen = options.load()
    settings = options.sampling
    how = Settings(settings.sampling(qwen), settings.max_tokens, settings.stop, options.system, options.raw)
    if failed := run(qwen, source, out, how):
        raise InputError(f"{failed} lines could not be answered; {out} says why, under error.")
    return 0


def _answer(options: Arguments, adapter: str, qwen: Qwen, prompts: list[str]) -> None:
    as_chat = qwen.is_chat_model and not options.raw
    if options.system and not as_chat:
        raise InputError("--system needs a chat model and no --raw; put the text into the prompt instead.")
    before = [{"role": "system", "content": options.system}] if options.system else []
    ids = [
        qwen.chat_prompt([*before, {"role": "user", "content": prompt}]) if as_chat else qwen.tokenizer.encode(prompt)
        for prompt in prompts
    ]
    settings = options.sampling
    stream = qwen.stream(
        ids,
        settings.sampling(qwen),
        max_tokens=settings.max_tokens,
        stop=settings.stop,
        stop_ids=qwen.turns.stop_ids if as_chat else (),
        top_logprobs=options.logprobs or 0,
    )
    streaming = len(prompts) == 1 and not options.json
    for _, text in stream:
        if streaming:
            print(text, end="", flush=True)
    if streaming:
        print()
    for prompt, answer in zip(prompts, stream.answers, strict=True):
        if options.json:
            record = {"prompt": prompt} | ({"adapter": adapter} if adapter else {}) | dataclasses.asdict(answer)
            if options.logprobs is None:
                del record["logprobs"], record["top_logprobs"]
            timing = dataclasses.asdict(stream.timing)
            print(json.dumps(record | {"timing": timing}, ensure_ascii=False))
        elif not streaming:
            print(f"> {prompt}\n{answer.text}\n")
    if sys.stderr.isatty():
        print(closing_line(stream.timing), file=sys.stderr)
