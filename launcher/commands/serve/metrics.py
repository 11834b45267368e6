"""What the server tells Prometheus of itself."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """Requests, their seconds, and the batches that they became."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "sparring_requests", "Requests that were answered", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "sparring_request_seconds", "Seconds until an answer", ["path"], buckets=_SECONDS, registry=self._registry
        )
        self._texts = Histogram(
            "sparring_batch_texts", "Texts computed together", ["kind"], buckets=_TEXTS, registry=self._registry
        )
        self._batch_seconds = Histogram(
            "sparring_batch_seconds", "Seconds of a batch", ["kind"], buckets=_SECONDS, registry=self._registry
        )
        self._waiting = Gauge("sparring_waiting_texts", "Texts in the queue", registry=self._registry)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Take in an answer.

        Args:
            path: One of the server's own; whatever else was asked for is one name, so that nobody can make many.
            status: Of HTTP.
            seconds: Until the answer was sent.
        """
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_batch(self, kind: str, texts: int, seconds: float) -> None:
        """Take in a batch: what it was of, how many texts, and how long it took."""
        self._texts.labels(kind).observe(texts)
        self._batch_seconds.labels(kind).observe(seconds)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Read the length of the queue by this function whenever somebody asks."""
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self._registry)
