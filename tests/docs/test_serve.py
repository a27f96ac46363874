"""docs/serve.md has a row for every setting, with its default and what it means."""

from __future__ import annotations

from dataclasses import fields

from posterior.cli.options import option
from server.configuration.schema import ServeSettings
from tests.docs.blocks import ROOT


def table() -> str:
    """The tables of the page, made from the settings."""
    lines = []
    for group in dict.fromkeys(each.metadata["group"] for each in fields(ServeSettings)):
        lines += [f"| {group} | Default | Meaning |", "|---|---|---|"]
        for each in fields(ServeSettings):
            if each.metadata["group"] == group:
                said, _, given = each.metadata["help"].partition(" (default: ")
                plain = "off" if each.default is False else "none" if each.default is None else f"`{each.default}`"
                default = given.removesuffix(")") or plain
                lines.append(f"| `{option(each.name)}` | {default} | {said} |")
        lines.append("")
    return "\n".join(lines)


def test_the_tables_are_the_settings() -> None:
    text = (ROOT / "docs" / "serve.md").read_text()
    assert table() in text, f"copy this into docs/serve.md:\n\n{table()}"
