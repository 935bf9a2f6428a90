"""The kinds of error that the program tells its user about in one line."""

FIRST_WORD_SECONDS = 15.0
"""how long other ranks leave it to the first to report what all may have found: its end then ends them"""


class InputError(ValueError):
    """The user's input is wrong: a key, a value or a file. Ends the program with exit status 2.

    The message is one line that names the key or file, what it was and what it may be; whatever in it would
    break the line (a key or path can hold anything) is escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class HostError(InputError):
    """Input that is wrong on this host, while it may be right on another: a device, an interface, a file."""


class RankRefused(InputError):
    """A rank that joins a run under way trains on something else; it ends, and the others go on."""


class ConnectionLost(RuntimeError):
    """A call or collective failed because another rank went away; that rank may have said why."""


class TooFewClients(RuntimeError):
    """With `clients.on_loss: drop`: so many clients were lost that the run gives up."""


class Diverged(RuntimeError):
    """A loss or a weight is not finite, and `stop.diverged` has ended the run. Exit status 1.

    Args:
        number: of the first round in which it was so, from 1.
    """

    def __init__(self, number: int):
        super().__init__(f"diverged in round {number}: a loss or a weight is not finite")


class RunOver(Exception):
    """Rank 0 has ended the run, at its end, while this rank was meeting the others anew."""
