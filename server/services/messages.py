"""Conversations as requests bring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posterior.data.chat import texts, tool_calls
from posterior.errors import PosteriorError
from server.errors import Refused


def check_messages(messages: Any) -> None:
    """Refuses what vLLM lets pass, or blames on another place than the one at fault: messages without content, media,
    which name addresses that the server would fetch, and tool calls that a fit would refuse.

    Raises Refused.
    """
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        where = f"message {index}"
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or (content is None and role != "assistant"):
            raise Refused(f"{where}: every message needs a 'role' and a 'content'", "messages")
        calls = message.get("tool_calls")
        try:
            texts(where, content)
            tool_calls(where, calls)
        except PosteriorError as error:
            raise Refused(str(error), "messages") from error
        if not all(isinstance(call.get("id"), str) and call.get("type") == "function" for call in calls or ()):
            raise Refused(f"{where}: each of the 'tool_calls' needs an 'id' and the 'type' \"function\"", "messages")


def question(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a conversation asks: the text of the user's last message; "" without one. The messages have been checked."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return "\n".join(texts("the user's last message", asked[-1])) if asked else ""
