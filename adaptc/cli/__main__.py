"""``python -m adaptc.cli`` is the command."""

from adaptc.cli import main

main()
