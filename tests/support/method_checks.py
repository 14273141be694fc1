"""What must hold of every method at every kind of layer: checks that run over ``method_table``.

The oracle is PEFT where it has the layer, or else torch itself: the layer called with the weight that the method's
``weight`` makes of its own, or for a method without one what its ``apply`` makes of the layer's output. All answer the
same questions: outputs, gradients of the adapter tensors, merged weights.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc.methods import config_class
from adaptc.passes.ir.attachment import Attachment
from tests.support.method_table import BY_NAME, ENTRIES, LAYERS, Entry, Layer

FILE = "adapter_model.safetensors"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Whatever PEFT has to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loss(out: Tensor) -> Tensor:
    """A number that weighs every output differently."""
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def sound(program: torch.export.ExportedProgram) -> None:
    program.graph.lint()
    program.validate()


def targets(layer: str) -> dict[str, Any]:
    return {"target_parameters": ["layer.matrices"]} if layer == "experts" else {"target_modules": ["layer"]}


def adapter_parameters(program: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    """Key in files -> the program's own tensor, of the trainable slots."""
    out = {}
    for a in program.adaptation.attachments:
        for name, slot in a.method.slots(program.ops[a.id]).items():
            if slot.trainable:
                out[a.file_key(name, slot)] = program.binding.values[a.slots[name]]
    return out


@cache
def captured(layer: str, widths: tuple[int, int], dtype: torch.dtype) -> tuple[nn.Module, adaptc.AdaptedProgram]:
    """A model of one layer, and its program without an adapter: captured once for all methods."""
    model = LAYERS[layer].model(widths).to(dtype)
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in LAYERS[layer].args(widths, 3))
    config = adaptc.LoraConfig(r=3, **targets(layer))
    return model, adaptc.unload(adaptc.compile(model, config, example_inputs=args))


@dataclass(eq=False)
class Subject:
    """One entry at one layer: a model, an adapter with random tensors on disk, and what they compute together."""

    entry: Entry
    layer: str

    @property
    def kind(self) -> Layer:
        return LAYERS[self.layer]

    @property
    def by_peft(self) -> bool:
        return self.layer in self.entry.peft

    @property
    def tolerance(self) -> float:
        return self.entry.tolerance if self.by_peft else 1e-9

    def args(self, batch: int) -> tuple[Tensor, ...]:
        return self.kind.args(self.entry.widths, batch)

    @property
    def base(self) -> nn.Module:
        return captured(self.layer, self.entry.widths, torch.float64)[0]

    def config(self, **changes: Any) -> Any:
        cls = getattr(adaptc, self.entry.cls)
        return cls(**{**targets(self.layer), **self.entry.config, **changes})

    def compile(self, adapter: Any = None, **options: Any) -> adaptc.AdaptedProgram:
        adapter = self.directory if adapter is None else adapter
        return adaptc.compile(captured(self.layer, self.entry.widths, torch.float64)[1], adapter, **options)

    @cached_property
    def wrapped(self) -> Any:
        """PEFT's model with random tensors."""
        cls = getattr(peft, self.entry.cls)
        with quiet():
            torch.manual_seed(7)
            model = peft.get_peft_model(
                self.kind.model(self.entry.widths), cls(**{**targets(self.layer), **self.entry.config})
            )
            saved = {short(k) for k in peft.get_peft_model_state_dict(model)}
        torch.manual_seed(5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                # PEFT may train what no file of its holds (AdaLoRA's number of ranks above a float64 base).
                p.requires_grad_(p.requires_grad and not saved.isdisjoint(keys_of(short(name))))
                if p.requires_grad:
                    p.copy_(self.entry.fill(name, p))
        return model.eval()

    @cached_property
    def directory(self) -> Path:
        """An adapter written by PEFT, or by adaptc where PEFT has none."""
        self._temporary = tempfile.TemporaryDirectory()
        path = Path(self._temporary.name)
        if self.by_peft:
            with quiet():
                self.wrapped.save_pretrained(str(path))
            return path
        return randomized(self, self.config(), path)

    @cached_property
    def program(self) -> adaptc.AdaptedProgram:
        return self.compile()

    @property
    def attachment(self) -> Attachment:
        (a,) = self.program.adaptation.attachments
        return a

    # -- the oracle's answers -----------------------------------------------------------------------------------------

    def named(self, slots: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The slots and the scale of the site, with these in their place."""
        a, values = self.attachment, self.program.binding.values
        found = {
            n: slots.get(n, values[f].double() if values[f].is_floating_point() else values[f])
            for n, f in a.slots.items()
        }
        return found, None if a.scale_slot is None else values[a.scale_slot].double()

    def made(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's parameters as the method makes them of the base's and of these slots."""
        a, op = self.attachment, self.program.ops[self.attachment.id]
        (named, scale), method, layer = self.named(slots), a.method, self.base.layer
        weight = getattr(layer, a.param)
        out = {a.param: op.stored(method.weight(op, op.canonical(weight.detach()), named, scale))}
        bias = getattr(layer, "bias", None)
        if method.has_bias() and op.callable:
            new = method.bias(op, None if bias is None else bias.detach(), named, scale)
            if new is not None:
                out["bias"] = new
        return out

    def forward(self, slots: dict[str, Tensor], *args: Tensor) -> Tensor:
        """The model with those parameters, or with what the method makes of the layer's output, run by torch."""
        if not self.entry.weight:
            return self.behind(slots, *args)
        made, model = self.made(slots), self.base
        if any(t.shape != getattr(model.layer, n).shape for n, t in made.items()):  # dense where there were groups
            model = copy.deepcopy(model)
            model.layer.groups = 1
        return torch.func.functional_call(model, {f"layer.{n}": t for n, t in made.items()}, args)

    def behind(self, slots: dict[str, Tensor], *args: Tensor) -> Tensor:
        a, op = self.attachment, self.program.ops[self.attachment.id]
        (named, scale), layer = self.named(slots), self.base.layer
        weight = op.canonical(getattr(layer, a.param).detach())

        def hook(_: nn.Module, given: tuple[Tensor], y: Tensor) -> Tensor:
            return a.method.apply(op, given[0], y, weight, layer.bias, named, scale)

        handle = layer.register_forward_hook(hook)
        try:
            return self.base(*args)
        finally:
            handle.remove()

    def expected(self, batch: int) -> Tensor:
        args = self.args(batch)
        with torch.no_grad():
            return self.wrapped(*args) if self.by_peft else self.forward({}, *args)

    def gradients(self, batch: int) -> dict[str, Tensor]:
        args = self.args(batch)
        if self.by_peft:
            self.wrapped.zero_grad()
            loss(self.wrapped(*args)).backward()
            named = {n: p.grad for n, p in self.wrapped.named_parameters() if p.requires_grad and p.grad is not None}
            return {short(n): g for n, g in named.items()}
        a, op = self.attachment, self.program.ops[self.attachment.id]
        specs = a.method.slots(op)
        leaves = {
            n: self.program.binding.values[f].detach().double().requires_grad_()
            for n, f in a.slots.items()
            if specs[n].trainable
        }
        loss(self.forward(leaves, *args)).backward()
        return {a.file_key(n, specs[n]): t.grad for n, t in leaves.items() if t.grad is not None}

    def merged(self) -> dict[str, Tensor]:
        if not self.by_peft:
            return {f"layer.{n}": t for n, t in self.made({}).items()}
        with quiet():
            return copy.deepcopy(self.wrapped).merge_and_unload().state_dict()


def short(name: str) -> str:
    """The key in files of a parameter of PEFT's model."""
    for prefix in ("base_model.model.", "base_model."):
        name = name.removeprefix(prefix)
    parts = [p for p in name.split(".") if p != "default"]
    return ".".join(parts)


def keys_of(name: str) -> tuple[str, ...]:
    """PEFT drops ``weight`` from some keys of its files, and the site from those of tensors that all sites share."""
    return (name, name.removesuffix(".weight"), name.rpartition(".")[2])


def key_of(found: dict[str, Tensor], name: str) -> str:
    return next((n for n in keys_of(name) if n in found), name)


def randomized(s: Subject, config: Any, path: Path, seed: int = 5) -> Path:
    """An adapter of this config with random tensors, written by adaptc."""
    torch.manual_seed(seed)
    program = s.compile(config)
    with torch.no_grad():
        for key, p in adapter_parameters(program).items():
            if p.is_floating_point():
                p.copy_(s.entry.fill(key, p))
    return Path(adaptc.save_adapter(program, path))


@cache
def subject(entry: str, layer: str) -> Subject:
    return Subject(BY_NAME[entry], layer)


# -- the checks -------------------------------------------------------------------------------------------------------


def check_outputs(s: Subject, tmp_path: Path) -> None:
    """The program compiled from the file computes what the oracle does, at other batch sizes than it saw."""
    sound(s.program)
    for batch in (2, 5):
        expected = s.expected(batch)
        close(s.program(*s.args(batch)), expected, s.tolerance)
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
    assert set(found) == {key_of(found, k) for k in expected}
    for key, grad in expected.items():
        scale, own = max(1.0, float(grad.abs().max())), found[key_of(found, key)]
        close(own / scale, grad.to(own.dtype).reshape(own.shape) / scale, s.tolerance * 10)  # files may have it flat
    trained = {id(p) for p in slots.values()}
    assert all(id(p) in trained for p in module.parameters() if p.requires_grad)


def check_first_values(s: Subject, tmp_path: Path) -> None:
    """A fresh adapter leaves the layer as it is, if the method says so, and trains; slots have the config's shapes."""
    program = s.compile(s.config())
    sound(program)
    found, base = program(*s.args(5)), s.base(*s.args(5))
    if s.entry.neutral:
        close(found, base, max(1e-9, s.entry.tolerance))
    assert found.isfinite().all()
    a, op = s.attachment, s.program.ops[s.attachment.id]
    for name, slot in a.method.slots(op).items():
        assert tuple(program.binding.values[a.slots[name]].shape) == slot.shape, name


def check_absent(s: Subject, tmp_path: Path) -> None:
    """The method's identity values leave the layer as it is, exactly up to rounding, and have finite gradients."""
    from adaptc.binding.bind import first_values

    program = s.compile(s.config())
    identity = first_values(program.spec(trainable=True), s.config(), only={})
    assert not identity.methods
    module = adaptc.AdaptedProgram.bind(program, identity)
    close(module(*s.args(5)), s.base(*s.args(5)), 1e-9)
    adaptc.swap(program, identity)
    sound(program)


def check_swap(s: Subject, tmp_path: Path) -> None:
    """A program compiled for an adapter with other sizes and options computes the oracle's outputs after a swap."""
    program = s.compile(s.config(**s.entry.other))
    before = {k: v.clone() for k, v in s.base.state_dict().items()}
    report = adaptc.swap(program, s.directory)
    assert str(report)
    sound(program)
    args = s.args(5)
    close(program(*args), s.expected(5), s.tolerance)
    close(program.module()(*args), s.expected(5), s.tolerance)
    assert all(torch.equal(v, before[k]) for k, v in s.base.state_dict().items())
    back = randomized(s, s.config(**s.entry.other), tmp_path, seed=9)
    adaptc.swap(program, back)
    sound(program)
    close(program(*args), s.compile(back)(*args))


def check_forms(s: Subject, tmp_path: Path) -> None:
    """What a method does to the weight is what its cheaper form does around the layer, in values and gradients."""
    a, op = s.attachment, s.program.ops[s.attachment.id]
    if not s.entry.weight:
        with pytest.raises(adaptc.ConfigError, match=f"{a.method.name} has no form on the weight"):
            s.compile(form="weight")
        return
    outside = a.method.has_apply_form(op)
    programs = [s.compile(form=f, training=True) for f in (("apply", "weight") if outside else ("auto", "weight"))]
    assert [p.adaptation.attachments[0].form for p in programs] == ["apply" if outside else "weight", "weight"]
    grads = []
    for p in programs:
        sound(p)
        close(p(*s.args(5)), s.expected(5), s.tolerance)
        module = p.module()
        module.eval()
        loss(module(*s.args(5))).backward()
        grads.append({k: t.grad for k, t in adapter_parameters(p).items()})
        assert torch.equal(adaptc.unload(p)(*s.args(5)), adaptc.unload(s.program)(*s.args(5)))
    for key, g in grads[0].items():
        assert (g is None) == (grads[1][key] is None), key
        if g is not None:
            scale = max(1.0, float(g.abs().max()))
            close(grads[1][key] / scale, g / scale, s.tolerance * 10)


def check_merge(s: Subject, tmp_path: Path) -> None:
    """Merged weights and outputs are the oracle's; unmerge and unload give every bit back."""
    args = s.args(5)
    adapted = s.program(*args)
    if not s.entry.weight:
        with pytest.raises(adaptc.MergeError, match="cannot be merged"):
            adaptc.merge(s.program)
        with pytest.raises(adaptc.AdaptcError, match="cannot be merged"):
            s.program.bind(s.directory, form="weight")(*args)
        assert torch.equal(s.program(*args), adapted)
        return
    merged = adaptc.merge(s.program)
    sound(merged)
    close(merged(*args), adapted, s.tolerance)
    for key, value in s.merged().items():
        close(merged.state_dict[key].double(), value.double(), s.tolerance)
    back = adaptc.unmerge(merged)
    sound(back)
    assert torch.equal(back(*args), adapted)
    assert all(torch.equal(back.state_dict[k], v) for k, v in s.program.state_dict.items())
    unloaded = adaptc.unload(back)
    sound(unloaded)
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
    if not s.by_peft:
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
    close(loaded(*s.args(5)), s.program(*s.args(5)), s.tolerance)


def check_reload(s: Subject, tmp_path: Path) -> None:
    """A program read from disk is understood from its graph: it runs, swaps, merges and unloads as before."""
    args = s.args(5)
    loaded = adaptc.load(adaptc.save(s.program, tmp_path / "program.pt2"))
    sound(loaded)
    assert list(loaded.adaptation.attachments) == list(s.program.adaptation.attachments)
    assert torch.equal(loaded(*args), s.program(*args))
    if s.entry.weight:
        assert torch.equal(adaptc.merge(loaded)(*args), adaptc.merge(s.program)(*args))
    adaptc.swap(loaded, s.directory)
    sound(loaded)
    assert torch.equal(loaded(*args), s.program(*args))


def check_dtypes(s: Subject, tmp_path: Path) -> None:
    """Above a half-precision base, slots are float32 and outputs have the base's dtype and its rounding."""
    exact, scale = s.expected(5), 1.0
    for dtype, autocast in ((torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)):
        plain = captured(s.layer, s.entry.widths, dtype)[1]
        args = tuple(a.to(dtype) if a.is_floating_point() else a for a in s.args(5))
        program = adaptc.compile(plain, s.directory, autocast_adapter_dtype=autocast)
        sound(program)
        slot = torch.float32 if autocast else dtype
        for key, p in adapter_parameters(program).items():
            assert p.dtype == slot or not p.is_floating_point(), key
        out = program(*args)
        assert out.dtype == dtype
        # What rounding every weight, input and adapter tensor once can do; an omitted factor does far more.
        bound = (60 if dtype == torch.bfloat16 else 2000) * torch.finfo(dtype).eps * scale
        assert float((out.double() - exact).abs().max()) < bound
        if not s.entry.weight:
            continue
        merged = adaptc.merge(program)
        assert all(v.dtype == dtype for v in merged.state_dict.values() if v.is_floating_point())
        assert float((merged(*args).double() - exact).abs().max()) < bound


def check_rows(s: Subject, tmp_path: Path) -> None:
    """In a bank of two adapters each row of a batch computes what its adapter alone does, none the base, and a mix the
    weighted sum of what they change; or the layer is refused by name."""
    program = s.compile(s.config(**s.entry.other))
    two = randomized(s, s.config(**s.entry.other), tmp_path, seed=9)
    if s.layer in ("functional", "experts") or not s.entry.rows:
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
    close(found, torch.stack([one[0], base[1], other[2], mix, one[4]]), 1e-8)


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
]


def cases(names: list[str] | None = None) -> list[Any]:
    """(entry, layer) of the whole table, or of the methods ``names``."""
    chosen = [e for e in ENTRIES if names is None or e.name in names]
    return [pytest.param(e.name, n, id=f"{e.name}-{n}") for e in chosen for n in e.layers()]


def refusals() -> list[tuple[str, str]]:
    return [(e.name, n) for e in ENTRIES for n in e.refused]


__all__ = ["CHECKS", "cases", "config_class", "refusals", "subject"]
