"""Draws docs/figures/answers.svg: what a running server says of an ordinary and of an ambiguous sentence.

make serve                                        # in another terminal
.venv/bin/python docs/figures/answers.py          # asks http://127.0.0.1:8000/v1, or $POSTERIOR_BASE_URL
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from posterior_client import PosteriorClient

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402  # the backend is chosen first

SENTENCES = ("Great soup and friendly staff.", "I ate there once.")  # ordinary, ambiguous
OUT = Path(__file__).with_suffix(".svg")


def main() -> None:
    with PosteriorClient() as client:
        records = client.predictive(model="sentiment", inputs=[{"text": text} for text in SENTENCES]).data
    matplotlib.rcParams.update({"svg.hashsalt": "posterior", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 1.9), sharey=True, layout="constrained")
    for axis, text, record in zip(axes, SENTENCES, records, strict=True):
        answers = sorted(record.answers, key=lambda each: each.answer)
        values = [each.probability for each in answers]
        low = [each.probability - each.interval[0] for each in answers]
        high = [each.interval[1] - each.probability for each in answers]
        names = [each.answer.strip() for each in answers]
        axis.barh(names, values, height=0.5, color="#7aa6c2")
        axis.errorbar(values, names, xerr=[low, high], fmt="none", ecolor="#1b3a4b", capsize=4, linewidth=1.5)
        axis.set_xlim(0, 1.02)
        axis.set_title(f'"{text}"', fontsize=9)
        entropy = record.entropy
        axis.set_xlabel(f"aleatoric {entropy.aleatoric:.2f} nats, epistemic {entropy.epistemic:.2f} nats", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT, metadata={"Date": None})
    OUT.write_text("\n".join(line.rstrip() for line in OUT.read_text().splitlines()) + "\n")
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
