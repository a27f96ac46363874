"""Which fields of vLLM's request models are open to clients: a new one of vLLM's is closed until listed here."""

from __future__ import annotations

from typing import Any

from server.errors import bad_request
from server.schemas import MAX_CHOICES, MAX_PROMPTS

OPENAI = (
    "model messages prompt suffix echo stream stream_options n temperature top_p max_tokens max_completion_tokens "
    "stop seed presence_penalty frequency_penalty logit_bias logprobs top_logprobs response_format tools tool_choice "
    "parallel_tool_calls reasoning_effort user"
)
SAMPLING = (
    "top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids include_stop_str_in_output "
    "skip_special_tokens spaces_between_special_tokens allowed_token_ids bad_words add_generation_prompt "
    "continue_final_message add_special_tokens return_token_ids return_tokens_as_token_ids structured_outputs"
)
SERVED = frozenset(f"{OPENAI} {SAMPLING}".split())


def check_fields(body: dict[str, Any], known: frozenset[str]) -> None:
    """Raises ApiError 400 for a field of vLLM's (`known`) that is not served here, or a request too large.

    Not served are those that reach into the server (templates, media, transfer parameters), cost without bound (beam
    search). Fields unknown to vLLM are ignored.
    """
    for field in body.keys() & known - SERVED:
        if body[field] is not None and body[field] is not False:  # clients may spell out a default
            raise bad_request(f"the field {field!r} is not served here", field)
    prompt, n = body.get("prompt"), body.get("n")
    if isinstance(prompt, list) and any(not isinstance(item, int) for item in prompt) and len(prompt) > MAX_PROMPTS:
        raise bad_request(f"{len(prompt)} prompts in one request; at most {MAX_PROMPTS} are served", "prompt")
    if isinstance(n, int) and not 1 <= n <= MAX_CHOICES:
        raise bad_request(f"n must be between 1 and {MAX_CHOICES}", "n")
