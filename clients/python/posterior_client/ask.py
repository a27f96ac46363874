"""`posterior ask`: questions at the terminal, answered with their distributions as bars, or by a text."""

import argparse
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any, get_args

from openai.types.decision_create_params import Question

from posterior_client._exceptions import InputError, PosteriorClientError, UnreachableError
from posterior_client._types import PredictiveName

# Options that not every way to ask has: which ways have it, and what to do elsewhere.
BELONGS = {
    "field": ({"task"}, "the posterior's own task; leave it out beside questions and --write"),
    "coverage": ({"task", "questions"}, "intervals, and a text has none; leave it out beside --write"),
    "max_risk": ({"questions", "text"}, "questions; ask one with --choice, --predicate or --score, or add --write"),
    "orders": ({"questions"}, "questions; ask one with --choice, --predicate or --score"),
    "doubt": ({"text"}, "a text; add --write"),
    "max_tokens": ({"text"}, "a text; add --write"),
    "temperature": ({"text"}, "a text; add --write"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments on `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("text", nargs="?", type=str, help="what to ask about; - or a pipe: standard input")
    parser.add_argument("--model", help="a posterior's name (default: the first one served)")
    parser.add_argument("--field", help="without questions: the task's field the text goes to (default: text)")
    parser.add_argument("--base-url", help="default: $POSTERIOR_BASE_URL, else http://127.0.0.1:8000/v1")
    parser.add_argument("--json", action="store_true", help="print the reply as it is, a stream's chunks line by line")
    parser.add_argument("--predictive", choices=get_args(PredictiveName), help="how the posterior is averaged")
    parser.add_argument("--coverage", type=float, metavar="P", help="of intervals and prediction sets (default: 0.9)")
    _add_questions(parser)
    _add_text(parser)


EPILOG = """\
Without questions the posterior's own task is asked. The text stands ahead of the questions. A question and each of its
options are arguments of their own, so that an option may hold commas, = or, in quotes, blanks:

  posterior ask "My card is lost." --choice "Which department?" cards loans "bank transfers" \\
      --predicate "The customer is in a hurry." --score "How urgent?" low medium high

In a bar, the interval of the probability has two shades, which meet at the probability. With --write an answer is
written, and each token is coloured by its doubt:

  posterior ask "What is the capital of Australia?" --write --doubt epistemic

Where the output is no terminal it has no bars and no colours. NO_COLOR=1 leaves out the colours alone.
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
        help="answer only where answers like it are wrong at most this often, else say why not; needs a calibration; "
        "of a text: say where it is too unsure",
    )  # fmt: skip
    group.add_argument(
        "--orders", type=int, metavar="N", help="ask in so many orders of the options, and average (default: 1)"
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument("--write", action="store_true", help="write an answer to the text, token by token")
    group.add_argument(
        "--doubt", choices=("total", "aleatoric", "epistemic"), help="which doubt colours the tokens (default: total)"
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens of the answer at most (default: 256)")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="0: the most probable tokens (default: the server's)"
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
    try:
        _check(args)
        text = _text(args.text)
        try:
            from posterior_client import _asking
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "rich":
                raise
            sys.exit(_complain("the library rich is missing; install it: pip install 'posterior-client[ask]'"))
        _asking.ask(text, args)
    except UnreachableError as error:
        sys.exit(_complain(f"{error}: start one with `posterior serve`, or `make serve` in the project's folder"))
    except PosteriorClientError as error:
        sys.exit(_complain(str(error)))


def _check(args: argparse.Namespace) -> None:
    """No option that was given is ignored. Raises InputError."""
    if args.write and args.questions:
        raise InputError("--write and questions exclude each other; leave out one of them")
    way = "text" if args.write else "questions" if args.questions else "task"
    for name, (ways, what) in BELONGS.items():
        if getattr(args, name) is not None and way not in ways:
            raise InputError(f"--{name.replace('_', '-')} belongs to {what}")


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


def _complain(message: str) -> int:
    print(f"posterior: {message}", file=sys.stderr)
    return 2


def main() -> None:
    """The same verb without the server's distribution: `python -m posterior_client.ask`."""
    parser = argparse.ArgumentParser(prog="python -m posterior_client.ask", description=__doc__)
    add_arguments(parser)
    if isinstance(sys.stdout, TextIOWrapper):  # a character that the terminal does not know is written as its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
