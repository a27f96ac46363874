"""A text at the terminal: each token is coloured by its doubt as it comes."""

from collections.abc import Iterable, Iterator
from typing import Literal

from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import Choice
from rich.console import Console
from rich.text import Text as Line

from posterior_client._bars import REASONS, REFUSED, calibration, doubt, source
from posterior_client._exceptions import ResponseError
from posterior_client._types import Entropy, Text, TextPart, Uncertainty
from posterior_client._uncertainty import uncertainty_of

Doubt = Literal["total", "aleatoric", "epistemic"]
# The least doubt of a token at the levels 1 to 4, in nats, as on the page. The epistemic part is much the smaller one.
LEAST: dict[Doubt, tuple[float, ...]] = {
    "total": (0.2, 0.7, 1.5, 3.0),
    "aleatoric": (0.2, 0.7, 1.5, 3.0),
    "epistemic": (0.01, 0.03, 0.1, 0.3),
}
# How the levels 0 to 4 look, on a dark terminal as on a light one. The colour-blind can tell the two colours of text
# apart, and the two of blocks (tests/clients/test_ask_colours.py). Where there are no colours, the other marks differ.
LEVELS = ("", "italic #2f86c9", "underline #b06c00", "bold #000000 on #f0b000", "bold underline #ffffff on #b84300")


def write(chunks: Iterable[ChatCompletionChunk], console: Console, doubt: Doubt) -> None:
    """Print a text as it comes, and then what the server says about the whole of it.

    Raises: ResponseError: the text broke off before its end.
    """
    entropies: list[Entropy] = []
    record: Uncertainty | None = None
    written, ended = 0, None
    try:
        for chunk in chunks:
            for choice in chunk.choices:
                for record in uncertainty_of(chunk):
                    entropies += [token.entropy for token in record.tokens] if isinstance(record, TextPart) else []
                for piece in _pieces(choice):
                    if not written and entropies and console.color_system:
                        console.print(legend(doubt), end="\n\n")
                    level = _level(entropies[written], doubt) if written < len(entropies) else 0
                    console.print(Line(_printable(piece), LEVELS[level]), end="", soft_wrap=True)
                    written += 1
                ended = choice.finish_reason or ended
    finally:
        console.print()
    if ended is None:
        raise ResponseError("the text broke off before its end")
    console.print("", *_about(record, ended), sep="\n")


def legend(doubt: Doubt) -> Line:
    """What the colours mean, in one line."""
    edges = (0, *LEAST[doubt])
    names = [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:], strict=False)] + [f"{edges[-1]:g} and more"]
    line = Line(f"{doubt} doubt of a token, nats: ")
    for name, style in zip(names, LEVELS, strict=True):
        line.append(name, style).append("  ")
    line.rstrip()
    return line


def _level(entropy: Entropy, doubt: Doubt) -> int:
    nats: float = getattr(entropy, doubt)
    return sum(nats >= least for least in LEAST[doubt])


def _pieces(choice: Choice) -> list[str]:
    """The text of each token of a chunk. It is empty where it is half a character, or ends the text."""
    content = choice.delta.content or ""
    tokens = [each.token for each in (choice.logprobs and choice.logprobs.content) or []]
    if "".join(tokens) == content:
        return tokens
    return [content, *[""] * (len(tokens) - 1)]  # half of a character came before, or the text ends


def _printable(text: str) -> str:
    """A part of a text as a terminal may show it: control characters could drive it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def _about(record: Uncertainty | None, ended: str) -> Iterator[Line]:
    """What the server says about a whole text, in lines."""
    if ended == "length":
        yield Line("the text was cut: it has as many tokens as it may have")
    if record is None:
        yield Line("base model: without a posterior there is no doubt about weights", "dim")
        return
    if isinstance(record, Text):
        if record.abstain:
            reason = record.reason or "unknown"
            said = f"too unsure for --max-risk, {reason}: {REASONS.get(reason, 'the server does not say why')}"
            yield Line(said, REFUSED)
        if record.confidence is not None:
            yield Line(f"right with probability {record.confidence:.2f} ({calibration(record)})", "bold")
        yield Line(
            f"mean probability of a token {record.mean_token_probability:.3f}; "
            f"the text tells {record.information:.3f} nats about the weights"
        )
        yield Line(doubt(record.entropy))
    yield Line(source(record), "dim")
