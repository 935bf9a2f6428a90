"""Units of bytes."""

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40


def unit_of(size: float) -> tuple[int, str]:
    """The largest unit of which a size in bytes has at least ten, else MiB, and its name."""
    units = ((TIB, "TiB"), (GIB, "GiB"))
    return next((unit for unit in units if size >= 10 * unit[0]), (MIB, "MiB"))
