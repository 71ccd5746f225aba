"""What a client may say, in OpenAI's words: one class for each endpoint, and what is refused by name.

The check of a request (parse.py) and the OpenAPI document (openapi.py) are both made from these classes and tables,
so they cannot differ. Not here: what depends on the model (its name, its vocabulary, its longest reply).
Source: OpenAI's API reference, chat completions and (legacy) completions, as the `openai` client 2 and 3 speak it.
top_k, min_p and repetition_penalty are not OpenAI's; their names and meanings are vLLM's.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nanochat.engine.sampler import MOST, MOST_LOGPROBS, MOST_REPLIES

MOST_BODY_BYTES = 1 << 20
MOST_DEPTH = 32  # lists and objects in each other
MOST_STOPS = 4
MOST_STOP_CHARACTERS = 256
MOST_PROMPTS = 32  # of one request for completions
MOST_CHOICES = 64  # prompts x n
MOST_LEGACY_LOGPROBS = 5  # OpenAI's own limit for completions
COMPLETION_TOKENS = 16  # that is how long OpenAI's completions are where none is said

# Settings that are not supported, and the values at which they ask for nothing. null asks for nothing everywhere.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
}
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {**NEUTRAL, "echo": (False,), "suffix": ()}
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")  # say who asks; no answer depends on them
NEUTRAL_OF_MESSAGE: tuple[Any, ...] = (None, [], "")  # tool_calls, refusal, ... of a message that was an answer


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # 1.0 is an integer in JSON
Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
Token = Annotated[int, Field(ge=0), WHOLE]  # openapi.py and parse.py know the vocabulary's size
Tokens = Annotated[list[Token], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """How a stream is told."""

    include_usage: bool | None = Field(None, description="A last event holds the usage.")
    include_obfuscation: bool | None = Field(None, json_schema_extra={"enum": [False, None]})


class _Request(_Strict):
    """What both endpoints understand. null means: not given."""

    model: str
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(None, description="The most tokens of a reply.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0: the likeliest token.")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MOST), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), WHOLE] | None = Field(
        None, description="The same seed, request and model give the same reply. Choice i draws with seed + i."
    )
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES), WHOLE] | None = Field(None, description="Choices for each prompt.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only where stream is true.")


class TextPart(_Strict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message; what else a message of OpenAI's may hold must be empty."""

    model_config = ConfigDict(
        extra="allow", strict=True, json_schema_extra={"additionalProperties": {"enum": list(NEUTRAL_OF_MESSAGE)}}
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="Optionally a system or developer message, then user and assistant in turn; the last is a user's."
    )
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description="As max_tokens; only one of them may be given."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = Field(
        None, description="Only where logprobs is true."
    )


class CompletionRequest(_Request):
    """The body of POST /v1/completions. A text begins a document; tokens are taken as they are."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LEGACY_LOGPROBS), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_REPLIES), WHOLE] | None = Field(
        None, description="Must be n: no more replies are made than are answered with."
    )
