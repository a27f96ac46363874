"""What `posterior calibrate --task text` may be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posterior.evaluation.calibrate import PARTICLES
from posterior.meaning import THRESHOLD
from posterior.models import devices
from posterior.models.devices import Dtype
from posterior.settings import Range, SettingError, Settings, setting
from server.services.options import MAX_SAMPLES, MeaningName

Grading = Literal["match", "f1", "judge"]


@dataclass(frozen=True, kw_only=True)
class TextCalibration(Settings):
    """How answers are written, sampled and graded."""

    predictive: Literal["mixture", "map"] = setting("mixture", "what writes the text: the posterior, or theta* alone")
    particles: int | None = setting(
        None,
        f"of the mixture; another number is another calibration (default: {PARTICLES}, or all in the folder)",
        Range(1, 1000),
    )
    samples: int = setting(
        8,
        "text: drawn for each prompt, so that there is a record with their meanings too; requests use it if they ask "
        "for as many; 0: only the record without samples",
        Range(0, MAX_SAMPLES),
    )
    meaning: MeaningName = setting("exact", "text: what tells the meanings of samples apart")
    meaning_embedding: Path | None = setting(None, "text: as for `posterior serve`")
    meaning_threshold: float = setting(THRESHOLD, "text: as for `posterior serve`", Range(-1, 1))
    meaning_nli: Path | None = setting(None, "text: as for `posterior serve`")
    grading: Grading = setting(
        "match",
        "text: what makes an answer right. match: equal to an accepted one up to case, punctuation, articles and white "
        "space; f1: at least half of its words in common with one; judge: the base model says that they mean the same",
    )
    max_tokens: int = setting(32, "text: of an answer, at most", Range(1, 2**15))
    stop: tuple[str, ...] | None = setting(None, "text: an answer ends before any of these texts")
    seed: int = setting(0, "text: of the samples", Range(0, 2**31))
    dtype: Dtype | None = setting(None, "of vLLM (default: the base's own, as `posterior serve` has it)")
    device: str | None = setting(None, devices.HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples == 1:
            raise SettingError("{samples} is 1; give at least 2, or 0 for none")
        if self.device not in (None, "cpu", "cuda"):
            raise SettingError("{device} is {value}; text is written on cpu or cuda", value=self.device)
        devices.check(self.device)
        model = f"meaning_{self.meaning}"
        if self.meaning in ("embedding", "nli") and getattr(self, model) is None:
            raise SettingError("{meaning} is {value}; give its model's folder, {" + model + "}", value=self.meaning)

    def ignored(self) -> dict[str, str]:
        if self.predictive == "map":
            return {"particles": "belongs to the mixture; {predictive} map has none"}
        return {}
