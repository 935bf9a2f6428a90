"""Which ranks go first where the server and clients compute on the same cores."""

import os
from contextlib import suppress
from pathlib import Path

from fslsage_rpc.comm.placement import Cores

NICE = 10
"""a tenth of the server's share of a core, while both want it"""
AUTOGROUP = Path("/proc/self/autogroup")


def gives_way(rank: int, cores: list[Cores]) -> bool:
    """Does this client rank run on cores that the server may run on too?

    Args:
        cores: by rank.
    """
    (servers_host, servers), (host, mine) = cores[0], cores[rank]
    return rank > 0 and host == servers_host and bool(mine & servers)


def give_way() -> None:
    """Lower the priority of this thread, and of its process's session, below the server's.

    Clients wait for what the server has yet to do, so a round has its longest chain there: when it went on no
    faster than they do, its last work (an alignment's last fit) would be done beside idle cores.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) < NICE:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    # Linux shares cores out between sessions first, and between the threads of each only then; torchrun and
    # the self-launching form give every rank a session. Not there inside of containers that are weighed
    # themselves: what is above is enough there.
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            AUTOGROUP.write_text(str(NICE))
