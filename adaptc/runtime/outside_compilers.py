"""Calls that ``torch.compile`` leaves alone.

A program is compiled already, or computes in eager mode because that was asked for. A compiler that traces its call
would find locks and memos, and would compile again for each adapter. So ``torch.compile(prog)`` runs ``prog`` as it is:
choose ``backend="inductor"``, or compile ``prog.module()``, which is a plain module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which compilers call and do not look into. Made when first needed: it loads half of a compiler, as
    every program does."""
    return torch.compiler.disable(
        function, reason="an adaptc program runs as it is: use backend='inductor', or compile prog.module()"
    )
