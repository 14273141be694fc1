"""Of equal layers some are traced and the others copied: the program is the one that tracing all of them gives."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.node import map_arg

import adaptc
from adaptc import LoraConfig
from adaptc.capture import dynamic_shapes
from adaptc.capture.capture import capture
from adaptc.capture.repeated_layers.equal_modules import equal_layers, index_attributes
from tests.support.families import FAMILIES, perturb

LAYERS = 7
UP = LoraConfig(r=2, target_modules=["up"])
_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"}


class Counted:
    """Whether copies are made, and how many were."""

    def __init__(self) -> None:
        self.on, self.copies, self.sound = True, 0, True


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found, real = Counted(), dynamic_shapes.copy_equal_layers

    @contextlib.contextmanager
    def traced_once(model: Any) -> Iterator[Any]:
        if not found.on:
            yield None
            return
        with real(model) as once:
            yield once
        found.copies += once.copy_count
        found.sound = found.sound and once.is_sound()

    monkeypatch.setattr(dynamic_shapes, "copy_equal_layers", traced_once)
    return found


def both(counted: Counted, make: Callable[[], ExportedProgram]) -> tuple[ExportedProgram, ExportedProgram]:
    counted.on = True
    first = make()
    counted.on = False
    return first, make()


def written(program: ExportedProgram) -> list[Any]:
    """Every node of a program, with names by order: torch counts nodes that are gone when it names others."""
    names: dict[str, str] = {}

    def name(found: re.Match[str]) -> str:
        return names.setdefault(found.group(0), f"v{len(names)}")

    out: list[Any] = []

    def size(node: Any) -> Any:
        """Sizes by what they are: torch reads them from whichever tensor it finds."""
        return node.meta["val"] if is_size(node) else node

    for node in program.graph.nodes:
        if is_size(node):
            continue
        val, stack = node.meta.get("val"), node.meta.get("nn_module_stack") or {}
        # The tensor that stands for an input is written to by the layers that run, and then it takes part in gradients.
        grad = None if node.op == "placeholder" else getattr(val, "requires_grad", None)
        arguments = re.sub(r"\b[a-z]\w*\b", name, str(map_arg((node.args, node.kwargs), size)))
        name(re.match(r".*", node.name))  # type: ignore[arg-type]
        facts = (str(getattr(val, "shape", val)), str(getattr(val, "dtype", None)), grad)
        out.append((node.op, str(node.target), arguments, facts, list(stack.values())))
    return out


def is_size(node: Any) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool))


def outputs(program: ExportedProgram) -> Any:
    return program.graph_signature.output_specs


def same(a: ExportedProgram, b: ExportedProgram) -> None:
    for x, y in zip(written(a), written(b), strict=True):
        assert x == y
    for x, y in ((a.graph_signature.input_specs, b.graph_signature.input_specs), (outputs(a), outputs(b))):
        assert [(str(s.kind), s.target) for s in x] == [(str(s.kind), s.target) for s in y]
    assert {str(v) for v in a.range_constraints.values()} == {str(v) for v in b.range_constraints.values()}
    assert len(a.range_constraints) == len(b.range_constraints)


def deeper(model: Any) -> Any:
    """A model of the same family with more layers."""
    config = copy.deepcopy(model.config)
    for part in [config, *[c for c in vars(config).values() if hasattr(c, "to_dict")]]:
        known = {key: getattr(part, key) for key in _COUNTS if isinstance(getattr(part, key, None), int)}
        for key in list(vars(part)):
            value = getattr(part, key)
            if isinstance(value, list) and len(value) in known.values() and "layer" in key:
                setattr(part, key, (value * LAYERS)[:LAYERS])
        for key in known:
            setattr(part, key, LAYERS)
    torch.manual_seed(0)
    made = type(model)(config)
    perturb(made)
    return made.eval()


#: families whose layers are copied, in whatever mode they are
COPIED = {"llama", "gpt2", "gpt_neox", "phi", "bert", "roberta", "opt", "mistral", "qwen2", "vit", "t5"}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* was captured for some sizes alone")
@pytest.mark.few(3)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(n for n, f in FAMILIES.items() if f.kind != "image"))
def test_families_are_captured_as_in_full(name: str, training: bool, counted: Counted) -> None:
    model = deeper(FAMILIES[name].build())
    inputs = FAMILIES[name].inputs(2, 5)
    first, second = both(counted, lambda: capture(model, inputs, training=training).program)
    same(first, second)
    assert counted.sound
    assert counted.copies >= LAYERS - 3 or name not in COPIED


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "t5", "mamba", "bloom"])
def test_steps_with_a_cache(name: str, counted: Counted) -> None:
    model = deeper(FAMILIES[name].build())
    config = LoraConfig(r=2, target_modules="all-linear")

    def make() -> ExportedProgram:
        torch.manual_seed(0)
        return adaptc.compile_for_generation(model, config, max_batch=2, max_length=24).program.snapshot()

    same(*both(counted, make))
    # All but two: the mask is made, and sizes are known, before the first.
    assert counted.copies == {"mamba": 0, "t5": LAYERS - 3}.get(name, LAYERS - 2)


# -- layers of one's own -----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx, self.scale, self.facts = index, 0.5, {"a": [1, 2]}
        self.up, self.down, self.norm = nn.Linear(6, 9), nn.Linear(9, 6, bias=False), nn.LayerNorm(6)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Any:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * self.scale


class Net(nn.Module):
    def __init__(self, layer: Callable[[int], nn.Module] = Layer, count: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer(i) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def of(change: Callable[[Any, Tensor], Any]) -> type[nn.Module]:
    """A layer whose forward is ``change(self, x)``."""

    class Changed(Layer):
        def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Any:
            return change(self, x)

    return Changed


def taken(change: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    """A network whose forward is ``change(self, x)``."""

    class Changed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return change(self, x)

    return Changed


def reads_index(self: Any, x: Tensor) -> Tensor:
    return Layer.forward(self, x) * (2 if self.layer_idx == 5 else 1)


def writes(self: Any, x: Tensor) -> Tensor:
    self.scale = self.scale + 0.25
    return Layer.forward(self, x)


def appends(self: Any, x: Tensor) -> Tensor:
    self.facts["a"].append(3)
    return Layer.forward(self, x) * len(self.facts["a"])


def in_place(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.seen.add_(x.detach().sum((0, 1)))
    return Layer.forward(self, x) + self.seen


SIDE: list[Tensor] = []


def aside(self: Any, x: Tensor) -> Tensor:
    SIDE.append(torch.sin(x))
    return Layer.forward(self, x)


def with_side(self: Any, x: Tensor) -> Tensor:
    SIDE.clear()
    out = Net.forward(self, x)
    for t in SIDE:
        out = out + t
    SIDE.clear()
    return out


def collected(self: Any, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    for layer in self.layers:
        found.append(x)
        x = layer(x, found=found)
    return x + sum(found)  # type: ignore[operator]


def some_without_gradients(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        with torch.set_grad_enabled(i > 3):
            x = layer(x)
    return x


def different_options(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        x = layer(x, scale=float(i)) + layer.scale
    return x


def twice(self: Any, x: Tensor) -> Tensor:
    for layer in [*self.layers, *self.layers]:
        x = layer(x)
    return x


def crossed(self: Any, x: Tensor) -> Tensor:
    """The second tensor is the first in all calls but one."""
    first = x
    for i, layer in enumerate(self.layers):
        x = layer(x, x if i != 5 else first)
    return x


def adds_second(self: Any, x: Tensor) -> Tensor:
    return Layer.forward(self, x)


class Second(Layer):
    def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Any:
        assert y is not None
        return Layer.forward(self, x) + torch.sin(y)


class Uneven(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.scale = 0.5 if index != 4 else 0.75


class Held(Layer):
    """Has a tensor that is no parameter and no buffer."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.held = torch.full((6,), float(index))

    def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Any:
        return Layer.forward(self, x) + self.held


class Wide(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        if index in (2, 5):
            self.up, self.down = nn.Linear(6, 11), nn.Linear(11, 6, bias=False)


class Two(Layer):
    def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Any:
        out = Layer.forward(self, x)
        return {"out": out, "more": (out.sum(-1), x, None)}


def of_two(self: Any, x: Tensor) -> Tensor:
    total = 0
    for layer in self.layers:
        found = layer(x)
        x, total = found["out"], total + found["more"][0]
        assert found["more"][1].shape == x.shape
        assert found["more"][2] is None
    return x + total.unsqueeze(-1)  # type: ignore[union-attr]


def tied() -> nn.Module:
    net = Net()
    for i in (1, 4, 5):
        net.layers[i].up.weight = net.layers[0].up.weight
    return net


def tied_inside() -> nn.Module:
    net = Net(lambda i: Square(i))
    net.layers[5].two.weight = net.layers[5].one.weight
    return net


class Square(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(torch.sin(self.one(x))))


def hooked() -> nn.Module:
    net = Net()
    net.layers[3].up.register_forward_hook(lambda m, args, out: out * 2)
    return net


def hooked_outside() -> nn.Module:
    """Hooks of a layer run around it, whether its nodes are copied or not."""
    net = Net()
    net.layers[5].register_forward_hook(lambda m, args, out: out * 2)
    return net


def replaced() -> nn.Module:
    net = Net()
    usual = net.layers[3].up.forward
    net.layers[3].up.forward = lambda x: usual(x) * 2  # type: ignore[method-assign]
    return net


def half_frozen() -> nn.Module:
    net = Net()
    for p in net.layers[4].parameters():
        p.requires_grad_(False)
    return net


#: how a network is made -> how many of its seven layers are copied. The first is given what needs no gradients, so the
#: second and third are the first two of one kind.
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (Net, 4),
    "several results": (lambda: taken(of_two)(Two), 4),
    "a buffer that is written to": (lambda: Net(of(in_place)), 4),
    "tied": (tied, 4),
    "tied inside": (tied_inside, 4),
    "a hook of a layer": (hooked_outside, 4),
    "a second tensor": (lambda: taken(crossed)(Second), 3),
    "frozen": (half_frozen, 3),
    "an attribute": (lambda: Net(Uneven), 3),
    "width": (lambda: Net(Wide), 2),
    "three layers": (lambda: Net(count=3), 0),
    "index": (lambda: Net(of(reads_index)), 0),
    "writes": (lambda: Net(of(writes)), 0),
    "appends": (lambda: Net(of(appends)), 0),
    "aside": (lambda: taken(with_side)(of(aside)), 4),
    "collected": (lambda: taken(collected)(), 0),
    "without gradients": (lambda: taken(some_without_gradients)(), 1),
    "options": (lambda: taken(different_options)(), 0),
    "twice": (lambda: taken(twice)(), 4),
    "a tensor that is held": (lambda: Net(Held), 0),
    "a hook inside": (hooked, 3),
    "a forward inside": (replaced, 3),
}


@pytest.mark.few(7)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_layers_that_are_equal_or_nearly(name: str, training: bool, counted: Counted) -> None:
    make, expected = NETS[name]
    x = torch.rand(3, 5, 6)

    def captured() -> ExportedProgram:
        return capture(make(), x, training=training).program

    with contextlib.ExitStack() as stack:
        if name in ("writes", "appends"):  # torch.export refuses, or takes the example's value, as it does in full
            stack.enter_context(contextlib.suppress(adaptc.CaptureError))
        first, second = both(counted, captured)
        same(first, second)
    assert counted.copies == expected
    assert counted.sound == (name != "aside")


def test_the_model_is_as_it_was() -> None:
    net = Net()
    kinds, own = [type(m) for m in net.modules()], [dict(vars(m)) for m in net.modules()]
    capture(net, torch.rand(3, 5, 6))
    with pytest.raises(adaptc.CaptureError):
        capture(taken(lambda self, x: Net.forward(self, x) + x[int(x.sum())])(), torch.rand(3, 5, 6))
    assert [type(m) for m in net.modules()] == kinds
    assert [dict(vars(m)) for m in net.modules()] == own


def test_groups() -> None:
    net = Net(lambda i: Layer(i) if i % 2 else Uneven(i))
    assert [[path for path, _ in g] for g in equal_layers(net)] == []
    net = Net()
    ((group),) = equal_layers(net)
    assert [path for path, _ in group] == [f"layers.{i}" for i in range(LAYERS)]
    assert index_attributes([layer for _, layer in group]) == [("", "layer_idx")]


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    def raises(self: Any, x: Tensor) -> Tensor:
        if self.layer_idx == 1:
            raise KeyboardInterrupt
        return Layer.forward(self, x)

    net = Net(of(raises))
    kinds, own = [type(m) for m in net.modules()], [dict(vars(m)) for m in net.modules()]
    with pytest.raises(KeyboardInterrupt):
        capture(net, torch.rand(3, 5, 6))
    assert [type(m) for m in net.modules()] == kinds
    assert [dict(vars(m)) for m in net.modules()] == own


@pytest.mark.long
def test_two_captures_at_once() -> None:
    net, x, found = Net(), torch.rand(3, 5, 6), list[Any]()

    def make() -> None:
        found.append(adaptc.compile(net, UP, example_inputs=x).base.snapshot())

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(found[0], found[1])
    same(found[0], found[2])
    assert all("forward" not in vars(layer) for layer in net.layers)
