"""Numbers that arithmetic can be done with, as types: decoding refuses all others."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_COUNT = 1 << 53
"""No byte, page, token or epoch has a higher number; JavaScript counts no further either."""

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Size = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Real = Annotated[float, Meta(ge=-1e18, le=1e18)]
"""Neither infinite nor NaN."""

InstanceNumber = Annotated[int, Meta(ge=0, lt=1 << 31)]
