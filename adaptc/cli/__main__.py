"""Run the ``adaptc`` command as ``python -m adaptc.cli``."""

from adaptc.cli import main

main()
