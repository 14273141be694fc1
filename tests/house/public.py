"""Read what is public from the source, without importing it: names, parameters, fields and members of classes.

The tables ``PUBLIC`` of adaptc and its namespaces name the functions and classes. :data:`MEMBERS` says what users call
of the classes: the other methods without an underscore are for the rest of adaptc.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.house.docstring_parts import entries, sections

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "adaptc",
    "adaptc.training",
    "adaptc.distributed",
    "adaptc.prefixes",
    "adaptc.engines",
    "adaptc.exporters",
    "adaptc.methods",
    "adaptc.debug",
)

_SCALES = "set_active active_adapters available_adapters disabled scaled set_adapter set_adapters disable_adapter"
#: public class -> its members that users call, in the order of the reference; inherited ones, too
MEMBERS: Mapping[str, tuple[str, ...]] = {
    name: tuple(members.split())
    for name, members in {
        "AdaptedProgram": "bind bank base module graph_view binding backend fuse kernels hoist_limit pack checkpoint "
        "held fusion products packed passes to resync_base_tensors run_decompositions "
        f"{_SCALES} delete_adapter add_adapter",
        "Runner": "held state device",
        "Bank": "add replace remove select generate prefill warm exported report program adapters capacity max_rank "
        "nbytes held",
        "Adapter": "write to",
        "Generator": "generate prefill new_cache forward bind bank base tokenizer device dtype",
        "ServingModel": "generate_batch init_continuous_batching device dtype",
        "Binding": "adapters_by_name to",
        "PackagedProgram": f"swap bind base {_SCALES} ranks binding",
        "SplitProgram": "keep swap merge save_adapter count",
        "TrainingPipeline": "parameters train eval step evaluate save_adapter",
        "StagedModule": "forward save_adapter",
        "RankAllocator": "update_and_allocate rank_pattern",
        "SubspaceAllocator": "update_and_allocate active_clusters",
        "TargetedConfig": "method with_model_defaults to_dict",
        "ProgramConfig": "method with_model_defaults",
        "VirtualTokens": "prompt",
        "ProgramMethod": "virtual_token_count tokens attention_mask position_ids token_type_ids labels inputs_embeds "
        "past_key_values prompt loss",
        "Method": "slots init scale weight weight_over bias bias_over input apply check_merge",
        "FileFormat": "read write keys derived needs_base fqn inner_path in_place summed low_rank with_low_rank",
        "SizeRule": "rank with_rank minimal with_sizes_of specialized_for",
        "BankForm": "apply apply_fused has_kernel apply_kernel",
        "KernelForm": "why_missing apply",
        "SharedSlots": "shares settle_shared_sizes grouped_slots with_weights tied_to",
        "ExtraInputs": "coefficients extras check_inputs",
        "Op": "down_up low_rank down up product add_low_rank dense along_out along_in matrix unmatrix matrix_shape "
        "canonical stored out_features in_features groups experts kernel is_conv is_pointwise",
    }.items()
}

#: the lines that the examples in docstrings start with
SETUP = """\
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig

model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
x = torch.randn(2, 5)
prog = adaptc.compile(model, LoraConfig(r=2, target_modules=["0"]), example_inputs=x)


def lora_weights(seed):
    '''Return the config and the tensors of another adapter for the model, by PEFT's keys.'''
    torch.manual_seed(seed)
    weights = {"0.lora_A.weight": torch.randn(2, 5), "0.lora_B.weight": torch.randn(7, 2)}
    return LoraConfig(r=2, target_modules=["0"]), weights
"""

#: further lines of the examples that generate
SETUP_LANGUAGE_MODEL = """\
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
lm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0)).eval()
ids = torch.randint(1, 97, (2, 7))
"""
#: further lines of the examples with a method of one's own
SETUP_METHOD = """\
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Shift(adaptc.methods.Method):
    name: ClassVar[str] = "shift"

    def slots(self, op):
        return {"shift": adaptc.methods.Slot((op.out_features,))}

    def weight(self, op, W, slots, scale):
        return (W + slots["shift"].reshape(-1, *[1] * (W.ndim - 1))).to(W.dtype)


@dataclass
class ShiftConfig(adaptc.methods.TargetedConfig):
    peft_type: ClassVar[str] = "SHIFT"

    def method(self, name, kind):
        return Shift()
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class PublicName:
    """A public function or class: the path users write, the module that defines it, and its definition."""

    path: str
    module: str
    node: Function | ast.ClassDef

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(frozen=True)
class Field:
    """A field of a dataclass: its name, annotation and default as code, and what ``Attributes:`` says of it."""

    name: str
    annotation: str
    default: str
    meaning: str


class Source:
    """The source below a folder, by dotted names."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._trees: dict[str, ast.Module] = {}

    def file(self, module: str) -> Path:
        """Return the file of a dotted name. ``adaptc.passes`` and ``adaptc.kernels`` lie beside ``adaptc``."""
        parts = module.split(".")
        path = self.root.joinpath(*(parts[1:] if parts[1:2] in (["passes"], ["kernels"]) else parts))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def tree(self, module: str) -> ast.Module:
        """Return the parsed source of a module."""
        if module not in self._trees:
            self._trees[module] = ast.parse(self.file(module).read_text(encoding="utf-8"))
        return self._trees[module]

    def table(self, package: str) -> dict[str, str]:
        """Return the table ``PUBLIC`` of a package: name -> the module that defines it."""
        for node in self.tree(package).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLIC":
                return dict(ast.literal_eval(node.value))
        raise LookupError(f"{package} has no table PUBLIC")

    def definition(self, module: str, name: str) -> Function | ast.ClassDef | None:
        """Return the definition of ``name`` in a module; of an overloaded function the last, which has the body."""
        found = [
            n
            for n in self.tree(module).body
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and n.name == name
        ]
        return found[-1] if found else None

    def names(self, package: str) -> list[PublicName]:
        """Return the public functions and classes of a package, in the order of its table."""
        found = []
        for name, module in self.table(package).items():
            home = self._home(module, name) or module
            node = self.definition(home, name)
            if node is None:
                raise LookupError(f"{module} does not define {name}, as PUBLIC of {package} says")
            found.append(PublicName(f"{package}.{name}", home, node))
        return found

    def bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """Yield a class and those of its bases that the source defines, nearest first, each with its module."""
        yield module, node
        for base in node.bases:
            name = ast.unparse(base).partition("[")[0]
            home = self._home(module, name)
            if home is not None and isinstance(found := self.definition(home, name), ast.ClassDef):
                yield from self.bases(home, found)

    def _home(self, module: str, name: str) -> str | None:
        """Return the module that defines ``name``, which ``module`` defines or imports; None for other packages."""
        if self.definition(module, name) is not None:
            return module
        for node in self.tree(module).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("adaptc"):
                for alias in node.names:
                    if alias.name == name:
                        return self._home(node.module, name)
        return None

    def members(self, public: PublicName) -> Iterator[tuple[str, Function]]:
        """Yield the members of a class that users call, each with the name of the class that defines it."""
        assert isinstance(public.node, ast.ClassDef)
        homes = list(self.bases(public.module, public.node))
        for name in MEMBERS.get(public.name, ()):
            for _, node in homes:
                found = [n for n in node.body if isinstance(n, Function) and n.name == name]
                if found:
                    yield node.name, found[0]  # of a property the getter
                    break

    def fields(self, public: PublicName) -> list[Field]:
        """Return the fields of a config, its own first; a field that a class declares anew counts once."""
        assert isinstance(public.node, ast.ClassDef)
        found: dict[str, Field] = {}
        classes = [node for _, node in self.bases(public.module, public.node)]
        # A base says once what a field means that its subclasses declare.
        said: dict[str, str] = {}
        for node in classes:
            said = entries(sections(ast.get_docstring(node) or "").get("Attributes", "")) | said
        for node in classes:
            for one in node.body:
                if isinstance(one, ast.AnnAssign) and "ClassVar" not in (annotation := ast.unparse(one.annotation)):
                    name = ast.unparse(one.target)
                    meaning = " ".join(said.get(name, "").split())
                    found.setdefault(name, Field(name, annotation, _default(one.value), meaning))
        return list(found.values())

    def unsupported(self, public: PublicName) -> dict[str, str]:
        """Return field -> why setting it is refused, as far as the table can be read without running it."""
        assert isinstance(public.node, ast.ClassDef)
        found: dict[str, str] = {}
        for _, node in self.bases(public.module, public.node):
            for one in node.body:
                if isinstance(one, ast.AnnAssign) and ast.unparse(one.target) == "unsupported_fields":
                    keys = one.value.keys if isinstance(one.value, ast.Dict) else []
                    found |= {k.value: "" for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str)}
        return found


def _default(value: ast.expr | None) -> str:
    """Return a default as code: that of ``field(default_factory=dict)`` is ``{}``."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        given = {k.arg: ast.unparse(k.value) for k in value.keywords}
        factory = given.get("default_factory")
        return given.get("default", {"dict": "{}", "list": "[]"}.get(factory or "", ""))
    return ast.unparse(value)


def parameters(node: Function) -> list[str]:
    """Return the names of a function's parameters, without ``self`` and ``cls``."""
    args: Any = node.args
    stars = [a for a in (args.vararg, args.kwarg) if a is not None]
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs, *stars) if a.arg not in ("self", "cls")]


@cache
def source() -> Source:
    """Return the source of this checkout."""
    return Source()
