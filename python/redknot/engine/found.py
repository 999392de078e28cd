"""A request's documents as they were found, and where they stand in its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from redknot.engine.segment_tiers import Outline
from redknot.recovery import Placement
from redknot.store import Segment

__all__ = ["Found", "LostPagesError", "place"]


@dataclass(frozen=True)
class Found:
    """A segment, where it came from for this request, and why.

    `source` is "cached" (it was in the page pool), "loaded" (from a tier below) or "computed".
    """

    segment: Segment
    source: Literal["cached", "loaded", "computed"]
    reason: str

    @property
    def computed(self) -> bool:
        """Whether something had to be computed for it."""
        return self.source == "computed"


class LostPagesError(Exception):
    """What a request needed of a document could not be read any more; the document was dropped."""


def place(prefix_end: int, segments: Sequence[Segment | Outline]) -> tuple[Placement, ...]:
    """Documents one behind the other behind the prefix; the first may be at home, so exact."""
    placements, begin = [], prefix_end
    for number, segment in enumerate(segments):
        end = begin + segment.num_tokens
        offset = begin - segment.first_position
        placements.append(Placement(begin, end, offset, exact=number == 0 and offset == 0))
        begin = end
    return tuple(placements)
