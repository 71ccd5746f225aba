"""Chats as tokens: nanochat's layout, and which tokens the model is trained to say.

    <|bos|> <|user_start|>..<|user_end|> <|assistant_start|>..<|assistant_end|> <|user_start|>..

A system message has no tokens of its own: it becomes the first lines of the first user message.
Layout from nanochat (Karpathy 2025), tokenizer.py, render_conversation.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol, TypedDict


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Encodes(Protocol):
    """What a chat needs of a vocabulary."""

    @property
    def special(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...


def check_messages(messages: object) -> list[Message]:
    """Return `messages` as a chat: at most one system message, then user and assistant in turn.

    Raises ValueError that names the message at fault. Content may be empty; it may not hold lone surrogates.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"messages must be a list, not {type(messages).__name__}")
    chat = [_check_message(number, message) for number, message in enumerate(messages)]
    turns = chat[1:] if chat and chat[0]["role"] == "system" else chat
    if not turns:
        raise ValueError("messages holds no user message")
    for number, message in enumerate(turns, len(chat) - len(turns)):
        wanted = "user" if (number - (len(chat) - len(turns))) % 2 == 0 else "assistant"
        if message["role"] != wanted:
            raise ValueError(
                f"messages[{number}].role is {message['role']!r} where {wanted!r} is due: "
                "a chat is an optional system message, then user and assistant in turn"
            )
    return chat


def render_chat(vocab: Encodes, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Tokens of a chat, and 1 for each token the model learns to say (the assistant's words and their end), else 0.

    Raises ValueError if it is no chat, or if the assistant says nothing in it.
    """
    tokens, mask = _render(vocab, messages)
    if not any(mask):
        raise ValueError("messages holds no assistant message, so there is nothing to learn from it")
    return tokens, mask


def render_prompt(vocab: Encodes, messages: Sequence[Message]) -> list[int]:
    """Tokens of a chat whose last message is the user's, up to where the assistant starts to speak."""
    tokens, _ = _render(vocab, messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s; an answer needs a user message to answer")
    return [*tokens, vocab.special["<|assistant_start|>"]]


def _render(vocab: Encodes, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    tokens, mask = [vocab.special["<|bos|>"]], [0]

    def say(piece: Iterable[int], counts: int) -> None:
        piece = list(piece)
        tokens.extend(piece)
        mask.extend([counts] * len(piece))

    for message in _without_system(check_messages(messages)):
        role = message["role"]
        counts = int(role == "assistant")
        say([vocab.special[f"<|{role}_start|>"]], 0)
        say([*vocab.encode(message["content"]), vocab.special[f"<|{role}_end|>"]], counts)
    return tokens, mask


def _without_system(messages: list[Message]) -> list[Message]:
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _check_message(number: int, message: object) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"messages[{number}] must be an object with `role` and `content`")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"messages[{number}].role is {role!r}; use 'system' (first only), 'user' or 'assistant'")
    if not isinstance(content, str):
        raise ValueError(f"messages[{number}].content must be text, not {type(content).__name__}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"messages[{number}].content holds half a character (a lone surrogate) at position {error.start}"
        ) from error
    return {"role": role, "content": content}
