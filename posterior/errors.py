"""The one exception of this package."""

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
