"""The rule that turns the log-probabilities of a candidate's tokens into its score.

p(candidate | prompt) is the softmax of the scores over the candidates. The fit, the linearised predictive and vLLM's
path apply the same object, their task's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from posterior.errors import PosteriorError

Tokens = Literal["mean", "sum"]


@dataclass(frozen=True)
class Scoring:
    """How candidates are scored.

    tokens: the score is the mean of a candidate's token log-probabilities or their sum, log p(candidate | prompt). Of
    one token both are the same.
    scale: what scores are multiplied by before the softmax (posterior/laplace/scale.py).

    Raises PosteriorError for another word, or a scale that is not positive.
    """

    tokens: Tokens = "mean"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens not in get_args(Tokens):
            raise PosteriorError(f"scores {self.tokens!r} are unknown; use 'mean' or 'sum'")
        if not (isinstance(self.scale, int | float) and math.isfinite(self.scale) and self.scale > 0):
            raise PosteriorError(f"the scale of scores is {self.scale!r}; it must be a positive number")

    def scores(self, log_p: Tensor, lengths: Tensor | int) -> Tensor:
        """Scores from log p(candidate | prompt), up to a constant of the prompt, and how many tokens each candidate
        has; the shapes broadcast."""
        return self.scale * (log_p / lengths if self.tokens == "mean" else log_p)
