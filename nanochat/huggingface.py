"""A vocabulary as the files that Hugging Face's tokenizers read, and the chat layout as their template.

Token ids are the same there. One thing differs by their design: `AutoTokenizer` turns text that spells a special
token into that token, unless it is called with `split_special_tokens=True`; ours never does.
"""

import json
from typing import Any

from nanochat.tokenizer import Vocabulary

# render_chat and render_prompt in Jinja, with add_generation_prompt for the latter.
CHAT_TEMPLATE = """\
{%- set told = namespace(system='', due='user') -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set told.system = message['content'] + '\\n\\n' -%}
    {%- elif message['role'] != told.due -%}
        {{- raise_exception('a chat is an optional system message, then user and assistant in turn') -}}
    {%- else -%}
        {{- '<|' + told.due + '_start|>' + told.system + message['content'] + '<|' + told.due + '_end|>' -}}
        {%- set told.system = '' -%}
        {%- set told.due = 'assistant' if told.due == 'user' else 'user' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def huggingface_files(vocab: Vocabulary, context: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads.

    context: tokens that the model can see at once.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "additional_special_tokens": [t for t in vocab.special if t not in ("<|bos|>", "<|assistant_end|>")],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": json.dumps(_tokenizer(vocab), ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
    }


def _tokenizer(vocab: Vocabulary) -> dict[str, Any]:
    signs = _signs()
    names = {token: "".join(signs[byte] for byte in token) for token in vocab.ranks}
    split = {"type": "Split", "pattern": {"Regex": vocab.pattern}, "behavior": "Isolated", "invert": False}
    bytes_as_signs = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in vocab.special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_as_signs]},
        "post_processor": None,
        "decoder": bytes_as_signs,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken: a piece that is a token is not merged step by step
            "vocab": {names[token]: rank for token, rank in vocab.ranks.items()},
            "merges": [[names[left], names[right]] for left, right in merges(vocab.ranks)],
        },
    }


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order in which tiktoken prefers to merge them.

    tiktoken merges any two neighbours whose bytes together are a token, so the pair seen in training is not enough.
    """
    found: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found += sorted((p for p in pairs if p[0] in ranks and p[1] in ranks), key=lambda p: (ranks[p[0]], ranks[p[1]]))
    return found


def _signs() -> dict[int, str]:
    """GPT-2's printable character for each byte (Radford et al. 2019, encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
