"""The algorithms by the name that the configuration gives them."""

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.algorithms.cse_fsl import CseFsl
from fslsage_rpc.algorithms.fedavg import FedAvg
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.algorithms.splitfed import SplitFedV1, SplitFedV2

__all__ = ["ALGORITHMS", "Algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm for algorithm in (FslSage, SplitFedV1, SplitFedV2, CseFsl, FedAvg)
}
