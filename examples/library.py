"""Fit, evaluate, calibrate and ask a posterior with the Python API alone: no command, no server, no vLLM.

python examples/library.py [--base FOLDER] [--epochs N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import posterior

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit, evaluate, calibrate and ask a posterior in Python.")
    parser.add_argument("--base", help="base model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the 64 rows (default %(default)s)")
    parser.add_argument("--out", help="the folder to write (default: a temporary one)")
    options = parser.parse_args()

    task = posterior.Task("choice", "{text}\nSentiment:", (" negative", " positive"))
    method = posterior.Laplace(epochs=options.epochs, rank=4)
    fitted = posterior.fit(HERE / "reviews.csv", task=task, method=method, base=options.base, out=options.out)
    print(fitted)

    for name, scores in fitted.evaluate(HERE / "held-out.csv").table.items():
        print(f"{name}: accuracy {scores['accuracy']}, negative log-likelihood {scores['nll']}")

    (record,) = fitted.calibrate(HERE / "held-out.csv")
    print(f"{record.n} rows chose {record.key.predictive}, calibrated by {record.calibrator.method}")

    for answer in fitted.predict(["The soup was cold.", "We were there on a Tuesday."]):
        doubt = f"{answer.predictive.total:.2f} nats of doubt, {answer.predictive.epistemic:.2f} of it the model's own"
        print(f"{answer.answer.strip()}: {answer.confidence:.2f} ({doubt})")

    print(f"{len(fitted.sample(4))} adapters drawn from the posterior")


if __name__ == "__main__":
    main()
