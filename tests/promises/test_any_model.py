"""Promise: whatever the model, an adapter computes what its method says, or is refused by the name of its site.

Random models and methods against a functional reference in float64: the model with the weights and biases that the
method's own mathematics makes, and PEFT's model where PEFT has all the layers.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import adaptc
from tests.support.method_table import ENTRIES, Entry
from tests.support.random_models import RandomModel, blocks_of, has_nested_blocks
from tests.support.subject import adapter_parameters, assert_valid, quiet

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Complex modules are a new feature:UserWarning",
    "ignore::adaptc.AdaptcWarning",
)

DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.complex64)
#: largest error, relative to the largest output; in bfloat16 the mean one, since single outputs have steep functions
BOUNDS = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 0.05, torch.complex64: 2e-3}
WIDE = {d: torch.complex128 if d.is_complex else torch.float64 for d in DTYPES}


def values(entry: Entry, program: adaptc.AdaptedProgram, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, p in adapter_parameters(program).items():
            if entry.random_values is not None and p.is_floating_point():
                p.copy_(entry.random_tensor(key, p))
            elif p.is_floating_point() or p.is_complex():
                p.add_(torch.randn(p.shape, dtype=torch.float64).to(p.dtype) * 0.2)
                if p.is_complex():
                    p.add_(torch.randn_like(p) * 0.2)


def made(program: adaptc.AdaptedProgram, model: RandomModel) -> dict[str, dict[str, Tensor]]:
    """Layer -> the parameters that the method makes of the base's, in the widest dtype."""

    def wide(t: Tensor) -> Tensor:
        dtype = torch.complex128 if t.is_complex() else torch.float64 if t.is_floating_point() else t.dtype
        return t.detach().to(dtype)

    out: dict[str, dict[str, Tensor]] = {}
    for a in program.adaptation.attachments:
        op, method = program.ops[a.id], a.method.evaluated()
        slots = {n: wide(program.binding.values[f]) for n, f in a.slots.items()}
        scale = None if a.scale_slot is None else wide(program.binding.values[a.scale_slot])
        layer: Any = model.get_submodule(a.module)
        weight, bias = op.canonical(wide(layer.weight)), getattr(layer, "bias", None)
        found = {"weight": op.stored(method.weight(op, weight, slots, scale))}
        own = None if bias is None else wide(bias)
        new = method.bias_over(op, weight, own, own, slots, scale)
        if new is not None:
            found["bias"] = new
        out[a.module] = found
    return out


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    wide = found.detach().to(expected.dtype)
    errors = (wide - expected).abs()
    error = float(errors.mean() if dtype == torch.bfloat16 else errors.max()) / max(1.0, float(expected.abs().max()))
    assert error < BOUNDS[dtype], f"{what}: {error}"


def compiled(model: RandomModel, config: Any) -> adaptc.AdaptedProgram | adaptc.AdaptcError:
    try:
        return adaptc.compile(model, config, example_inputs=model.inputs(3, 5))
    except adaptc.AdaptcError as error:
        return error


def check(seed: int, branches: bool) -> str:
    """One random model and method; returns what became of it."""
    draw = Random(seed)
    dtype, entry = draw.choice(DTYPES), draw.choice([e for e in ENTRIES if e.has_weight_form])
    model = RandomModel(seed, dtype, branches)
    names = list(model.kinds)
    targets = draw.sample(names, draw.randint(1, len(names)))
    cls = getattr(adaptc, entry.cls)
    config = cls(**{**entry.config, "target_modules": targets})
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    program = compiled(model, config)
    if isinstance(program, adaptc.CaptureError):
        return "uncaptured"  # torch cannot, whoever asks: branches in branches, and views that leave one
    if isinstance(program, adaptc.AdaptcError):
        assert not isinstance(program, adaptc.PassError), str(program)
        assert any(n in str(program) for n in targets), str(program)
        return "refused"
    assert_valid(program)
    assert {a.module for a in program.adaptation.attachments} == set(targets)
    values(entry, program, seed)
    with tempfile.TemporaryDirectory() as folder:
        first = Path(adaptc.save_adapter(program, Path(folder) / "first"))
        adaptc.swap(program, first)
        reference = model.with_call_parameters(made(program, model))
        loose = torch.bfloat16 if dtype == torch.float32 and "autocast" in blocks_of(model.steps) else dtype
        # A captured program may be fixed to the sizes of its example.
        args = model.inputs(3, 5)
        with torch.no_grad():
            widened = [a if model.takes_ids else a.to(WIDE[dtype]) for a in args]
            expected, out = reference(*widened), program(*args)
            close(out, expected, loose, "program")
            close(program.module()(*args), expected, loose, "module")
            merged = adaptc.merge(program)
            assert_valid(merged)
            close(merged(*args), expected, loose, "merged")
            back = adaptc.unmerge(merged)
            assert torch.equal(back(*args), out)
            assert all(torch.equal(back.state_dict[k], v) for k, v in program.state_dict.items())
            values(entry, program, seed + 1)
            second = Path(adaptc.save_adapter(program, Path(folder) / "second"))
            for path in (second, first, second, first):
                adaptc.swap(program, path)
            assert_valid(program)
            assert torch.equal(program(*args), out)
            if draw.random() < 0.2 and not has_nested_blocks(model.steps):
                loaded = adaptc.load(adaptc.save(program, Path(folder) / "program.pt2"))
                # Up to rounding: kernels depend on how a file's tensors lie in memory.
                torch.testing.assert_close(loaded(*args), out)
                close(adaptc.merge(loaded)(*args), expected, loose, "merged after loading")
            unloaded = adaptc.unload(program)
            close(unloaded(*args), model.with_call_parameters({})(*widened), loose, "unloaded")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        if has_peft(entry, model, targets, dtype):
            with quiet(), torch.no_grad():
                twin = copy.deepcopy(model)
                twin.python_branches = True
                theirs = peft.PeftModel.from_pretrained(twin, str(first)).eval()
                close(out, theirs(*args).to(expected.dtype), loose, "PEFT")
            return "as PEFT"
    return "right"


def has_peft(entry: Entry, model: RandomModel, targets: list[str], dtype: torch.dtype) -> bool:
    """Whether PEFT's own model answers the same question: all layers are its, none of them tied."""
    tied = len({id(p) for p in model.parameters()}) < sum(1 for _ in model.named_parameters(remove_duplicate=False))
    kinds = {"conv2d": "conv2d_odd", "conv1d_groups": ""}
    # PEFT computes some of them in float32, whatever the dtype.
    exact = dtype != torch.float64 or entry.tolerance <= 1e-9
    return not tied and exact and all(kinds.get(model.kinds[n], model.kinds[n]) in entry.peft for n in targets)


@pytest.mark.parametrize("seed", range(9))
def test_random_models(seed):
    check(seed, branches=False)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(40))
def test_many_random_models(block):
    found = [check(1000 + 50 * block + i, branches=i % 2 == 1) for i in range(50)]
    assert found.count("right") + found.count("as PEFT") > 15, found
    assert found.count("uncaptured") < 10, found


def test_what_is_drawn():
    """The draws reach every kind of layer and block, and most of them are adapted and not refused."""
    models = [RandomModel(s, torch.float64, True) for s in range(120)]
    assert {k for m in models for k in m.kinds.values()} >= {"linear", "linear_nobias", "addmm", "embedding", "conv1d"}
    steps = {k for m in models for k in blocks_of(m.steps)}
    assert steps == {"call", "norm", "read", "add", "no_grad", "autocast", "cond", "map"}
