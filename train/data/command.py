"""`qwen-jax data`: look at the data before training on it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import tyro

from qwen_jax.errors import InputError
from qwen_jax.local_path import LocalPath
from train.data.config import DataConfig, Format, Packing, SourceConfig

if TYPE_CHECKING:
    from qwen_jax.tokenizer import Tokenizer

SAMPLED_DOCUMENTS = 1000


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Shows what training would see: tokens of each source, how well either packer fills rows, and rows as text."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """PATH or PATH=WEIGHT: files, folders, patterns, data sets; or corpus:python, corpus:english, corpus:chinese."""
    sequence_length: int = 4096
    """Tokens in a row."""
    batch_size: int = 8
    """Rows in a batch."""
    batches: int = 32
    """Batches to read with each packer."""
    samples: int = 2
    """Rows to print as text."""
    tokenizer: str = "default"
    """A model folder, a .gguf file, or `default` for the default model's."""
    format: Format = "auto"
    """Of all sources."""
    text_field: str = "text"
    """The field of a record that holds the text."""
    split: str = "train"
    """Of Hugging Face data sets and of our corpora."""
    repo_level: bool = False
    """Documents are whole repositories."""
    fim_rate: float = 0.0
    """Share of the documents rewritten as prefix, suffix, middle."""
    num_workers: int = 0
    """Processes that read and tokenise."""
    seed: int = 0
    """Of the order."""
    json: bool = False
    """Print one JSON object."""


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Learns a tokenizer from sources: Qwen's rules with a vocabulary of your own, for models trained from scratch."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, patterns, data sets; or corpus:python, corpus:english, corpus:chinese."""
    out: LocalPath
    """Folder to write it to; `qwen-jax train EXPERIMENT --model FOLDER` uses it."""
    vocab_size: int = 4096
    """Ids, those of the added tokens included."""
    text_field: str = "text"
    """The field of a record that holds the text."""


@dataclasses.dataclass(frozen=True)
class WriteShards:
    """Tokenises sources once, to files that training reads at once, however large they are."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, patterns, data sets; or corpus:python, corpus:english, corpus:chinese."""
    out: LocalPath
    """Folder to write; a source for training, of the format `shards`."""
    tokenizer: str = "default"
    """A model folder, a .gguf file, or `default` for the default model's. Training needs the same one."""
    shard_tokens: int = 1 << 28
    """Tokens of a file, about; 4 bytes each."""
    format: Format = "auto"
    """Of all sources."""
    text_field: str = "text"
    """The field of a record that holds the text."""
    split: str = "train"
    """Of Hugging Face data sets and of our corpora."""
    repo_level: bool = False
    """Documents are whole repositories."""
    on_bad_record: Literal["refuse", "skip"] = "refuse"
    """What becomes of a record without its text, or that is not UTF-8."""


@dataclasses.dataclass(frozen=True)
class SourceRow:
    """Of one source; tokens are estimated from `sampled` documents spread evenly over it, exact when that is all."""

    path: str
    weight: float
    documents: int
    sampled: int
    tokens: int
    tokens_per_document: float
    longest: int
    characters_per_token: float


@dataclasses.dataclass(frozen=True)
class PackingRow:
    """Of the batches that one packer made. Shares are of the slots, rows x sequence_length."""

    packing: str
    rows: int
    filled: float
    learned: float
    segments_per_row: float
    cut: float
    """Share of the segments that do not reach the end of their document."""
    first_batch_seconds: float
    tokens_per_second: float
    """Of all batches, the first included."""


def main(argv: list[str]) -> int:
    """The subcommand `data`. Raises InputError for a word that is none of its commands."""
    name, *rest = argv or ["--help"]
    commands: dict[str, tuple[type, Callable[[Any], None]]] = {
        "inspect": (Inspect, inspect),
        "shards": (WriteShards, shards),
        "tokenizer": (TrainTokenizer, train_tokenizer),
    }
    if name in ("-h", "--help"):
        print(
            "usage: qwen-jax data COMMAND SOURCES... [options]\n\n"
            "  inspect    tokens, packing and samples of sources\n"
            "  shards     tokenise sources once, for training at scale\n"
            "  tokenizer  learn a tokenizer from sources"
        )
        return 0
    if name not in commands:
        raise InputError(f"there is no command 'data {name}'; there are {', '.join(commands)}.")
    kind, command = commands[name]
    options = tyro.cli(kind, args=rest, prog=f"qwen-jax data {name}", config=(tyro.conf.FlagCreatePairsOff,))
    if not options.sources:
        raise InputError(f"data {name} needs at least one source: a file, a folder, or corpus:english.")
    command(options)
    return 0


def shards(options: WriteShards) -> None:
    """Writes the shards. Raises InputError when a source cannot be used or the folder exists."""
    from qwen_jax.tokenizer import load_tokenizer
    from qwen_jax.weights.default_model import default_model
    from train.data.documents import REPO_TOKENS, Tokenise, check_special_tokens, tokenise_all
    from train.data.shards import write_shards
    from train.data.sources import open_source

    if options.shard_tokens < 1:
        raise InputError(f"shard_tokens is {options.shard_tokens}, which must be 1 or more.")
    tokenizer = load_tokenizer(default_model() if options.tokenizer == "default" else options.tokenizer)
    if options.repo_level:
        check_special_tokens(tokenizer, REPO_TOKENS, "repo_level")
    tokenise = Tokenise(tokenizer, fim_rate=0.0, max_tokens=0)
    opened = [open_source(_source(path, 1.0, options)) for path in options.sources]
    began, total = time.perf_counter(), [0, 0]

    def advance(documents: int, tokens: int) -> None:
        total[0], total[1] = total[0] + documents, total[1] + tokens
        rate = total[1] / (time.perf_counter() - began)
        print(f"{total[0]:,} documents, {total[1]:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr)

    documents = itertools.chain.from_iterable(tokenise_all(source, tokenise, tokenizer) for source in opened)
    made = write_shards(documents, tokenizer, options.out, options.shard_tokens, advance)
    seconds = time.perf_counter() - began
    print(f"{options.out}: " + ", ".join(f"{count:,} {name}" for name, count in made.items()) + f" in {seconds:.0f} s")


def train_tokenizer(options: TrainTokenizer) -> None:
    """Learns and writes the tokenizer. Raises InputError when a source cannot be used or the folder exists."""
    from qwen_jax.tokenizer import Tokenizer
    from qwen_jax.weights._files import new_folder
    from train.data.sources import open_source

    texts, began = [], time.perf_counter()
    with new_folder(options.out) as folder:
        for path in options.sources:
            source = open_source(SourceConfig(path, text_field=options.text_field))
            texts += [str(source[i]) for i in range(len(source))]
        tokenizer = Tokenizer.train(texts, options.vocab_size)
        tokenizer.save(folder)
    characters = sum(map(len, texts))
    seconds = time.perf_counter() - began
    print(f"{len(tokenizer)} tokens learned from {characters / 1e6:.1f}M characters in {seconds:.0f} s: {options.out}")


def inspect(options: Inspect) -> None:
    """Prints the report. Raises InputError when a source cannot be used."""
    from qwen_jax.tokenizer import load_tokenizer
    from qwen_jax.weights.default_model import default_model

    tokenizer = load_tokenizer(default_model() if options.tokenizer == "default" else options.tokenizer)
    sources = tuple(_source(*_weighted(text), options) for text in options.sources)
    config = DataConfig(
        sources=sources,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        fim_rate=options.fim_rate,
        num_workers=options.num_workers,
        seed=options.seed,
    )
    rows = [source_row(source, config, tokenizer) for source in sources]
    packed, samples = [], []
    for packing in get_args(Packing):
        row, batch = packing_row(dataclasses.replace(config, packing=packing), options.batches, tokenizer)
        packed.append(row)
        samples = samples or [segments_as_text(batch, i, tokenizer) for i in range(len(batch["tokens"]))]
    samples = samples[: options.samples]
    if options.json:
        report = {"sources": rows, "packing": packed, "samples": samples}
        print(json.dumps(report, default=dataclasses.asdict, indent=2, ensure_ascii=False))
    else:
        _print(rows, packed, samples)


def source_row(source: SourceConfig, config: DataConfig, tokenizer: Tokenizer) -> SourceRow:
    """Counts the tokens of a source's documents, of SAMPLED_DOCUMENTS when it has more."""
    import numpy as np

    from train.data.documents import Tokenise, plain_text
    from train.data.sources import open_source

    opened = open_source(source)
    tokenise = Tokenise(tokenizer, fim_rate=0.0, max_tokens=config.sequence_length)
    numbers = np.linspace(0, len(opened) - 1, min(SAMPLED_DOCUMENTS, len(opened))).astype(int)
    rng, lengths, characters = np.random.default_rng(0), [], 0
    for number in numbers:
        document = opened[int(number)]
        lengths.append(len(tokenise.random_map(document, rng)["tokens"]))
        characters += len(plain_text(document))
    return SourceRow(
        path=source.path,
        weight=source.weight,
        documents=len(opened),
        sampled=len(numbers),
        tokens=round(float(np.mean(lengths)) * len(opened)),
        tokens_per_document=float(np.mean(lengths)),
        longest=max(lengths),
        characters_per_token=characters / sum(lengths),
    )


def packing_row(config: DataConfig, count: int, tokenizer: Tokenizer) -> tuple[PackingRow, dict[str, Any]]:
    """Makes `count` batches; their figures, and the first of them."""
    from train.data.loader import make_loader

    with make_loader(config, tokenizer) as loader:
        start = time.perf_counter()
        batches = [next(loader)]
        first = time.perf_counter()
        batches += itertools.islice(loader, count - 1)
        end = time.perf_counter()
    slots = sum(batch["tokens"].size for batch in batches)
    filled = [int((batch["segment_ids"] > 0).sum()) for batch in batches]
    rows = sum(len(batch["tokens"]) for batch in batches)
    segments = sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in batches)
    end_id = tokenizer.end_of_text_id
    ended = sum(int(((batch["tokens"] == end_id) & (batch["segment_ids"] > 0)).sum()) for batch in batches)
    row = PackingRow(
        packing=config.packing,
        rows=rows,
        filled=sum(filled) / slots,
        learned=float(sum(batch["loss_mask"].sum() for batch in batches)) / slots,
        segments_per_row=segments / rows,
        cut=1 - ended / segments,
        first_batch_seconds=first - start,
        tokens_per_second=sum(filled) / (end - start),
    )
    return row, batches[0]


def segments_as_text(batch: dict[str, Any], row: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Each segment of a row: its number of tokens and its text."""
    ids = batch["segment_ids"][row]
    pieces = [batch["tokens"][row][ids == segment] for segment in range(1, int(ids.max()) + 1)]
    return [{"tokens": len(piece), "text": tokenizer.decode(piece.tolist())} for piece in pieces]


def _weighted(text: str) -> tuple[str, float]:
    path, equals, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0  # a name with an equals sign in it


def _source(path: str, weight: float, options: Inspect | WriteShards) -> SourceConfig:
    names = ("format", "text_field", "split", "repo_level", "on_bad_record")
    return SourceConfig(path, weight, **{name: getattr(options, name) for name in names if hasattr(options, name)})


def _print(sources: list[SourceRow], packed: list[PackingRow], samples: list[list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a pipe gets whole rows, not rows cut at 80 columns
        console = Console(width=160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source", overflow="fold")
    for heading in "weight documents tokens tokens/document longest characters/token".split():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sources:
        about = "" if row.sampled == row.documents else "~"
        table.add_row(
            escape(row.path), f"{row.weight:g}", f"{row.documents:,}", f"{about}{row.tokens:,}",
            f"{row.tokens_per_document:,.1f}", f"{row.longest:,}", f"{row.characters_per_token:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("packing", no_wrap=True)
    for heading in ("rows", "filled", "learned", "segments/row", "cut", "first batch", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in packed:
        table.add_row(
            row.packing, f"{row.rows:,}", f"{row.filled:.2%}", f"{row.learned:.2%}", f"{row.segments_per_row:.1f}",
            f"{row.cut:.1%}", f"{row.first_batch_seconds:.2f} s", f"{row.tokens_per_second:,.0f}",
        )  # fmt: skip
    console.print(table)
    console.print("cut: segments that do not reach the end of their document. ~: estimated.", style="dim")
    for number, segments in enumerate(samples, start=1):
        console.print(f"\n[bold]row {number}[/], {len(segments)} segments")
        for segment in segments[:5]:
            text = segment["text"]
            shown = text if len(text) <= 160 else f"{text[:100]} … {text[-50:]}"
            console.print(f"{segment['tokens']:>7,}  {escape(repr(shown)[1:-1])}", highlight=False)
        if len(segments) > 5:
            console.print(f"         and {len(segments) - 5} more", style="dim")
