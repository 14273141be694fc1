"""Nested inputs and outputs as flat lists, the way ``torch.export`` does it.

Private torch use, with the public route that was tried: ``torch.utils._pytree`` knows the classes that torch.export has
registered, and a program's specs of inputs and outputs are TreeSpecs of it. No public module reads them.
"""

from __future__ import annotations

from torch.utils import _pytree as pytree

__all__ = ["pytree"]
