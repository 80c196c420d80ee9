"""What /metrics tells, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LONG = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self.requests = Counter(
            "babyllama_requests", "Requests by path and status", ["path", "status"], **of
        )
        self.refused = Counter("babyllama_refused", "Requests refused with 429", ["reason"], **of)
        self.tokens = Counter("babyllama_tokens", "Tokens read, known, written", ["kind"], **of)
        self.replies = Counter("babyllama_replies", "Replies by the way they ended", ["end"], **of)
        self.open = Gauge("babyllama_open_replies", "Replies running and waiting", **of)
        self.step = Histogram("babyllama_step_seconds", "A step", buckets=_SHORT, **of)
        self.first = Histogram("babyllama_first_seconds", "To the first piece", buckets=_LONG, **of)
        self.between = Histogram(
            "babyllama_between_seconds", "Between two pieces of a reply", buckets=_SHORT, **of
        )
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
