"""Ids against the published vectors, tiktoken and transformers, over every route into a tokenizer."""

import base64
import dataclasses
import functools
import hashlib
import json
import random
import unicodedata

import pytest
import tokenizers

from qwen_jax.errors import InputError
from qwen_jax.presets import load_preset
from qwen_jax.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from qwen_jax.vocabulary import merges_from_ranks
from qwen_jax.weights.gguf import read_metadata

# ids cross-checked between QwenLM's notes and llama.cpp's vocabulary tests
GOLDEN = {
    "Hello world": "9707 1879",
    "Hello, y'all! How are you 😁 ?": "9707 11 379 64848 0 2585 525 498 26525 223 937",
    "3.14159 12345": "18 13 16 19 16 20 24 220 16 17 18 19 20",
    "def f(x):\n    return x+1\n": "750 282 2075 982 262 470 856 10 16 198",
    "你好，世界": "108386 3837 99489",
    "\n": "198",
    "\n\n": "271",
    "  a": "220 264",
    "   ": "262",
    "caf\u00e9": "924 58858",
    "cafe\u0301": "924 58858",
    "Observation:": "37763 367 25",
    "Observation:\n": "37763 367 510",
    'print("<|endoftext|>")': "1350 445 151643 899",
    "\u3000全角": "22441 35987 63836",
    "\t\tif x:\r\n": "197 743 856 2834",
    "system": "8948",
    "user": "872",
    "assistant": "77091",
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n": "151644 8948 198 2610 525 1207 16948 11 3465 553 "
    "54364 14817 13 1446 525 264 10950 17847 13 151645 198 151644 872 198 9707 151645 198 151644 77091 198",
}
QWEN_TIKTOKEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|im_end"]


@pytest.fixture(scope="module")
def metadata(default_gguf):
    return read_metadata(default_gguf)


@pytest.fixture(scope="module")
def ranks(metadata):
    """Bytes -> rank, decoded here from the GGUF's printable characters independently of the library."""
    moved = [b for b in range(256) if b <= 32 or 127 <= b <= 160 or b == 173]
    to_byte = lambda char: moved[ord(char) - 256] if ord(char) >= 256 else ord(char)  # noqa: E731
    tokens = metadata["tokenizer.ggml.tokens"][:151643]
    return {bytes(map(to_byte, token)): rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def tiktoken_file(ranks, tmp_path_factory):
    """`qwen.tiktoken`, byte for byte as Qwen ships it."""
    path = tmp_path_factory.mktemp("qwen1") / "qwen.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == QWEN_TIKTOKEN_SHA256
    return path


@pytest.fixture(scope="module")
def from_gguf(metadata):
    return Tokenizer.from_gguf_metadata(metadata)


@pytest.fixture(scope="module")
def from_tiktoken(tiktoken_file):
    return Tokenizer.from_tiktoken(tiktoken_file, "qwen2.5")


@pytest.fixture(scope="module")
def saved(from_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    from_gguf.save(folder)
    return folder


@pytest.fixture(scope="module")
def routes(from_gguf, from_tiktoken, saved, tmp_path_factory):
    slow = tmp_path_factory.mktemp("slow")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (slow / name).write_bytes((saved / name).read_bytes())
    return {
        "gguf": from_gguf,
        "tiktoken": from_tiktoken,
        "json": load_tokenizer(saved),
        "vocab+merges": load_tokenizer(slow),
    }


@functools.cache
def assigned_characters():
    return [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]


def random_texts(count, seed, specials=()):
    """Scripts, emoji, combining marks, control characters, runs of white space, digits, contractions, words."""
    rng = random.Random(seed)
    assigned = assigned_characters()
    blocks = [
        (0x0, 0x80), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1100, 0x1200),
        (0x1E00, 0x2000), (0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0xFB00, 0xFFF0),
        (0x1F300, 0x1FA00), (0x20000, 0x20100),
    ]  # fmt: skip
    by_block = [[c for c in assigned if low <= ord(c) < high] for low, high in blocks]
    words = "the Hello WORLD don't I'LL we've café 你好 世界 мир हिन्दी مرحبا 한국어 ไทย def return 123 ½ ² ٣".split()
    runs = [" ", "\t", "\n", "\r\n", "\u3000", "\u00a0", "\u200d", "\ufe0f", "\u0301", "\u0000", "ſ", "'ſ"]
    pieces = [
        lambda: "".join(rng.choices(rng.choice(by_block), k=rng.randint(1, 6))),
        lambda: rng.choice(assigned),
        lambda: rng.choice(words),
        lambda: rng.choice(["", " "]) + rng.choice(words),
        lambda: rng.choice(runs) * rng.randint(1, 5),
        lambda: "👩\u200d👩\u200d👧🏽🇫🇷"[: rng.randint(1, 8)],
        lambda: "".join(rng.choices("0123456789.,-+*/(){}[]<>|=_'\"", k=rng.randint(1, 8))),
    ]
    if specials:
        pieces.append(lambda: rng.choice(specials))
    return ["".join(rng.choice(pieces)() for _ in range(rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("route", ["gguf", "tiktoken", "json", "vocab+merges"])
def test_golden_vectors(routes, route):
    tokenizer = routes[route]
    for text, ids in GOLDEN.items():
        assert tokenizer.encode(text) == list(map(int, ids.split())), text
    plain = tokenizer.encode('print("<|endoftext|>")', allow_special=False)
    assert plain == [1350, 9639, 91, 8691, 723, 427, 91, 82598]


def test_merges_from_ranks_are_the_published_ones(ranks, saved):
    merges = (saved / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    vocab = json.loads((saved / "vocab.json").read_text(encoding="utf-8"))
    rebuilt = merges_from_ranks(ranks)
    assert len(rebuilt) == len(merges) == 151_387
    parts = [merge.split(" ") for merge in merges]
    assert [(ranks[a], ranks[b]) for a, b in rebuilt] == [(vocab[a], vocab[b]) for a, b in parts]


def test_random_text_as_tiktoken_encodes_it(routes, ranks):
    tiktoken = pytest.importorskip("tiktoken")
    pattern = (  # as Qwen's first tokenizer states it
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    reference = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    texts = random_texts(4000, seed=1, specials=SPECIALS)
    expected = [reference.encode_ordinary(unicodedata.normalize("NFC", text)) for text in texts]
    for name, tokenizer in routes.items():
        assert tokenizer.encode_batch(texts, allow_special=False) == expected, name
        assert [tokenizer.encode(text, allow_special=False) for text in texts[:50]] == expected[:50], name


def test_random_text_as_transformers_encodes_it(routes, metadata, saved):
    transformers = pytest.importorskip("transformers")
    texts = random_texts(4000, seed=2, specials=SPECIALS)
    vocab = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"][:151643])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    built = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    built.add_tokens(metadata["tokenizer.ggml.tokens"][151643:151665], special_tokens=True)
    loaded = transformers.AutoTokenizer.from_pretrained(saved)
    expected = built(texts)["input_ids"]
    assert loaded(texts)["input_ids"] == expected
    for name, tokenizer in routes.items():
        assert tokenizer.encode_batch(texts) == expected, name
    own = routes["gguf"]
    assert len(loaded) == len(own) == 151_665
    assert (loaded.eos_token_id, loaded.pad_token_id) == (own.eos_ids[0], own.pad_id) == (151645, 151643)
    assert loaded.chat_template == own.chat_template == metadata["tokenizer.chat_template"]
    for ids in expected[:500]:
        for skip in (False, True):
            assert own.decode(ids, skip_special=skip) == loaded.decode(ids, skip_special_tokens=skip)


@pytest.mark.slow
def test_random_text_as_transformers_reads_the_gguf(from_gguf, default_gguf):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    reference = transformers.AutoTokenizer.from_pretrained(default_gguf.parent, gguf_file=default_gguf.name)
    # transformers forgets the NFC step on this route only, so it gets text that is in NFC already
    texts = [unicodedata.normalize("NFC", text) for text in random_texts(20_000, seed=3, specials=SPECIALS)]
    assert from_gguf.encode_batch(texts) == reference(texts)["input_ids"]


def test_plain_text_never_gives_an_added_token(from_gguf):
    texts = random_texts(300, seed=4, specials=list(from_gguf.special_tokens))
    assert all(id < 151643 for ids in from_gguf.encode_batch(texts, allow_special=False) for id in ids)


def test_decode_inverts_encode(from_gguf):
    for text in random_texts(1000, seed=5, specials=SPECIALS):
        ids = from_gguf.encode(text, allow_special=False)
        assert from_gguf.decode(ids) == unicodedata.normalize("NFC", text)
        assert b"".join(map(from_gguf.token_bytes, ids)) == unicodedata.normalize("NFC", text).encode()


def test_decode_of_arbitrary_ids_as_the_rust_tokenizer_does(from_gguf, saved):
    reference = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    rng = random.Random(6)
    for _ in range(1000):
        # single bytes make broken and unfinished characters
        ids = [
            rng.choice([rng.randrange(256), rng.randrange(151665), rng.randrange(151643, 151665)]) for _ in range(20)
        ]
        for skip in (False, True):
            expected = reference.decode(ids, skip_special_tokens=skip)
            assert from_gguf.decode(ids, skip_special=skip) == expected
            stream = from_gguf.stream(skip_special=skip)
            assert "".join(map(stream.add, ids)) + stream.flush() == expected


def test_stream_holds_back_unfinished_characters(from_gguf):
    emoji = [next(i for i in range(256) if from_gguf.token_bytes(i) == bytes([b])) for b in "😁".encode()]
    stream = from_gguf.stream()
    assert [stream.add(id) for id in emoji] == ["", "", "", "😁"]
    assert [stream.add(id) for id in emoji[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert [stream.add(id) for id in [*emoji, 151645]] == ["", "", "", "😁", "<|im_end|>"]


def test_skip_special_keeps_tool_calls(from_gguf, from_tiktoken):
    for tokenizer in (from_gguf, from_tiktoken):
        ids = tokenizer.encode("<|im_start|><tool_call>x</tool_call><|im_end|>")
        assert tokenizer.decode(ids, skip_special=True) == "<tool_call>x</tool_call>"


@pytest.mark.parametrize(
    ("generation", "length", "tokens"),
    [
        ("qwen1", 151_851, {"<|im_end|>": 151645, "<|extra_0|>": 151646, "<|extra_204|>": 151850}),
        ("qwen1.5", 151_646, {"<|endoftext|>": 151643, "<|im_start|>": 151644}),
        ("qwen2", 151_646, {"<|im_end|>": 151645}),
        ("qwen2.5", 151_665, {"<|video_pad|>": 151656, "<tool_call>": 151657, "<|file_sep|>": 151664}),
        (
            "qwen3",
            151_669,
            {"<|fim_prefix|>": 151659, "<tool_response>": 151665, "<think>": 151667, "</think>": 151668},
        ),
    ],
)
def test_added_tokens_of_each_generation(tiktoken_file, monkeypatch, generation, length, tokens):
    monkeypatch.setattr("qwen_jax.tokenizer.merges_from_ranks", lambda ranks: [])  # slow, and checked above
    tokenizer = Tokenizer.from_tiktoken(tiktoken_file, generation)
    assert len(tokenizer) == tokenizer.vocab_size == length
    for token, id in tokens.items():
        assert tokenizer.special_tokens[token] == id
        assert tokenizer.encode(f"a{token}b") == [64, id, 65]
    assert tokenizer.eos_ids == (151643,) and tokenizer.pad_id == 151643


def test_gguf_and_qwen2_5_have_the_same_added_tokens(from_gguf, from_tiktoken):
    assert from_gguf.special_tokens == from_tiktoken.special_tokens


def test_save_and_load_keep_everything(from_gguf, routes):
    for name in ("json", "vocab+merges"):
        loaded = routes[name]
        for attribute in ("special_tokens", "special_ids", "eos_ids", "pad_id", "chat_template", "vocab_size"):
            assert getattr(loaded, attribute) == getattr(from_gguf, attribute), (name, attribute)


def test_load_tokenizer_reads_a_gguf_file_and_a_qwen1_folder(default_gguf, tiktoken_file, monkeypatch):
    monkeypatch.setattr("qwen_jax.tokenizer.merges_from_ranks", lambda ranks: [])  # slow, and checked above
    assert load_tokenizer(default_gguf).eos_ids == (151645, 151643)
    assert len(load_tokenizer(tiktoken_file.parent)) == 151_851


# --- Small vocabularies: declarations and errors ----------------------------------------------------------------------


def small_metadata(**changes):
    """A GGUF's metadata with the 256 bytes, one merge, two control tokens, and padding rows."""
    chars = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 256) if c != 173]
    tokens = chars + [chr(256 + i) for i in range(68)] + ["ab", "<|endoftext|>", "<|im_end|>", "[PAD259]", "x"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3, 4, 5],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 258,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    assert len(tokens) == 261
    return {key: value for key, value in metadata.items() if value is not None}


@pytest.fixture
def small():
    return Tokenizer.from_gguf_metadata(small_metadata())


def test_tokens_that_a_fine_tune_added_after_the_padding_keep_their_ids():
    metadata = small_metadata(tokenizer__ggml__token_type=[1] * 257 + [3, 3, 4, 4])
    metadata["tokenizer.ggml.tokens"][260] = "<new>"
    late = Tokenizer.from_gguf_metadata(metadata)
    assert (len(late), late.special_tokens["<new>"]) == (261, 260)
    assert late.encode("x<new><|im_end|>") == [87, 260, 258]
    assert late.decode([259, 260], skip_special=True) == "<new>"


def test_a_token_of_characters_that_stand_for_no_bytes_is_text(small):
    """As the ByteLevel decoder of `tokenizers` has it; found by fuzzing vocabularies."""
    fields = json.loads(small._backend.to_str())
    id = max(fields["model"]["vocab"].values())
    old = next(token for token, number in fields["model"]["vocab"].items() if number == id)
    fields["model"]["merges"] = []
    for odd in ("ťa", "Ġ日"):
        del fields["model"]["vocab"][old]
        fields["model"]["vocab"][odd] = id
        old = odd
        backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
        assert Tokenizer(backend).token_bytes(id).decode() == backend.decode([id]) == odd


def test_padding_rows_are_no_tokens(small):
    assert len(small) == 259
    assert small.encode("ab<|im_end|>") == [256, 258]
    assert (small.eos_ids, small.pad_id) == ((258, 257), 257)
    with pytest.raises(InputError, match="token id 259 has no text"):
        small.decode([259])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer__ggml__model": "bert"}, "'bert'/'qwen2' tokenizer"),
        ({"tokenizer__ggml__model": "llama"}, "lacks tokenizer.ggml.scores"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, "'gpt2'/'llama-bpe' tokenizer"),
        ({"tokenizer__ggml__merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer__ggml__token_type": [1] * 256 + [3, 1, 3, 5, 5]}, "not in Qwen's order"),
        ({"tokenizer__ggml__merges": ["a b c"]}, "do not belong together"),
        ({"tokenizer__ggml__merges": ["a c"]}, "do not belong together"),
        ({"tokenizer__ggml__token_type": [1] * 257 + [5] * 4}, "token id 258 has no text"),
        (
            {"tokenizer__ggml__token_type": [1] * 257 + [5] * 4, "tokenizer__ggml__eos_token_id": None},
            "no <|endoftext|> token",
        ),
        ({"tokenizer__ggml__eos_token_id": 300}, "token id 300"),
    ],
)
def test_a_wrong_gguf_vocabulary_is_refused(changes, message):
    with pytest.raises(InputError) as error:
        Tokenizer.from_gguf_metadata(small_metadata(**changes))
    assert message in str(error.value)


def test_files_beside_tokenizer_json_declare_ends_and_template(small, tmp_path):
    small.chat_template = "in the config"
    small.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "in the config"
    (tmp_path / "chat_template.jinja").write_text("in its own file")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == "in its own file"
    assert loaded.eos_ids == (257, 258)


def test_missing_and_damaged_files_are_one_sentence(tmp_path):
    cases = {
        "is neither a model folder": lambda: load_tokenizer(tmp_path / "nowhere"),
        "has no tokenizer": lambda: load_tokenizer(tmp_path),
        "does not exist; a model folder": lambda: Tokenizer.from_json(tmp_path / "tokenizer.json"),
        "does not exist; give the path": lambda: Tokenizer.from_tiktoken(tmp_path / "qwen.tiktoken", "qwen1"),
    }
    for message, load in cases.items():
        with pytest.raises(InputError, match=message):
            load()
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="is not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_another_familys_tokenizer_json_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="is not a BPE"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "is not a tiktoken file"),
        ("IQ== zero\n", "is not a tiktoken file"),
        ("IQ== 0\nIg== 1\n", "is incomplete"),
    ],
)
def test_a_damaged_tiktoken_file_is_refused(tmp_path, text, message):
    (tmp_path / "qwen.tiktoken").write_text(text)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_qwen_tiktoken_beside_a_later_generations_config_is_refused(tmp_path):
    (tmp_path / "qwen.tiktoken").write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(InputError, match="model_type 'qwen3'"):
        load_tokenizer(tmp_path)


def test_ranks_that_are_no_bpe_are_refused():
    with pytest.raises(InputError, match="no merge of two earlier tokens"):
        merges_from_ranks({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})


def test_a_tokenizer_larger_than_the_model_is_refused(from_gguf):
    config = load_preset("qwen2.5-coder-0.5b-instruct")
    check_tokenizer(from_gguf, config)
    with pytest.raises(InputError, match="151665 tokens but the model only 151000 rows"):
        check_tokenizer(from_gguf, dataclasses.replace(config, vocab_size=151_000))


def test_a_lone_surrogate_is_named(small):
    for encode in (small.encode, lambda text: small.encode_batch(["a", text])):
        with pytest.raises(InputError, match=r"lone surrogate \(U\+D83D at character 2\)"):
            encode("ab\ud83d")
