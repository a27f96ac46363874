"""What the user is told: the one exception of this package, and warnings."""

import sys

LONGEST = 1500  # characters of a message


class PosteriorError(Exception):
    """One clear line for the user: what was wrong, what was expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


def shortened(message: str) -> str:
    """A message without its middle where it is too long: it quotes what somebody wrote, which may have any length. What
    is wrong stands at its start, and what to do at its end."""
    if len(message) <= LONGEST:
        return message
    return f"{message[: 2 * LONGEST // 3]} ... {message[-LONGEST // 3 :]}"


def first_line(said: BaseException | str, otherwise: str = "") -> str:
    """The first line of an error or a text; where it says nothing, `otherwise`, or the error's type."""
    text = str(said).strip()
    return text.splitlines()[0] if text else otherwise or type(said).__name__


def warn(*lines: str) -> None:
    """Print what the user should look at."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
