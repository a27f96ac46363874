"""What `posterior ask` sends, and what it prints of the reply."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from openai import Stream
from openai.types.chat import ChatCompletionChunk
from rich.console import Console

from posterior_client._bars import of_decisions, of_prediction
from posterior_client._client import PosteriorClient
from posterior_client._exceptions import PosteriorClientError, translated
from posterior_client._request import body
from posterior_client._uncertainty import decision_response, predictive_response
from posterior_client._writing import write

UNWRAPPED = 1_000_000  # cells of a line where no terminal is: no line is broken
MAX_TOKENS = 256


@dataclass(frozen=True)
class Reply:
    """The JSON as it came, a stream's in parts, and what shows it to a reader."""

    raw: Iterable[object]
    show: Callable[[Console], None]


class Terminal(Console):
    """Prints nothing but what it is given: no markup, no emoji codes, no colours of numbers."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = UNWRAPPED

    def on_broken_pipe(self) -> None:
        """Whoever read our output has enough of it: an error as of any other print, not Rich's own exit."""
        raise BrokenPipeError


def ask(text: str, args: argparse.Namespace) -> None:
    """Ask the server about `text` and print the reply. Until it comes, a terminal sees on stderr that it is awaited.

    Raises: PosteriorClientError.
    """
    asked = _text if args.write else _decisions if args.questions else _prediction
    with PosteriorClient(args.base_url) as client:
        with Terminal(stderr=True).status(f"waiting for {client.base_url}", spinner="line"):
            reply = asked(client, args.model or _first_posterior(client), text, args)
        if not args.json:
            reply.show(Terminal())
            return
        for each in reply.raw:
            print(json.dumps(each), flush=True)


def _prediction(client: PosteriorClient, model: str, text: str, args: argparse.Namespace) -> Reply:
    asked = {"model": model, "inputs": [{args.field or "text": text}], **_given(args, "predictive", "coverage")}
    with translated(client.base_url):
        raw = client.openai.post("/predictive", cast_to=object, body=body(asked))
        response = predictive_response(raw)
    return Reply([raw], lambda console: console.print(of_prediction(response.data[0])))


def _decisions(client: PosteriorClient, model: str, text: str, args: argparse.Namespace) -> Reply:
    options = _given(args, "predictive", "coverage", "max_risk", "orders")
    asked = {"model": model, "input": text, "questions": args.questions, "uncertainty": options or None}
    with translated(client.base_url):
        raw = client.openai.post("/decisions", cast_to=object, body=body(asked))
        response = decision_response(raw, len(args.questions))
    return Reply([raw], lambda console: console.print(of_decisions(args.questions, response)))


def _text(client: PosteriorClient, model: str, text: str, args: argparse.Namespace) -> Reply:
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        "temperature": args.temperature,
        "logprobs": True,  # a stream's chunks may hold several tokens: these say where each one ends
        "stream": True,
        "uncertainty": _given(args, "predictive", "max_risk") or None,
    }
    chunks = _chunks(client, body(asked))
    chunks = chain(list(islice(chunks, 1)), chunks)  # the first is awaited here
    raw = (chunk.to_dict(mode="json") for chunk in chunks)
    return Reply(raw, lambda console: write(chunks, console, args.doubt or "total"))


def _chunks(client: PosteriorClient, sent: dict[str, Any]) -> Iterator[ChatCompletionChunk]:
    kind = Stream[ChatCompletionChunk]
    with translated(client.base_url):
        path = "/chat/completions"
        with client.openai.post(path, cast_to=ChatCompletionChunk, body=sent, stream=True, stream_cls=kind) as stream:
            yield from stream


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _first_posterior(client: PosteriorClient) -> str:
    with translated(client.base_url):
        names = [str(model.id) for model in client.openai.models.list().data if getattr(model, "parent", None)]
    for name in names:
        if not name.endswith("/map"):
            return name
    raise PosteriorClientError(f"the server at {client.base_url} serves no posterior")
