"""Which of vLLM's own fields pass, and with which values."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.config import set_environment
from server.errors import Refused
from server.http.schemas import FIELDS

set_environment("cpu")  # before vLLM, as the server does

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # noqa: E402
from vllm.entrypoints.openai.completion.protocol import CompletionRequest  # noqa: E402

from server.engine.fields import check_fields  # noqa: E402

PASS = [
    {"priority": 0}, {"length_penalty": 1.0}, {"length_penalty": 1}, {"include_reasoning": True},
    {"use_beam_search": False}, {"prompt_logprobs": None}, {"documents": None}, {"documents": []},
    {"chat_template_kwargs": {"enable_thinking": False}}, {"kv_transfer_params": {}}, {"nobody_knows": "x"},
    {"best_of": 1}, {"functions": None}, {"modalities": ["text"]},
]  # fmt: skip
REFUSED = [
    {"priority": 1}, {"length_penalty": 2.0}, {"include_reasoning": False},
    {"include_reasoning": 1}, {"use_beam_search": True}, {"prompt_logprobs": 0}, {"chat_template": "{{ 1 }}"},
    {"documents": [{"text": "x"}]}, {"kv_transfer_params": {"a": 1}}, {"request_id": "mine"}, {"cache_salt": "x"},
    {"vllm_xargs": {"posterior_gang": "x"}}, {"logprob_token_ids": [1]}, {"truncate_prompt_tokens": 1},
    {"chat_template_kwargs": {"model_config": 1}}, {"chat_template_kwargs": {"messages": "x"}},
    {"chat_template_kwargs": {"self": 1}}, {"chat_template_kwargs": {"max_length": 3}}, {"best_of": 2},
    {"functions": [{"name": "f"}]}, {"modalities": ["audio"]}, {"prediction": {"content": "x"}},
    {"chat_template_kwargs": {"chat_template": "x"}}, {"chat_template_kwargs": {"tokenize": False}},
]  # fmt: skip


@pytest.mark.parametrize("body", PASS, ids=map(str, PASS))
def test_a_spelled_out_default_passes(body: dict[str, Any]) -> None:
    check_fields(body, ChatCompletionRequest, FIELDS["chat"])


@pytest.mark.parametrize("body", REFUSED, ids=map(str, REFUSED))
def test_what_reaches_into_the_server_or_costs_without_bound_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(Refused) as caught:
        check_fields(body, ChatCompletionRequest, FIELDS["chat"])
    assert caught.value.param == next(iter(body))


def test_every_field_that_is_served_is_one_of_vllms_or_ours() -> None:
    for kind, model in (("chat", ChatCompletionRequest), ("completion", CompletionRequest)):
        assert FIELDS[kind] - model.model_fields.keys() == {"uncertainty"}
