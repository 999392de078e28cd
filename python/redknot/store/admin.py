"""What an operator does with a store: look, check, remove, take along."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from redknot.errors import InputError, StoreError
from redknot.store.backend import Status
from redknot.store.layout import REGIONS
from redknot.store.manifest import Manifest, checksum, new_write_id, seal
from redknot.store.reading import Loaded, read_segment
from redknot.store.tier import Tier
from redknot.store.url import open_backend, parse_url

__all__ = ["StoreAdmin", "Trouble"]

_EXCHANGE_FORMAT = "redknot-segment-1"


@dataclass(frozen=True)
class Trouble:
    """Something in a store that is not as it should be."""

    key: str
    what: str


class StoreAdmin:
    """One store, by its URL; nothing is created by looking.

    Raises
    ------
    InputError, StoreError
        For a URL that means nothing, or a store that cannot be opened or does not answer; here and
        in every method.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        parsed = parse_url(url)
        if parsed.scheme == "mem":
            raise InputError("mem: ends with its process; there is nothing to look at")
        self._url = url
        self.tier = Tier(open_backend(parsed, create=create), parsed)

    def __enter__(self) -> StoreAdmin:
        return self

    def __exit__(self, *error: object) -> None:
        self.tier.close()

    def _sizes(self, prefix: str) -> dict[str, int]:
        answer = self.tier.call(lambda t: self.tier.backend.sizes(prefix, t))
        if isinstance(answer, Status):
            raise StoreError(f"{self._url}: the store is not usable: {answer.value}")
        return dict(answer)

    def segments(self) -> Iterator[Manifest | Trouble]:
        """Every segment, by key; a manifest that cannot be read is trouble."""
        for name in sorted(self._sizes("m/")):
            key = name.removeprefix("m/")
            found = self.tier.manifest(key)
            yield found if isinstance(found, Manifest) else Trouble(key, f"manifest {found.value}")

    def find(self, key: str) -> Manifest:
        """The one segment whose key begins with `key`."""
        names = [name.removeprefix("m/") for name in self._sizes(f"m/{key}")]
        if len(names) != 1:
            what = "no segment" if not names else f"{len(names)} segments"
            raise InputError(f"{self._url}: {what} with a key that begins with {key!r}")
        found = self.tier.manifest(names[0])
        if not isinstance(found, Manifest):
            raise StoreError(f"{self._url}: segment {names[0][:12]}: manifest {found.value}")
        return found

    def read(self, manifest: Manifest) -> Loaded | Trouble:
        """All of a segment, checked."""
        loaded = read_segment(self.tier, manifest)
        return loaded if isinstance(loaded, Loaded) else Trouble(manifest.key, loaded.value)

    def verify(self, *, repair: bool = False) -> Iterator[Manifest | Trouble]:
        """Read everything; segments that are right, and troubles.

        Objects that no manifest names (of writers that were killed) are trouble too. With `repair`
        what is damaged or named by nobody is removed; while others write to the store, theirs may
        be among it.
        """
        named: set[str] = set()
        for found in self.segments():
            if isinstance(found, Trouble):
                if repair:
                    self.tier.remove_items([f"m/{found.key}"])
                yield found
                continue
            named.update(found.object_keys)
            result = self.read(found)
            if repair and isinstance(result, Trouble):
                self.tier.remove(found)
            yield result if isinstance(result, Trouble) else found
        for item in sorted(set(self._sizes("d/")) - named):
            if repair:
                self.tier.remove_items([item])
            yield Trouble(item.split("/")[1], f"{item.rsplit('/', 1)[1]}: named by no manifest")

    def remove(self, manifest: Manifest) -> None:
        """Remove a segment."""
        status = self.tier.remove(manifest)
        if status not in (Status.OK, Status.MISSING):
            raise StoreError(
                f"{self._url}: {manifest.key[:12]} could not be removed: {status.value}"
            )

    def stats(self) -> dict[str, Any]:
        """Counts and bytes, as far as the store's own listing tells."""
        by_region = dict.fromkeys((*REGIONS, "hidden"), 0)
        for item, size in self._sizes("d/").items():
            by_region[item.rsplit("/", 1)[1].rsplit("-", 1)[0]] += size
        models: dict[str, int] = {}
        tokens = 0
        for found in self.segments():
            if isinstance(found, Manifest):
                models[found.fingerprint] = models.get(found.fingerprint, 0) + 1
                tokens += found.shape.num_tokens
        used = self.tier.call(self.tier.backend.used_bytes)
        return {
            "segments": sum(models.values()),
            "tokens": tokens,
            "bytes": sum(by_region.values()),
            "bytes_by_region": {name: size for name, size in by_region.items() if size},
            "medium_bytes": None if isinstance(used, Status) else used,
            "segments_by_model": models,
        }

    # --- exchange --------------------------------------------------------------------------------

    def export(self, manifest: Manifest, folder: Path) -> Path:
        """Write a segment to `folder/<key>.safetensors`, whole or not at all.

        Tensors k and v [num_layers, num_kv_heads, num_tokens, head_dim], keys rotated at the
        positions from `first_position` on, and hidden [num_tokens, hidden_dim] where stored.
        """
        import torch
        from safetensors.torch import save_file

        loaded = self.read(manifest)
        if isinstance(loaded, Trouble):
            raise StoreError(f"{self._url}: segment {manifest.key[:12]}: {loaded.what}")
        shape, dtype = manifest.shape, getattr(torch, manifest.dtype)
        k_row, v_row, token = manifest.layout.rows(loaded.selection)
        rows = loaded.buffer.reshape(-1, shape.row_bytes)
        contents = {}
        for name, row in (("k", k_row), ("v", v_row)):
            contents[name] = np.empty((len(token), shape.row_bytes), dtype=np.uint8)
            contents[name][token] = rows[row]
        sizes: dict[str, tuple[int, ...]] = {
            name: (*shape.pages[:2], shape.num_tokens, -1) for name in contents
        }
        if loaded.hidden is not None:
            contents["hidden"], sizes["hidden"] = loaded.hidden, (shape.num_tokens, -1)
        tensors = {
            name: torch.from_numpy(data).view(dtype).view(sizes[name])
            for name, data in contents.items()
        }
        metadata = {"format": _EXCHANGE_FORMAT, "manifest": json.dumps(manifest.header())}
        for name, data in contents.items():
            metadata[f"xxh3_{name}"] = f"{checksum(data.data):016x}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{manifest.key}.safetensors"
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file(tensors, str(partial), metadata)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise StoreError(f"{path}: cannot write: {error}") from None
        return path

    def import_file(self, path: Path) -> Manifest:
        """Store a segment that `export` wrote; one that is there already stays."""
        manifest, tensors = _read_exchange(path)
        shape = manifest.shape
        k_row, v_row, token = manifest.layout.rows(manifest.layout.selection(None))
        rows = np.empty((2 * len(token), shape.row_bytes), dtype=np.uint8)
        rows[k_row] = tensors["k"].reshape(-1, shape.row_bytes)[token]
        rows[v_row] = tensors["v"].reshape(-1, shape.row_bytes)[token]
        sealed, objects = seal(manifest, rows.reshape(-1), tensors.get("hidden"))
        status = self.tier.write(sealed, objects)
        if status is not Status.OK:
            raise StoreError(f"{self._url}: {path.name} could not be stored: {status.value}")
        return sealed


def _read_exchange(path: Path) -> tuple[Manifest, dict[str, NDArray[np.uint8]]]:
    import torch
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from None
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors file, or cut off: {error}") from None
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != _EXCHANGE_FORMAT:
        raise InputError(f"{path}: not a segment that redknot exported ({_EXCHANGE_FORMAT})")
    contents = {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy()
        for name, tensor in tensors.items()
    }
    for name, content in contents.items():
        if metadata.get(f"xxh3_{name}") != f"{checksum(content.data):016x}":
            raise InputError(f"{path}: {name} does not match its checksum; the file is damaged")
    manifest = Manifest.from_header(json.loads(metadata["manifest"]), write_id=new_write_id())
    return manifest, contents
