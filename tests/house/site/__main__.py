"""Build the site: ``make docs``."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.house.public import ROOT
from tests.house.sections import faults
from tests.house.site.pages import write_pages

SETTINGS = ROOT / "tests" / "house" / "site" / "mkdocs.yml"


def main() -> int:
    """Check the docstrings, write the pages, and run mkdocs; return the exit status."""
    if found := list(faults()):
        print(*found, sep="\n")
        return 1
    write_pages(ROOT / "build" / "pages")
    # Not --quiet: with it, warnings are not counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(SETTINGS)]
    # The theme speaks of its successor at every build.
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
