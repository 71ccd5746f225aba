"""Chats as tokens: the layout written out by hand, with a vocabulary of one token a byte."""

from typing import ClassVar

import pytest

from nanochat.chat import check_messages, render_chat, render_prompt

NAMES = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
BOS, USER, USER_END, ASSISTANT, ASSISTANT_END = range(1000, 1005)


class Bytes:
    special: ClassVar = {f"<|{name}|>": 1000 + number for number, name in enumerate(NAMES)}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def chat(*turns: str) -> list:
    """Turns like "user: hello"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def test_layout_and_mask() -> None:
    tokens, mask = render_chat(Bytes(), chat("user: Hi", "assistant: Yo", "user: So", "assistant: OK"))
    first = [BOS, USER, *b"Hi", USER_END, ASSISTANT, *b"Yo", ASSISTANT_END]
    assert tokens == [*first, USER, *b"So", USER_END, ASSISTANT, *b"OK", ASSISTANT_END]
    assert mask == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1]


def test_a_system_message_opens_the_first_user_message() -> None:
    told = render_chat(Bytes(), chat("system: Be brief.", "user: Hi", "assistant: Yo"))
    assert told == render_chat(Bytes(), chat("user: Be brief.\n\nHi", "assistant: Yo"))


def test_a_prompt_ends_where_the_assistant_begins() -> None:
    messages = chat("user: Hi", "assistant: Yo", "user: So")
    whole, mask = render_chat(Bytes(), [*messages, *chat("assistant: OK")])
    prompt = render_prompt(Bytes(), messages)
    assert prompt == whole[: len(prompt)]
    assert prompt[-1] == ASSISTANT
    assert mask[len(prompt) :] == [1, 1, 1]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no user message"),
        (chat("system: x"), "no user message"),
        (chat("assistant: x"), r"messages\[0\].role is 'assistant' where 'user' is due"),
        (chat("user: x", "user: y"), r"messages\[1\].role is 'user' where 'assistant' is due"),
        (chat("system: a", "user: x", "system: b"), r"messages\[2\].role is 'system' where 'assistant'"),
        (chat("tool: x"), r"messages\[0\].role is 'tool'; use"),
        ([{"role": "user", "content": None}], r"messages\[0\].content must be text, not NoneType"),
        ([{"role": "user"}], r"messages\[0\] must be an object"),
        (["hello"], r"messages\[0\] must be an object"),
        ("hello", "must be a list, not str"),
        ({"role": "user"}, "must be a list, not dict"),
        (None, "must be a list, not NoneType"),
        ([{"role": ["user"], "content": "x"}], "role is"),
        (chat("user: \ud800"), r"messages\[0\].content holds half a character"),
    ],
)
def test_what_is_no_chat_is_refused(messages: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_messages(messages)


def test_what_cannot_be_learnt_from_or_answered_is_refused() -> None:
    with pytest.raises(ValueError, match="no assistant message"):
        render_chat(Bytes(), chat("user: Hi"))
    with pytest.raises(ValueError, match="last message is the assistant's"):
        render_prompt(Bytes(), chat("user: Hi", "assistant: Yo"))


def test_other_fields_are_left_out() -> None:
    assert check_messages([{"role": "user", "content": "x", "name": "me"}]) == [{"role": "user", "content": "x"}]
