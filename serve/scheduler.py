"""The desk between requests and the model: who may come in, and the thread that runs the steps.

One thread steps all engines (one for each model or adapter); asyncio's side puts jobs into its
inbox and gets all pieces of a step in one call. Places are counted here: at most so many replies
at a time, waiting ones included, and so many of one client; what is done is counted for /metrics.
"""

import asyncio
import collections
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from serve.engine import Engine, Job, Piece
from serve.schema import Refused, bad

logger = logging.getLogger("babyllama.serve")

Mailbox = asyncio.Queue  # of (number of the reply, Piece)
WAIT_S = 5  # until a place is likely to be free


_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """What /metrics tells of one server, in Prometheus' text format."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self.refused = Counter("babyllama_refused", "Requests refused with 429", ["reason"], **of)
        self.tokens = Counter("babyllama_tokens", "Tokens read, known, written", ["kind"], **of)
        self.replies = Counter("babyllama_replies", "Replies by the way they ended", ["end"], **of)
        self.open = Gauge("babyllama_open_replies", "Replies running and waiting", **of)
        self.step = Histogram("babyllama_step_seconds", "A step", buckets=_STEPS, **of)
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Desk:
    """Hands jobs to engines and pieces to requests.

    most: replies at a time, running and waiting
    per_client: of them, of one address
    on_failure: called in the engines' thread if a step raises, which is a bug of ours
    """

    def __init__(
        self,
        engines: list[Engine],
        most: int,
        per_client: int,
        metrics: Metrics,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.engines, self.most, self.per_client = engines, most, per_client
        self.metrics, self.on_failure = metrics, on_failure
        self.failed = False
        self._inbox: queue.SimpleQueue[tuple[Engine, Job] | None] = queue.SimpleQueue()
        self._outbox: list[tuple[Mailbox, int, Piece]] = []
        self._unfinished: set[Job] = set()
        self._open: collections.Counter[str] = collections.Counter()
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step under way."""
        self._inbox.put(None)
        self._thread.join(timeout=10)

    @contextmanager
    def places(self, client: str, n: int) -> Iterator[ExitStack]:
        """Room for n replies, as long as the block runs, or longer for who takes the stack.

        raises: Refused (429) if there is none, (400) if there never can be
        """
        if n > (most := min(self.per_client, self.most)):
            raise bad("n", f"wanted at most {most} replies to a request, found {n} in all")
        bounds = (
            ("client", "of this client ", self._open[client], self.per_client),
            ("queue", "", self._open.total(), self.most),
        )
        for reason, whose, n_open, most in bounds:
            if n_open + n > most:
                self.metrics.refused.labels(reason).inc()
                text = f"{n_open} replies {whose}are under way or waiting, at most {most} may be"
                text, headers = f"{text}; try again in {WAIT_S} s", {"Retry-After": str(WAIT_S)}
                raise Refused(429, text, code="rate_limit_exceeded", headers=headers)
        self._open[client] += n
        self.metrics.open.set(self._open.total())
        with ExitStack() as stack:
            stack.callback(self._give_back, client, n)
            yield stack

    def _give_back(self, client: str, n: int) -> None:
        self._open[client] -= n
        self._open += collections.Counter()  # forgets clients without replies
        self.metrics.open.set(self._open.total())

    def submit(self, engine: Engine, jobs: list[Job], mailbox: Mailbox) -> None:
        """Let jobs wait for their turn; their pieces go to the mailbox."""
        if self.failed:
            raise Refused(503, "the model has stopped working; start the server again")
        for number, job in enumerate(jobs):
            job.notify = partial(self._take, job, mailbox, number)
            self._unfinished.add(job)
            self._inbox.put((engine, job))

    def _take(self, job: Job, mailbox: Mailbox, number: int, piece: Piece) -> None:
        """Keep a piece until the step is over."""
        if piece.reason:
            self._unfinished.discard(job)
        self._outbox.append((mailbox, number, piece))

    def _run(self) -> None:
        busy = False
        try:
            while True:
                try:
                    while (found := self._inbox.get(block=not busy)) is not None:
                        engine, job = found
                        engine.add(job)
                        busy = True
                    return
                except queue.Empty:
                    pass
                started = time.perf_counter()
                busy = any([engine.step() for engine in self.engines])
                self.metrics.step.observe(time.perf_counter() - started)
                self._send()
        except Exception:
            # What a bug of ours leaves behind is no state to go on with: every reply ends, and
            # the server after them.
            logger.exception("a step failed")
            self.failed = True
            for job in list(self._unfinished):
                job.notify(Piece("", "error"))
            self._send()
            self.on_failure()

    def _send(self) -> None:
        if self._outbox:
            self._loop.call_soon_threadsafe(_deliver, self._outbox)
            self._outbox = []


def _deliver(pieces: list[tuple[Mailbox, int, Piece]]) -> None:
    for mailbox, number, piece in pieces:
        mailbox.put_nowait((number, piece))
