"""Number types of the wire: the ranges that strict clients and servers of the API hold to."""

from typing import Annotated

import attrs


@attrs.frozen
class IntRange:
    """Both ends included."""

    lowest: int
    highest: int


@attrs.frozen
class FloatRange:
    """Finite numbers of at most this magnitude."""

    largest: float


Int32 = Annotated[int, IntRange(-(2**31), 2**31 - 1)]
Uint32 = Annotated[int, IntRange(0, 2**32 - 1)]
Unsigned = Annotated[int, IntRange(0, 2**64 - 1)]
Float32 = Annotated[float, FloatRange(3.4028235e38)]
