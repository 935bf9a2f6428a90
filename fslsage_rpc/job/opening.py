"""Opens the world that a configuration asks for."""

from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.memory import one_heap
from fslsage_rpc.job.local_world import LocalWorld
from fslsage_rpc.job.world import World


def open_world(config: Config) -> World:
    """Start the configured kind of world, or join it; the real ones are imported only where asked for."""
    one_heap()
    if config.transport == "local":
        return LocalWorld(config)
    if config.clients.on_loss == "drop":
        from fslsage_rpc.job.elastic_world import ElasticWorld

        return ElasticWorld(config)
    from fslsage_rpc.job.rpc_world import RpcWorld

    return RpcWorld(config)
