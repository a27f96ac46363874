"""Options of the command, made of the fields of settings classes: each is written once (posterior/settings.py)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from posterior.errors import PosteriorError
from posterior.settings import Form, SettingError, forms

EMPTY = "it is empty; give a value, or leave it out"


def add(parser: argparse.ArgumentParser, classes: Mapping[str, type]) -> None:
    """An option for every field of the settings classes. What is not given is not in the result."""
    groups: dict[str, Any] = {}
    for name, about in _all_fields(classes.values()).items():
        heading = about.metadata["group"]
        if heading and heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        target = groups.get(heading, parser)
        form = _merged(name, classes.values())
        target.add_argument(_option(name, about), dest=name, default=argparse.SUPPRESS, **_described(form, about))


def given(args: argparse.Namespace, classes: Mapping[str, type]) -> dict[str, Any]:
    """The fields' values that were given."""
    return {name: value for name, value in vars(args).items() if name in _all_fields(classes.values())}


def build(kind: str, classes: Mapping[str, type], values: Mapping[str, Any], chooser: str = "--method") -> Any:
    """The settings of this kind, which the option `chooser` names, with the values that were given. No option that was
    given is ignored.

    Raises PosteriorError.
    """
    cls = classes[kind]
    own = {each.name: each for each in fields(cls)}
    missing = [name for name, each in own.items() if each.default is MISSING and name not in values]
    if missing:
        raise PosteriorError(f"{chooser} {kind} needs one more option; give {option(missing[0])}")
    for name, value in values.items():
        users = [other for other, its in classes.items() if name in {each.name for each in fields(its)}]
        if name not in own:
            raise PosteriorError(f"{option(name)} belongs to {chooser} {', '.join(users)}; {kind} does not use it")
        words = forms(cls)[name].words
        if isinstance(value, str) and forms(cls)[name].number() and value not in words:
            knowing = [other for other in users if value in forms(classes[other])[name].words]
            raise PosteriorError(
                f"{option(name)} {value} belongs to {chooser} {', '.join(knowing)}; {kind} needs a number"
            )
    settings = cls(**values)
    for name, reason in settings.ignored().items():
        if name in values:
            raise SettingError("{" + name + "} " + reason)
    return settings


def option(name: str) -> str:
    """What the command calls a setting."""
    return "--" + {"variational": "no-variational", "repulsion": "no-repulsion"}.get(name, name.replace("_", "-"))


def _option(name: str, about: Field[Any]) -> str:
    return f"--no-{name}" if about.default is True else option(name)


def _all_fields(classes: Any) -> dict[str, Field[Any]]:
    """By name; of a name that several have, the first one's."""
    found: dict[str, Field[Any]] = {}
    for cls in classes:
        for each in fields(cls):
            found.setdefault(each.name, each)
    return found


def _merged(name: str, classes: Any) -> Form:
    """What any of the classes takes."""
    each = [forms(cls)[name] for cls in classes if name in forms(cls)]
    return Form(
        frozenset().union(*(form.kinds for form in each)),
        tuple(dict.fromkeys(word for form in each for word in form.words)),
    )


def _described(form: Form, about: Field[Any]) -> dict[str, Any]:
    """argparse's keywords."""
    help, metavar = about.metadata["help"].replace("%", "%%"), about.metadata["metavar"]
    if form.kinds >= {bool, str}:
        return {"nargs": "?", "const": True, "help": help, "metavar": metavar}
    if bool in form.kinds:
        return {"action": "store_const", "const": not about.default, "help": help}
    if about.default not in (MISSING, None) and "(default" not in help:
        shown = " ".join(about.default) if isinstance(about.default, tuple) else about.default
        help = f"{help} (default {shown})"
    number = form.number()
    if number is not None:
        return {"type": _number(number, form.words), "help": help, "metavar": metavar or _metavar(number, form.words)}
    if form.words:
        return {"choices": form.words, "help": help}
    if tuple in form.kinds:
        return {"nargs": "+", "action": "extend", "help": help, "metavar": metavar}
    return {"help": help, "metavar": metavar, **({"type": Path} if Path in form.kinds else {})}


def _metavar(number: type, words: Sequence[str]) -> str:
    return "|".join([*words, "N" if number is int else "NUMBER"])


def _number(number: type, words: Sequence[str]) -> Callable[[str], Any]:
    """A reader of numbers, and of words where there are any."""

    def read(text: str) -> Any:
        if text in words:
            return text
        if not text:
            raise argparse.ArgumentTypeError(EMPTY)
        try:
            return number(text)
        except ValueError:
            kind = "a whole number" if number is int else "a number"
            choice = f"neither {', '.join(map(repr, words))} nor {kind}" if words else f"not {kind}"
            raise argparse.ArgumentTypeError(f"{text!r} is {choice}") from None

    return read
