# The part of triton that adaptc uses. Bodies of kernels are no ordinary Python, so what they call is Any.
from typing import Any

from triton import knobs as knobs

def cdiv(x: Any, y: Any) -> int: ...
def next_power_of_2(n: int) -> int: ...
def compile(src: Any, target: Any = None, options: dict[str, Any] | None = None) -> Any: ...

jit: Any
