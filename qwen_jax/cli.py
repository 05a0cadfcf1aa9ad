"""The console command `qwen-jax`: a lazy table of subcommands, so that `--help` imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from qwen_jax.errors import Failure, InputError

# name -> (module:function, one line of help); the function takes its own arguments and returns an exit status or None
COMMANDS: dict[str, tuple[str, str]] = {
    "models": ("qwen_jax.models_table:main", "list the models: sizes, context, memory"),
    "chat": ("infer.chat:main", "talk to a model in the terminal"),
    "generate": ("infer.generate:main", "complete prompts"),
    "serve": ("infer.serve:main", "answer OpenAI's clients, and people in a browser"),
    "demo": ("infer.demo:main", "answer one question with the default model"),
    "convert": ("qwen_jax.weights.convert:main", "convert a checkpoint between formats"),
    "quantize": ("train.quantise.command:main", "write a checkpoint in fewer bits: GPTQ, AWQ, int8, FP8, GGUF"),
    "data": ("train.data.command:main", "look at training data: tokens, packing, samples"),
    "compile": ("aot.command:main", "compile for TPUs or GPUs that are not here: memory, collectives, time"),
    "eval": ("infer.evaluate:main", "measure how far a model reads: perplexity by length, needles, sparse prefill"),
    "train": ("train.trainer:main", "train a model: an experiment of configs/, from random or given weights"),
    "upcycle": ("train.upcycle:main", "make a mixture of experts out of a dense checkpoint"),
    "crosscheck": ("infer.crosscheck:main", "prove a model equal to PyTorch, layer by layer"),
}


def usage() -> str:
    """The text of `qwen-jax --help`."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    head = ["usage: qwen-jax COMMAND [options]", "", "Every Qwen, in JAX.", "", "commands:"]
    tail = [
        "",
        "`qwen-jax COMMAND --help` explains one command. Exit status: 0 good, 1 a check did not hold, 2 bad input,",
        "75 the environment failed and trying again may help.",
    ]
    return "\n".join(head + rows + tail)


def run(argv: Sequence[str]) -> int:
    """Runs one subcommand and returns its exit status. Raises InputError for a name that is not in the table."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known commands: {', '.join(COMMANDS)}."
        raise InputError(f"there is no command {name!r}; {hint}")
    module, function = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(module), function)(rest) or 0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: a Failure ends as one sentence on stderr and its status, Ctrl-C as status 130."""
    try:
        status = run(sys.argv[1:] if argv is None else argv)
    except Failure as error:
        print(f"qwen-jax: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
