"""The fit's chats have the token ids that vLLM's OpenAI server gives the same messages."""

from __future__ import annotations

from typing import Any

import pytest

from posterior.data.chat import _loops_over_parts, chat_ids
from posterior.models.base import load_tokenizer, resolve
from server.engine.config import set_environment
from tests.posterior.data.test_chat import LLAMA2, PARTS, PLAIN, STRICT

set_environment("cpu")  # before vLLM, as the server does

from vllm.config import ModelConfig  # noqa: E402
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # noqa: E402
from vllm.renderers.chat_utils import parse_chat_messages  # noqa: E402
from vllm.renderers.hf import _detect_content_format, safe_apply_chat_template  # noqa: E402

CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}, "strict": True}}]
USER = {"role": "user", "content": "hi"}
TWO = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
DEVELOPER = {"role": "developer", "content": "be brief"}
CHATS = {
    "user": [USER],
    "system": [{"role": "system", "content": "be kind"}, USER],
    "turns": [USER, {"role": "assistant", "content": "yes"}, USER],
    "parts": [TWO],
    "developer": [DEVELOPER, USER],
    "developer later": [{"role": "system", "content": "be kind"}, USER, DEVELOPER, TWO],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "user", "content": "and?", "name": "ann"},
    ],
}
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN
TEMPLATES = {"the base's": None, "parts": PARTS, "tools": WITH_TOOLS, "developer": PLAIN + "{# 'developer' #}"}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(model=str(resolve().path))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_the_same_ids(config: ModelConfig, chat: str, template: str) -> None:
    tokenizer = load_tokenizer(resolve())
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": CHATS[chat], "tools": TOOLS})
    tools: Any = [tool.model_dump() for tool in request.tools or ()]
    form: Any = _detect_content_format(tokenizer.chat_template, default="string")
    conversation, *_ = parse_chat_messages(request.messages, config, form)
    theirs = safe_apply_chat_template(config, tokenizer, conversation, tools=tools, add_generation_prompt=True)
    assert chat_ids(tokenizer, CHATS[chat], TOOLS) == theirs


MACRO = "{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        PARTS,
        LLAMA2,
        STRICT,
        MACRO + "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
        MACRO + "{% for m in messages %}{{ show(c=m['content']) }}{% endfor %}",
        MACRO + "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% set content = m['content'] %}{% for p in content | list %}{{ p }}{% endfor %}"
        "{% endfor %}",
        "{% for m in messages[1:] %}{{ m.content | trim }}{% for c in m.tool_calls %}{{ c }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_the_same_reading_of_templates(template: str) -> None:
    assert _loops_over_parts(template) == (_detect_content_format(template, default="string") == "openai")
