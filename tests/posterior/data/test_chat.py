"""Chats as the base's template writes them; tests/server/engine/test_chat_as_vllm.py compares them with vLLM's."""

from __future__ import annotations

from typing import Any

import pytest

from posterior.data import decisions
from posterior.data.chat import answered_ids, chat_ids, render
from posterior.data.decisions import TEMPLATE
from posterior.data.examples import encode
from posterior.data.task import Task
from posterior.errors import PosteriorError
from tests.posterior.tokenizers_of_kinds import make

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m['content'] %}({{ part.text }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
THINKING = PLAIN.replace(  # as Qwen3's
    "<assistant>",
    "<assistant>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}",
)
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}
USER: dict[str, Any] = {"role": "user", "content": "hi"}


def tokenizer(template: str | None) -> Any:
    made = make("byte-level")
    made.chat_template = template
    return made


def test_text_parts_are_joined_by_line_breaks_or_read_by_the_template() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render(tokenizer(PLAIN), [{"role": "user", "content": parts}]) == "<user>one\ntwo</s><assistant>"
    assert render(tokenizer(PARTS), [{"role": "user", "content": parts}]) == "<user>(one)(two)<assistant>"
    assert render(tokenizer(PARTS), [USER]) == "<user>(hi)<assistant>"


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    told = {"role": "developer", "content": "be brief"}
    assert render(tokenizer(PLAIN), [told, USER]) == "<system>be brief</s><user>hi</s><assistant>"
    chat = [{"role": "system", "content": "be kind"}, USER, told]
    assert render(tokenizer(PLAIN), chat) == "<system>be kind\n\nbe brief</s><user>hi</s><assistant>"
    knows = PLAIN + "{# 'developer' #}"
    assert render(tokenizer(knows), [told, USER]) == "<developer>be brief</s><user>hi</s><assistant>"


def test_rows_with_calls_of_tools() -> None:
    """In the history, with `content: null`, and as the answer, which is what the template writes of it."""
    chat = tokenizer(PLAIN)
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]}
    prompt, response = answered_ids(chat, [USER, call, result, {"role": "assistant", "content": "sun"}])
    assert chat.decode(prompt) == '<user>hi</s><assistant>[look {"city": "Rome"}]</s><tool>sunny</s><assistant>'
    assert chat.decode(response) == "sun"
    prompt, response = answered_ids(chat, [USER, call])
    assert (chat.decode(prompt), chat.decode(response)) == ("<user>hi</s><assistant>", '[look {"city": "Rome"}]')
    (example,) = encode(Task("text", "{text}"), chat, [{"messages": [USER, call]}])
    assert example.continuations == ((*response, chat.eos_token_id),)
    with pytest.raises(PosteriorError, match="row 1: .* template does not write calls of tools \\('look'\\)"):
        encode(Task("text", "{text}"), tokenizer(PARTS), [{"messages": [USER, call]}])


def test_tools_of_a_row_reach_the_template() -> None:
    chat = tokenizer("{{ tools | tojson }}" + PLAIN)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    text = chat.decode(answered_ids(chat, [USER, {"role": "assistant", "content": "x"}], tools)[0])
    shown = '{"name": "look", "description": null, "parameters": {"type": "object"}}'
    assert text.startswith(f'[{{"type": "function", "function": {shown}}}]<user>')


def test_the_space_that_a_template_writes_before_an_answer_is_part_of_it() -> None:
    chat = tokenizer(LLAMA2)
    prompt, response = answered_ids(chat, [USER, {"role": "assistant", "content": "yes"}])
    assert (chat.decode(prompt), chat.decode(response)) == ("[hi]", " yes")


BAD = [
    ([], "'messages' must be a list"),
    ("hi", "'messages' must be a list"),
    (["hi"], "'messages' must be a list that ends with the assistant's"),
    ([USER], "ends with the assistant's message"),
    (["hi", {"role": "assistant", "content": "x"}], "message 1 must be an object like"),
    ([7, {"role": "assistant", "content": "x"}], "message 1 must be an object like"),
    ([{"content": "x"}, {"role": "assistant", "content": "x"}], "message 1 must be an object like"),
    ([{"role": 3, "content": "x"}, {"role": "assistant", "content": "x"}], "message 1 must be an object like"),
    ([{"role": "user"}, {"role": "assistant", "content": "x"}], r"message 1 \(user\) has no 'content'"),
    (
        [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}],
        "message 1: the 'content' must be a text",
    ),
    ([{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "x"}], "message 1: each part"),
    ([USER, {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}], "message 2: each part"),
    ([USER, {"role": "assistant", "content": None}], r"message 2 \(assistant\) has no 'content'"),
    ([USER, {"role": "assistant", "content": ""}], "has no text and no tool_calls"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": "look"}], "message 2: 'tool_calls' must be a list"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": ["look"]}], "message 2: each of the 'tool_calls'"),
    (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{"}}]}],
        "message 2: the arguments of 'look' are no JSON object",
    ),
    ([USER, {"role": "assistant", "content": None, "function_call": {"name": "x"}}], "message 2 has a 'function_call'"),
    ([{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "x"}], "half of a character"),
]


@pytest.mark.parametrize(("messages", "match"), BAD)
def test_bad_messages_name_the_row(messages: Any, match: str) -> None:
    good = {"messages": [USER, {"role": "assistant", "content": "x"}]}
    with pytest.raises(PosteriorError, match=f"row 2: .*{match}") as caught:
        encode(Task("text", "{text}"), tokenizer(PLAIN), [good, {"messages": messages}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tools", ["look", ["look"], [{"function": {}}]])
def test_bad_tools_name_the_row(tools: Any) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "x"}], "tools": tools}
    with pytest.raises(PosteriorError, match="row 1: .*'tools'"):
        encode(Task("text", "{text}"), tokenizer(PLAIN), [row])


def test_a_base_without_a_template_or_whose_template_refuses() -> None:
    row = {"messages": [{"role": "system", "content": "x"}, USER, {"role": "assistant", "content": "x"}]}
    for template, match in (
        (None, "row 1: the base has no chat template: ask without .chat. and .messages."),
        (STRICT, "row 1: the base's chat template does not take these messages: System role not supported"),
        ("{{ messages[0].content.x.y }}", "row 1: the base's chat template does not take these messages"),
    ):
        with pytest.raises(PosteriorError, match=match):
            encode(Task("text", "{text}"), tokenizer(template), [row])
    with pytest.raises(PosteriorError, match="row 1: the base has no chat template"):
        encode(Task("choice", "{text}", ("a", "b"), chat=True), tokenizer(None), [{"text": "x", "label": 0}])


def test_a_decision_follows_directly_where_the_template_can_leave_thoughts_out() -> None:
    """Other tasks are rendered as chats are. A template without the switch writes the same text either way."""
    question = {"type": "predicate", "instructions": "It is late."}
    row = {"input": "hi", "question": question, "answer": True}
    for template, said in ((THINKING, "<assistant><think>\n\n</think>"), (PLAIN, "<assistant>")):
        chat, task = tokenizer(template), Task("decision", TEMPLATE, chat=True)
        (fitted,) = encode(task, chat, [row])
        assert chat.decode(fitted.prompt).endswith(f"Answer:</s>{said}")
        assert list(fitted.prompt) == task.ask(chat, "hi", decisions.read(decisions.QUESTION, question, "it"))[0]
        (other,) = encode(Task("choice", "{text}", ("a", "b"), chat=True), chat, [{"text": "hi", "label": 0}])
        assert list(other.prompt) == chat_ids(chat, [USER]) and chat.decode(other.prompt).endswith("hi</s><assistant>")
    assert chat_ids(chat, [USER], thinking=False) == chat_ids(chat, [USER])


def test_ids_of_a_prompt_have_the_template_s_own_bos_once() -> None:
    chat = make("always", "both")
    chat.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ids = chat_ids(chat, [{"role": "user", "content": "a"}])
    assert ids[0] == chat.bos_token_id and ids.count(chat.bos_token_id) == 1 and ids[-1] != chat.eos_token_id
