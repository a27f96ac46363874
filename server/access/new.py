"""`posterior key`: a new key, and its lines for the file of keys."""

from __future__ import annotations

import argparse
import secrets
import sys

from server.access.keys import check_name, digest

BYTES = 32  # of randomness
PREFIX = "posterior-"  # so that whoever finds it, a person or a scanner of leaks, knows what it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `posterior key`."""
    parser.add_argument("name", help="who holds it: up to 64 letters, digits, '_' and '-'; metrics count by this name")


def run(args: argparse.Namespace) -> None:
    """Print the lines for the file, and on stderr the key, which is written nowhere. Raises PosteriorError for a name
    that a key cannot have."""
    check_name(args.name)
    key = PREFIX + secrets.token_urlsafe(BYTES)
    print(f'[keys.{args.name}]\nsha256 = "{digest(key.encode()).hex()}"', flush=True)
    print(f"posterior: the key of {args.name}, which is shown only here: {key}", file=sys.stderr)
