"""The page pool and the caches over it."""

from redknot.cache.page_memory import empty_pages
from redknot.cache.pool import KVPool, bytes_per_page, out_of_pages

__all__ = ["KVPool", "bytes_per_page", "empty_pages", "out_of_pages"]
