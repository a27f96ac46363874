"""`posterior ask`: one question at the terminal, answered with its distribution as bars."""

import argparse
import json
import sys
from dataclasses import asdict

from posterior_client._client import PosteriorClient
from posterior_client._exceptions import PosteriorClientError, UnreachableError, translated
from posterior_client._types import Answer, Prediction

WIDTH = 32  # cells of a bar from probability 0 to 1
UNICODE = "█▓░·"  # below the interval; interval up to the mean; interval above the mean; beyond
ASCII = "#=-."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments on `parser`."""
    parser.add_argument("text", type=str, help="what to ask about")
    parser.add_argument("--model", help="a posterior's name (default: the first one served)")
    parser.add_argument("--field", default="text", help="the task's field the text goes to (default: %(default)s)")
    parser.add_argument("--base-url", help="default: $POSTERIOR_BASE_URL, else http://127.0.0.1:8000/v1")
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")


def run(args: argparse.Namespace) -> None:
    """Ask the server and print. The API key, if any, is $POSTERIOR_API_KEY. Exits 2 with one line on an error."""
    try:
        with PosteriorClient(args.base_url) as client:
            model = args.model or _first_posterior(client)
            response = client.predictive(model=model, inputs=[{args.field: args.text}])
    except UnreachableError as error:
        sys.exit(_complain(f"{error}: start one with `posterior serve`, or `make serve` in the project's folder"))
    except PosteriorClientError as error:
        sys.exit(_complain(str(error)))
    if args.json:
        print(json.dumps(asdict(response)))
        return
    encoding = sys.stdout.encoding or "ascii"
    glyphs = UNICODE if encoding.lower().replace("-", "") == "utf8" else ASCII
    print(render(response.data[0], glyphs).encode(encoding, "backslashreplace").decode(encoding))


def render(prediction: Prediction, glyphs: str = UNICODE) -> str:
    """The answer, a bar with its interval for every candidate, and where the doubt comes from, as lines of text."""
    width = max(len(_label(one.answer)) for one in prediction.answers)
    ranked = sorted(prediction.answers, key=lambda one: -one.probability)
    entropy = prediction.entropy
    return "\n".join(
        [
            f"{_label(prediction.answer)}  (confidence {prediction.confidence:.2f}, {_calibration(prediction)})",
            "",
            *(_line(one, width, glyphs) for one in ranked),
            "",
            f"entropy {entropy.total:.3f} nats = {entropy.aleatoric:.3f} aleatoric + {entropy.epistemic:.3f} epistemic"
            f" ({entropy.epistemic_share:.0%} epistemic)",
            f"{prediction.posterior or 'base model'}, {prediction.predictive} predictive",
        ]
    )


def bar(answer: Answer, glyphs: str) -> str:
    """WIDTH cells: solid below the interval, two shades inside it that meet at the mean, dots beyond.

    >>> bar(Answer(answer="a", probability=.5, variance=.01, std=.1, interval=(.25, .75)), "#=-.")
    '########========--------........'
    """
    low, high = answer.interval
    edges = [round(WIDTH * value) for value in (low, answer.probability, high, 1.0)]
    cells, start = "", 0
    for glyph, end in zip(glyphs, edges, strict=True):
        cells += glyph * (end - start)
        start = max(start, end)
    return cells


def _line(answer: Answer, width: int, glyphs: str) -> str:
    low, high = answer.interval
    probability = f"{answer.probability:.3f}"
    return f"  {_label(answer.answer):<{width}}  {probability}  {bar(answer, glyphs)}  [{low:.3f}, {high:.3f}]"


def _label(answer: str) -> str:
    # An answer starts with the space that joins it to the prompt; control characters could drive the terminal.
    return "".join(c if c.isprintable() else "?" for c in answer.strip()) or repr(answer)


def _calibration(prediction: Prediction) -> str:
    return "calibrated" if prediction.calibrated else "not calibrated"


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
