"""The colours of tokens: they can be read, and told apart by the colour-blind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from posterior_client._writing import LEVELS
from rich.style import Style

STYLES = [Style.parse(each) for each in LEVELS]
BLACK, WHITE = (0.0,) * 3, (1.0,) * 3
# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", at
# severity 1, of linear RGB.
EYES = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def linear(level: int, ground: bool) -> tuple[float, ...]:
    """Linear RGB of a level's text or of its ground (IEC 61966-2-1)."""
    color = STYLES[level].bgcolor if ground else STYLES[level].color
    assert color is not None and color.triplet is not None
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color.triplet.normalized)


def luminance(rgb: Sequence[float]) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """WCAG 2's contrast, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: Sequence[float]) -> tuple[float, float, float]:
    """CIE L*a*b* under D65."""
    r, g, b = rgb
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, luminance(rgb), z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def seen(rgb: Sequence[float], eyes: str) -> list[float]:
    return [min(1.0, max(0.0, sum(a * b for a, b in zip(row, rgb, strict=True)))) for row in EYES[eyes]]


def distance(one: Sequence[float], other: Sequence[float], eyes: str) -> float:
    """CIE 1976's difference of colours: 2.3 is just noticeable."""
    pairs = zip(lab(seen(one, eyes)), lab(seen(other, eyes)), strict=True)
    return float(sum((a - b) ** 2 for a, b in pairs) ** 0.5)


def test_every_level_can_be_read_on_black_and_on_white() -> None:
    for level in (1, 2):  # coloured text on the terminal's own ground
        assert STYLES[level].bgcolor is None
        assert min(contrast(linear(level, False), ground) for ground in (BLACK, WHITE)) > 3.5
    for level in (3, 4):  # a block of its own
        assert contrast(linear(level, False), linear(level, True)) > 4.5


@pytest.mark.parametrize("eyes", EYES)
def test_the_colours_differ_by_more_than_ten_times_what_can_be_noticed(eyes: str) -> None:
    assert distance(linear(1, False), linear(2, False), eyes) > 23
    assert distance(linear(3, True), linear(4, True), eyes) > 23


def test_without_colours_the_levels_differ_too() -> None:
    marks = [(style.bold, style.italic, style.underline) for style in STYLES]
    assert all(one != other for one, other in itertools.combinations(marks, 2))
