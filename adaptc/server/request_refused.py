"""Define the error of a request that a server refuses."""

from __future__ import annotations

from adaptc.errors import AdaptcError


class RequestRefusedError(AdaptcError):
    """A request that is answered with an HTTP status and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
