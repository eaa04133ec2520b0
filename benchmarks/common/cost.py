"""What work takes on a GPU by arithmetic: launches, bytes and operations, as if nothing overlapped."""

from __future__ import annotations

import dataclasses

LAUNCH_SECONDS = 4e-6
#: Device → bytes and floating-point operations (bf16) a second.
DEVICES = {"H100": (3e12, 400e12), "4090": (1e12, 165e12)}


@dataclasses.dataclass
class Counts:
    """What was counted.

    Example:
        >>> one = Counts(1, 2.0, 3.0)
        >>> (one + one).times(2)
        Counts(launches=4, bytes=8.0, operations=12.0)
    """

    launches: int = 0
    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.launches + other.launches, self.bytes + other.bytes, self.operations + other.operations)

    def times(self, many: int) -> Counts:
        """So many of these."""
        return Counts(self.launches * many, self.bytes * many, self.operations * many)


def seconds(counts: Counts, device: str) -> float:
    """Predicted seconds.

    Example:
        >>> round(seconds(Counts(1000, 3e9, 4e11), "H100"), 6)
        0.006
    """
    bandwidth, speed = DEVICES[device]
    return counts.launches * LAUNCH_SECONDS + counts.bytes / bandwidth + counts.operations / speed
