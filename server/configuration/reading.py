"""`posterior serve`'s settings, from its flags, the environment and a TOML file.

A flag goes before the environment, and the environment before the file. A setting `max_model_len` is the flag
--max-model-len, the variable POSTERIOR_MAX_MODEL_LEN and the line `max_model_len = 4096`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from posterior.cli import options
from posterior.errors import PosteriorError, first_line
from posterior.settings import Form, SettingError, forms
from server.configuration.schema import SECRETS, ServeSettings

PREFIX, CONFIG = "POSTERIOR_", "POSTERIOR_CONFIG"
FORMS: Mapping[str, Form] = forms(ServeSettings)
OTHERS = frozenset({"CACHE", "CACHE_GIB", "ANY_VLLM", "TRACEBACK", "BASE_URL", "CONFIG"})  # variables, but no settings
# What Kubernetes sets in every container for a service named posterior, or posterior-anything.
KUBERNETES = re.compile(r"POSTERIOR(_\w+)?_(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_\w+)")
KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
EPILOG = (
    "Every option can also stand in the environment (POSTERIOR_MAX_MODEL_LEN=4096) and in the file of --config "
    "(max_model_len = 4096). An option goes before the environment, and the environment before the file. "
    "`posterior doctor` takes the same options and says whether this machine can serve with them."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `posterior serve`. What is not given is not in the result."""
    parser.epilog = EPILOG
    text = "TOML file of these options, such as `port = 8080` (default: $POSTERIOR_CONFIG, if it is set)"
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)
    options.add(parser, {"serve": ServeSettings})


def read(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServeSettings:
    """The settings that the options, the environment and the file ask for.

    Raises PosteriorError, one line that calls a setting what the user called it.
    """
    file = config(args, environment)
    found: dict[str, tuple[Any, str]] = {}  # value and name
    if file is not None:
        found |= {name: (value, f"{file}: {name}") for name, value in from_file(file).items()}
    for name, value in from_environment(environment).items():
        found[name] = value, f"{PREFIX}{name.upper()}"
    for name, value in options.given(args, {"serve": ServeSettings}).items():
        found[name] = tuple(value) if isinstance(value, list) else value, options.option(name)
    try:
        return ServeSettings(**{name: value for name, (value, _) in found.items()})
    except SettingError as error:
        named = error.named(lambda name: found[name][1] if name in found else options.option(name))
        raise PosteriorError(named) from error


def config(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file of settings, if one is named."""
    given: Path | None = args.config
    return given or (Path(environment[CONFIG]) if environment.get(CONFIG) else None)


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """What its variables set. An empty one counts as none. Raises PosteriorError for one of ours that is unknown."""
    values: dict[str, Any] = {}
    for variable, text in sorted(environment.items()):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in OTHERS or KUBERNETES.fullmatch(variable) or KUBERNETES_PORT.match(text):
            continue
        if name.lower() not in FORMS or name != name.upper():
            hint = _nearest(name.upper(), [*(known.upper() for known in FORMS), *OTHERS])
            known = f"did you mean {PREFIX}{hint}?" if hint else "`posterior serve --help` lists the settings"
            raise PosteriorError(f"{variable} in the environment is no setting of this server; {known}")
        if text:
            values[name.lower()] = _parsed(FORMS[name.lower()], text)
    return values


def from_file(path: Path) -> dict[str, Any]:
    """What the file sets. Paths in it are relative to its folder. Raises PosteriorError."""
    try:
        body = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise PosteriorError(f"cannot read {path}: {error.strerror}; name a TOML file with --config") from error
    except (ValueError, RecursionError) as error:
        raise PosteriorError(f"{path} is not TOML in UTF-8: {first_line(error)}") from error
    for name, value in body.items():
        if name not in FORMS:
            hint = _nearest(name.replace("-", "_").lower(), FORMS)
            known = f"did you mean {hint!r}?" if hint else "`posterior serve --help` lists the settings"
            raise PosteriorError(f"{path}: unknown setting {name!r}; {known}")
        if not isinstance(value, str | int | float | list):
            raise PosteriorError(f"{path}: {name} is no text, number, list, true or false; write it as in `port = 80`")
    return {name: _read(FORMS[name], value, path.parent) for name, value in body.items()}


def exposed(path: Path | None) -> str | None:
    """What to say of a file whose secrets other users of the machine can read, else None. Raises PosteriorError."""
    found = [] if path is None else [name for name in SECRETS if isinstance(from_file(path).get(name), str)]
    if path is None or not found or not path.stat().st_mode & 0o044:
        return None
    return f"other users of this machine can read {' and '.join(found)} in {path}; run `chmod 600 {path}`"


def _parsed(form: Form, text: str) -> Any:
    """A value of the environment. What it cannot be is left as it is: the settings' own check says so."""
    number = form.number()
    if number is not None:
        try:
            return number(text)
        except ValueError:
            return text
    if bool in form.kinds and text.lower() in WORDS:
        return WORDS[text.lower()]
    if tuple in form.kinds:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return Path(text).expanduser() if Path in form.kinds else text


def _read(form: Form, value: Any, folder: Path) -> Any:
    """A value of the file."""
    if isinstance(value, list):
        return tuple(value)
    return folder / Path(value).expanduser() if Path in form.kinds and isinstance(value, str) and value else value


def _nearest(name: str, known: Collection[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)
