"""What we believe about the weights: fit, store, sample, predict and evaluate posteriors. No HTTP, no vLLM.

    import posterior

    task = posterior.Task("choice", "{text}\\nSentiment:", (" negative", " positive"))
    fitted = posterior.fit("reviews.jsonl", task=task, method=posterior.Laplace(epochs=3), out="posteriors/reviews")
    fitted.predict(["The food was good, the service was slow."])[0].confidence

Names are imported when they are first used: torch takes seconds that a command's help need not wait for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from posterior.api import Answer, Posterior, fit, load
    from posterior.calibration.records import Record
    from posterior.data.task import Task
    from posterior.errors import PosteriorError
    from posterior.evaluation.calibrate import Calibration
    from posterior.evaluation.evaluate import Evaluation
    from posterior.evaluation.report import Report
    from posterior.laplace.gaussian import Laplace
    from posterior.particles.blob import Blob
    from posterior.particles.dropout import Dropout
    from posterior.particles.ensemble import Ensemble
    from posterior.particles.ivon import Ivon
    from posterior.particles.svgd import Svgd
    from posterior.particles.swag import Swag
    from posterior.particles.tfb import Tfb

_HOMES = {
    "Answer": "api",
    "Blob": "particles.blob",
    "Calibration": "evaluation.calibrate",
    "Dropout": "particles.dropout",
    "Ensemble": "particles.ensemble",
    "Evaluation": "evaluation.evaluate",
    "Ivon": "particles.ivon",
    "Laplace": "laplace.gaussian",
    "Posterior": "api",
    "PosteriorError": "errors",
    "Record": "calibration.records",
    "Report": "evaluation.report",
    "Svgd": "particles.svgd",
    "Swag": "particles.swag",
    "Task": "data.task",
    "Tfb": "particles.tfb",
    "fit": "api",
    "load": "api",
}

__all__ = [
    "Answer",
    "Blob",
    "Calibration",
    "Dropout",
    "Ensemble",
    "Evaluation",
    "Ivon",
    "Laplace",
    "Posterior",
    "PosteriorError",
    "Record",
    "Report",
    "Svgd",
    "Swag",
    "Task",
    "Tfb",
    "fit",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
