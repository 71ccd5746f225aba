"""Tokens: against tiktoken itself, by round trip, and by what a damaged file is called."""

import os
import pickle
import random
import subprocess
import sys
from itertools import pairwise, product

import numpy as np
import pytest
import regex
import requests
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from nanochat.files import Folder
from nanochat.tokenizer import SPECIAL, SPLIT, TIKTOKEN_SPLIT, Vocabulary, tiktoken_vocabulary, train_vocabulary

TEXT = [f"The {n}th of {n * 7} documents; it's naïve, isn't it?\n\n    def f(x): return x + {n}\n" for n in range(400)]
EVERY = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
# GPT-4's pattern as nanochat's first release writes it, with one digit fewer.
NANOCHAT = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)


@pytest.fixture(scope="module")
def vocab() -> Vocabulary:
    return train_vocabulary(TEXT, 400)


def test_size_counts_the_special_tokens(vocab) -> None:
    assert vocab.size == 400
    assert list(vocab.special.values()) == list(range(391, 400))
    assert tuple(vocab.special) == SPECIAL
    assert {bytes([byte]) for byte in range(256)} <= set(vocab.ranks)


def test_every_text_comes_back(vocab) -> None:
    for text in (*TEXT[:20], EVERY, "", " " * 5000, "\n" * 5000, "a" * 5000, *SPECIAL):
        tokens = vocab.encode(text)
        assert vocab.decode(tokens) == text
        assert vocab.decode_bytes(np.array(tokens, dtype=np.uint16)) == text.encode()
    assert vocab.encode_batch(TEXT) == [vocab.encode(text) for text in TEXT]


def test_text_never_becomes_a_special_token(vocab) -> None:
    for name, number in vocab.special.items():
        assert number not in vocab.encode(f"say {name} twice: {name}")
        assert vocab.decode([number]) == name


def test_merges_are_those_of_a_slow_obvious_trainer() -> None:
    """Byte-pair encoding by its definition: count all pairs, merge the most frequent, count again."""
    text = ["low lower lowest newer newest wider widest"] * 3 + ["low low new"]
    words = [[bytes([byte]) for byte in word.encode()] for t in text for word in regex.findall(SPLIT, t)]
    merged = []
    for _ in range(12):
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        most = max(counts.values())
        merged.append({left + right for (left, right), count in counts.items() if count == most})
        # Where pairs are equally frequent, which comes first is the trainer's choice; follow it.
        learned = [t for t, r in train_vocabulary(text, 265 + len(merged)).ranks.items() if r == 255 + len(merged)]
        assert learned[0] in merged[-1]
        pair = next(p for p, count in counts.items() if count == most and p[0] + p[1] == learned[0])
        words = [_merge(word, pair) for word in words]


def _merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


def test_the_pattern_is_nanochat_s(vocab) -> None:
    theirs = tiktoken.Encoding("theirs", pat_str=NANOCHAT, mergeable_ranks=vocab.ranks, special_tokens={})
    texts = [*TEXT[:50], *_random_texts(2000), EVERY.replace("\u017f", "")]  # the long s is no s to us
    assert [vocab.encode(t) for t in texts] == theirs.encode_ordinary_batch(texts)


def test_token_bytes_add_up_to_the_text(vocab) -> None:
    sizes = vocab.token_bytes()
    assert sizes.dtype == np.int32
    assert sizes.shape == (vocab.size,)
    assert not sizes[list(vocab.special.values())].any()
    for text in (*TEXT[:20], EVERY):
        assert sizes[vocab.encode(text)].sum() == len(text.encode())


def test_save_and_load(vocab, tmp_path) -> None:
    files = Folder(tmp_path)
    assert [file.path for file in vocab.save(files)] == ["ranks.tiktoken", "vocabulary.json"]
    loaded = Vocabulary.load(files)
    assert loaded == vocab
    assert loaded.encode(TEXT[7]) == vocab.encode(TEXT[7])
    assert load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken")) == vocab.ranks
    assert pickle.loads(pickle.dumps(loaded)) == vocab


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("ranks.tiktoken", lambda data: data[: len(data) // 2]),
        ("ranks.tiktoken", lambda data: data.replace(b" 300\n", b" 301\n")),
        ("ranks.tiktoken", lambda data: b"!!" + data),
        ("vocabulary.json", lambda data: data[:-5]),
        ("vocabulary.json", lambda data: data.replace(b'"pattern"', b'"patten"')),
    ],
)
def test_a_damaged_file_is_named(vocab, tmp_path, name: str, damage) -> None:
    vocab.save(Folder(tmp_path))
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Vocabulary.load(Folder(tmp_path))


def test_ids_that_are_none_are_refused(vocab) -> None:
    for wrong in (-1, 400):
        with pytest.raises(ValueError, match="0 to 399"):
            vocab.decode([5, wrong])


def test_too_little_text_or_too_small_a_size() -> None:
    with pytest.raises(ValueError, match=r"size is 5000, but this text has only \d+ different merges; use at most \d+"):
        train_vocabulary(["a few words, a few words"], 5000)
    with pytest.raises(ValueError, match=r"size is 264; .* at least 265"):
        train_vocabulary(TEXT, 264)
    with pytest.raises(ValueError, match=r"only 0 different merges; use at most 265"):
        train_vocabulary([], 266)


def test_threads_change_nothing() -> None:
    code = (
        "import hashlib, random\nfrom nanochat.tokenizer import train_vocabulary\n"
        "draw = random.Random(5)\n"
        "words = [''.join(draw.choices('abcdefgh', k=draw.randint(2, 9))) for _ in range(900)]\n"
        "texts = [' '.join(draw.choices(words, k=50)) for _ in range(3000)]\n"
        "print(hashlib.sha256(repr(train_vocabulary(texts, 1500).ranks).encode()).hexdigest())"
    )
    told = set()
    for threads in "121":
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        told.add(done.stdout)
    assert len(told) == 1


def test_tiktoken_vocabularies_need_a_cache_or_a_network(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("requests.get", _no_network)
    with pytest.raises(OSError, match=r"r50k_base .* TIKTOKEN_CACHE_DIR .*`size`"):
        tiktoken_vocabulary("r50k_base")
    with pytest.raises(ValueError, match="r50k_base, cl100k_base"):
        tiktoken_vocabulary("gpt5")


def _no_network(url: str) -> None:
    raise requests.ConnectionError(f"no way to {url}")


@pytest.mark.parametrize("encoding", ["r50k_base", "cl100k_base"])
def test_tiktoken_vocabularies_split_as_tiktoken_does(encoding: str, vocab, monkeypatch) -> None:
    """The pattern is our own spelling of theirs; with small ranks, so that nothing is downloaded."""
    from tiktoken_ext import openai_public

    # Where a split falls shows only if tokens could reach over it: all short runs of spaces, and the long s.
    runs = ["".join(signs) for n in (2, 3, 4) for signs in product(" \n", repeat=n)]
    ranks = dict.fromkeys([*vocab.ranks, *(run.encode() for run in [*runs, "\u017f", "\u017fa", "'\u017f"])])
    ranks = {token: rank for rank, token in enumerate(ranks)}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: dict(ranks))
    ours = tiktoken_vocabulary(encoding)
    assert ours.pattern == TIKTOKEN_SPLIT[encoding]
    assert ours.size == len(ranks) + 9
    their_pattern = getattr(openai_public, encoding)()["pat_str"]
    theirs = tiktoken.Encoding("theirs", pat_str=their_pattern, mergeable_ranks=ranks, special_tokens={})
    texts = [*TEXT[:50], EVERY, *_random_texts(3000), *(f"x{run}" for run in runs), "it'\u017fa"]
    assert [ours.encode(t) for t in texts] == theirs.encode_ordinary_batch(texts)


@pytest.mark.parametrize(("encoding", "ranks"), [("r50k_base", 50256), ("cl100k_base", 100256)])
def test_tiktoken_vocabularies_from_a_cache(encoding: str, ranks: int, monkeypatch) -> None:
    """Where this machine has tiktoken's files in its cache; nothing is downloaded."""
    monkeypatch.setattr("requests.get", _no_network)
    try:
        vocab = tiktoken_vocabulary(encoding)
    except OSError:
        pytest.skip(f"tiktoken's cache (TIKTOKEN_CACHE_DIR) has no {encoding}")
    assert len(vocab.ranks) == ranks
    assert vocab.size == ranks + 9
    theirs = tiktoken.get_encoding(encoding)
    for text in [*TEXT, *_random_texts(1000)]:
        assert vocab.encode(text) == theirs.encode_ordinary(text)


def _random_texts(count: int) -> list[str]:
    draw = random.Random(1)
    signs = [*"aZ9é字 \t\n\r'.,<|>_\u0300\u200d\u3000\x85", "'s", "'LL", "\r\n", "  ", "12345", "٣٤"]
    return ["".join(draw.choices(signs, k=draw.randrange(40))) for _ in range(count)]
