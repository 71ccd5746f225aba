"""Text to tokens and back: byte-level BPE, split as GPT-4 splits it, with nanochat's nine special tokens.

A vocabulary is plain data (ranks and a pattern), trained by rustbpe and applied by tiktoken. Text never becomes a
special token: whoever wants one takes its id from `special`. Sources: Sennrich et al. 2016 (BPE), Radford et al. 2019
(bytes), nanochat's tokenizer.py (two digits at a time, since a small vocabulary has better uses than 900 numbers).
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nanochat.files import File, Files

if TYPE_CHECKING:
    import tiktoken

SPECIAL = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
RANKS = "ranks.tiktoken"
VOCABULARY = "vocabulary.json"

# The engines that apply these (fancy-regex in tiktoken and rustbpe, Oniguruma in Hugging Face's tokenizers) read some
# signs differently: `(?i:s)` folds to other letters, `$` is the end of a line in one, and `{1,3}+` is possessive in
# one and a repetition in the other. So none of these is used; a test compares the engines on every code point.
ENGLISH = r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])"
SPLIT = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
# tiktoken's own patterns, in that common language; U+017F is the long s, which folds to s.
TIKTOKEN_SPLIT = {
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k_base": (
        "'(?:[sdmtSDMT\u017f]|[lL][lL]|[vV][eE]|[rR][eE])"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """Which bytes each token stands for. Ids 0.. are `ranks`, the last nine are `special`."""

    pattern: str
    ranks: dict[bytes, int]
    special: dict[str, int]

    def __post_init__(self) -> None:
        ids = [*self.ranks.values(), *self.special.values()]
        if ids != list(range(len(ids))):
            raise ValueError(f"a vocabulary's ids must be 0 to {len(ids) - 1} in order, special tokens last")
        if missing := [byte for byte in range(256) if bytes([byte]) not in self.ranks]:
            raise ValueError(f"a vocabulary needs a token for each of the 256 bytes; missing: {missing}")
        if unnamed := [name for name in SPECIAL if name not in self.special]:
            raise ValueError(f"a vocabulary needs the special tokens of chats; missing: {', '.join(unnamed)}")

    @property
    def size(self) -> int:
        """Tokens, the special ones included."""
        return len(self.ranks) + len(self.special)

    def token_bytes(self) -> np.ndarray:
        """(size,) int32: how many bytes of text each token stands for, 0 for the special ones."""
        sizes = [*map(len, self.ranks), *(0 for _ in self.special)]
        return np.array(sizes, dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Tokens of text; what spells a special token stays text. A lone surrogate becomes U+FFFD."""
        tokens: list[int] = self._encoding.encode_ordinary(text)
        return tokens

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, in order; tiktoken spreads them over eight threads."""
        tokens: list[list[int]] = self._encoding.encode_ordinary_batch(list(texts))
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Bytes of tokens; a special token gives its name. ValueError for an id that is none."""
        table = self._table
        ids = [int(token) for token in tokens]
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            raise ValueError(f"token ids from {min(ids)} to {max(ids)} are not all in 0 to {len(table) - 1}")
        return b"".join(map(table.__getitem__, ids))

    def save(self, files: Files) -> list[File]:
        """Writes ranks.tiktoken and vocabulary.json."""
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items()]
        told = {"pattern": self.pattern, "special": self.special, "size": self.size}
        return [files.put(RANKS, b"".join(lines)), files.put(VOCABULARY, json.dumps(told, indent=1).encode())]

    @classmethod
    def load(cls, files: Files) -> "Vocabulary":
        """Reads what `save` wrote. ValueError names the file that is damaged."""
        with files.open(RANKS) as ranks_file, files.open(VOCABULARY) as told_file:
            lines, told_bytes = ranks_file.read().splitlines(), told_file.read()
        try:
            told: dict[str, Any] = json.loads(told_bytes)
            pattern, special = told["pattern"], told["special"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{VOCABULARY} is damaged: {error!r}") from error
        try:
            pairs = [line.split() for line in lines]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            return cls(pattern, ranks, special)  # a line too few or too many shows in the ids of the special tokens
        except ValueError as error:
            raise ValueError(f"{RANKS} is damaged: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Data alone: what was built from it is built again where it is unpickled."""
        return {"pattern": self.pattern, "ranks": self.ranks, "special": self.special}

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding("nanochat", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={})

    @cached_property
    def _table(self) -> list[bytes]:
        return [*self.ranks, *(name.encode() for name in self.special)]


def train_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """A vocabulary of `size` tokens, special ones included, from texts that are read once and not kept.

    The same texts give the same vocabulary whatever the threads (RAYON_NUM_THREADS). ValueError if there is too
    little text to merge that often.
    """
    import rustbpe

    least = 256 + len(SPECIAL)
    if size < least:
        raise ValueError(f"size is {size}; 256 bytes and {len(SPECIAL)} special tokens need at least {least}")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), size - len(SPECIAL), pattern=SPLIT)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + len(SPECIAL) < size:
        raise ValueError(
            f"size is {size}, but this text has only {len(ranks) - 256} different merges; "
            f"use at most {len(ranks) + len(SPECIAL)}, or more text"
        )
    return _with_special(SPLIT, ranks)


def tiktoken_vocabulary(encoding: str) -> Vocabulary:
    """The ranks of tiktoken's `r50k_base` (GPT-2) or `cl100k_base` (GPT-4), with nanochat's special tokens after them.

    Read from tiktoken's cache, or downloaded by tiktoken into it. OSError if neither works.
    """
    if encoding not in TIKTOKEN_SPLIT:
        raise ValueError(f"encoding is {encoding!r}; use one of {', '.join(TIKTOKEN_SPLIT)}")
    from tiktoken_ext import openai_public

    try:
        ranks = getattr(openai_public, encoding)()["mergeable_ranks"]
    except OSError as error:
        raise OSError(
            f"the vocabulary {encoding} is not in tiktoken's cache and cannot be downloaded ({type(error).__name__}); "
            "set TIKTOKEN_CACHE_DIR to a folder that has it, or train a vocabulary with `size` instead of `encoding`"
        ) from error
    return _with_special(TIKTOKEN_SPLIT[encoding], cast(dict[bytes, int], ranks))


def _with_special(pattern: str, ranks: dict[bytes, int]) -> Vocabulary:
    in_order = dict(sorted(ranks.items(), key=lambda pair: pair[1]))
    return Vocabulary(pattern, in_order, {name: len(ranks) + n for n, name in enumerate(SPECIAL)})
