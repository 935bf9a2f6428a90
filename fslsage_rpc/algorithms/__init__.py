"""The algorithms by the name that the configuration gives them."""

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.algorithms.cse_fsl import CseFsl
from fslsage_rpc.algorithms.fedavg import FedAvg
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.algorithms.splitfed import SplitFedV1, SplitFedV2
from fslsage_rpc.errors import InputError
from fslsage_rpc.own import import_own, is_own

__all__ = ["ALGORITHMS", "Algorithm", "find"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm for algorithm in (FslSage, SplitFedV1, SplitFedV2, CseFsl, FedAvg)
}


def find(name: str) -> type[Algorithm]:
    """The algorithm of that name, or the user's own class.

    Raises:
        InputError: there is none.
    """
    if not is_own(name):
        return ALGORITHMS[name]
    expected = "a subclass of fslsage_rpc.algorithms.Algorithm"
    found = import_own("algorithm.name", name, expected)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise InputError(f"algorithm.name: got {name!r}, expected {expected}")
    return found
