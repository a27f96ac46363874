"""What is odd about a base, said once when it is loaded: weights that know no language, a tokenizer whose BOS is wrong,
a chat template that loses what is said, answers that do not join the prompt.

`probes` prepares token ids, whoever holds the model scores them, `judge` says what the scores mean: a server can do the
middle step in another process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from posterior.data import chat, tokens
from posterior.data.task import Task
from posterior.errors import PosteriorError

SENTENCE = "The capital of France is Paris, and the capital of Italy is Rome."
MUCH = 1.0  # nats a token by which one way of beginning a text is much the worse one
USER, ASSISTANT = "What is the capital of France?", "The capital of France is Paris."

Ids = tuple[int, ...]
Score = Callable[[Sequence[int]], float]


def check(tokenizer: Any, score: Score, task: Task | None = None) -> list[str]:
    """Warnings about a base, each one line with what to do, and about a task on it. `score` gives the mean
    log-likelihood of ids[1:], in nats a token."""
    found = probes(tokenizer)
    return [
        *judge(found, {name: score(ids) for name, ids in found.items()}, len(tokenizer)),
        *(joints(tokenizer, task) if task is not None else ()),
    ]


def scorer(model: Any) -> Score:
    """The score of `check` by a causal language model of transformers."""

    def score(ids: Sequence[int]) -> float:
        row = torch.tensor([list(ids)], device=model.device)
        with torch.no_grad():
            log_p = model(row).logits[0, :-1].float().log_softmax(-1)
        return float(log_p.gather(1, row[0, 1:, None]).mean())

    return score


def probes(tokenizer: Any) -> dict[str, Ids]:
    """Token ids to score, by name: a plain sentence as the tokenizer begins it ("own"), and the other way, with BOS or
    without ("other"), if there is a BOS."""
    plain, own = tokens.plain(tokenizer, SENTENCE), tokens.prompt(tokenizer, SENTENCE)
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        return {"own": tuple(own)}
    return {"own": tuple(own), "other": tuple(plain if own[:1] == [start] else [start, *plain])}


def judge(found: Mapping[str, Ids], scores: Mapping[str, float], vocabulary: int) -> list[str]:
    """What the scores of `probes` say: each a mean over the tokens but the first, in nats a token."""
    uniform, best = -math.log(vocabulary), max(scores.values())
    if not best > uniform / 2:  # also NaN
        return [
            f"the base gives a plain sentence {best:.1f} nats a token (chance is {uniform:.1f}): its weights or its "
            "tokenizer are damaged, or it is untrained; download it again"
        ]
    if "other" in scores and scores["other"] - scores["own"] > MUCH:
        with_start = len(found["own"]) > len(found["other"])
        does, should = ("adds", "without") if with_start else ("does not add", "with")
        gain = scores["other"] - scores["own"]
        return [
            f"the base's tokenizer {does} BOS, but a plain sentence is {gain:.1f} nats a token likelier {should} it; "
            f"set add_bos_token in its tokenizer_config.json to {str(not with_start).lower()}"
        ]
    return []


def joints(tokenizer: Any, task: Task) -> list[str]:
    """What is odd where the task's prompts meet the chat template or the answers."""
    if task.chat:
        return _template(tokenizer)
    answers, end = task.answers or (), task.template[-1:]
    spaced = any(answer[:1].isspace() for answer in answers)
    if answers and end == " ":
        return [
            f"the template ends in a space{' and answers start with one' if spaced else ''}; leave it to the answers "
            f"({' ' + answers[0].lstrip()!r}): most tokenizers make one token of a space and the word after it"
        ]
    if answers and not spaced and (end.isalnum() or end in ".:,;?!"):
        return [
            f"nothing stands between the template's end {task.template[-12:]!r} and the answer {answers[0]!r}; if a "
            f"space should, begin the answers with it: {' ' + answers[0]!r}"
        ]
    return []


def _template(tokenizer: Any) -> list[str]:
    """What the chat template does to two turns."""
    messages = [
        {"role": "user", "content": USER},
        {"role": "assistant", "content": ASSISTANT},
        {"role": "user", "content": SENTENCE},
    ]
    try:
        text = chat.render(tokenizer, messages)
    except PosteriorError as error:
        return [f"on a chat of two turns: {error}"]
    lost = [said for said in (USER, ASSISTANT, SENTENCE) if said not in text]
    return [f"the base's chat template leaves out what was said ({lost[0]!r}); use a base with another"] if lost else []
