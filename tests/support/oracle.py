"""Compare adaptc with PEFT on the tiny transformers models: one base, one adapter with random tensors, two engines.

A family is captured once per process, from the model itself; its program without the adapter serves every further
adapter. PEFT gets a freshly built model each time, since it changes the one it is given. Nothing adaptc answers is
compared with itself: every expectation is computed by PEFT on its own copy of the weights.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from tests.support.families import FAMILIES, Family, perturb

PREFIX = "base_model.model."

#: What to adapt where "all-linear" is not the point: PEFT reads it as more than the linear layers, or there are none.
TARGETS: Mapping[str, Any] = {
    "resnet": ["convolution"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

#: What PEFT says of targets that are on purpose; the patterns it speaks of match parameters, and are not ignored.
EXPECTED_WARNINGS = (
    "Setting `save_embedding_layers` to `True` as embedding layers found.*",
    "fan_in_fan_out is set to False but the target module is `Conv1D`.*",
    ".*[Tt]ied .*",
    ".*tie_word_embeddings.*",
    "`lora_bias=True` was passed but the targeted layer of type .* has no bias.*",
    "`is_gradient_checkpointing` is deprecated.*",
    "The following (rank|alpha)_pattern keys did not match .*_proj.*",
)


@contextlib.contextmanager
def quiet(*messages: str) -> Iterator[None]:
    """Let the given warnings pass; all others stay errors."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=message)
        yield


@cache
def shared_lora_program(name: str) -> adaptc.AdaptedProgram:
    """The family's one capture, made from the model, with an adapter on every layer the tests adapt.

    Shared by all tests of a process: they may swap what it is bound to, and must not rely on what they find.
    """
    config = adaptc.LoraConfig(r=4, target_modules=TARGETS.get(name, "all-linear"))
    return adaptc.compile(FAMILIES[name].build(), config)


@cache
def shared_base_program(name: str) -> adaptc.AdaptedProgram:
    """The family's program without an adapter: what to compile further adapters into. Nothing may change it."""
    return adaptc.unload(shared_lora_program(name))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random values for all trainable tensors, small enough that outputs stay near those of the base."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.copy_(0.3 * noise if "lora_" in name else p + 0.2 * noise)


def with_head(model_class: type[nn.Module], family: str, **config: Any) -> nn.Module:
    """The family's backbone under another class's head, every parameter random."""
    settings = copy.deepcopy(FAMILIES[family].build().config)
    for key, value in config.items():
        setattr(settings, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(settings)
    perturb(model)
    return model.eval()


def tensors_of(out: Any) -> dict[str, Tensor]:
    """The float tensors of a model's output by name, without the key-value cache."""
    flat: dict[str, Tensor] = {}
    stack: list[tuple[str, Any]] = [("", out)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor) and value.is_floating_point():
            flat[name] = value
        elif isinstance(value, Mapping):
            stack += [(f"{name}.{k}", v) for k, v in value.items() if k != "past_key_values"]
        elif isinstance(value, (tuple, list)):
            stack += [(f"{name}.{i}", v) for i, v in enumerate(value)]
    return flat


def loss(out: Any) -> Tensor:
    """A number that weighs every output differently."""
    total = torch.zeros((), dtype=torch.float64)
    for _, t in sorted(tensors_of(out).items()):
        weights = torch.linspace(-1, 2, t.numel(), dtype=torch.float64).reshape(t.shape)
        total = total + (t.double() * weights).mean()
    return total


def assert_same(got: Any, expected: Any, tol: float = 5e-6) -> None:
    """The same tensors by name, dtype and shape, and values within ``tol`` of the largest of each."""
    got, expected = tensors_of(got), tensors_of(expected)
    assert got, "nothing to compare"
    assert sorted(got) == sorted(expected)
    for name, want in expected.items():
        assert got[name].dtype == want.dtype, name
        atol = tol * float(want.detach().abs().max())
        torch.testing.assert_close(got[name], want, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_differs(a: Any, b: Any, at_least: float = 1e-2) -> None:
    """Some output differs clearly, so that an adapter without effect cannot pass a comparison."""
    a, b = tensors_of(a), tensors_of(b)
    assert max(float((a[k] - b[k]).detach().abs().max()) for k in a) > at_least


def run(call: Callable[..., Any], family: Family, batch: int = 2, seq: int = 5) -> Any:
    with torch.no_grad():
        return call(**family.inputs(batch, seq))


def file_key_of(parameter: str) -> str:
    """A parameter of a wrapped model or of a program, by the key it has in a file (adapter name "default")."""
    name = parameter.removeprefix(PREFIX)
    return re.sub(r"\.(modules_to_save|trained_bias)(?=\.default\.)|\.default(?=\.|$)", "", name)


def gradients(module: nn.Module, out: Any) -> dict[str, Tensor]:
    """File key -> gradient of :func:`loss`, of every trainable parameter of ``module``; ``out`` is its output."""
    module.zero_grad()
    loss(out).backward()
    found = {file_key_of(n): p.grad for n, p in module.named_parameters() if p.requires_grad}
    missing = [n for n, g in found.items() if g is None]
    assert not missing, f"no gradient for {missing}"
    return found  # type: ignore[return-value]


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """By file key, of the same parameters: sums in another order, whose rounding goes with the largest of a tensor."""
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def gradients_by_key(module: nn.Module) -> dict[str, Tensor]:
    """File key -> gradient, of every tensor of a LoRA in ``module`` that has one."""
    named = module.named_parameters()
    found = {file_key_of(n): p.grad for n, p in named if "lora_" in n and p.grad is not None}
    assert found
    return found


@torch.no_grad()
def copy_values(theirs: nn.Module, module: nn.Module) -> None:
    """Write the trainable values of PEFT's model into the parameters of a program's module, as an optimizer does."""
    named = theirs.named_parameters(remove_duplicate=False)
    values = {file_key_of(n): p for n, p in named if p.requires_grad}
    for name, p in module.named_parameters():
        if p.requires_grad:
            p.copy_(values[file_key_of(name)])


def lora_twins(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Any]:
    """A program's module and PEFT's model, each of a model that ``build`` makes, with one random LoRA."""
    with quiet(*EXPECTED_WARNINGS):
        theirs = peft.get_peft_model(build(), peft.LoraConfig(**options)).eval()
    randomize(theirs)
    module = adaptc.compile(build(), adaptc.LoraConfig(**options)).module()
    copy_values(theirs, module)
    return module, theirs


def masked_texts(batch: int, length: int) -> dict[str, Tensor]:
    """Texts of a language model's tiny vocabulary, the first of which begins with two masked tokens."""
    ids = torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def file_tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def load_peft(model: nn.Module, path: Path, name: str = "default") -> peft.PeftModel:
    """The adapter in ``path`` loaded by PEFT into ``model``. Missing and unexpected keys are errors."""
    with quiet(*EXPECTED_WARNINGS[1:]):
        return peft.PeftModel.from_pretrained(model, str(path), adapter_name=name).eval()


@dataclass(eq=False)
class Oracle:
    """A family's model wrapped by PEFT, with random adapter tensors, and saved by PEFT to ``path``."""

    name: str
    model: peft.PeftModel
    path: Path

    @classmethod
    def wrap_and_save(
        cls, name: str, config: peft.PeftConfig, path: Path, *, model: nn.Module | None = None, seed: int = 0
    ) -> Oracle:
        """``model`` replaces the family's own (a task head, another dtype); ``seed`` decides all values drawn."""
        with quiet(*EXPECTED_WARNINGS), torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(FAMILIES[name].build() if model is None else model, config).eval()
            randomize(wrapped, seed)
            wrapped.save_pretrained(str(path))
        return cls(name, wrapped, Path(path))

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def __call__(self, batch: int = 2, seq: int = 5) -> Any:
        return run(self.model, self.family, batch, seq)

    def base_output(self, batch: int = 2, seq: int = 5) -> Any:
        with self.model.disable_adapter():
            return run(self.model, self.family, batch, seq)

    def adapted_modules(self) -> set[str]:
        """Paths of the modules PEFT put an adapter into, as its files name them."""
        return {n.removeprefix(PREFIX) for n, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}

    def gradients(self, batch: int = 2, seq: int = 5) -> dict[str, Tensor]:
        return gradients(self.model, self.model(**self.family.inputs(batch, seq)))

    def merge_copy(self) -> nn.Module:
        """PEFT's merge of a copy of the model.

        Merging in place changes whatever a weight is tied to, and with it the outputs, so that PEFT advises to untie
        adapted weights first. This is done here.
        """
        wrapped = copy.deepcopy(self.model)
        owners: dict[int, int] = {}
        for _, p in wrapped.named_parameters(remove_duplicate=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
        for module in wrapped.modules():
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
            weight = getattr(layer, "weight", None)
            if owners.get(id(weight), 0) > 1:
                layer.weight = nn.Parameter(weight.detach().clone())
        with quiet(*EXPECTED_WARNINGS):
            return wrapped.merge_and_unload()

    def module_with_peft_values(self, program: adaptc.AdaptedProgram) -> nn.Module:
        """``program.module()``, with PEFT's values written into its parameters as an optimizer writes them."""
        module = program.module()
        copy_values(self.model, module)
        return module

    def _tied_file_keys(self) -> list[set[str]]:
        """The file keys of each trainable parameter that has several."""
        names: dict[int, set[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if p.requires_grad:
                names.setdefault(id(p), set()).add(file_key_of(name))
        return [n for n in names.values() if len(n) > 1]

    def check_trained(self, program: adaptc.AdaptedProgram, directory: Path, model: nn.Module | None = None) -> None:
        """The round trip of training: gradients equal PEFT's, and PEFT loads what is saved and computes the same.

        ``program`` was compiled from a config; ``model`` is a fresh base for PEFT, by default the family's own.
        """
        module = self.module_with_peft_values(program)
        got = gradients(module, module(**self.family.inputs(3, 7)))
        expected = self.gradients(3, 7)
        for names in self._tied_file_keys():  # parameters() knows one name of each, and not always the same
            expected |= {n: expected[m] for n in names if n in got for m in names if m in expected}
            for name in names - got.keys():
                expected.pop(name, None)
        assert sorted(got) == sorted(expected)
        for key, want in expected.items():
            torch.testing.assert_close(
                got[key], want, rtol=1e-4, atol=1e-5 * float(want.abs().max()), msg=lambda m, k=key: f"{k}: {m}"
            )
        # Units that a ReLU holds at zero have no gradient; most must, or the comparison says nothing.
        assert sum(float(g.abs().max()) > 0 for g in got.values()) > 0.6 * len(got)
        saved = adaptc.save_adapter(program, directory)
        # PEFT adds the base weights of adapted embeddings and heads, and needs them only if they were changed.
        ours, theirs = file_tensors(saved), file_tensors(self.path)
        theirs = {k: v for k, v in theirs.items() if not k.endswith("base_layer.weight")}
        assert sorted(ours) == sorted(theirs)
        for key, want in theirs.items():
            torch.testing.assert_close(ours[key], want, rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")
        loaded = load_peft(self.family.build() if model is None else model, saved)
        assert_same(run(program, self.family, 3, 7), self(3, 7))
        assert_same(run(loaded, self.family, 3, 7), self(3, 7))

    def check_merged(self, program: adaptc.AdaptedProgram, tol: float = 2e-6) -> None:
        """``adaptc.merge`` gives the state dict and the outputs of PEFT's merge."""
        theirs, ours = self.merge_copy(), adaptc.merge(program)
        expected = theirs.state_dict()
        assert sorted(ours.state_dict) == sorted(expected)
        for name, want in expected.items():
            got = ours.state_dict[name]
            assert got.dtype == want.dtype, name
            torch.testing.assert_close(got, want, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")
        # The weights may differ in their last bit: the scale is in B here, and on the product there.
        assert_same(run(ours, self.family, 3, 7), run(theirs, self.family, 3, 7), 1e-5)
