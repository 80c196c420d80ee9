"""Serve a checkpoint: OpenAI's interface and a chat page, on this machine alone unless told.

    python -m serve.server                                     # the newest run in out/
    python -m serve.server out/redgpt --port 8000              # then open http://127.0.0.1:8000
    python -m serve.server out/redgpt --lora titles=out/csl_lora  # more models to choose from
    python -m serve.server out/vqa-cross                       # takes an image with the question
    python -m serve.server out/redgpt --host 0.0.0.0 --api-key-file key.txt

The first Ctrl-C lets running replies finish, a second one does not. Needs requirements/serve.txt.
"""

import logging
import signal
import socket
from contextlib import suppress
from pathlib import Path

from babyllama.chat.session import choose_checkpoint, open_retriever
from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError
from serve.models import ServerConfig, serve_from

MOST_CONNECTIONS = 1000  # more are answered with 503


def main(cfg: ServerConfig) -> int:
    # First, so that a package that is missing is said before the work.
    import uvicorn

    from serve.app import make_app
    from serve.guard import Protocol
    from serve.page_routes import Service
    from serve.scheduler import Desk, Metrics

    key = read_key(cfg.api_key_file)
    if not key and not cfg.is_local:
        raise ConfigError(
            f"--host {cfg.host} can be reached by others, so it needs --api-key-file FILE; "
            f"leave --host out to serve this machine alone"
        )
    raise_file_limit()
    Protocol.head_s = cfg.body_seconds
    # Before the model is loaded, so that a port in use shows at once.
    with listen(cfg.host, cfg.port) as listener:
        retriever = open_retriever(cfg.index, False)
        models = serve_from(cfg, choose_checkpoint(cfg.checkpoint, lora=cfg.lora))
        engines = [model.engine for model in models.values()]
        desk = Desk(engines, cfg.slots + cfg.queue, cfg.per_client, Metrics())
        # Without proxy_headers=False a client could give itself another address. Protocol closes
        # idle connections.
        server = uvicorn.Server(uvicorn.Config(
            make_app(Service(desk, models, cfg, retriever), key), http=Protocol, ws="none",
            lifespan="on", log_level="warning", access_log=False, server_header=False,
            limit_concurrency=MOST_CONNECTIONS, backlog=256, proxy_headers=False,
            timeout_graceful_shutdown=cfg.shutdown_seconds, timeout_keep_alive=3600,
        ))  # fmt: skip
        desk.on_failure = lambda: setattr(server, "should_exit", True)
        logging.getLogger("babyllama.serve").addHandler(logging.StreamHandler())
        for model in models.values():
            decoder = model.engine.decoder
            print(f"{model.name}: {shown(model.path)}, {decoder.kind} ({decoder.reason})")
        if retriever:
            print(f"资料: {retriever.describe()}")
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"http://{host}:{port}   (Ctrl-C: 停止 / stop)", flush=True)
        # uvicorn raises a signal that it caught once more when all is done; here nothing comes of
        # it, because to stop when asked is no failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    return int(desk.failed)


def raise_file_limit() -> None:
    """As many open files as the system allows: each connection is one."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    raises: ConfigError if the address cannot be had; one line that says why
    """
    is_6 = ":" in host
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if is_6 else socket.AF_INET, backlog=256,
            dualstack_ipv6=is_6 and socket.has_dualstack_ipv6(),
        )  # fmt: skip
    except OSError as error:
        holder = _holder(port)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}"
            + (f" (by {holder})" if holder else "")
            + "; stop what is there, or choose another with --port"
        ) from None
    # What it accepts sends small answers at once, too.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _holder(port: int) -> str:
    """The program that listens on a port, where the system tells."""
    import psutil

    try:
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid:
                return f"{psutil.Process(found.pid).name()}, process {found.pid}"
    except (psutil.Error, OSError):
        pass  # the name is a courtesy
    return ""


def read_key(path: Path | None) -> str:
    """The first line of a key file; "" where none is named.

    raises: ConfigError if it is missing, or no key
    """
    if path is None:
        return ""
    try:
        lines = from_repo(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: wanted a text file, found {error}") from None
    key = lines[0].strip() if lines else ""
    if len(key) < 16 or not key.isascii():
        raise ConfigError(
            f"--api-key-file {path}: wanted a key of 16 ASCII characters or more in the first "
            f"line, found {len(key)}; python -c 'import secrets; print(secrets.token_urlsafe())' "
            f"makes one"
        )
    return key


if __name__ == "__main__":
    run(main, parse(ServerConfig, __doc__, positional=["checkpoint"]))
