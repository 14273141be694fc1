"""The ``adaptc`` command: programs and adapters as files."""

from adaptc.cli import (
    chat,
    engine_commands,
    pictures,
    programs,
    runtime_commands,
    serve,
    training_commands,
    with_adapters,
)
from adaptc.cli.app import app

__all__ = [
    "app",
    "chat",
    "engine_commands",
    "main",
    "pictures",
    "programs",
    "runtime_commands",
    "serve",
    "training_commands",
    "with_adapters",
]


def main() -> None:
    """Run the command; it is the entry point of the console script."""
    app(prog_name="adaptc")
