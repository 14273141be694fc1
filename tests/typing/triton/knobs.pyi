from typing import Any

runtime: Any
nvidia: Any
