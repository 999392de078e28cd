"""Counts of an engine's tiers for Prometheus (optional: the package prometheus-client)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from redknot.errors import StoreError
from redknot.store.tiers import TieredStore

__all__ = ["StoreMetrics"]

# Metric, field of TierCounts, help. Counters get their `_total` from the client.
_COUNTERS = (
    ("redknot_tier_read_bytes", "bytes_read", "Bytes read from a tier"),
    ("redknot_tier_read_seconds", "read_seconds", "Seconds spent reading from a tier"),
    ("redknot_tier_written_bytes", "bytes_written", "Bytes written to a tier"),
    ("redknot_tier_segments_written", "segments_written", "Segments written to a tier"),
    ("redknot_tier_evictions", "evictions", "Regions of segments dropped to make room"),
    ("redknot_tier_evicted_bytes", "evicted_bytes", "Bytes dropped to make room"),
    ("redknot_tier_rejected", "rejected", "Regions of segments that the policy did not admit"),
)
# Outcome of a look-up, field of TierCounts.
_LOOKUPS = (
    ("hit", "hits"),
    ("miss", "misses"),
    ("expired", "expired"),
    ("slower_than_computing", "skipped_slower"),
    ("down", "skipped_down"),
)


class StoreMetrics:
    """A collector for `prometheus_client`: counts are read when they are scraped.

    Parameters
    ----------
    store : TieredStore
        Such as `engine.store`.
    registry : CollectorRegistry, optional
        Where to register; default: the client's own.

    Raises
    ------
    StoreError
        Without the package prometheus-client.
    """

    def __init__(self, store: TieredStore, registry: Any = None) -> None:
        try:
            import prometheus_client
        except ImportError:
            raise StoreError(
                "metrics need the package prometheus-client: pip install 'redknot[metrics]'"
            ) from None
        self._store = store
        (registry if registry is not None else prometheus_client.REGISTRY).register(self)

    def collect(self) -> Iterator[Any]:
        """Yield the metric families; each sample is labelled with its tier."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        tiers = [(f"{i}-{tier.name}", tier) for i, tier in enumerate(self._store.tiers)]
        for name, field, text in _COUNTERS:
            family = CounterMetricFamily(name, text, labels=["tier"])
            for label, tier in tiers:
                family.add_metric([label], getattr(tier.counts, field))
            yield family
        lookups = CounterMetricFamily(
            "redknot_tier_lookups", "Look-ups by outcome", labels=["tier", "outcome"]
        )
        failures = CounterMetricFamily(
            "redknot_tier_failures", "Calls that failed, by kind", labels=["tier", "kind"]
        )
        down = GaugeMetricFamily(
            "redknot_tier_down", "1 while a tier is left alone", labels=["tier"]
        )
        used = GaugeMetricFamily(
            "redknot_tier_used_bytes", "Bytes of segments known to be there", labels=["tier"]
        )
        for label, tier in tiers:
            for outcome, field in _LOOKUPS:
                lookups.add_metric([label, outcome], getattr(tier.counts, field))
            for kind, count in dict(tier.counts.failures).items():
                failures.add_metric([label, kind], count)
            down.add_metric([label], float(tier.is_down()))
            used.add_metric([label], tier.used_bytes)
        yield from (lookups, failures, down, used)
        dropped = CounterMetricFamily(
            "redknot_writes_dropped", "Segments not written because too much waited already"
        )
        dropped.add_metric([], self._store.writes_dropped)
        yield dropped
