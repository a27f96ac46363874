"""Which fields of a request for text other kinds of answers honour."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from server.http.schemas import ChatRequest, CompletionRequest

# The fields that say how the prompt is read, and how the answer is sent.
READING = frozenset({
    "messages", "prompt", "add_special_tokens", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs", "reasoning_effort",
})  # fmt: skip
STREAMING = frozenset({"stream", "stream_options"})
SENDING = frozenset({
    "model", "uncertainty", "user", "parallel_tool_calls", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output",
})  # fmt: skip
# Of the others, the values that leave an answer as it is.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,), "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,), "min_tokens": (0,), "top_logprobs": (0,), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}  # fmt: skip


def not_honoured(
    request: ChatRequest | CompletionRequest, honoured: Set[str], neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL
) -> str | None:
    """The first field that is given, not honoured, and not at a value that changes nothing."""
    for name in sorted(request.model_fields_set - honoured):
        value = getattr(request, name)
        empty = value is None or value is False or value in ([], {}, "")
        if name in type(request).model_fields and not empty and value not in neutral.get(name, ()):
            return name
    return None
