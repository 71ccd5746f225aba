"""Token ids and chats as transformers sees them, loaded from the files that the export writes."""

import random
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from nanochat.chat import render_chat, render_prompt
from nanochat.huggingface import CHAT_TEMPLATE, huggingface_files, merges
from nanochat.tokenizer import SPECIAL, SPLIT, Vocabulary, train_vocabulary
from pipelines import stdlib

EVERY = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [text for _, text in stdlib.documents()]


@pytest.fixture(scope="module")
def vocab(documents) -> Vocabulary:
    return train_vocabulary(documents, 4096)


@pytest.fixture(scope="module")
def theirs(vocab, tmp_path_factory) -> Any:
    folder: Path = tmp_path_factory.mktemp("bundle")
    for name, data in huggingface_files(vocab, 10**9).items():
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(folder)


def same_ids(vocab: Vocabulary, theirs: Any, texts: list[str]) -> None:
    """Ours never makes a special token of text; transformers must be told not to."""
    for start in range(0, len(texts), 500):
        part = texts[start : start + 500]
        for text, ids in zip(part, theirs(part, split_special_tokens=True)["input_ids"], strict=True):
            assert vocab.encode(text) == ids, text[:200]
            assert vocab.decode(ids) == text


def test_the_vocabulary_is_the_same(vocab, theirs) -> None:
    assert len(theirs) == vocab.size
    assert theirs.model_max_length == 10**9
    assert {name: theirs.convert_tokens_to_ids(name) for name in SPECIAL} == vocab.special
    assert (theirs.bos_token, theirs.eos_token) == ("<|bos|>", "<|assistant_end|>")


def test_every_code_point_alone_and_among_others(vocab, theirs) -> None:
    """Both engines must agree on what is a letter, a number and a space, also where Unicode has assigned nothing."""
    order = random.Random(0).sample(EVERY, len(EVERY))
    texts = ["".join(order[at : at + 200]) for at in range(0, len(order), 200)]
    same_ids(vocab, theirs, texts)
    same_ids(vocab, theirs, [f"a{'b'.join(EVERY[at : at + 400])} 1" for at in range(0, len(EVERY), 400)])


def random_texts(count: int) -> list[str]:
    """Strings of a few kinds of characters each, from one up to eleven kinds."""
    draw = random.Random(2)
    spaces = [c for c in EVERY if c.isspace()] + ["\u200b", "\u180e", "\ufeff", "\r\n", "   "]
    marks = [c for c in EVERY[:0x3000] if unicodedata.combining(c)]
    kinds = [
        EVERY,
        EVERY[:0x3000],
        EVERY[32:127],
        EVERY[:32],
        EVERY[0x590:0x700],
        EVERY[-0xF800:-0xF000] + [chr(c) for c in range(0x1F300, 0x1FB00)] + ["\u200d", "\ufe0f"],
        spaces,
        marks,
        [c for c in EVERY if unicodedata.category(c) == "Cn"][:5000],
        ["'s", "'S", "'\u017f", "'LL", "'ve", "1234", "٣٤٥", "Ⅷ½"],
        [*SPECIAL, "<|bos", "|>", "<|"],
    ]
    return [
        "".join(
            draw.choice(kind) for kind in draw.choices(draw.sample(kinds, draw.randint(1, 11)), k=draw.randrange(60))
        )
        for _ in range(count)
    ]


def test_ten_thousand_random_strings(vocab, theirs) -> None:
    same_ids(vocab, theirs, random_texts(10_000))


def test_long_runs(vocab, theirs) -> None:
    same_ids(vocab, theirs, [sign * 3000 for sign in (" ", "\n", "a", "1", "é", "🙂", "\t ", "aA", "<|bos|>")])


@pytest.mark.slow
def test_every_document_and_question_of_the_stdlib(vocab, theirs, documents) -> None:
    same_ids(vocab, theirs, documents)
    same_ids(vocab, theirs, [m["content"] for _, chat in stdlib.questions() for m in chat])


CHATS = [
    [("user", "Hi")],
    [("user", " Hi \n"), ("assistant", "Yes, it's\n\n ")],
    [("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "<b>'\"{{ x }}</b>")],
    [("user", ""), ("assistant", ""), ("user", "12345 é🙂")],
]


@pytest.mark.parametrize("chat", CHATS)
def test_the_chat_template_renders_as_we_do(vocab, theirs, chat) -> None:
    messages = [{"role": role, "content": content} for role, content in chat]
    if messages[-1]["role"] == "user":
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == render_prompt(vocab, messages)
    else:
        assert theirs.apply_chat_template(messages, return_dict=False) == render_chat(vocab, messages)[0]


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "system"], ["user", "tool"]])
def test_the_chat_template_refuses_what_we_refuse(theirs, roles) -> None:
    assert CHAT_TEMPLATE in theirs.chat_template
    with pytest.raises(jinja2.TemplateError, match="user and assistant in turn"):
        theirs.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)


def test_merges_are_every_split_of_every_token_into_two() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5}
    assert merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]


def test_a_token_that_no_merge_reaches_is_found_when_it_is_a_whole_piece(tmp_path) -> None:
    """As in tiktoken, which looks a piece up before it merges."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    vocab = Vocabulary(SPLIT, ranks, {name: 257 + n for n, name in enumerate(SPECIAL)})
    for name, data in huggingface_files(vocab, 128).items():
        (tmp_path / name).write_bytes(data)
    same_ids(vocab, AutoTokenizer.from_pretrained(tmp_path), ["abc", "abcd", "abc abc"])
    assert vocab.encode("abc") == [256]
