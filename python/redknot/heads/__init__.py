"""Which KV heads see everything and which only a sink and a window: the head map."""

from redknot.heads.head_map import HeadMap

__all__ = ["HeadMap"]
