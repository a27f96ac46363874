"""`posterior ask`: questions at the terminal, answered with their distributions as bars."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, get_args

from openai.types.decision_create_params import Question

from posterior_client import _bars as bars
from posterior_client._client import PosteriorClient
from posterior_client._exceptions import InputError, PosteriorClientError, UnreachableError, translated
from posterior_client._request import body
from posterior_client._types import PredictiveName
from posterior_client._uncertainty import decision_response

BOTH, OWN = ("predictive", "coverage"), ("max_risk", "orders")  # options of every question, and of decisions only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments on `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("text", nargs="?", type=str, help="what to ask about; - or a pipe: standard input")
    parser.add_argument("--model", help="a posterior's name (default: the first one served)")
    parser.add_argument("--field", help="without questions: the task's field the text goes to (default: text)")
    parser.add_argument("--base-url", help="default: $POSTERIOR_BASE_URL, else http://127.0.0.1:8000/v1")
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    parser.add_argument("--predictive", choices=get_args(PredictiveName), help="how the posterior is averaged")
    parser.add_argument("--coverage", type=float, metavar="P", help="of intervals and prediction sets (default: 0.9)")
    _add_questions(parser)


EPILOG = """\
Without questions the posterior's own task is asked. The text stands ahead of the questions. A question and each of its
options are arguments of their own, so that an option may hold commas, = or, in quotes, blanks:

  posterior ask "My card is lost." --choice "Which department?" cards loans "bank transfers" \\
      --predicate "The customer is in a hurry." --score "How urgent?" low medium high

In a bar, the interval of the probability has two shades, which meet at the probability.
The API key, if the server needs one, is $POSTERIOR_API_KEY."""


def _add_questions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("questions", "each may be given several times; they are answered in this order")

    def add(name: str, read: Callable[[Sequence[str]], list[Question]], shape: Any, help: str) -> None:
        group.add_argument(name, dest="questions", nargs="+", action=_Ask, const=read, metavar=shape, help=help)

    add("--predicate", _predicates, "STATEMENT", "how likely the statement is true")
    add("--choice", _choice, ("QUESTION", "OPTION"), "which of the options it is: 2 or more")
    add("--score", _score, ("QUESTION", "LEVEL"), "which of the levels it has: 2 or more, the lowest first")
    group.add_argument(
        "--max-risk", type=float, metavar="P",
        help="answer only where answers like it are wrong at most this often, else say why not; needs a calibration",
    )  # fmt: skip
    group.add_argument(
        "--orders", type=int, metavar="N", help="ask in so many orders of the options, and average (default: 1)"
    )


class _Ask(argparse.Action):
    """Adds the questions that its `const` reads from the words."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if "-" in values:
            raise argparse.ArgumentError(self, "- for standard input stands ahead of the questions")
        try:
            asked = self.const(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        namespace.questions = [*(namespace.questions or []), *asked]


def _predicates(words: Sequence[str]) -> list[Question]:
    return [{"type": "predicate", "instructions": each} for each in words]


def _choice(words: Sequence[str]) -> list[Question]:
    asked, options = _asked(words, "options")
    return [{"type": "choice", "instructions": asked, "choices": [{"value": each} for each in options]}]


def _score(words: Sequence[str]) -> list[Question]:
    asked, levels = _asked(words, "levels")
    return [{"type": "score", "instructions": asked, "levels": [{"label": each} for each in levels]}]


def _asked(words: Sequence[str], what: str) -> tuple[str, Sequence[str]]:
    """The question and what follows it. Raises ValueError."""
    if len(words) < 3:
        raise ValueError(
            f'expected a question and 2 {what} or more, each an argument of its own ("Which one?" first second), '
            f"got {len(words)}"
        )
    return words[0], words[1:]


def run(args: argparse.Namespace) -> None:
    """Ask the server and print. The API key, if any, is $POSTERIOR_API_KEY. Exits 2 with one line on an error."""
    encoding = sys.stdout.encoding or "ascii"
    glyphs = bars.UNICODE if encoding.lower().replace("-", "") == "utf8" else bars.ASCII
    try:
        _check(args)
        text = _text(args.text)
        with PosteriorClient(args.base_url) as client:
            model = args.model or _first_posterior(client)
            shown = (_decisions if args.questions else _prediction)(client, model, text, args, glyphs)
    except UnreachableError as error:
        sys.exit(_complain(f"{error}: start one with `posterior serve`, or `make serve` in the project's folder"))
    except PosteriorClientError as error:
        sys.exit(_complain(str(error)))
    print(shown.encode(encoding, "backslashreplace").decode(encoding))


def _check(args: argparse.Namespace) -> None:
    """No option that was given is ignored. Raises InputError."""
    if args.questions and args.field:
        raise InputError("--field belongs to the posterior's own task; leave it out beside questions")
    for name in OWN:
        if getattr(args, name) is not None and not args.questions:
            raise InputError(
                f"--{name.replace('_', '-')} belongs to questions; ask one with --choice, --predicate or --score"
            )


def _text(given: str | None) -> str:
    """What to ask about. Raises InputError."""
    if given not in (None, "-"):
        return str(given)
    if sys.stdin is None or (given is None and sys.stdin.isatty()):
        raise InputError("there is no text to ask about; give it ahead of the questions, or - for standard input")
    try:
        text = sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8; convert it, for example with iconv") from None
    if not text:
        raise InputError("standard input is empty; give the text ahead of the questions, or pipe it in")
    return text


def _prediction(client: PosteriorClient, model: str, text: str, args: argparse.Namespace, glyphs: str) -> str:
    options: dict[str, Any] = {name: getattr(args, name) for name in BOTH}
    response = client.predictive(model=model, inputs=[{args.field or "text": text}], **options)
    return json.dumps(asdict(response)) if args.json else bars.of_prediction(response.data[0], glyphs)


def _decisions(client: PosteriorClient, model: str, text: str, args: argparse.Namespace, glyphs: str) -> str:
    options = {name: getattr(args, name) for name in (*BOTH, *OWN) if getattr(args, name) is not None}
    sent = body({"model": model, "input": text, "questions": args.questions, "uncertainty": options or None})
    with translated(client.base_url):
        reply = client.openai.post("/decisions", cast_to=object, body=sent)
        response = decision_response(reply, len(args.questions))
    return json.dumps(reply) if args.json else bars.of_decisions(args.questions, response, glyphs)


def _first_posterior(client: PosteriorClient) -> str:
    with translated(client.base_url):
        names = [str(model.id) for model in client.openai.models.list().data if getattr(model, "parent", None)]
    for name in names:
        if not name.endswith("/map"):
            return name
    raise PosteriorClientError(f"the server at {client.base_url} serves no posterior")


def _complain(message: str) -> int:
    print(f"posterior: {message}", file=sys.stderr)
    return 2


def main() -> None:
    """The same verb without the server's distribution: `python -m posterior_client.ask`."""
    parser = argparse.ArgumentParser(prog="python -m posterior_client.ask", description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
