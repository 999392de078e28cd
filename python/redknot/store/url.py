"""Store URLs: which engine, where, and how a tier on it behaves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redknot.errors import InputError
from redknot.store.backend import StorageBackend
from redknot.store.eviction import POLICIES

__all__ = ["StoreUrl", "open_backend", "parse_size", "parse_url"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_REDIS = ("redis", "rediss", "unix")
_SCHEMES = ("mem", "lmdb", *_REDIS)
_OPTIONS = ("capacity", "policy", "ttl", "timeout", "prefer")
_PREFER = ("faster", "load")

_TIMEOUT_SECONDS = 5.0


def parse_size(text: str | int, what: str) -> int:
    """Bytes of "8GiB", "500 MB" or a number.

    Raises
    ------
    InputError
        That names `what`.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match.group(2) not in _UNITS:
        raise InputError(f"{what} must be bytes or a text such as '8GiB', got {text!r}")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


@dataclass(frozen=True)
class StoreUrl:
    """One tier, as its URL says it.

    Attributes
    ----------
    scheme : {"mem", "lmdb", "redis", "rediss", "unix"}
    target : str
        The URL without redknot's own options.
    capacity : int, optional
        Most bytes of segments to keep there; None: as many as the engine takes.
    policy : str
        What goes first when the capacity is reached: a name in `POLICIES`.
    ttl : float, optional
        Seconds after which a segment counts as not stored.
    timeout : float
        Most seconds that any call may take.
    prefer : {"faster", "load"}
        Whether a load that is expected to take longer than computing is skipped, or done anyway.
    """

    scheme: str
    target: str
    capacity: int | None = None
    policy: str = "lru"
    ttl: float | None = None
    timeout: float = _TIMEOUT_SECONDS
    prefer: str = "faster"

    @property
    def path(self) -> Path:
        """Directory of an `lmdb:` URL."""
        return Path(urlsplit(self.target).path)


def parse_url(url: str) -> StoreUrl:
    """Read `SCHEME:...[?capacity=8GiB&policy=lru&ttl=SECONDS&timeout=SECONDS&prefer=faster]`.

    Raises
    ------
    InputError
        For an unknown scheme, option or value.
    """
    if not isinstance(url, str):
        raise InputError(f"a store is given by its URL, such as 'lmdb:///path', got {url!r}")
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise InputError(
            f"store {url!r}: the URL must be mem:, lmdb:///path or redis://host:port/db"
            + ("; file: is for redknot store export and import" if parts.scheme == "file" else "")
        )
    if parts.scheme == "lmdb" and (parts.netloc or not parts.path.strip("/")):
        raise InputError(f"store {url!r}: write lmdb:///absolute/path (three slashes)")
    if parts.scheme == "mem" and (parts.netloc or parts.path.strip("/")):
        raise InputError(f"store {url!r}: mem: has no path; write mem: or mem:?capacity=4GiB")
    query = parse_qsl(parts.query, keep_blank_values=True)
    ours = {name: value for name, value in query if name in _OPTIONS}
    others = [(name, value) for name, value in query if name not in _OPTIONS]
    if others and parts.scheme not in _REDIS:  # redis-py has options of its own
        raise InputError(
            f"store {url!r}: unknown option {others[0][0]!r}; there are {', '.join(_OPTIONS)}"
        )
    if "capacity" in ours and parts.scheme in _REDIS:
        raise InputError(f"store {url!r}: a server's capacity is its own setting (maxmemory)")
    policy, prefer = ours.get("policy", "lru"), ours.get("prefer", "faster")
    for what, value, known in (("policy", policy, POLICIES), ("prefer", prefer, _PREFER)):
        if value not in known:
            raise InputError(
                f"store {url!r}: unknown {what} {value!r}; there are {', '.join(known)}"
            )
    target = urlunsplit(parts._replace(query=urlencode(others)))
    return StoreUrl(
        scheme=parts.scheme,
        target=target,
        capacity=parse_size(ours["capacity"], f"store {url!r}: capacity")
        if "capacity" in ours
        else None,
        policy=policy,
        ttl=_seconds(url, ours, "ttl"),
        timeout=_seconds(url, ours, "timeout") or _TIMEOUT_SECONDS,
        prefer=prefer,
    )


def _seconds(url: str, options: dict[str, str], name: str) -> float | None:
    if name not in options:
        return None
    try:
        value = float(options[name])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(
            f"store {url!r}: {name} must be a number of seconds above 0, got {options[name]!r}"
        )
    return value


def open_backend(url: StoreUrl, *, create: bool = True) -> StorageBackend:
    """Open the engine of a URL.

    Raises
    ------
    StoreError
        When it cannot be opened, or its package is missing.
    """
    if url.scheme == "mem":
        from redknot.store.mem_backend import MemBackend

        return MemBackend()
    if url.scheme == "lmdb":
        from redknot.store.lmdb_backend import LmdbBackend

        return LmdbBackend(url.path, create=create)
    from redknot.store.redis_backend import RedisBackend

    return RedisBackend(url.target)
