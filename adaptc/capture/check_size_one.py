"""Find out whether a program computes at sizes of 1 what its model computes.

torch's tracer takes free sizes for two or more. A model that branches on a size of 1 is traced on its other branch,
with no guard that says so. Only running both tells whether such a branch matters. Most (no causal mask for one token)
change nothing. The model's tensors and torch's random state are unchanged afterwards.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc.capture.given_inputs import collect_tensors
from adaptc.capture.model_state import can_run, preserve_state
from adaptc.capture.run_graph import guarded_module, run_graph
from adaptc.errors import AdaptcWarning, CaptureError
from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.graph.pytree import pytree
from adaptc.progress import stage


def differing_sizes(model: nn.Module, program: ExportedProgram, args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """Return one line for each input and axis at whose size 1 the program and the model differ.

    The example inputs are cut to size 1 along each free size in turn, and along all at once.
    """
    axes = _free_axes(program) if can_run(model, args, kwargs) else {}
    if not axes:
        return []
    with stage(f"checking the program of {type(model).__name__} against the model at sizes of one"):
        return _find_differing(model, program, args, kwargs, axes)


def guard_sizes_of_one(
    model: nn.Module,
    program: ExportedProgram,
    args: tuple,
    kwargs: Mapping[str, Any],
    export_guarded: Callable[[], ExportedProgram],
    training: bool,
) -> ExportedProgram:
    """Return ``program``, or one with guards where ``program`` computes something else than ``model`` at sizes of 1.

    ``export_guarded`` exports the model with such guards. Warns where the guards do not tell the two apart.
    """
    differences = [] if training else differing_sizes(model, program, args, kwargs)
    if not differences:
        return program
    guarded = None
    with contextlib.suppress(CaptureError), stage(f"exporting {type(model).__name__} with guards on sizes of one"):
        guarded = export_guarded()
    if guarded is not None and not differing_sizes(model, guarded, args, kwargs):
        return guarded
    warnings.warn(
        f"{type(model).__name__} computes something else for {', '.join(differences)} than for larger sizes, and "
        "torch could not tell why: calls of this size compute what those of larger ones do. Capture it for such sizes "
        "alone, with example_inputs of this size and dynamic_shapes=None",
        AdaptcWarning,
        stacklevel=4,
    )
    return program


def has_same_outputs(
    model: nn.Module, program: ExportedProgram, args: tuple, kwargs: Mapping[str, Any], training: bool
) -> bool:
    """Return whether a program traced on two rows gives the model's outputs on the user's example of one row.

    A model that branches on a size of 1 is traced on its other branch, without a guard that says so.
    """
    tensors = collect_tensors((args, kwargs, list(model.parameters())))
    if training or any(t.device.type == "meta" for t in tensors):
        return True
    with run_without_effects(model):
        expected, expected_tree = flatten_results(model(*args, **kwargs))
        try:
            found, found_tree = flatten_results(guarded_module(program)(*args, **kwargs))
        except Exception:  # guards of a branch that the example does not take raise it
            return False
    return expected_tree == found_tree and all(
        e.shape == f.shape and torch.allclose(e, f, rtol=1e-2, atol=1e-3, equal_nan=True)
        if isinstance(e, Tensor)
        else e == f
        for e, f in zip(expected, found, strict=True)
    )


def _find_differing(
    model: nn.Module,
    program: ExportedProgram,
    args: tuple,
    kwargs: Mapping[str, Any],
    axes: Mapping[str, list[tuple[int, int]]],
) -> list[str]:
    names = list(user_inputs(program))
    with run_without_effects(model) as restore:

        def is_same(run: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> bool:
            return _outputs_match(model, run, args, kwargs, restore)

        def find_differences(run: Callable[..., Any]) -> list[str]:
            apart = [where for where in axes.values() if not is_same(run, *_cut_to_one(args, kwargs, where))]
            if apart:
                return [f"size 1 of axis {axis} of input {names[i]!r}" for where in apart for i, axis in where]
            everywhere = [w for where in axes.values() for w in where]
            alike = len(axes) == 1 or is_same(run, *_cut_to_one(args, kwargs, everywhere))
            return [] if alike else ["sizes of 1 alone"]

        # The graph checks no guards. A difference that it shows counts only where the guarded module shows it, too.
        if not find_differences(partial(run_graph, program)):
            return []
        module = guarded_module(program)
        out = find_differences(module)
        # A difference counts only where both agree on the uncut example. Otherwise the model may be random, or torch
        # may have confused module names.
        return out if out and is_same(module, args, kwargs) else []


def _free_axes(program: ExportedProgram) -> dict[str, list[tuple[int, int]]]:
    """Return for each free size its (flat input, axis) pairs. Sizes from which other sizes are computed are left
    out."""
    found: dict[str, list[tuple[int, int]]] = {}
    derived_from: set[str] = set()
    for i, value in enumerate(user_inputs(program).values()):
        sizes: Any = value.shape if isinstance(value, Tensor) else ()
        for axis, size in enumerate(sizes):
            if not isinstance(size, int):
                text = str(size)
                if text.isidentifier():
                    found.setdefault(text, []).append((i, axis))
                else:
                    derived_from |= {str(s) for s in size.node.expr.free_symbols}
    return {s: where for s, where in found.items() if s not in derived_from}


def _cut_to_one(args: tuple, kwargs: Mapping[str, Any], axes: list[tuple[int, int]]) -> tuple[tuple, dict[str, Any]]:
    flat, spec = pytree.tree_flatten((args, dict(kwargs)))
    for i, axis in axes:
        flat[i] = flat[i].narrow(axis, 0, 1)
    flat = [v.clone() if isinstance(v, Tensor) else v for v in flat]
    return pytree.tree_unflatten(flat, spec)


@contextlib.contextmanager
def run_without_effects(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Run the block without gradients, and restore ``model`` afterwards.

    The block may run the model, or a program of its tensors. It is given the function of :func:`preserve_state` that
    restores the model at once.
    """
    with preserve_state(model) as restore, torch.no_grad():
        yield restore


def _outputs_match(
    model: nn.Module, run: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], restore: Callable[[], None]
) -> bool:
    """Return whether both compute the same. Where one of them refuses a size, they count as the same."""
    copies = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    try:
        expected, expected_tree = flatten_results(model(*args, **kwargs))
        restore()
        found, found_tree = flatten_results(run(*copies[0], **copies[1]))
    except Exception:  # a model may raise anything at such sizes
        return True
    finally:
        restore()
    if expected_tree != found_tree:  # features of each image apart, and of all in one tensor
        return _match_by_name(pytree.tree_unflatten(expected, expected_tree), pytree.tree_unflatten(found, found_tree))
    return all(map(_is_close, expected, found))


def _match_by_name(expected: Any, found: Any) -> bool:
    wanted, got = joined_outputs(expected), joined_outputs(found)
    return wanted.keys() == got.keys() and all(_is_close(value, got[name]) for name, value in wanted.items())


def joined_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return copies of the float tensors in ``outputs`` by name.

    Tensors of one list are joined along their first dimension, and flattened before that where other sizes differ.
    """
    found: dict[str, list[Tensor]] = {}
    for path, value in pytree.tree_leaves_with_path(outputs):
        if isinstance(value, Tensor) and value.is_floating_point():
            keys = [str(key).strip(".[]'") for key in path]
            while keys and keys[-1].isdigit():
                keys.pop()
            found.setdefault(".".join(keys), []).append(value)
    return {name: _join(parts) for name, parts in found.items()}


def _join(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0].clone()
    return torch.cat(parts if len({p.shape[1:] for p in parts}) == 1 else [p.flatten() for p in parts])


def flatten_results(value: Any) -> tuple[list[Any], Any]:
    """Return the flat results and their tree. Tensors are copied, since a result may be part of a buffer."""
    flat, tree = pytree.tree_flatten(value)
    return [v.clone() if isinstance(v, Tensor) else v for v in flat], tree


def _is_close(expected: Any, found: Any) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return type(expected) is type(found)
    if expected.shape != found.shape:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return True
    size = float(expected.abs().nan_to_num().max())
    # Both use the same kernels, and a branch that matters changes the leading digits.
    tolerance = 1e-3 if expected.itemsize >= 4 else 5e-2
    return torch.allclose(expected.float(), found.float(), rtol=0, atol=tolerance * max(size, 1e-3), equal_nan=True)
