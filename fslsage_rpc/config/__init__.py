"""The configuration."""

from fslsage_rpc.config.schema import Bounds, Config

__all__ = ["Bounds", "Config"]
