"""Keep ``torch.compile`` from tracing the calls of programs.

A program is compiled already, or runs in eager mode because that was asked for. A compiler that traces its call would
find locks and caches, and would compile again for each adapter. So ``torch.compile(prog)`` runs ``prog`` as it is.
To compile, choose ``backend="inductor"``, or compile ``prog.module()``, which is a plain module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def not_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` as one that compilers call without tracing it.

    It is made when first needed, since that imports much of torch's compiler.
    """
    return torch.compiler.disable(
        function, reason="an adaptc program runs as it is: use backend='inductor', or compile prog.module()"
    )
