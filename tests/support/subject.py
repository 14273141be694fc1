"""One method at one layer: a model, an adapter of it with random tensors, and an oracle of what they compute.

The oracle is PEFT where it has the layer, or else torch itself: the layer called with the weight that the method's
``weight`` makes of its own, or for a method without one what its ``apply`` makes of the layer's output. Both answer the
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
import torch
from torch import Tensor, nn

import adaptc
from adaptc.passes.protocol.attachment import Attachment
from tests.support.layer_table import LAYERS, Layer
from tests.support.method_table import BY_NAME, Entry

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


def assert_close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_valid(program: torch.export.ExportedProgram) -> None:
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
def base_model_and_program(
    layer: str, widths: tuple[int, int], dtype: torch.dtype
) -> tuple[nn.Module, adaptc.AdaptedProgram]:
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
    def has_peft_oracle(self) -> bool:
        return self.layer in self.entry.peft

    @property
    def tolerance(self) -> float:
        return self.entry.tolerance if self.has_peft_oracle else 1e-9

    def args(self, batch: int) -> tuple[Tensor, ...]:
        return self.kind.args(self.entry.widths, batch)

    @property
    def base(self) -> nn.Module:
        return base_model_and_program(self.layer, self.entry.widths, torch.float64)[0]

    def config(self, **changes: Any) -> Any:
        cls = getattr(adaptc, self.entry.cls)
        return cls(**{**targets(self.layer), **self.entry.config, **changes})

    def compile(self, adapter: Any = None, **options: Any) -> adaptc.AdaptedProgram:
        adapter = self.directory if adapter is None else adapter
        return adaptc.compile(
            base_model_and_program(self.layer, self.entry.widths, torch.float64)[1], adapter, **options
        )

    @cached_property
    def wrapped(self) -> Any:
        """PEFT's model with random tensors."""
        cls = getattr(peft, self.entry.cls)
        with quiet():
            torch.manual_seed(7)
            model = peft.get_peft_model(
                self.kind.model(self.entry.widths), cls(**{**targets(self.layer), **self.entry.config})
            )
            saved = {file_key_of(k) for k in peft.get_peft_model_state_dict(model)}
        torch.manual_seed(5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                # PEFT may train what no file of its holds (AdaLoRA's number of ranks above a float64 base).
                p.requires_grad_(p.requires_grad and not saved.isdisjoint(possible_file_keys(file_key_of(name))))
                if p.requires_grad:
                    p.copy_(self.entry.random_tensor(name, p))
        return model.eval()

    @cached_property
    def directory(self) -> Path:
        """An adapter written by PEFT, or by adaptc where PEFT has none."""
        self._temporary = tempfile.TemporaryDirectory()
        path = Path(self._temporary.name)
        if self.has_peft_oracle:
            with quiet():
                self.wrapped.save_pretrained(str(path))
            return path
        return save_random_adapter(self, self.config(), path)

    @cached_property
    def program(self) -> adaptc.AdaptedProgram:
        return self.compile()

    @property
    def attachment(self) -> Attachment:
        (a,) = self.program.adaptation.attachments
        return a

    # -- the oracle's answers -----------------------------------------------------------------------------------------

    @cached_property
    def trained_program(self) -> adaptc.AdaptedProgram:
        """The program as it is trained: a method may have another derivative there, and slots that only it reads."""
        return self.compile(training=True)

    def program_of(self, slots: dict[str, Tensor]) -> adaptc.AdaptedProgram:
        """The program that says what the method is: the trained one where ``slots`` are given, to take gradients of."""
        return self.trained_program if slots else self.program

    def slots_and_scale(self, slots: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The slots and the scale of the site, with these in their place."""
        (a,), values = self.program_of(slots).adaptation.attachments, self.program_of(slots).binding.values
        slot_values = {
            n: slots.get(n, values[f].double() if values[f].is_floating_point() else values[f])
            for n, f in a.slots.items()
        }
        return slot_values, None if a.scale_slot is None else values[a.scale_slot].double()

    def adapted_parameters(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's parameters as the method makes them of the base's and of these slots."""
        (a,) = self.program_of(slots).adaptation.attachments
        op = self.program.ops[self.attachment.id]
        (named, scale), method, layer = self.slots_and_scale(slots), a.method, self.base.layer
        weight = getattr(layer, a.param)
        out = {a.param: op.stored(method.weight(op, op.canonical(weight.detach()), named, scale))}
        bias = getattr(layer, "bias", None)
        if method.has_bias() and op.callable:
            own = None if bias is None else bias.detach()
            new = method.bias_over(op, op.canonical(weight.detach()), own, own, named, scale)
            if new is not None:
                out["bias"] = new
        return out

    def forward(self, slots: dict[str, Tensor], *args: Tensor) -> Tensor:
        """The model with those parameters, or with what the method makes of the layer's output, run by torch."""
        if not self.entry.has_weight_form:
            return self.forward_with_hook(slots, *args)
        made, model = self.adapted_parameters(slots), self.base
        own = {n: getattr(model.layer, n) for n in made}
        if any(t is None or t.shape != made[n].shape for n, t in own.items()):
            model = copy.deepcopy(model)
        for n, t in own.items():
            if t is None:
                model.layer.register_parameter(n, nn.Parameter(torch.empty_like(made[n])))
            elif t.shape != made[n].shape:  # dense where there were groups
                model.layer.groups = 1
        return torch.func.functional_call(model, {f"layer.{n}": t for n, t in made.items()}, args)

    def forward_with_hook(self, slots: dict[str, Tensor], *args: Tensor) -> Tensor:
        a, op = self.attachment, self.program.ops[self.attachment.id]
        (named, scale), layer = self.slots_and_scale(slots), self.base.layer
        weight = op.canonical(getattr(layer, a.param).detach())

        def hook(_: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
            return a.method.apply(op, inputs[0], y, weight, layer.bias, named, scale)

        handle = layer.register_forward_hook(hook)
        try:
            return self.base(*args)
        finally:
            handle.remove()

    def expected(self, batch: int) -> Tensor:
        args = self.args(batch)
        with torch.no_grad():
            return self.wrapped(*args) if self.has_peft_oracle else self.forward({}, *args)

    def gradients(self, batch: int) -> dict[str, Tensor]:
        args = self.args(batch)
        if self.has_peft_oracle:
            self.wrapped.zero_grad()
            loss(self.wrapped(*args)).backward()
            named = {n: p.grad for n, p in self.wrapped.named_parameters() if p.requires_grad and p.grad is not None}
            return {file_key_of(n): g for n, g in named.items()}
        (a,), op = self.trained_program.adaptation.attachments, self.program.ops[self.attachment.id]
        specs = a.method.slots(op)
        leaves = {
            n: self.trained_program.binding.values[f].detach().double().requires_grad_()
            for n, f in a.slots.items()
            if specs[n].trainable
        }
        loss(self.forward(leaves, *args)).backward()
        return {a.file_key(n, specs[n]): t.grad for n, t in leaves.items() if t.grad is not None}

    def merged(self) -> dict[str, Tensor]:
        if not self.has_peft_oracle:
            return {f"layer.{n}": t for n, t in self.adapted_parameters({}).items()}
        with quiet():
            return copy.deepcopy(self.wrapped).merge_and_unload().state_dict()


def file_key_of(name: str) -> str:
    """The key in files of a parameter of PEFT's model."""
    for prefix in ("base_model.model.", "base_model."):
        name = name.removeprefix(prefix)
    parts = [p for p in name.split(".") if p != "default"]
    return ".".join(parts)


def possible_file_keys(name: str) -> tuple[str, ...]:
    """PEFT drops ``weight`` from some keys of its files, and the site from those of tensors that all sites share."""
    last = name.rsplit(".", 2)
    return (name, name.removesuffix(".weight"), last[-1], ".".join(last[-2:]))


def find_file_key(found: dict[str, Tensor], name: str) -> str:
    return next((n for n in possible_file_keys(name) if n in found), name)


def save_random_adapter(s: Subject, config: Any, path: Path, seed: int = 5) -> Path:
    """An adapter of this config with random tensors, written by adaptc."""
    torch.manual_seed(seed)
    program = s.compile(config)
    with torch.no_grad():
        for key, p in adapter_parameters(program).items():
            if p.is_floating_point():
                p.copy_(s.entry.random_tensor(key, p))
    return Path(adaptc.save_adapter(program, path))


@cache
def subject(entry: str, layer: str) -> Subject:
    return Subject(BY_NAME[entry], layer)
