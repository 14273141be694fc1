"""What must hold at every site, whatever consumes the weight: checks that run over the table in ``site_cases``.

The oracle is PEFT, or, for weights it cannot adapt or gets wrong, a copy of the model with the weights merged by hand.
Both answer the same three questions: the outputs, the gradients of the adapter tensors by key, the merged weights.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc.binding.bind import initial_values
from adaptc.binding.binding import BindingSpec
from adaptc.methods import ModelFacts
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import op_of
from adaptc.state.adaptation import Adaptation
from adaptc.targets.plan_layers import plan_layers
from tests.support.oracle import quiet
from tests.support.site_cases import CASES, Case

PREFIX = "base_model.model."


#: what PEFT says of tied weights, of target_parameters, and of saving a model it cannot name
EXPECTED_WARNINGS = (
    ".*tied.*",
    ".*tie_word_embeddings.*",
    "LoRA adapter added to ConvNd layer with groups.*",
    ".*LoRA tensor.s. have invalid shape.*lora_B.bias.*",
    ".*has no bias. This means that merging.*",
)


def loss(out: Tensor) -> Tensor:
    """A number that weighs every output differently."""
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(PREFIX): v for k, v in tensors.items()}


class PeftOracle:
    """The case's model wrapped by PEFT, every tensor of its adapter random."""

    def __init__(self, case: Case, directory: Path) -> None:
        self.case = case
        with quiet(*EXPECTED_WARNINGS):
            self.model = peft.get_peft_model(case.model(), peft.LoraConfig(**case.config)).eval()
            self.randomize()
            self.model.save_pretrained(str(directory))

    @torch.no_grad()
    def randomize(self) -> None:
        torch.manual_seed(3)
        for p in self.model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, dtype=torch.float64))

    def __call__(self, *args: Tensor) -> Tensor:
        return self.model(*args)

    def gradients(self, *args: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad()
        loss(self.model(*args)).backward()
        named = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad and p.grad is not None}
        out = without_prefix({n.replace(".default", "").replace(".modules_to_save", ""): g for n, g in named.items()})
        for key in out:
            out[key] *= next((f for end, f in self.case.factors.items() if key.endswith(end)), 1.0)
        return out

    def merged(self) -> dict[str, Tensor]:
        if self.case.peft_merge == "whole":
            with quiet(*EXPECTED_WARNINGS):
                return copy.deepcopy(self.model).merge_and_unload().state_dict()
        state = {k: v.clone() for k, v in self.case.model().state_dict().items()}
        for name, layer in self.model.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                state[f"{name}.weight"] += layer.get_delta_weight("default")
        return state


class ManualOracle:
    """The case's model with W + s B A computed here, one weight at a time."""

    def __init__(self, case: Case, directory: Path) -> None:
        self.case = case
        program = adaptc.compile(case.model(), adaptc.LoraConfig(**case.config), example_inputs=case.args(3))
        adaptc.save_adapter(program, directory)
        self.tensors = without_prefix(load_file(directory / "adapter_model.safetensors"))
        self.model = case.model()
        r = case.config["r"]
        self.scale = case.config["lora_alpha"] / (r**0.5 if case.config.get("use_rslora") else r)
        expected = {f"{h.key}.lora_{x}.weight" for h in case.manual_merges.values() for x in "AB"}
        assert set(self.tensors) == expected, set(self.tensors) ^ expected
        for fqn in case.manual_merges:
            with torch.no_grad():
                self.parameter(fqn).add_(self.change(fqn))

    def parameter(self, fqn: str) -> nn.Parameter:
        return self.model.get_parameter(fqn)

    def factors(self, fqn: str) -> tuple[Tensor, Tensor]:
        key = self.case.manual_merges[fqn].key
        A, B = (self.tensors[f"{key}.lora_{x}.weight"] for x in "AB")
        return A.flatten(1), B.flatten(1)

    def transposed(self, fqn: str, t: Tensor) -> Tensor:
        return t.transpose(0, 1) if self.case.manual_merges[fqn].layout == "swap" else t

    def change(self, fqn: str) -> Tensor:
        A, B = self.factors(fqn)
        shape = self.transposed(fqn, self.parameter(fqn)).shape
        return self.transposed(fqn, (B @ A * self.scale * self.case.manual_merges[fqn].times).reshape(shape))

    def __call__(self, *args: Tensor) -> Tensor:
        return self.model(*args)

    def gradients(self, *args: Tensor) -> dict[str, Tensor]:
        """By the chain rule from the gradient of the merged weight."""
        self.model.zero_grad()
        loss(self.model(*args)).backward()
        out = {}
        for fqn, hand in self.case.manual_merges.items():
            A, B = self.factors(fqn)
            grad = self.parameter(fqn).grad
            assert grad is not None
            g = self.transposed(fqn, grad).flatten(1) * self.scale * hand.times
            out[f"{hand.key}.lora_A.weight"] = B.T @ g
            out[f"{hand.key}.lora_B.weight"] = g @ A.T
        return {k: g.reshape(self.tensors[k].shape) for k, g in out.items()}

    def merged(self) -> dict[str, Tensor]:
        return self.model.state_dict()


@dataclass(eq=False)
class Subject:
    """One case made ready: its oracle, the oracle's adapter on disk, and the program compiled from that."""

    case: Case

    @cached_property
    def oracle(self) -> Any:
        self._temporary = tempfile.TemporaryDirectory()
        return (ManualOracle if self.case.manual_merges else PeftOracle)(self.case, Path(self._temporary.name))

    @property
    def directory(self) -> Path:
        """Where the oracle has written its adapter."""
        assert self.oracle is not None
        return Path(self._temporary.name)

    def close(self) -> None:
        """Remove what the oracle has written; subjects of the table keep it to the end of the process."""
        self._temporary.cleanup()

    @cached_property
    def base(self) -> nn.Module:
        return self.case.model()

    @cached_property
    def program(self) -> adaptc.AdaptedProgram:
        return adaptc.compile(self.base, self.directory, example_inputs=self.case.args(3))

    @cached_property
    def file(self) -> dict[str, Tensor]:
        return load_file(self.directory / "adapter_model.safetensors")


@cache
def subject(name: str) -> Subject:
    return Subject(CASES[name])


def assert_close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_valid(program: torch.export.ExportedProgram) -> None:
    program.graph.lint()
    program.validate()


def check_outputs(s: Subject, tmp_path: Path) -> None:
    """The program compiled from the file computes what the oracle does, at other batch sizes than it saw."""
    assert_valid(s.program)
    for batch in (2, 5):
        args = s.case.args(batch)
        expected = s.oracle(*args)
        assert_close(s.program(*args), expected)
        assert not torch.allclose(expected, s.base(*args), rtol=1e-3, atol=1e-3)


def check_gradients(s: Subject, tmp_path: Path) -> None:
    """Gradients of every adapter tensor, and of nothing else."""
    args = s.case.args(5)
    expected = s.oracle.gradients(*args)
    program = adaptc.compile(s.base, s.directory, example_inputs=s.case.args(3), training=True)
    slots = adapter_parameters(program)
    module = program.module()
    module.eval()
    loss(module(*args)).backward()
    assert {k for k, t in slots.items() if t.grad is not None} == set(expected)
    for key, grad in expected.items():
        assert_close(slots[key].grad, grad, 1e-9)
    trained = {id(p) for p in slots.values()}
    assert all(id(p) in trained for p in module.parameters() if p.requires_grad)


def adapter_parameters(program: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    """Key in files -> the program's own tensor."""
    out = {}
    for a in program.adaptation.attachments:
        for slot, fqn in a.slots.items():
            if a.method.slots(program.ops[a.id])[slot].saved:
                out[f"{a.key}.{slot}" if a.key else slot] = program.binding.values[fqn]
    return out


def check_swap(s: Subject, tmp_path: Path) -> None:
    """A fresh program computes the base; after a swap it computes what the oracle does."""
    config = adaptc.LoraConfig(**{**s.case.config, "init_lora_weights": True, "r": 2 * s.case.config["r"]})
    program = adaptc.compile(s.base, config, example_inputs=s.case.args(3))
    args = s.case.args(5)
    assert_close(program(*args), s.base(*args))
    with torch.no_grad():
        before = {k: v.clone() for k, v in s.base.state_dict().items()}
    adaptc.swap(program, s.directory)
    assert_valid(program)
    assert_close(program(*args), s.oracle(*args))
    assert_close(program.module()(*args), s.oracle(*args))
    assert all(torch.equal(v, before[k]) for k, v in s.base.state_dict().items())


def check_merge(s: Subject, tmp_path: Path) -> None:
    """Merged weights and outputs are the oracle's; unmerge and unload give every bit back."""
    args = s.case.args(5)
    adapted = s.program(*args)
    merged = adaptc.merge(s.program)
    assert_valid(merged)
    assert_close(merged(*args), adapted)
    if s.case.peft_merge:
        expected = s.oracle.merged()
        state = merged.state_dict
        for key, value in state.items():
            assert_close(value, expected[key] if key in expected else s.base.get_parameter(key.removesuffix("_untied")))
    back = adaptc.unmerge(merged)
    assert_valid(back)
    assert torch.equal(back(*args), adapted)
    assert all(torch.equal(back.state_dict[k], v) for k, v in s.program.state_dict.items())
    unloaded = adaptc.unload(back)
    assert_valid(unloaded)
    base = s.base.state_dict()
    assert set(unloaded.state_dict) <= set(base)
    assert all(torch.equal(v, base[k]) and v.data_ptr() == base[k].data_ptr() for k, v in unloaded.state_dict.items())
    frozen = copy.deepcopy(s.base).requires_grad_(False)  # weights that want gradients take other kernels
    assert torch.equal(unloaded(*args), torch.export.export(frozen, args).module()(*args))


def check_files(s: Subject, tmp_path: Path) -> None:
    """The file written is the file read, and PEFT takes it without a word."""
    written = adaptc.save_adapter(s.program, tmp_path)
    found = load_file(written / "adapter_model.safetensors")
    assert set(found) == set(s.file)
    assert all(torch.equal(found[k], v) for k, v in s.file.items())
    if not s.case.manual_merges:
        with quiet(*EXPECTED_WARNINGS):
            model = peft.PeftModel.from_pretrained(s.case.model(), str(tmp_path)).eval()
        args = s.case.args(5)
        assert_close(model(*args), s.program(*args))


def check_reload(s: Subject, tmp_path: Path) -> None:
    """A program read from disk is understood from its graph: it runs, swaps, merges and unloads as before."""
    args = s.case.args(5)
    loaded = adaptc.load(adaptc.save(s.program, tmp_path / "program.pt2"))
    assert_valid(loaded)
    found, expected = ({a.id: a for a in p.adaptation.attachments} for p in (loaded, s.program))
    assert found == expected
    assert torch.equal(loaded(*args), s.program(*args))
    merged = adaptc.merge(loaded)
    assert torch.equal(merged(*args), adaptc.merge(s.program)(*args))
    assert torch.equal(adaptc.unload(loaded)(*args), adaptc.unload(s.program)(*args))
    adaptc.swap(loaded, s.directory)
    assert_valid(loaded)
    assert torch.equal(loaded(*args), s.program(*args))


def check_weight_form(s: Subject, tmp_path: Path) -> None:
    """What a method does to the weight is what its cheaper form does to the outputs, at any rank it swaps to."""
    r = s.case.config["r"] * 2
    config = adaptc.LoraConfig(**{**s.case.config, "r": r})
    base = torch.export.export(s.base, s.case.args(3), dynamic_shapes=dynamic_batch(s.case.args(3)))
    facts = ModelFacts(
        transposed_experts=frozenset(n for n, m in s.base.named_modules() if getattr(m, "is_transposed", False))
    )
    planned = plan_layers(config, base, facts)
    attachments = [replace(a, form="weight") for a in planned.attachments]
    lifted = LiftedProgram(base)
    ops = {a.id: op_of(a.kind, lifted.tensor(a.fqn), lifted.nodes[a.consumers[0]]) for a in attachments}
    binding = initial_values(BindingSpec(attachments, ops, base.state_dict, unread=planned.unread_tensors), config)
    adaptation = Adaptation(attachments, unread=planned.unread_tensors)
    injected = Inject(attachments, binding.values, adaptation.header(binding))(base)
    adaptation = replace(adaptation, attachments=injected.data)
    program = adaptc.AdaptedProgram(injected.program, adaptation, binding)
    assert {a.form for a in program.adaptation.attachments} == {"weight"}
    adaptc.swap(program, s.directory)
    assert_valid(program)
    args = s.case.args(5)
    assert_close(program(*args), s.program(*args))
    assert torch.equal(adaptc.unload(program)(*args), adaptc.unload(s.program)(*args))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert torch.equal(loaded(*args), program(*args))


def changed_by(check: Any, name: str, tmp_path: Path) -> list[str]:
    """Run a check on a case, and return the names of the tensors of the user's own model that it changed."""
    s = subject(name)
    before = {k: v.detach().clone() for k, v in s.base.state_dict().items()}
    check(s, tmp_path)
    after = s.base.state_dict()
    assert before
    assert before.keys() == after.keys()
    return [k for k, v in before.items() if not torch.equal(v, after[k])]


def dynamic_batch(args: tuple[Tensor, ...]) -> Any:
    return tuple({0: torch.export.Dim.DYNAMIC} for _ in args)


CHECKS = [check_outputs, check_gradients, check_swap, check_merge, check_files, check_reload, check_weight_form]


def parametrize_checks(cases: list[Case]) -> Any:
    """Parametrizes ``test(name, check)``; the checks of one case come together, since they share what is built. Where
    not all of them run, each case has one of the checks, and each check comes at least once."""

    def mark(function: Any) -> Any:
        function = pytest.mark.few(max(len(cases), len(CHECKS)))(function)
        function = pytest.mark.parametrize("name", [c.name for c in cases])(function)
        return pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))(function)

    return mark
