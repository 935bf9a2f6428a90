"""`model.memory_format: auto` without timing: what tests compute must not depend on it."""

from collections.abc import Iterable

from fslsage_rpc.training import order_choice


def keep_usual_order() -> None:
    """From here on this process has all images in torch's usual order, unless another is asked for."""
    order_choice.choose = usual_orders


def usual_orders(passes: Iterable[str]) -> dict[str, str]:
    """In the place of `order_choice.choose`."""
    return dict.fromkeys(passes, order_choice.USUAL)
