"""The metrics of all replicas as one page for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping


def joined(pages: Mapping[str, str]) -> str:
    """The samples of all pages, each with the label `replica`, in Prometheus's text format.

    Args:
        pages: of each replica what its `/metrics` says.
    """
    about: dict[str, list[str]] = {}  # HELP and TYPE of each family
    samples: dict[str, list[str]] = {}  # a family's samples must follow each other
    for replica, page in pages.items():
        family, described = "", set(about)
        for line in filter(None, page.splitlines()):
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                if family not in described:
                    about.setdefault(family, []).append(line)
            else:
                samples.setdefault(family, []).append(_labelled(line, replica))
    families = (about.get(family, []) + lines for family, lines in samples.items())
    return "".join(f"{line}\n" for lines in families for line in lines)


def _labelled(sample: str, replica: str) -> str:
    """`name{a="b"} 1` with one more label, its first."""
    brace, blank = sample.find("{"), sample.find(" ")
    label = f'replica="{replica}"'
    if brace == -1 or blank < brace:
        return f"{sample[:blank]}{{{label}}}{sample[blank:]}"
    return f"{sample[: brace + 1]}{label},{sample[brace + 1 :]}"
