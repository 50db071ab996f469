"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app.serving.worker import Worker

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServiceMetrics:
    """Counters of one service; every instance has a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gill_requests",
            "Requests for answers, by HTTP status",
            ["status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "gill_request_seconds",
            "From the first byte of a request to the last of its answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_piece = Histogram(
            "gill_first_piece_seconds",
            "From a request in line to the first words or picture of its answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.pictures = Counter(
            "gill_pictures", "Pictures of answers, by kind", ["kind"], registry=self.registry
        )
        self.tokens = Counter(
            "gill_tokens", "Positions read and said", ["direction"], registry=self.registry
        )
        self.ended = Counter(
            "gill_answers", "Accepted requests, by how they ended", ["end"], registry=self.registry
        )
        self.ignored_fields = Counter(
            "gill_ignored_fields", "Fields of requests that nothing reads", registry=self.registry
        )
        self.batch = Histogram(
            "gill_batch_turns",
            "Turns answered together",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )
        self.batch_seconds = Counter(
            "gill_batch_seconds", "Time spent answering", registry=self.registry
        )

    def watch(self, worker: Worker) -> None:
        """Show the worker's line as it is when asked."""
        waiting = Gauge("gill_waiting", "Requests in line", registry=self.registry)
        running = Gauge("gill_running", "Requests being answered", registry=self.registry)
        waiting.set_function(lambda: worker.num_waiting)
        running.set_function(lambda: worker.num_running)

    def on_batch(self, turns: int, seconds: float) -> None:
        """Count a batch that the worker has finished."""
        self.batch.observe(turns)
        self.batch_seconds.inc(seconds)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
