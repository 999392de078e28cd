"""A stored segment's manifest: what it is, where its pages lie, what each must hash to.

    magic  "RKSG" | format version u16 | header length u32 | header (JSON, UTF-8)
    checksums u64 [objects' pages in storage order, then pages of the hidden states]
    checksum of all that, u64

Little endian; checksums are XXH3-64, a page's seeded with its number, so that pages cannot be
mistaken for each other. The manifest is written after everything it names: it is the commit.
"""

from __future__ import annotations

import base64
import itertools
import json
import secrets
import struct
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redknot.errors import StoreError
from redknot.store.layout import Regions, SegmentLayout, SegmentShape

__all__ = ["FORMAT_VERSION", "DamagedError", "Manifest", "new_write_id", "seal"]

FORMAT_VERSION = 1
_MAGIC = b"RKSG"
_FIXED = struct.Struct("<4sHI")


class DamagedError(Exception):
    """Stored bytes that are not what was written."""


def checksum(data: Any, seed: int = 0) -> int:
    """XXH3-64 of some bytes."""
    try:
        import xxhash
    except ImportError:
        raise StoreError(
            "a store on disk or in Redis needs the package xxhash: pip install 'redknot[lmdb]' "
            "(or [redis])"
        ) from None
    return int(xxhash.xxh3_64_intdigest(data, seed))


def hash_pages(
    data: memoryview, begin: NDArray[np.int64], sizes: NDArray[np.int64], seeds: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Checksums of pages that lie at `begin` in a buffer, each seeded with its page number."""
    spans = zip(begin.tolist(), sizes.tolist(), seeds.tolist(), strict=True)
    return np.array([checksum(data[at : at + size], seed) for at, size, seed in spans], dtype="<u8")


def new_write_id() -> str:
    """Return a name that sets one writer's objects apart from any other's of the same segment."""
    return secrets.token_hex(6)


@dataclass(frozen=True)
class Manifest:
    """What a tier knows of one segment without reading it.

    Attributes
    ----------
    key : str
        Of the segment (`redknot.store.segment_key`).
    fingerprint : str
        Of the model.
    dtype : str
        Of K, V and hidden states, such as "bfloat16".
    shape, regions
        Decide the layout.
    first_position : int
        Position of the first token when the segment was computed.
    offline_flops, offline_seconds : float
        What computing it cost, where it was computed.
    created : float
        Wall-clock seconds since 1970 of the writer; only TTLs read it.
    write_id : str
        Names the objects; `new_write_id`.
    checksums : uint64 [pages]
        In storage order; hidden pages last.
    hidden_layer : int
        Layer whose input hidden states are stored too; -1: none.
    hidden_bytes : int
        Bytes of one token's hidden state.
    """

    key: str
    fingerprint: str
    dtype: str
    shape: SegmentShape
    regions: Regions
    first_position: int
    offline_flops: float
    offline_seconds: float
    created: float
    write_id: str
    checksums: NDArray[np.uint64] = field(repr=False)
    hidden_layer: int = -1
    hidden_bytes: int = 0

    @cached_property
    def layout(self) -> SegmentLayout:
        """Where the pages lie."""
        return SegmentLayout(self.shape, self.regions)

    @property
    def item_key(self) -> str:
        """Key of the manifest in a backend."""
        return f"m/{self.key}"

    @cached_property
    def object_keys(self) -> list[str]:
        """Keys of the objects in a backend, the hidden states' last if there are any."""
        names = [*self.layout.object_names, *(["hidden-0"] if self.hidden_layer >= 0 else [])]
        return [f"d/{self.key}/{self.write_id}/{name}" for name in names]

    @property
    def num_hidden_bytes(self) -> int:
        """Bytes of the stored hidden states; 0 without."""
        return self.shape.num_tokens * self.hidden_bytes if self.hidden_layer >= 0 else 0

    @property
    def object_sizes(self) -> list[int]:
        """Bytes of each object of `object_keys`."""
        hidden = [self.num_hidden_bytes] if self.hidden_layer >= 0 else []
        return [*self.layout.object_sizes, *hidden]

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(self.object_sizes)

    def hidden_spans(self) -> tuple[NDArray[np.int64], ...]:
        """Of the pages of the hidden states: number (for the seed), begin, bytes."""
        sizes = self.shape.page_tokens() * self.hidden_bytes
        first = int(np.prod(self.shape.pages))
        return first + np.arange(len(sizes)), np.cumsum(sizes) - sizes, sizes

    def header(self) -> dict[str, Any]:
        """Everything but the checksums, as plain values."""
        shape = self.shape
        return {
            "key": self.key,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "shape": [
                shape.num_layers,
                shape.num_kv_heads,
                shape.num_tokens,
                shape.page_size,
                shape.row_bytes,
            ],
            "first_pages": _pack(self.regions.first_pages),
            "last_pages": _pack(self.regions.last_pages),
            "first_position": self.first_position,
            "offline_flops": self.offline_flops,
            "offline_seconds": self.offline_seconds,
            "created": self.created,
            "write_id": self.write_id,
            "hidden": [self.hidden_layer, self.hidden_bytes],
        }

    def to_bytes(self) -> bytes:
        """Serialise."""
        text = json.dumps(self.header(), sort_keys=True).encode()
        body = _FIXED.pack(_MAGIC, FORMAT_VERSION, len(text)) + text + self.checksums.tobytes()
        return body + checksum(body).to_bytes(8, "little")

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Parse.

        Raises
        ------
        DamagedError
            When the bytes are not what `to_bytes` wrote, or of another format version.
        """
        if len(data) < _FIXED.size + 8:
            raise DamagedError(f"manifest of {len(data)} bytes is too short")
        magic, version, length = _FIXED.unpack_from(data)
        if magic != _MAGIC:
            raise DamagedError("manifest does not begin with RKSG")
        if version != FORMAT_VERSION:
            raise DamagedError(f"manifest has format {version}, this is format {FORMAT_VERSION}")
        if checksum(data[:-8]) != int.from_bytes(data[-8:], "little"):
            raise DamagedError("manifest does not match its checksum")
        header = json.loads(data[_FIXED.size : _FIXED.size + length])
        sums = np.frombuffer(data[_FIXED.size + length : -8], dtype="<u8")
        return Manifest.from_header(header, checksums=sums)

    @staticmethod
    def from_header(header: dict[str, Any], **changes: Any) -> Manifest:
        """Of what `header` returned, with some fields given anew; checksums are empty if not."""
        shape = SegmentShape(*header["shape"])
        heads = (shape.num_layers, shape.num_kv_heads)
        fields: dict[str, Any] = {
            "key": header["key"],
            "fingerprint": header["fingerprint"],
            "dtype": header["dtype"],
            "shape": shape,
            "regions": Regions(
                _unpack(header["first_pages"], heads), _unpack(header["last_pages"], heads)
            ),
            "first_position": header["first_position"],
            "offline_flops": header["offline_flops"],
            "offline_seconds": header["offline_seconds"],
            "created": header["created"],
            "write_id": header["write_id"],
            "checksums": np.empty(0, dtype="<u8"),
            "hidden_layer": header["hidden"][0],
            "hidden_bytes": header["hidden"][1],
        }
        return Manifest(**{**fields, **changes})


def seal(
    manifest: Manifest, pages: NDArray[np.uint8], hidden: NDArray[np.uint8] | None
) -> tuple[Manifest, list[memoryview | None]]:
    """Add the checksums to a manifest and cut its bytes into objects."""
    layout = manifest.layout
    numbers, begin, sizes = layout.page_spans(layout.selection(None))
    checksums = hash_pages(pages.data, begin, sizes, numbers)
    ends = np.cumsum([0, *layout.object_sizes])
    objects: list[memoryview | None] = [pages[a:b].data for a, b in itertools.pairwise(ends)]
    if hidden is not None:
        seeds, begin, sizes = manifest.hidden_spans()
        more = hash_pages(hidden.data, begin, sizes, seeds)
        checksums = np.concatenate([checksums, more])
        objects.append(hidden.data)
    return replace(manifest, checksums=checksums), objects


def _pack(matrix: NDArray[np.int32]) -> str:
    return base64.b64encode(np.ascontiguousarray(matrix, dtype="<i4").tobytes()).decode()


def _unpack(text: str, shape: tuple[int, int]) -> NDArray[np.int32]:
    return np.frombuffer(base64.b64decode(text), dtype="<i4").reshape(shape)
