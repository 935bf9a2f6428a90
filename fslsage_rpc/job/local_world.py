"""A job that is one process, server and client rank at once."""

from collections.abc import Callable
from typing import Any, NoReturn

from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.placement import open_device
from fslsage_rpc.job.world import World
from fslsage_rpc.transport.local import LocalTransport


class LocalWorld(World):
    """The one rank. Its server works at once, on the thread that asks."""

    works_beside = False
    homes, home = 1, 0

    def __init__(self, config: Config):
        self.device = open_device(config, 0)
        self.transport = LocalTransport(self.device)

    @staticmethod  # so that a server, which is given this, does not hold the world that serves it
    def start(kind: str, number: int, work: Callable[[], None]) -> None:
        """Do it."""
        work()

    def gather_beside(self, name: str, value: Any) -> list[Any]:
        return [value]

    def fail(self, error: BaseException) -> NoReturn:
        raise error

    def close(self) -> None:
        self.transport.close()
