"""The command `posterior`. Each verb imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from posterior.errors import PosteriorError

VERBS = {
    "fit": ("posterior.fit", "fit a posterior on LoRA weights to your data"),
    "import": ("posterior.imported", "make a posterior of PEFT adapters that were trained elsewhere"),
    "evaluate": ("posterior.evaluate", "accuracy and calibration of the MAP beside the posterior"),
    "calibrate": ("posterior.calibrate", "fit calibrated probabilities and prediction sets on held-out rows"),
    "inspect": ("posterior.inspect", "what a posterior folder holds, verified"),
    "serve": ("server.main", "answer OpenAI's API with posterior predictive distributions"),
    "ask": ("posterior_client.ask", "ask a running server from the terminal"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on stderr for a mistake the user can mend; 141 when nobody reads on."""
    # Read when torch is first imported. Threads that spin while they wait made a busy 2-core machine 30 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="posterior", description="Posterior distributions on LoRA weights: fit them, serve them."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for verb, (_, text) in VERBS.items():
        verbs.add_parser(verb, help=text, description=text, add_help=False)
    if not given or given[0] not in VERBS:
        parser.parse_args(given)  # prints help or the error, and exits
    module = importlib.import_module(VERBS[given[0]][0])
    verb_parser = argparse.ArgumentParser(prog=f"posterior {given[0]}", description=VERBS[given[0]][1])
    module.add_arguments(verb_parser)
    try:
        module.run(verb_parser.parse_args(given[1:]))
        sys.stdout.flush()
    except PosteriorError as error:
        print(f"posterior: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has enough of it, as in `posterior ask --json ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail again
        return 141
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
