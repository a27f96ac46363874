"""Which fields of vLLM's request models are open to clients: those of our own request models."""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase
from vllm.renderers.hf import safe_apply_chat_template

from server.errors import Refused

CONTROLS = {  # of a rendering, by vLLM or by transformers: no values of a template
    "messages",
    *inspect.signature(safe_apply_chat_template).parameters,
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
}
# OpenAI's fields that vLLM does not know and that would change an answer, with the values that change nothing.
UNKNOWN: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (),
}  # fmt: skip


def check_fields(body: dict[str, Any], vllms: type[BaseModel], served: Set[str]) -> None:
    """Raises Refused for a field of vLLM's request model that is not among the `served` ones.

    Not served are those that reach into the server (templates, media, transfer parameters) or cost without bound (beam
    search). A value that changes nothing passes: clients may spell out a default. Fields unknown to vLLM are ignored.
    """
    for name in body.keys() & vllms.model_fields.keys() - served:
        if body[name] is not None and not changes_nothing(name, body[name], vllms):
            raise Refused(f"the field {name!r} is not served here", name)
    for name in body.keys() & UNKNOWN.keys():
        if body[name] is not None and body[name] not in UNKNOWN[name]:
            raise Refused(f"the field {name!r} is not served here", name)
    for name in body.get("chat_template_kwargs") or ():
        if name in CONTROLS:
            raise Refused(f"chat_template_kwargs may not hold {name!r}", "chat_template_kwargs")


def changes_nothing(name: str, value: Any, vllms: type[BaseModel]) -> bool:
    """Whether `value` is what vLLM would take if the field were not given."""
    default = vllms.model_fields[name].get_default(call_default_factory=True, validated_data={})
    alike = isinstance(value, bool) == isinstance(default, bool)
    empty = value is False or (isinstance(value, list | dict) and not value)
    return (alike and value == default) or (empty and not default)
