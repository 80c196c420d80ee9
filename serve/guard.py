"""The guard in front of the application: who may come in, how much they may send, and how slowly.

`Gate` is ASGI middleware: host and origin, key, size and time of a body, headers of safety, time
to take an answer. `Protocol` is uvicorn's HTTP protocol with what uvicorn leaves open: a time limit
for a request's head, and how many connections one address may hold.
"""

import asyncio
import hashlib
import hmac
import re

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.models import LOOPBACK, ServerConfig
from serve.page_routes import LARGER, OPEN
from serve.schema import Refused

SEND_S = 30
LARGEST_BODY = 2**20  # bytes; more is answered with 413
# Connections of one address: enough for a pool, too few to keep all others out.
MOST_OF_ADDRESS = 200

# The page loads only its own files and talks only to its own server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFETY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Protocol(H11Protocol):
    """Closes a connection whose first request does not begin, or any head not end, in time. Of an
    address that holds too many, the one that has been silent longest, or else the new one, goes.

    Between two requests a client may rest longer: pools keep connections, and one that is closed
    just as the next request is sent looks like a failure.

    first_s: seconds from a connection to its first byte
    head_s: seconds for a head, from its first byte on; set by who starts the server
    rest_s: seconds from a response to the next request's first byte
    open: all connections, by address, the oldest first; one for all that a server makes
    """

    first_s = 4.0
    head_s = 10.0
    rest_s = 75.0
    open: dict[str, dict["Protocol", None]] = {}  # noqa: RUF012

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._resting = self._silent = True
        own = self.open.setdefault(self._address, {})
        if len(own) >= MOST_OF_ADDRESS:
            next((one for one in own if one._silent), self).transport.close()
        own[self] = None
        self._timer = self.loop.call_later(min(self.first_s, self.head_s), transport.close)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        own = self.open[self._address]
        del own[self]
        if not own:
            del self.open[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._silent = False
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
        self._timer = self.loop.call_later(seconds, self.transport.close)


class Gate:
    """The application behind its gate.

    key: the key that a request must bear; "" asks for none
    """

    def __init__(self, app: ASGIApp, cfg: ServerConfig, key: str) -> None:
        self.app, self.cfg = app, cfg
        self.key = hashlib.sha256(key.encode()).digest() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, _to_the_end(receive), send)
        path, headers = scope["path"], Headers(scope=scope)
        reply = _Reply(send)
        answer: ASGIApp = self.app
        try:
            reply.allowed = self._check_site(headers)
            if not (reply.allowed and scope["method"] == "OPTIONS"):
                self._check_key(path, headers)
                body = await self._body(path, headers, HttpRequest(scope, receive))
                receive = _replay(body, receive)
        except Refused as refused:
            # Where the client is still sending, uvicorn throws that away, until Protocol's time
            # is up.
            answer = refused.answer
        except ClientDisconnect:
            return
        if reply.allowed:  # what lets a browser give an answer to another site's page
            answer = CORSMiddleware(
                answer, [reply.allowed], ["GET", "POST"], ["*"], allow_private_network=True,
                expose_headers=["Retry-After"],
            )  # fmt: skip
        try:
            await answer(scope, receive, reply.send)
        except ClientDisconnect:
            pass  # the server closes a connection whose answer was not finished
        except asyncio.CancelledError:
            # The server stops and waits no longer. Raised, it would be logged as a fault of ours.
            if not reply.has_begun:
                stopped = Refused(503, "the server was stopped", code="stopped")
                await stopped.answer(scope, receive, reply.send)

    def _check_site(self, headers: Headers) -> str:
        """The other site whose page asks, if it may; "" for the server's own and for programs."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        # Keeps out web pages whose own name was turned to this address.
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if self.cfg.is_local and name not in LOOPBACK:
            text = (
                f"this server answers to {', '.join(LOOPBACK)} only, found host {host!r}; to "
                f"reach it by another name start it with --host 0.0.0.0 --api-key-file FILE"
            )
            raise Refused(403, text, code="wrong_host")
        if not origin or origin.partition("//")[2] == host:
            return ""
        if not {origin, "*"} & set(self.cfg.allow_origin):
            text = (
                f"requests from other sites are refused, found origin {origin!r}; if it is yours, "
                f"start the server with --allow-origin {origin}"
            )
            raise Refused(403, text, code="wrong_origin")
        return origin

    def _check_key(self, path: str, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(given.strip().encode("latin-1")).digest()
        is_right = scheme.lower() == "bearer" and hmac.compare_digest(found, self.key)
        if self.key and path not in OPEN and not is_right:
            text = "this server wants its key: Authorization: Bearer KEY"
            raise Refused(401, text, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    async def _body(self, path: str, headers: Headers, request: HttpRequest) -> bytes:
        """The whole body. One that is too large is read to its end and thrown away: most clients
        look for an answer only when all is sent, and see a reset connection else.

        raises: Refused if it is too large or comes too slowly, ClientDisconnect
        """
        most = LARGER.get(path, LARGEST_BODY)
        length = headers.get("content-length", "")
        size = announced = int(length) if length.isdecimal() and len(length) < 20 else 0
        body, is_late = bytearray(), False
        # Who expects an answer asks before he sends.
        if not (announced > most and "expect" in headers):
            try:
                async with asyncio.timeout(self.cfg.body_seconds):
                    size = 0
                    async for part in request.stream():
                        size += len(part)
                        if size <= most:
                            body += part
            except TimeoutError:
                is_late = True
        if max(size, announced) > most:
            text = f"the body has {max(size, announced)} bytes or more, at most {most} are read"
            raise Refused(413, text, code="body_too_large")
        if is_late:
            text = f"the body did not arrive within {self.cfg.body_seconds:g} s"
            raise Refused(408, text, code="timeout")
        return bytes(body)


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
    first = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> Message:
        return next(first, None) or await receive()

    return again


class _Reply:
    """The way out: headers that every answer has, a time limit.

    allowed: the other site that may read the answer
    """

    def __init__(self, send: Send) -> None:
        self._send, self.has_begun, self.allowed = send, False, ""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = MutableHeaders(raw=list(message["headers"]))
            headers.update(SAFETY)
            if self.allowed:
                headers["Cross-Origin-Resource-Policy"] = "cross-origin"
            message = {**message, "headers": headers.raw}
        try:
            async with asyncio.timeout(SEND_S):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnect from None
