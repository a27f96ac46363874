"""Two texts mean the same if each entails the other, as answers to the question (Kuhn et al. 2023, arXiv 2302.09664;
Farquhar et al. 2024, Nature 630, who put the question before both).

The model is any sequence classifier of which one class is entailment. A text entails another if that class is the most
probable one of premise and hypothesis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from posterior.errors import PosteriorError
from posterior.meaning import reader

NAME = "entail"  # how the class is called: "entailment", "ENTAILMENT"; "not_entailment" is another one


class Nli:
    """A Comparison by natural language inference."""

    def __init__(self, folder: Path) -> None:
        """Raises PosteriorError for a folder that holds no such classifier."""
        from transformers import AutoModelForSequenceClassification

        self._reader = reader.load(folder, AutoModelForSequenceClassification)
        self._entailment = _entailment(folder, self._reader.model.config.id2label)

    def __call__(self, question: str, text: str, others: Sequence[str]) -> list[bool]:
        """As Comparison. The other direction is asked only where the first one holds."""
        one, many = _answer(question, text), [_answer(question, other) for other in others]
        forth = self.entails([one] * len(many), many)
        those = [number for number, holds in enumerate(forth) if holds]
        back = self.entails([many[number] for number in those], [one] * len(those))
        both = {number for number, holds in zip(those, back, strict=True) if holds}
        return [number in both for number in range(len(many))]

    def entails(self, premises: Sequence[str], hypotheses: Sequence[str]) -> list[bool]:
        """Whether each premise entails its hypothesis. Raises PosteriorError for what the model cannot read whole."""
        classes = [output.logits.argmax(-1) for _, output in self._reader.read(premises, hypotheses)]
        return [] if not classes else (torch.cat(classes) == self._entailment).tolist()


def _answer(question: str, text: str) -> str:
    return f"{question} {text}" if question else text


def _entailment(folder: Path, labels: Mapping[int, str]) -> int:
    """The number of the class that is entailment. Raises PosteriorError where there is not exactly one."""
    found = [int(number) for number, label in labels.items() if str(label).casefold().startswith(NAME)]
    if len(found) != 1:
        raise PosteriorError(
            f"the classifier in {folder} has the classes {sorted(map(str, labels.values()))}; one must be called "
            "'entailment': name a folder of a model for natural language inference"
        )
    return found[0]
