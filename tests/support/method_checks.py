"""What must hold of every method at every kind of layer: checks that run over ``method_table``.

Each is given one method at one layer (``subject``), whose oracle is PEFT or torch, and a folder of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc.binding.bind import initial_values
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.method_table import ENTRIES
from tests.support.subject import (
    FILE,
    Subject,
    adapter_parameters,
    assert_close,
    assert_valid,
    base_model_and_program,
    find_file_key,
    loss,
    quiet,
    save_random_adapter,
)


def check_outputs(s: Subject, tmp_path: Path) -> None:
    """The program compiled from the file computes what the oracle does, at other batch sizes than it saw."""
    assert_valid(s.program)
    for batch in (2, 5):
        expected = s.expected(batch)
        assert_close(s.program(*s.args(batch)), expected, s.tolerance)
        assert not torch.allclose(expected, s.base(*s.args(batch)), rtol=1e-3, atol=1e-3)


def check_gradients(s: Subject, tmp_path: Path) -> None:
    """Gradients of every trainable tensor of the adapter, and of nothing else."""
    expected = s.gradients(5)
    program = s.compile(training=True)
    slots = adapter_parameters(program)
    module = program.module()
    module.eval()
    loss(module(*s.args(5))).backward()
    found = {k: t.grad for k, t in slots.items() if t.grad is not None}
    assert found
    unread = set(found) - {find_file_key(found, k) for k in expected}
    # What only noise reads has no gradient in PEFT's inference, and here one of zero.
    assert not unread or (s.attachment.method.trained().is_random() and not any(found[k].any() for k in unread))
    assert set(found) - unread == {find_file_key(found, k) for k in expected}
    for key, grad in expected.items():
        scale, own = max(1.0, float(grad.abs().max())), found[find_file_key(found, key)]
        assert_close(
            own / scale, grad.to(own.dtype).reshape(own.shape) / scale, s.tolerance * 10
        )  # files may have it flat
    trained = {id(p) for p in slots.values()}
    assert all(id(p) in trained for p in module.parameters() if p.requires_grad)


def check_first_values(s: Subject, tmp_path: Path) -> None:
    """A fresh adapter leaves the layer as it is, if the method says so, and trains; slots have the config's shapes."""
    program = s.compile(s.config())
    assert_valid(program)
    found, base = program(*s.args(5)), s.base(*s.args(5))
    if s.entry.is_identity_at_init:
        assert_close(found, base, max(1e-9, s.entry.tolerance))
    assert found.isfinite().all()
    a, op = s.attachment, s.program.ops[s.attachment.id]
    for name, slot in a.method.slots(op).items():
        assert tuple(program.binding.values[a.slots[name]].shape) == slot.shape, name


def check_absent(s: Subject, tmp_path: Path) -> None:
    """The method's identity values leave the layer as it is, exactly up to rounding, and have finite gradients."""
    program = s.compile(s.config())
    identity = initial_values(program.spec(trainable=True), s.config(), methods_by_id={})
    assert not identity.methods
    module = adaptc.AdaptedProgram.bind(program, identity)
    assert_close(module(*s.args(5)), s.base(*s.args(5)), 1e-9)
    adaptc.swap(program, identity)
    assert_valid(program)


def check_swap(s: Subject, tmp_path: Path) -> None:
    """A program compiled for an adapter with other sizes and options computes the oracle's outputs after a swap."""
    program = s.compile(s.config(**s.entry.other_config))
    before = {k: v.clone() for k, v in s.base.state_dict().items()}
    report = adaptc.swap(program, s.directory)
    assert str(report)
    assert_valid(program)
    args = s.args(5)
    assert_close(program(*args), s.expected(5), s.tolerance)
    assert_close(program.module()(*args), s.expected(5), s.tolerance)
    assert all(torch.equal(v, before[k]) for k, v in s.base.state_dict().items())
    back = save_random_adapter(s, s.config(**s.entry.other_config), tmp_path, seed=9)
    adaptc.swap(program, back)
    assert_valid(program)
    assert_close(program(*args), s.compile(back)(*args))


def check_forms(s: Subject, tmp_path: Path) -> None:
    """What a method does to the weight is what its cheaper form does around the layer, in values and gradients."""
    a, op = s.attachment, s.program.ops[s.attachment.id]
    if not s.entry.has_weight_form:
        with pytest.raises(adaptc.ConfigError, match=f"{a.method.name} has no form on the weight"):
            s.compile(form="weight")
        return
    outside = a.method.has_apply_form(op)
    trained = a.method.trained()
    if trained.is_random() or trained.trains_at_layer():  # which no weight has: the forms are equal in inference alone
        with pytest.raises(adaptc.ConfigError, match=r"would lose its (dropout or noise|derivative)"):
            s.compile(form="weight", training=True)
        for form in ("apply", "weight"):
            p = s.compile(form=form)
            assert_valid(p)
            assert_close(p(*s.args(5)), s.expected(5), s.tolerance)
        return
    programs = [s.compile(form=f, training=True) for f in (("apply", "weight") if outside else ("auto", "weight"))]
    assert [p.adaptation.attachments[0].form for p in programs] == ["apply" if outside else "weight", "weight"]
    grads = []
    for p in programs:
        assert_valid(p)
        assert_close(p(*s.args(5)), s.expected(5), s.tolerance)
        module = p.module()
        module.eval()
        loss(module(*s.args(5))).backward()
        grads.append({k: t.grad for k, t in adapter_parameters(p).items()})
        assert torch.equal(adaptc.unload(p)(*s.args(5)), adaptc.unload(s.program)(*s.args(5)))
    for key, g in grads[0].items():
        assert (g is None) == (grads[1][key] is None), key
        if g is not None:
            scale = max(1.0, float(g.abs().max()))
            assert_close(grads[1][key] / scale, g / scale, s.tolerance * 10)


def check_merge(s: Subject, tmp_path: Path) -> None:
    """Merged weights and outputs are the oracle's; unmerge and unload give every bit back."""
    args = s.args(5)
    adapted = s.program(*args)
    if not s.entry.has_weight_form:
        with pytest.raises(adaptc.MergeError, match="cannot be merged"):
            adaptc.merge(s.program)
        with pytest.raises(adaptc.AdaptcError, match="cannot be merged"):
            s.program.bind(s.directory, form="weight")(*args)
        assert torch.equal(s.program(*args), adapted)
        return
    merged = adaptc.merge(s.program)
    assert_valid(merged)
    assert_close(merged(*args), adapted, s.tolerance)
    for key, value in s.merged().items():
        assert_close(merged.state_dict[key].double(), value.double(), s.tolerance)
    back = adaptc.unmerge(merged)
    assert_valid(back)
    assert torch.equal(back(*args), adapted)
    assert all(torch.equal(back.state_dict[k], v) for k, v in s.program.state_dict.items())
    unloaded = adaptc.unload(back)
    assert_valid(unloaded)
    base = s.base.state_dict()
    assert set(unloaded.state_dict) == set(base)
    assert all(v.data_ptr() == base[k].data_ptr() for k, v in unloaded.state_dict.items())
    frozen = copy.deepcopy(s.base).requires_grad_(False)  # weights that want gradients take other kernels
    assert torch.equal(unloaded(*args), torch.export.export(frozen, args).module()(*args))


def check_files(s: Subject, tmp_path: Path) -> None:
    """The file written is the file read, bit for bit, and PEFT takes it with no key missing or left over."""
    written = adaptc.save_adapter(s.program, tmp_path)
    found, given = load_file(written / FILE), load_file(s.directory / FILE)
    assert set(found) == set(given)
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in given.items())
    if not s.has_peft_oracle:
        return
    with quiet():
        model = s.kind.model(s.entry.widths)
        loaded = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
        result = loaded.load_adapter(str(tmp_path), "default")
    state = loaded.state_dict()
    read = {t.data_ptr() for k, t in state.items() if k not in result.missing_keys}  # a tensor may have several names
    own = [
        k
        for k in result.missing_keys
        if "base_layer" not in k
        and not k.startswith("base_model.model.layer.weight")
        and state[k].data_ptr() not in read
    ]
    assert not result.unexpected_keys
    assert not [k for k in own if any(p in k for p in ("lora", "vera", "hada", "lokr", "oft", "ia3", ".default"))]
    assert_close(loaded(*s.args(5)), s.program(*s.args(5)), s.tolerance)


def check_reload(s: Subject, tmp_path: Path) -> None:
    """A program read from disk is understood from its graph: it runs, swaps, also by name, merges and unloads."""
    args = s.args(5)
    file = adaptc.save(s.program, tmp_path / "program.pt2", adapters={"own": s.directory, "bound": s.program.binding})
    loaded = adaptc.load(file)
    assert_valid(loaded)
    assert list(loaded.adaptation.attachments) == list(s.program.adaptation.attachments)
    assert torch.equal(loaded(*args), s.program(*args))
    if s.entry.has_weight_form:
        assert torch.equal(adaptc.merge(loaded)(*args), adaptc.merge(s.program)(*args))
    for adapter in (s.directory, "own", "bound"):
        adaptc.swap(loaded, adapter)
        assert_valid(loaded)
        assert torch.equal(loaded(*args), s.program(*args))


def check_dtypes(s: Subject, tmp_path: Path) -> None:
    """Above a half-precision base, slots are float32 and outputs have the base's dtype and its rounding."""
    exact, scale = s.expected(5), 1.0
    for dtype, autocast in ((torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)):
        plain = base_model_and_program(s.layer, s.entry.widths, dtype)[1]
        args = tuple(a.to(dtype) if a.is_floating_point() else a for a in s.args(5))
        program = adaptc.compile(plain, s.directory, autocast_adapter_dtype=autocast)
        assert_valid(program)
        slot = torch.float32 if autocast else dtype
        for key, p in adapter_parameters(program).items():
            assert p.dtype == slot or not p.is_floating_point(), key
        out = program(*args)
        assert out.dtype == dtype
        if s.entry.follows_from_base:
            rounded = copy.deepcopy(base_model_and_program(s.layer, s.entry.widths, dtype)[0]).double()
            same = tuple(a.double() if a.is_floating_point() else a for a in args)
            exact = adaptc.compile(rounded, s.directory, example_inputs=same)(*same)
        # What rounding every weight, input and adapter tensor once can do; an omitted factor does far more.
        bound = (60 if dtype == torch.bfloat16 else 2000) * torch.finfo(dtype).eps * scale
        assert float((out.double() - exact).abs().max()) < bound
        if not s.entry.has_weight_form:
            continue
        merged = adaptc.merge(program)
        assert all(v.dtype == dtype for v in merged.state_dict.values() if v.is_floating_point())
        assert float((merged(*args).double() - exact).abs().max()) < bound


def check_rows(s: Subject, tmp_path: Path) -> None:
    """In a bank of two adapters each row of a batch computes what its adapter alone does, none the base, and a mix the
    weighted sum of what they change; or the layer is refused by name."""
    program = s.compile(s.config(**s.entry.other_config))
    two = save_random_adapter(s, s.config(**s.entry.other_config), tmp_path, seed=9)
    if s.layer == "functional" or not s.entry.rows:
        with pytest.raises(adaptc.TargetError, match="another adapter for each row"):
            program.bank({"one": s.directory})
        return
    bank = program.bank({"one": s.directory, "two": two})
    args = s.args(5)
    found = bank(*args, adapters=["one", None, "two", {"one": 0.5, "two": -0.25}, "one"])
    one, other, base = s.program(*args), s.compile(two)(*args), s.base(*args)
    behind = [torch.atanh(t[3]) for t in (base, one, other)]  # a tanh stands behind the layer
    told = torch.stack([t[3].abs() < 0.9999 for t in (base, one, other)]).all(0)  # where it lets that be told
    assert told.any()
    mix = torch.tanh(behind[0] + 0.5 * (behind[1] - behind[0]) - 0.25 * (behind[2] - behind[0]))
    mix = torch.where(told, mix, found[3])
    assert_close(found, torch.stack([one[0], base[1], other[2], mix, one[4]]), 1e-8)


def check_quantized_base(s: Subject, tmp_path: Path) -> None:
    """On a quantised weight an adapter does what it does on a plain weight of the same values."""
    stored, plain = copy.deepcopy(s.base), copy.deepcopy(s.base)
    for name, weight in list(stored.layer.named_parameters()):
        if weight.ndim > 1:
            quantized = QuantizedTensor.quantize(weight.detach(), IntegerScheme())
            setattr(stored.layer, name, torch.nn.Parameter(quantized, requires_grad=False))
            setattr(plain.layer, name, torch.nn.Parameter(quantized.dequantize()))
    options = {"example_inputs": s.args(3)}
    program, expected = (adaptc.compile(m, s.directory, **options) for m in (stored, plain))
    assert_valid(program)
    args = s.args(5)
    assert_close(program(*args), expected(*args), s.tolerance)
    assert not torch.allclose(program(*args), s.program(*args), rtol=1e-6, atol=1e-6)
    path = adaptc.save(program, tmp_path / "program.pt2")
    assert_close(adaptc.load(path)(*args), expected(*args), s.tolerance)
    assert_close(torch.export.load(path).module()(*args), expected(*args), s.tolerance)
    if s.entry.has_weight_form:
        kept = adaptc.merge(program, keep="residual")
        assert_close(kept(*args), expected(*args), s.tolerance)
        merged = adaptc.merge(program, dequantize=True)
        assert_close(merged(*args), adaptc.merge(expected)(*args), s.tolerance)
        assert torch.equal(adaptc.unmerge(merged)(*args), program(*args))
    grads = []
    for model in (stored, plain):
        trained = adaptc.compile(model, s.directory, training=True, **options)
        module = trained.module()
        module.eval()
        loss(module(*args)).backward()
        grads.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    for name, grad in grads[1].items():
        assert_close(grads[0][name], grad, max(1.0, float(grad.abs().max())) * s.tolerance * 10)


CHECKS = [
    check_outputs,
    check_gradients,
    check_first_values,
    check_absent,
    check_swap,
    check_forms,
    check_merge,
    check_files,
    check_reload,
    check_dtypes,
    check_rows,
    check_quantized_base,
]


def cases(names: list[str] | None = None) -> list[Any]:
    """(entry, layer) of the whole table, or of the methods ``names``."""
    chosen = [e for e in ENTRIES if names is None or e.name in names]
    return [pytest.param(e.name, n, id=f"{e.name}-{n}") for e in chosen for n in e.layers()]


def refusals() -> list[tuple[str, str]]:
    return [(e.name, n) for e in ENTRIES for n in e.refused_layers]
