"""Run the app of a server, until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from adaptc.errors import AdaptcError, ConfigError
from adaptc.server.http_app import build_app
from adaptc.server.request_checks import check_packages
from adaptc.server.served import Served


@dataclass(frozen=True)
class HostedApp:
    """An ASGI app that is ready. ``says``: what it does, for the line that names its address. ``stop`` ends it."""

    app: Any
    says: str
    stop: Callable[[], None]


def run_server(open_served: Callable[[], Served], host: str, port: int) -> None:
    """Answer requests at ``host`` and ``port`` with what ``open_served`` opens, as :func:`run_app` does."""
    check_packages()
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # it warns of each request

    def open_app() -> HostedApp:
        served = open_served()
        try:
            served.manager()
            return HostedApp(build_app(served), f"serves {', '.join(served.names)}", served.stop)
        except BaseException:
            served.stop()
            raise

    run_app(open_app, host, port)


def run_app(open_app: Callable[[], HostedApp], host: str, port: int) -> None:
    """Answer requests at ``host`` and ``port``, 0 for a free one, until Ctrl-C or SIGTERM.

    ``open_app`` is called after all else that may fail. Raises ConfigError where the port is taken, and where uvicorn
    is missing.
    """
    check_packages("uvicorn")
    import uvicorn

    with contextlib.closing(_listen(host, port)) as listening:
        hosted = open_app()
        try:
            print(f"adaptc {hosted.says} at http://{host}:{listening.getsockname()[1]}", flush=True)
            uvicorn.Server(uvicorn.Config(hosted.app, log_level="warning")).run(sockets=[listening])
        finally:
            hosted.stop()


def server_in_thread(served: Served) -> contextlib.AbstractContextManager[str]:
    """Run the block beside a server in a thread, as :func:`app_in_thread` does."""
    return app_in_thread(HostedApp(build_app(served), "", served.stop))


@contextlib.contextmanager
def app_in_thread(hosted: HostedApp) -> Iterator[str]:
    """Run the block beside an app in a thread, and give it the app's address, on a free port of this machine."""
    import uvicorn

    listening = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(hosted.app, log_level="warning"))
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
        hosted.stop()


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
