"""The first process of a rank's PID namespace: starts the rank and takes it along when the launcher ends.

    python init.py COMMAND ...

Each line of its standard input is the number of a signal for the rank. At its end, which is the launcher's
end too, this process exits, and with it the kernel ends everything in the namespace. Its status is the
rank's, or 128 and the number of the signal that ended the rank.
"""

import contextlib
import os
import subprocess
import sys
import threading


def main(command: list[str]) -> None:
    """Start the command and wait for it."""
    # A session of its own, as every launcher gives a rank: by it, too, the clients give way to the server.
    rank = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_obey, args=(rank,), daemon=True).start()
    status = rank.wait()
    os._exit(status if status >= 0 else 128 - status)


def _obey(rank: subprocess.Popen[bytes]) -> None:
    for line in sys.stdin:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(int(line))
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
