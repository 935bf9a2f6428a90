"""Units of bytes."""

MIB, GIB, TIB = 2**20, 2**30, 2**40
