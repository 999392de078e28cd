"""What a session means, without pages: one dict of tokens per row, copied whenever it is forked.

Shares nothing with the library; read it to know what `redknot._memory` must do.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Head = tuple[int, int]  # (layer, KV head)


@dataclass(frozen=True)
class Token:
    content: int  # unique for each key and value ever written
    rotated_at: int  # the position that the key's rotation stands for


@dataclass
class Row:
    window: int  # -1: global
    sink: int
    tokens: dict[int, Token] = field(default_factory=dict)  # by position, all ever appended
    forgotten: set[int] = field(default_factory=set)  # positions that need not be held any more

    def sees(self, position: int, query: int) -> bool:
        """Whether a query looks at an earlier position: the definition of local and global."""
        return self.window < 0 or position < self.sink or position > query - self.window

    def needed(self, query: int) -> set[int]:
        """Positions before the query that it sees."""
        return {p for p in self.tokens if p < query and self.sees(p, query)}


@dataclass
class Segment:
    first_position: int
    contents: dict[Head, list[int]]


class Session:
    def __init__(self, windows: Sequence[Sequence[int]], sinks: Sequence[Sequence[int]]) -> None:
        self.length = 0
        self.rows: dict[Head, Row] = {
            (layer, head): Row(window, sinks[layer][head])
            for layer, row in enumerate(windows)
            for head, window in enumerate(row)
        }

    def fork(self) -> Session:
        return copy.deepcopy(self)

    def append_segment(self, segment: Segment) -> None:
        for key, row in self.rows.items():
            for i, content in enumerate(segment.contents[key]):
                row.tokens[self.length + i] = Token(content, segment.first_position + i)
        self.length += len(next(iter(segment.contents.values())))

    def append(self, num_tokens: int, new_content: Iterable[int]) -> None:
        contents = iter(new_content)
        for position in range(self.length, self.length + num_tokens):
            for row in self.rows.values():
                row.tokens[position] = Token(next(contents), position)
        self.length += num_tokens

    def refresh(
        self, heads: Iterable[Head], positions: Iterable[int], new_content: Iterable[int]
    ) -> None:
        """Replace keys and values; a refreshed key keeps the rotation of the one it replaces."""
        contents = iter(new_content)
        for key, position in itertools.product(heads, positions):
            tokens = self.rows[key].tokens
            tokens[position] = Token(next(contents), tokens[position].rotated_at)

    def expire(self) -> None:
        for row in self.rows.values():
            row.forgotten |= {p for p in row.tokens if not row.sees(p, self.length)}

    def change_rules(
        self, windows: Sequence[Sequence[int]], sinks: Sequence[Sequence[int]]
    ) -> None:
        for (layer, head), row in self.rows.items():
            row.window, row.sink = windows[layer][head], sinks[layer][head]
        self.expire()

    def truncate(self, length: int) -> None:
        for row in self.rows.values():
            for position in range(length, self.length):
                del row.tokens[position]
            row.forgotten = {p for p in row.forgotten if p < length and not row.sees(p, length)}
        self.length = length
