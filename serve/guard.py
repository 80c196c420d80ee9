"""What stands before the application: who may come in, how much they may send, and how slowly.

`Gate` is ASGI middleware: host and origin, key, size and time of a body, headers of safety, time
to take an answer. `Protocol` is uvicorn's HTTP protocol with a time limit for a request's head,
which uvicorn leaves open.
"""

import asyncio
import hashlib
import hmac
import json
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.errors import Refused
from serve.metrics import Metrics

SEND_S = 30

# The page loads only its own files and talks only to its own server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFETY = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
]


class Protocol(H11Protocol):
    """Closes a connection whose first request does not begin, or any head not end, in time.

    Between two requests a client may rest longer: pools keep connections, and one that is closed
    just as the next request is sent looks like a failure.

    head_s: seconds for a head, from the connection's or its own first byte on; set by who starts
        the server
    rest_s: seconds from a response to the next request's first byte
    """

    head_s = 10.0
    rest_s = 75.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._resting = False
        self._timer = self.loop.call_later(self.head_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._resting:
            self._resting = False
            self._wait(self.head_s)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._timer.cancel()

    def on_response_complete(self) -> None:
        before = self.cycle
        # Else the request's body has not ended, or the next head has begun.
        self._resting = self.conn.their_state is h11.DONE and not self.conn.trailing_data[0]
        self._wait(self.rest_s if self._resting else self.head_s)
        super().on_response_complete()
        if self.cycle is not before:  # the next request was there already
            self._timer.cancel()

    def _wait(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


@dataclass(frozen=True)
class GateConfig:
    """What the gate lets in.

    key: the key that a request must bear; "" asks for none
    names: by which requests may call the server; empty: any. Of a server for this machine alone
        they keep out web pages whose own name was turned to this address
    open_paths: which need no key
    """

    key: str
    names: tuple[str, ...]
    open_paths: frozenset[str]
    body_bytes: int
    body_s: float


class Gate:
    def __init__(self, app: ASGIApp, cfg: GateConfig, metrics: Metrics, paths: set[str]) -> None:
        self.app, self.cfg, self.metrics, self.paths = app, cfg, metrics, paths
        self.key = hashlib.sha256(cfg.key.encode()).digest() if cfg.key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, _to_the_end(receive), send)
        path = scope["path"] if scope["path"] in self.paths else "other"
        reply = _Reply(send, path, self.metrics)
        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except Refused as refused:
            await reply.refuse(refused)
            return
        except ConnectionError:
            return  # the client left while sending
        try:
            await self.app(scope, _replay(body, receive), reply.send)
        except TimeoutError:
            if not reply.is_slow:
                raise
            # The server closes a connection whose answer was not finished.
        except asyncio.CancelledError:
            # The server stops and waits no longer. Raised, it would be logged as a fault of ours.
            if not reply.has_begun:
                await reply.refuse(Refused(503, "the server was stopped", code="stopped"))

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.cfg.names and _name(f"//{host}") not in self.cfg.names:
            text = f"this server answers to {', '.join(self.cfg.names)} only, found host {host!r}"
            raise Refused(403, text, code="wrong_host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("//")[2] != host:
            raise Refused(403, f"requests from other sites are refused, found origin {origin!r}",
                          code="wrong_origin")  # fmt: skip
        if self.key and scope["path"] not in self.cfg.open_paths:
            scheme, _, found = headers.get(b"authorization", b"").partition(b" ")
            is_right = hmac.compare_digest(hashlib.sha256(found.strip()).digest(), self.key)
            if scheme.lower() != b"bearer" or not is_right:
                raise Refused(
                    401, "this server wants its key: Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body.

        raises: Refused if it is too large or comes too slowly, ConnectionError if it does not end
        """
        most = self.cfg.body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise _too_large(int(length), most)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.cfg.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(size, most)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            text = f"the body did not arrive within {self.cfg.body_s:g} s"
            raise Refused(408, text, code="timeout") from None


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _too_large(found: int, most: int) -> Refused:
    text = f"the body has {found} bytes or more, at most {most} are read"
    return Refused(413, text, code="body_too_large")


def _to_the_end(receive: Receive) -> Receive:
    """The server's life: one that is cut off by a second Ctrl-C ends as any other."""

    async def next_turn() -> Message:
        try:
            return await receive()
        except asyncio.CancelledError:
            return {"type": "lifespan.shutdown"}

    return next_turn


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what really comes: the end of the connection."""
    first = True

    async def again() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


class _Reply:
    """The way out: headers that every answer has, a time limit, a count."""

    def __init__(self, send: Send, path: str, metrics: Metrics) -> None:
        self._send, self.path, self.metrics = send, path, metrics
        self.is_slow = self.has_begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            message = {**message, "headers": [*message.get("headers", []), *SAFETY]}
            self.metrics.requests.labels(self.path, str(message["status"])).inc()
        try:
            async with asyncio.timeout(SEND_S):
                await self._send(message)
        except TimeoutError:
            self.is_slow = True
            raise

    async def refuse(self, refused: Refused) -> None:
        body = json.dumps(refused.body, ensure_ascii=False).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **{name.lower(): value for name, value in refused.headers.items()},
        }
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send(
            {"type": "http.response.start", "status": refused.status, "headers": encoded}
        )
        # Where the client is still sending, uvicorn throws that away, until Protocol's time is up.
        await self.send({"type": "http.response.body", "body": body})
