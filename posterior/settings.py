"""Settings: frozen dataclasses that check themselves. Options of the command are made of their fields (cli/options.py).

    @dataclass(frozen=True, kw_only=True)
    class Adapter(Settings):
        rank: int = setting(8, "rank r of A and B", Range(1, 512))

A field's type says what it takes: a number, one of some words (Literal), either, a flag (bool), texts
(tuple[str, ...]), a path, or None, where it may be left open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from posterior.errors import PosteriorError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `above`, not `low` itself. Neither NaN nor infinity is in any."""

    low: float
    high: float = sys.float_info.max
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:.10g}"
        return low if self.high == sys.float_info.max else f"{low} and at most {self.high:.10g}"


POSITIVE = Range(0, above=True)


class SettingError(PosteriorError):
    """A setting has a value that it cannot have. `{names}` in the template are settings, or among the `values`."""

    def __init__(self, template: str, **values: object) -> None:
        self.template, self.values = template, values
        super().__init__(self.named(str))

    def named(self, name: Callable[[str], str]) -> str:
        """The message, with each setting called what `name` makes of it."""
        return self.template.format_map(_Names(name, self.values))


class _Names(dict[str, object]):
    def __init__(self, name: Callable[[str], str], values: Mapping[str, object]) -> None:
        super().__init__(values)
        self._name = name

    def __missing__(self, key: str) -> str:
        return self._name(key)


def setting(default: Any, help: str, allowed: Range | None = None, group: str = "", metavar: str | None = None) -> Any:
    """A field of a settings class: its default (MISSING: it must be given), what it means, the numbers it may be, and
    for the command's help the heading of its option and what stands there for its value."""
    return field(default=default, metadata={"help": help, "allowed": allowed, "group": group, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that check themselves. Raises SettingError for a value that a field cannot have, or that would be
    ignored."""

    def __post_init__(self) -> None:
        check(self)
        ignored = self.ignored()
        for each in fields(self):
            if each.name in ignored and each.default is not MISSING and getattr(self, each.name) != each.default:
                raise SettingError("{" + each.name + "} " + ignored[each.name])

    def ignored(self) -> Mapping[str, str]:
        """Fields that the others leave without effect, and why; "{name}" stands for a setting."""
        return {}


@dataclass(frozen=True)
class Form:
    """What a field takes: kinds of values, and words."""

    kinds: frozenset[type]
    words: tuple[str, ...]

    def number(self) -> type | None:
        return next((kind for kind in (float, int) if kind in self.kinds), None)


@cache
def forms(settings: Any) -> dict[str, Form]:
    """Every field's."""
    hints = get_type_hints(settings)
    return {each.name: _form(hints[each.name]) for each in fields(settings)}


def _form(hint: Any) -> Form:
    parts = list(_parts(hint))
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    return Form(frozenset(get_origin(part) or part for part in parts if get_origin(part) is not Literal), words)


def _parts(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def check(settings: Any) -> None:
    """Raises SettingError for a field whose value is of another type, or out of range."""
    found = forms(settings.__class__)
    for each in fields(settings):
        value, form = getattr(settings, each.name), found[each.name]
        if not _fits(value, form, each):
            raise SettingError("{" + each.name + "} is {value}; it must be {must}", value=value, must=_must(form, each))


def _fits(value: Any, form: Form, about: Field[Any]) -> bool:
    if value is None:
        return NoneType in form.kinds
    if isinstance(value, bool):
        return bool in form.kinds
    if isinstance(value, int | float):
        kind, allowed = form.number(), about.metadata["allowed"]
        return kind is not None and isinstance(value, int | kind) and (allowed is None or value in allowed)
    if isinstance(value, str) and form.words:
        return value in form.words
    if isinstance(value, str | os.PathLike):
        return bool(form.kinds & {str, Path}) and str(value) != ""
    return tuple in form.kinds and bool(value) and all(isinstance(one, str) and one for one in value)


def _must(form: Form, about: Field[Any]) -> str:
    """What a value must be, in words."""
    number = form.number()
    kinds = {bool: "true or false", Path: "a path", str: "a text", tuple: "a list of texts", NoneType: "None"}
    said = [repr(word) for word in form.words]
    said += [f"{about.metadata['allowed'] or 'a number'}"] if number else []
    said += [name for kind, name in kinds.items() if kind in form.kinds]
    return " or ".join(said)
