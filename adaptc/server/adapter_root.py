"""Find adapters below one directory of a server, by paths that clients give.

Nothing outside of the directory is found, and no message has its place on the server.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from adaptc.errors import short_repr
from adaptc.server.request_checks import RequestRefusedError


class AdapterRoot:
    """The directory ``path``, below which clients may name adapters; None for a server that finds none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def find(self, path: str) -> Path:
        """Return the place of ``path``, which is relative to the directory.

        Raises RequestRefusedError with a status: 403 for a path that is not below the directory, or where there is no
        directory; 404 where nothing is there; 422 for a text that is no path.
        """
        found = self.place(path)
        if not found.exists():
            raise RequestRefusedError(404, f"there is nothing at {short_repr(path)}")
        return found

    def place(self, path: str) -> Path:
        """Return the place of ``path`` whether something is there or not. Raises as :meth:`find` does, but for 404."""
        if self._path is None:
            raise RequestRefusedError(403, "this server loads no adapters: it was started without --adapter-root")
        root = self._path.resolve()
        try:
            found = (root / path).resolve()
            is_inside = found != root and found.is_relative_to(root)
            if is_inside:
                found.exists()  # raises where the text is no path
        except (OSError, ValueError):
            raise RequestRefusedError(422, f"{short_repr(path)} is no path") from None
        if not is_inside:
            raise RequestRefusedError(403, f"{short_repr(path)} is not below the server's adapter root")
        return found

    def find_named(self, name: str) -> Path | None:
        """Return the adapter directory called ``name``; None where there is none.

        A directory has one name: other spellings of its path, such as ``./fr``, would load it once more.
        """
        path = PurePosixPath(name)
        if path.as_posix() != name or ".." in path.parts:
            return None
        try:
            found = self.find(name)
        except RequestRefusedError:
            return None
        return found if (found / "adapter_config.json").is_file() else None

    def without_root(self, text: str) -> str:
        """Return a message without the directory's place on the server."""
        if self._path is not None:
            for place in {str(self._path.resolve()), str(self._path.absolute())}:
                text = text.replace(f"{place}/", "").replace(place, "")
        return text
