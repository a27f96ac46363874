"""From which confidence on a record proves that answers are wrong seldom enough."""

from __future__ import annotations

from posterior.calibration.risk import Risk, needed
from server.errors import Refused

PLACE = "uncertainty.max_risk"


def threshold(risk: Risk, allowed: float, about: str = "") -> float:
    """The least confidence that is answered for an error of at most `allowed`. Raises Refused where the rows of the
    record prove none; `about`: what its message begins with."""
    found = risk.threshold(allowed)
    if found is None:
        raise Refused(
            f"{about}the {len(risk.right)} rows of its calibration do not prove an error of at most {allowed:g} at any "
            f"confidence (that takes at least {needed(allowed)} rows, all of them right); calibrate with more rows, or "
            "allow more",
            PLACE,
        )
    return found
