"""The page pool and the caches over it."""

from redknot.cache.pool import KVPool, bytes_per_page, out_of_pages

__all__ = ["KVPool", "bytes_per_page", "out_of_pages"]
