"""Run the app of a server, until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

from adaptc.errors import AdaptcError, ConfigError
from adaptc.server.http_app import build_app, check_packages
from adaptc.server.served import Served


def run_server(open_served: Callable[[], Served], host: str, port: int) -> None:
    """Answer requests at ``host`` and ``port``, 0 for a free one, until Ctrl-C or SIGTERM.

    ``open_served`` opens what is served, after all else that may fail. Raises ConfigError where the port is taken, and
    where the packages of the extra ``serve`` are missing.
    """
    check_packages()
    import uvicorn

    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # it warns of each request
    with contextlib.closing(_listen(host, port)) as listening:
        served = open_served()
        try:
            served.manager()
            address = f"http://{host}:{listening.getsockname()[1]}"
            print(f"adaptc serves {', '.join(served.names)} at {address}", flush=True)
            uvicorn.Server(uvicorn.Config(build_app(served), log_level="warning")).run(sockets=[listening])
        finally:
            served.stop()


@contextlib.contextmanager
def server_in_thread(served: Served) -> Iterator[str]:
    """Run the block beside a server in a thread, and give it the server's address, on a free port of this machine."""
    app = build_app(served)
    import uvicorn

    listening = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise AdaptcError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listening.close()
        served.stop()


def _listen(host: str, port: int) -> socket.socket:
    with contextlib.ExitStack() as opened:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            made = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, port))
            made.listen(128)  # so that clients wait until the server answers
        except OSError as error:
            raise ConfigError(f"no server can listen at {host}:{port} ({error.strerror or error})") from error
        opened.pop_all()
        return made
