"""Check what a method of the program promises, on small tensors.

The input is a method and the op of a token embedding. A broken promise raises a MethodError that names the function,
what was expected and what was found. ``method_checks`` does the same for methods at layers. Its promise about first
values holds here, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, MethodError
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method_checks import first_values_fit
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.torch_typing import fork_rng, manual_seed

_ROWS, _EXTRA_SIZE, _TOKENS = 3, 2, 5


def check_program_promises(method: ProgramMethod, op: Op) -> None:
    """Raise MethodError for the first promise that is broken."""
    name = type(method).__name__
    try:
        first_values_fit(method, op)
        with torch.no_grad(), fork_rng([]):
            manual_seed(0)
            _check_identity(method, op, name)
            if method.opening() == "prompt":
                _check_prompt(method, op, name)
    except AdaptcError:
        raise
    except Exception as error:  # the method's own code may raise anything
        raise MethodError(f"{name} failed where it was tried: {type(error).__name__}: {error}") from error


def _check_identity(method: ProgramMethod, op: Op, name: str) -> None:
    """Raise MethodError if identity values put a virtual token in front, since the base must stay what it was."""
    W = torch.randn(op.shape, dtype=torch.float64)
    count = method.virtual_token_count(method.identity(op, W, W.dtype))
    if count:
        raise MethodError(
            f"{name}.identity() must put no token in front, so that the base is what it was, and puts {count}"
        )


def _check_prompt(method: ProgramMethod, op: Op, name: str) -> None:
    """Raise MethodError unless prompt() and embedded() agree, for slots of the method's sizes and for larger ones."""
    extra_inputs = {
        n: torch.zeros([_ROWS] * len(e.axes), dtype=e.dtype) for n, e in method.extra_inputs.extras().items()
    }
    for extra_size in (0, _EXTRA_SIZE):
        slots = _random_slots(method, op, extra_size)
        count = method.virtual_token_count(slots)
        rows = method.prompt(slots, extra_inputs)
        if rows.shape[-2:] != (count, op.out_features):
            raise MethodError(
                f"{name}.prompt() must give rows (..., {count}, {op.out_features}), as many as virtual_token_count() "
                f"says for slots of these sizes, and gave {tuple(rows.shape)}. Read sizes off slots, and not off fields"
            )
        value = torch.randn(_ROWS, count + _TOKENS, op.out_features)
        expected = torch.cat([rows.to(value.dtype).expand(_ROWS, -1, -1), value[:, count:]], 1)
        if not torch.allclose(method.inputs_embeds(value, slots, extra_inputs), expected):
            raise MethodError(
                f"{name}.inputs_embeds() must change the first rows to those of prompt(), and no others: what a cache "
                "begins with is all that a program which generates has of them"
            )


def _random_slots(method: ProgramMethod, op: Op, extra_size: int) -> Mapping[str, Tensor]:
    """Return random slot values (zeros for integers), longer by ``extra_size`` along free axes than the method says."""
    out: dict[str, Tensor] = {}
    for name, slot in method.slots(op).items():
        shape = [n + extra_size if i in slot.free else n for i, n in enumerate(slot.shape)]
        is_integer = slot.dtype is not None and not slot.dtype.is_floating_point
        out[name] = torch.zeros(shape, dtype=slot.dtype) if is_integer else torch.randn(shape)
    return out
