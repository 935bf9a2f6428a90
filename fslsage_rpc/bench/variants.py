"""The variants of a benchmark: one configuration each, all for the same processes."""

from fslsage_rpc.config.loading import FOLDER_NAME, from_tree, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError

SHARED = ("name", "ranks", "transport", "device", "tf32", "output", "resume", "trace", "stop", "bench")
SHARED_COMM = ("averaging", "interface", "transports", "channels", "device_maps", "timeout_seconds")
"""what belongs to the processes, not to a variant"""


def variant_configs(config: Config) -> dict[str, Config]:
    """The configuration of every variant, by name.

    Raises:
        InputError: there is none, the reference is not among them, or an override is not allowed.
    """
    keys = config.bench
    if not keys.variants:
        raise InputError(
            "bench.variants: got {}, expected variants, as {fsl_sage: [algorithm.name=fsl_sage]}"
        )
    if keys.reference not in keys.variants:
        known = ", ".join(keys.variants)
        raise InputError(f"bench.reference: got {keys.reference!r}, expected one of the variants {known}")
    return {name: _variant(config, name, overrides) for name, overrides in keys.variants.items()}


def _variant(config: Config, name: str, overrides: list[str]) -> Config:
    if not FOLDER_NAME.fullmatch(name):
        raise InputError(f"bench.variants: got {name!r}, expected names of letters, digits, '.', '_' and '-'")
    for override in overrides:
        section, _, rest = override.partition("=")[0].partition(".")
        if section in SHARED or (section == "comm" and rest in (*SHARED_COMM, "")):
            raise InputError(
                f"bench.variants.{name}: got {override}, expected keys that processes do not share"
            )
    try:
        return from_tree({**to_tree(config), "trace": False, "stop": {"diverged": False}}, overrides)
    except InputError as error:
        raise type(error)(f"bench.variants.{name}: {error}") from None
