"""Programs whose adapter is an input: names, shapes, and the same numbers as the program that they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import adaptc
from adaptc import LoraConfig
from adaptc.exporters.input_description import describe, parse_description
from adaptc.exporters.slot_program import SlotProgram, as_input, make_slot_program
from tests.support.method_table import ENTRIES
from tests.support.several_layers import at_several_layers
from tests.support.subject import assert_close, assert_valid, quiet, save_random_adapter, subject

CASES = [(e.name, "linear") for e in ENTRIES if "linear" in e.layers()]
CASES += [(e.name, e.layers()[0]) for e in ENTRIES if "linear" not in e.layers()]
CASES += [(n, layer) for n in ("lora", "shira", "vera") for layer in ("embedding", "conv2d_odd", "experts")]


class Net(nn.Module):
    """Two layers of sizes that are prime."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(7, 11), nn.Linear(11, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def inputs(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 7, generator=torch.Generator().manual_seed(batch + 10 * length))


def compiled(config: Any = None, **options: Any) -> adaptc.AdaptedProgram:
    config = config or LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    torch.manual_seed(5)
    free = ({0: Dim("batch"), 1: Dim("length")},)
    return adaptc.compile(Net(), config, example_inputs=(inputs(2, 3),), dynamic_shapes=free, **options)


def run(made: SlotProgram, values: dict[str, Tensor], *args: Tensor) -> Tensor:
    """The program with the tensors of a binding; identity values where it has none."""
    given = {i.argument: as_input(values.get(i.fqn, i.identity)) for i in made.inputs}
    with torch.no_grad():
        return made.program.module(check_guards=False)(*args, **given)


def test_scales_multiply_the_narrow_side() -> None:
    made = make_slot_program(compiled())
    scales = [n for n in made.program.graph.nodes if n.op == "placeholder" and "scaling" in n.name]
    read = [user.meta["val"].shape[-1] for n in scales for user in n.users]
    assert len(read) == 2
    assert all(isinstance(n, torch.SymInt) for n in read)


@pytest.mark.few(12)
@pytest.mark.parametrize(("entry", "layer"), CASES)
def test_every_method(entry: str, layer: str, tmp_path: Path) -> None:
    """Compiled for one adapter, the program computes another one of other sizes, its own, and the base."""
    s = subject(entry, layer)
    with quiet():
        program = s.compile(save_random_adapter(s, s.config(**s.entry.other_config), tmp_path, seed=9))
        made, small = make_slot_program(program), make_slot_program(program, identity="minimal")
        other = program.bind(s.directory).binding
    assert_valid(made.program)
    args, tolerance = s.args(5), max(1e-6, s.tolerance)
    assert_close(run(made, made.current, *args), program(*args), tolerance)
    assert_close(run(made, {**other.values, **other.changed_base}, *args), s.expected(5), tolerance)
    assert all(i.identity.numel() for i in small.inputs)
    for one in (made, small):
        assert_close(run(one, {}, *args), s.base(*args), tolerance)
        for i in one.inputs:
            sizes = zip(i.shape, i.identity.shape, strict=True)
            assert all(isinstance(n, str) or n == found for n, found in sizes), i.name
    described = parse_description(json.dumps(describe(made)), "here")
    assert [x.attachment for x in described.sites] == list(program.adaptation.attachments)
    assert [x.name for x in described.inputs] == [i.name for i in made.inputs]


@pytest.mark.few(8)
@pytest.mark.parametrize("entry", [e.name for e in ENTRIES if "linear" in e.layers()])
def test_every_method_at_several_layers(entry: str) -> None:
    programs, x = at_several_layers(subject(entry, "linear"))
    made = make_slot_program(programs[0])
    for p in programs:
        with torch.no_grad():
            wanted = p(x)
        found = run(made, {**p.binding.values, **p.binding.changed_base}, x)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))
    assert_close(run(made, {}, x), programs[0].base(x), 1e-8)


def test_names_are_those_of_peft(tmp_path: Path) -> None:
    made = make_slot_program(compiled())
    config = peft.LoraConfig(r=5, target_modules=["up", "down"], init_lora_weights=False)
    model = peft.get_peft_model(Net(), config).eval()
    keys = peft.get_peft_model_state_dict(model)
    by_key = {i.key: i for i in made.inputs if i.key is not None}
    assert by_key.keys() == keys.keys()
    assert all(f"base_model.model.{i.name}" == key for key, i in by_key.items())
    assert [i.name for i in made.inputs if i.key is None] == ["up.scaling.lora", "down.scaling.lora"]
    assert {i.name: i.shape for i in made.inputs}["down.lora_B.weight"] == (5, "rank_1")
    # PEFT's tensors by these keys, without any adaptc between the two
    values = {i.fqn: keys[key] for key, i in by_key.items()} | {
        i.fqn: torch.tensor(8 / 5) for i in made.inputs if i.key is None
    }
    for size in ((2, 3), (1, 1), (5, 17)):
        with torch.no_grad():
            torch.testing.assert_close(run(made, values, inputs(*size)), model(inputs(*size)))


def test_one_site_alone() -> None:
    """Sites that are not fed compute the base, and the scale of the config counts where none is fed."""
    program = compiled()
    made = make_slot_program(program)
    values = {f: t for f, t in made.current.items() if f.startswith("down.lora")}
    config = LoraConfig(r=3, target_modules=["down"], init_lora_weights=False)
    state = {i.key: made.current[i.fqn] for i in made.inputs if i.key and i.site == "down.weight"}
    alone = program.bind(state, config=config)
    torch.testing.assert_close(run(made, values, inputs(3, 2)), alone(inputs(3, 2)))


def test_an_adapter_that_replaces_the_base() -> None:
    program = compiled(LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"))
    made = make_slot_program(program)
    assert [i.slot for i in made.inputs if i.site == "up.weight"][-1] == "base"
    torch.testing.assert_close(run(made, made.current, inputs(2, 5)), program(inputs(2, 5)))
    torch.testing.assert_close(run(made, {}, inputs(2, 5)), Net()(inputs(2, 5)))


def test_a_quantised_base_and_a_program_that_trains() -> None:
    program = adaptc.quantize(compiled(), "int8")
    made = make_slot_program(program)
    assert not any("adaptc" in str(n.target) for n in made.program.graph.nodes)
    torch.testing.assert_close(run(made, made.current, inputs(2, 5)), program(inputs(2, 5)), rtol=1e-4, atol=1e-5)
    trained = compiled(LoraConfig(r=3, target_modules=["up"], init_lora_weights=False, lora_dropout=0.5), training=True)
    made = make_slot_program(trained)
    torch.testing.assert_close(run(made, made.current, inputs(2, 5)), trained(inputs(2, 5)))


def test_a_largest_rank() -> None:
    made = make_slot_program(compiled(), max_rank=9)
    ranges = made.program.range_constraints
    assert [int(r.upper) for s, r in ranges.items() if str(s) in made.size_names] == [9, 9]
    lowered = made.program.run_decompositions({})
    assert [int(r.upper) for s, r in lowered.range_constraints.items() if str(s) in made.size_names] == [9, 9]


def test_programs_without_one_adapter_that_acts() -> None:
    program = compiled()
    with pytest.raises(adaptc.ConfigError, match="no adapter that could be an input"):
        make_slot_program(adaptc.merge(program))
    two = compiled({"a": LoraConfig(r=2, target_modules=["up"]), "b": LoraConfig(r=3, target_modules=["up"])})
    with pytest.raises(adaptc.ConfigError, match=r"\['a', 'b'\] act together"):
        make_slot_program(two)
    program.set_active([])
    with pytest.raises(adaptc.ConfigError, match="'default' is off"):
        make_slot_program(program)


def test_fingerprints_tell_bases_apart() -> None:
    program = compiled()
    first = describe(make_slot_program(program))["fingerprint"]
    assert first == describe(make_slot_program(compiled()))["fingerprint"]
    with torch.no_grad():
        program.base_tensors["up.weight"][3, 2] += 1
    assert first != describe(make_slot_program(program))["fingerprint"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "its format is 99"),
        (lambda d: d.pop("sites"), "expected an object"),
        (lambda d: d["inputs"][0].update(shape=["x", -1]), "shape"),
        (lambda d: d["inputs"][0].update(fqn="else"), "'else' is of no site"),
        (lambda d: d["sites"][0]["attachment"].update(method="nothing"), "nothing"),
    ],
)
def test_descriptions_that_are_damaged(change: Any, message: str) -> None:
    data = describe(make_slot_program(compiled()))
    change(data)
    with pytest.raises(adaptc.CheckpointError, match=f"model.onnx: the description .* is damaged.*{message}"):
        parse_description(json.dumps(data), "model.onnx")
