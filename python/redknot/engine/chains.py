"""Recovered documents kept for the next request that has the same ones in the same order.

A *chain* is a session that ends where its documents end: the pages that the recovery refreshed,
what local heads keep, and nothing of any question. Requests continue from forks of it, as from a
prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from redknot.cache import KVPool
from redknot.engine.results import Explanation
from redknot.heads import HeadMap
from redknot.recovery import Policy

__all__ = ["Chain", "ChainStats", "RecoveredChains", "chain_key"]


@dataclass
class Chain:
    """Documents recovered behind the prefix, under one policy and head map.

    Attributes
    ----------
    session : int
        Holds the pages; it is never decoded, only forked.
    num_tokens : int
        Of prefix and documents.
    explanation : Explanation
        Of the request that recovered them.
    offline_flops : float
        What caching the documents had cost.
    hits : int
        Requests that continued from it.
    """

    session: int
    num_tokens: int
    explanation: Explanation
    offline_flops: float
    hits: int = 0


@dataclass
class ChainStats:
    """Counts since the engine was made."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


def chain_key(document_keys: Sequence[str], policy: Policy, heads: HeadMap) -> str:
    """Key of a chain: the documents in their order, the policy with its options, the head map."""
    parts = [*document_keys, repr(policy), json.dumps(heads.to_json(), sort_keys=True)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little"))
        digest.update(part.encode())
    return digest.hexdigest()


class RecoveredChains:
    """Chains of one pool, least recently used first out."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._chains: OrderedDict[str, Chain] = OrderedDict()
        self.stats = ChainStats()

    def __len__(self) -> int:
        return len(self._chains)

    def find(self, key: str) -> Chain | None:
        """The chain of `key`, marked used; None is a counted miss."""
        chain = self._chains.get(key)
        if chain is None:
            self.stats.misses += 1
            return None
        self._chains.move_to_end(key)
        chain.hits += 1
        self.stats.hits += 1
        return chain

    def keep(self, key: str, chain: Chain) -> None:
        """Take over a chain and its session."""
        if key in self._chains:
            self._drop(key)
        self._chains[key] = chain

    def evict_one(self, *, shared_too: bool, keep: Chain | None = None) -> bool:
        """Drop the least recently used chain but `keep`; with `shared_too` also one that had hits.

        Pages that sessions still share stay until those let go. False when there is none.
        """
        for key, chain in self._chains.items():
            if chain is not keep and (shared_too or not chain.hits):
                self._drop(key)
                self.stats.evictions += 1
                return True
        return False

    def pages(self) -> int:
        """Pages that chains alone hold, and no running session, segment or other chain."""
        sessions = [chain.session for chain in self._chains.values()]
        return len(self._pool.allocator.exclusive_pages(sessions)) if sessions else 0

    def clear(self) -> None:
        """Drop every chain."""
        while self._chains:
            self._drop(next(iter(self._chains)))

    def _drop(self, key: str) -> None:
        self._pool.allocator.release_session(self._chains.pop(key).session)
