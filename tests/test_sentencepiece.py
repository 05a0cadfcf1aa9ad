"""CodeQwen1.5's kind of tokenizer, from each of its files, against the Rust library told by hand."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.vocabulary import pieces_of

SPACE = "\u2581"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["h", "i", "hi", SPACE, SPACE + "hi", "e", "he", SPACE + "he", "l", "ll", "hell", "o", "\n", SPACE * 2, "é"]
# (text, score, kind): as in a SentencePiece model, scores are minus the rank of the merge
PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), *((mark, 0.0, 3) for mark in CONTROL), ("<fim>", 0.0, 4)]
PIECES += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
PIECES += [(word, -float(rank), 1) for rank, word in enumerate(WORDS)]
VOCAB = {text: id for id, (text, *_) in enumerate(PIECES)}
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def reference():
    """The tokenizer as written for the Rust library by hand: merges in the order of their results' scores."""
    merges = [("h", "i"), (SPACE, "hi"), ("h", "e"), (SPACE, "he"), ("l", "l"), ("he", "ll"), (SPACE, SPACE)]
    backend = tokenizers.Tokenizer(models.BPE(VOCAB, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", *CONTROL])
    backend.add_tokens([tokenizers.AddedToken("<fim>", normalized=False)])
    return backend


def model_bytes(kind=2):
    pb2 = pytest.importorskip("transformers.utils.sentencepiece_model_pb2_new")
    model = pb2.ModelProto()
    for text, score, type in PIECES:
        model.pieces.add(piece=text, score=score, type=type)
    model.trainer_spec.model_type = kind
    model.normalizer_spec.add_dummy_prefix = True
    return model.SerializeToString()


def test_pieces_give_the_same_tokenizer_again(routes):
    """Merges in ranks become scores, by which llama.cpp merges, and these the same merges."""
    for tokenizer in routes.values():
        pieces = tokenizer.pieces()
        assert [(piece.text, piece.kind) for piece in pieces] == [(text, kind) for text, _, kind in PIECES]
        made = [piece for piece in pieces if piece.kind == 1 and len(piece.text) > 1]
        scores = {text: score for text, score, _ in PIECES}
        by_score = sorted(made, key=lambda piece: -piece.score)
        assert [scores[piece.text] for piece in by_score] == sorted(
            (scores[piece.text] for piece in made), reverse=True
        )


def test_what_scores_cannot_say():
    described = json.loads(reference().to_str())
    merges = described["model"]["merges"]
    for change, reason in (
        ({"merges": merges[1:]}, "not every two pieces"),
        ({"unk_token": None}, "no unknown token"),
    ):
        with pytest.raises(InputError, match=reason):
            pieces_of(described | {"model": described["model"] | change})
    with pytest.raises(InputError, match="normalises by 'NFC'"):
        pieces_of(described | {"normalizer": {"type": "NFC"}})


@pytest.fixture(scope="module")
def routes(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ("json", "model")}
    reference().save(str(folders["json"] / "tokenizer.json"))
    (folders["model"] / "tokenizer.model").write_bytes(model_bytes())
    for folder in folders.values():
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    columns = dict(zip(("tokens", "scores", "token_type"), map(list, zip(*PIECES, strict=True)), strict=True))
    metadata = {f"tokenizer.ggml.{name}": column for name, column in columns.items()}
    metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.eos_token_id": VOCAB["<|im_end|>"]}
    gguf = Tokenizer.from_gguf_metadata(metadata)
    again = tmp_path_factory.mktemp("again")
    gguf.save(again)
    return {name: load_tokenizer(folder) for name, folder in folders.items()} | {
        "gguf": gguf,
        "again": load_tokenizer(again),
    }


texts = st.lists(
    st.sampled_from(["hi", " ", "  ", "hell", "o", "he", "\n", "é", "世", "<|im_end|>", "<fim>", "x"]), max_size=8
)


@pytest.mark.parametrize("route", ["json", "model", "gguf", "again"])
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(parts=texts)
def test_ids_and_text_are_those_of_the_library(routes, route, parts):
    text, tokenizer, expected = "".join(parts), routes[route], reference()
    ids = expected.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids, skip_special=True) == expected.decode(ids, skip_special_tokens=True)
    plain = tokenizer.encode(text, allow_special=False)
    assert not {VOCAB[mark] for mark in (*CONTROL, "<fim>")} & set(plain)
    assert tokenizer.decode(plain) == text


def test_transformers_reads_the_same(routes, tmp_path):
    transformers = pytest.importorskip("transformers")
    routes["model"].save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "hi hello\n<|im_start|>é hi"
    assert theirs(text, add_special_tokens=False)["input_ids"] == routes["model"].encode(text)


def test_ends_and_special_tokens(routes):
    for tokenizer in routes.values():
        assert tokenizer.eos_ids == (VOCAB["<|im_end|>"], VOCAB["<|endoftext|>"])
        assert VOCAB["<fim>"] not in tokenizer.special_ids and VOCAB["<|im_start|>"] in tokenizer.special_ids


def test_a_stream_drops_the_first_space_only(routes):
    decoder = routes["json"].stream()
    assert [decoder.add(VOCAB[t]) for t in (SPACE + "hi", SPACE + "hi", "<0xC3>", "<0xA9>")] == ["hi", " hi", "", "é"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b"x" * 50, lambda b: b"", lambda b: b"\xff" * 30, lambda b: b[5:]]
)
def test_a_damaged_model_is_one_sentence(tmp_path, damage):
    (tmp_path / "tokenizer.model").write_bytes(damage(model_bytes()))
    with pytest.raises(InputError, match=r"SentencePiece"):
        load_tokenizer(tmp_path)


def test_a_unigram_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(kind=1))
    with pytest.raises(InputError, match="but no BPE"):
        load_tokenizer(tmp_path)
