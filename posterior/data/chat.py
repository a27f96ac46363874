"""Chats as token ids, rendered by the base's own chat template as vLLM's OpenAI server renders them.

Messages are prepared as vLLM's renderer does (vllm/renderers/chat_utils.py, hf.py): text parts are joined by line
breaks unless the template loops over parts, arguments of tool calls become objects, and `developer` becomes `system`
where the template does not know it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from posterior.data import tokens
from posterior.data.tokens import Tokenizer
from posterior.errors import PosteriorError, first_line

Message = dict[str, Any]
_TEXTS = {"text": "text", "refusal": "refusal"}  # where the text of each kind of part is


def chat_ids(tokenizer: Tokenizer, messages: Any, tools: Any = None, *, thinking: bool = True) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins. Raises PosteriorError."""
    return tokens.plain(tokenizer, render(tokenizer, messages, tools, thinking=thinking))


def answered_ids(tokenizer: Tokenizer, messages: Any, tools: Any = None) -> tuple[list[int], list[int]]:
    """Token ids of a conversation up to its last message, the assistant's, and of that message as the template writes
    it, without the token that ends it. Raises PosteriorError."""
    if not isinstance(messages, list) or not messages or _role(messages[-1]) != "assistant":
        raise PosteriorError("'messages' must be a list that ends with the assistant's message")
    before = render(tokenizer, messages[:-1], tools)
    last = prepared(messages, parts=False)[-1]
    calls = last.get("tool_calls", ())
    if not calls and not last["content"]:
        raise PosteriorError("the assistant's last message has no text and no tool_calls; there is nothing to learn")
    try:
        whole = render(tokenizer, messages, tools, answer=False)
    except PosteriorError:
        if calls:
            raise
        whole = before  # some templates take no conversation that ends with an answer
    written = whole.removeprefix(before) if whole.startswith(before) else ""
    if calls:
        names = [call["function"]["name"] for call in calls]
        if not all(name in written for name in names):
            raise PosteriorError(f"the base's chat template does not write calls of tools ({names[0]!r}); use another")
        return tokens.plain(tokenizer, before), _until_end(tokenizer, tokens.plain(tokenizer, written))
    space = written[: len(written) - len(written.lstrip())]  # some templates write one before the answer
    text = space + last["content"] if written.startswith(space + last["content"]) else last["content"]
    return tokens.plain(tokenizer, before), tokens.continuation(tokenizer, text)


def _until_end(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """What stands before the token that ends a turn, where generation stops."""
    end = getattr(tokenizer, "eos_token_id", None)
    return ids[: ids.index(end)] if end in ids else ids


def render(
    tokenizer: Tokenizer, messages: Any, tools: Any = None, *, answer: bool = True, thinking: bool = True
) -> str:
    """The text of a conversation; with `answer`, up to where the assistant's answer begins. Without `thinking`, no
    thoughts come before it, if the template has `enable_thinking` to say so. Raises PosteriorError."""
    tools = _tools(tools)
    template = _template(tokenizer, tools)
    conversation = prepared(messages, parts=_loops_over_parts(template))
    if '"developer"' not in template and "'developer'" not in template:
        conversation = _without_developer(conversation)
    switch = {} if thinking else {"enable_thinking": False}
    try:
        text = tokenizer.apply_chat_template(
            conversation, tools=tools, add_generation_prompt=answer, tokenize=False, return_dict=False, **switch
        )
    except Exception as error:  # a template may raise anything about roles and their order
        said = first_line(error)
        raise PosteriorError(f"the base's chat template does not take these messages: {said}") from None
    return str(text)


def prepared(messages: Any, *, parts: bool) -> list[Message]:
    """Messages as a template reads them: content is a text, or with `parts` a list of parts. Raises PosteriorError."""
    if not isinstance(messages, list) or not messages:
        raise PosteriorError("'messages' must be a list of at least one message")
    return [_prepared(number, message, parts) for number, message in enumerate(messages, 1)]


def _prepared(number: int, message: Any, parts: bool) -> Message:
    where, role = f"message {number}", _role(message)
    if role is None:
        raise PosteriorError(f'{where} must be an object like {{"role": "user", "content": "..."}}')
    if message.get("function_call") is not None:
        raise PosteriorError(f"{where} has a 'function_call', an older form; write 'tool_calls'")
    calls = tool_calls(where, message.get("tool_calls")) if role == "assistant" else []
    content = message.get("content")
    if content is None and not calls:
        raise PosteriorError(f"{where} ({role}) has no 'content'")
    found = texts(where, content)
    result: Message = {"role": role, "content": "\n".join(found)}
    if parts and role != "tool":
        result["content"] = [{"type": "text", "text": text} for text in found]
    if calls:
        result["tool_calls"] = calls
    if role == "assistant" and isinstance(message.get("reasoning"), str):
        result |= {"reasoning": message["reasoning"], "reasoning_content": message["reasoning"]}
    copied = ("name", "tool_call_id") if role == "tool" else ("name",)
    result |= {key: message[key] for key in copied if isinstance(message.get(key), str)}
    if role == "developer":
        result["tools"] = message.get("tools")
    return result


def _role(message: Any) -> str | None:
    role = message.get("role") if isinstance(message, dict) else None
    return role if isinstance(role, str) and role else None


def texts(where: str, content: Any) -> list[str]:
    """The texts of a message's content. Raises PosteriorError."""
    if content is None or isinstance(content, str):
        return [] if content is None else [content]
    if not isinstance(content, list):
        raise PosteriorError(f"{where}: the 'content' must be a text or a list of text parts, not {content!r:.60}")
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXTS[kind]) if kind in _TEXTS else None
        if not isinstance(text, str):
            raise PosteriorError(
                f'{where}: each part of the \'content\' must be text, {{"type": "text", "text": ...}}, not {part!r:.60}'
            )
        found.append(text)
    return found


def tool_calls(where: str, calls: Any) -> list[Message]:
    """Tool calls whose arguments are objects, as templates expect them; OpenAI's are JSON in a string."""
    if not isinstance(calls or [], list):
        raise PosteriorError(f"{where}: 'tool_calls' must be a list")
    result = []
    for call in calls or []:
        function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise PosteriorError(
                f'{where}: each of the \'tool_calls\' must be {{"type": "function", "function": '
                '{"name": ..., "arguments": ...}}'
            )
        arguments = function.get("arguments") or {}
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise PosteriorError(f"{where}: the arguments of {function['name']!r} are no JSON object")
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result


def _tools(tools: Any) -> list[Message] | None:
    """OpenAI's `tools` with the fields that vLLM shows to templates."""
    if not tools:
        return None
    if not isinstance(tools, list):
        raise PosteriorError("'tools' must be a list of tools")
    result = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise PosteriorError('each of the \'tools\' must be {"type": "function", "function": {"name": ...}}')
        shown = {key: function.get(key) for key in ("name", "description", "parameters")}
        strict = {"strict": function["strict"]} if function.get("strict") is not None else {}
        result.append({"type": "function", "function": shown | strict})
    return result


def _template(tokenizer: Any, tools: list[Message] | None) -> str:
    """The tokenizer's chat template. Raises PosteriorError without one."""
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError:
        raise PosteriorError(
            "the base has no chat template: ask without 'chat' and 'messages', or use a base that was made for chats"
        ) from None


def _without_developer(conversation: Sequence[Message]) -> list[Message]:
    """With a developer's messages as the system's; where that makes several of the system, they become one."""
    if all(message["role"] != "developer" for message in conversation):
        return list(conversation)
    system = [message for message in conversation if message["role"] in ("developer", "system")]
    if len(system) == 1 and conversation[0] is system[0]:
        return [{**{k: v for k, v in system[0].items() if k != "tools"}, "role": "system"}, *conversation[1:]]
    texts = [content if isinstance(content, str) else _joined(content) for content in (m["content"] for m in system)]
    rest = [message for message in conversation if message["role"] not in ("developer", "system")]
    return [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *rest]


def _joined(parts: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(part["text"] for part in parts)


@lru_cache(maxsize=32)
def _loops_over_parts(template: str) -> bool:
    """Whether the template loops over the parts of a message's content, so that it reads them as a list."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    root = _compile_jinja_template(template).environment.parse(template)
    contents = {"content", *_macro_contents(root)}

    def of_content(node: Any) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in contents
        while isinstance(node, nodes.Filter | nodes.Test) or _sliced(node):
            node = node.node
        return _is_content(node)

    return any(of_content(loop.iter) for loop in root.find_all(nodes.For))


def _macro_contents(root: Any) -> Iterator[str]:
    """Parameters of macros that are called with a message's content."""
    from jinja2 import nodes

    for macro in root.find_all(nodes.Macro):
        for call in root.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
                given = [*zip(macro.args, call.args, strict=False)]
                yield from (name.name for name, value in given if _is_content(value))
                yield from (pair.key for pair in call.kwargs if _is_content(pair.value))


def _sliced(node: Any) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)


def _is_content(node: Any) -> bool:
    """`message.content` or `message['content']`."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return isinstance(node.node, nodes.Name) and node.attr == "content"
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.node, nodes.Name)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == "content"
    )
