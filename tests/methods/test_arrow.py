"""Arrow next to PEFT's: what each token gets, outputs, gradients, swaps, files, rows of a batch; what can go wrong."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import ArrowConfig, LoraConfig, methods
from adaptc.errors import CheckpointError, ConfigError, MergeError, SwapError, TargetError
from adaptc.methods.lora_family.arrow import Arrow, top_right_singular_vector
from adaptc.passes.graph.ops import Op
from tests.support.arrow import peft_arrow_layer_output, peft_model, random_lora_adapter, save_random_lora, targets
from tests.support.families import FAMILIES
from tests.support.oracle import (
    EXPECTED_WARNINGS,
    assert_differs,
    assert_same,
    file_tensors,
    quiet,
    run,
    shared_base_program,
)
from tests.support.subject import assert_valid

NAMES = ["llama", "gpt2"]
LINEAR = Op("linear", (5, 7), torch.ops.aten.linear.default, ())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@cache
def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().double().eval()


def inputs(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 7, generator=generator, dtype=torch.float64)


def drawn(number: int, seed: int = 0) -> list[adaptc.Adapter]:
    """Adapters of other ranks and scales."""
    return [random_lora_adapter(1 + (i + seed) % 4, 2.0 + 3 * i - seed % 2, 10 * seed + i) for i in range(number)]


@cache
def program(backend: str = "eager", number: int = 3) -> adaptc.AdaptedProgram:
    """One that the tests of a process share and swap."""
    batch, length = torch.export.Dim("batch", max=9), torch.export.Dim("length", max=40)
    shapes = {"x": {0: batch, 1: length}}
    adapter = methods.arrow_adapter(drawn(number), ArrowConfig(top_k=2))
    return adaptc.compile(net(), adapter, example_inputs=(inputs(3, 4),), dynamic_shapes=shapes, backend=backend)


@cache
def directory(family: str, seed: int, r: int = 3, gap: bool = False) -> Path:
    return save_random_lora(family, Path(mkdtemp()), seed, r, gap, lora_alpha=4 + seed)


# -- the rule ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 11), st.integers(1, 11), st.integers(0, 99))
def test_prototypes_are_singular_vectors(rank, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    b = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    _, sizes, vectors = torch.linalg.svd(b @ a)
    found = top_right_singular_vector(a, b)
    torch.testing.assert_close(found.norm(), torch.ones_like(found.norm()))
    torch.testing.assert_close((b @ (a @ found)).norm(), sizes[0])
    if len(sizes) == 1 or sizes[1] < 0.99 * sizes[0]:
        torch.testing.assert_close((found @ vectors[0]).abs(), torch.ones_like(found.norm()))


def test_an_adapter_that_does_nothing_has_no_direction():
    a, b = torch.randn(3, 7), torch.zeros(5, 3)
    assert not top_right_singular_vector(a, b).any()
    assert not top_right_singular_vector(0 * a, b + 1).any()


@given(
    number=st.integers(1, 6),
    top_k=st.integers(1, 7),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 6.0]),
    batch=st.integers(1, 9),
    length=st.integers(1, 11),
    seed=st.integers(0, 9),
)
def test_what_each_token_gets(number, top_k, temperature, batch, length, seed):
    """Any number of adapters, of any ranks, through code that was compiled for three of them."""
    adapters, x = drawn(number, seed), inputs(batch, length, seed)
    prog = program()
    with adaptc.debug.assert_no_recompiles(), torch.no_grad():
        adaptc.swap(prog, methods.arrow_adapter(adapters, ArrowConfig(top_k, temperature)))
        got = prog(x)
    expected = net()(x) + peft_arrow_layer_output(adapters, x, top_k, temperature)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_of_equal_ones_the_first_are_chosen():
    one, other = drawn(1)[0], random_lora_adapter(2, 5.0, 77)
    twice = adaptc.Adapter(one.config.replace(lora_alpha=50), dict(one.tensors), "the same, stronger")
    x = inputs(2, 5)
    for pair in ([one, twice, other], [twice, one, other]):
        alone = adaptc.compile(net(), methods.arrow_adapter([pair[0], other], ArrowConfig(1)), example_inputs=(x,))
        both = adaptc.compile(net(), methods.arrow_adapter(pair, ArrowConfig(1)), example_inputs=(x,))
        torch.testing.assert_close(both(x), alone(x))


def test_a_token_without_direction_and_one_that_is_not_finite():
    prog = program()
    adaptc.swap(prog, methods.arrow_adapter(drawn(4), ArrowConfig(2)))
    x = inputs(2, 3)
    x[0, 1], x[1, 2] = 0, float("nan")
    got, plain = prog(x), net()(x)
    torch.testing.assert_close(got[0, 1], plain[0, 1])
    assert got[1, 2].isnan().all()
    assert got[1, :2].isfinite().all()


def test_gradients_of_inputs():
    adapters, x = drawn(4, 1), inputs(3, 4)
    prog = program()
    adaptc.swap(prog, methods.arrow_adapter(adapters, ArrowConfig(2, 0.4)))
    weights = torch.linspace(-1, 2, 60, dtype=torch.float64).reshape(3, 4, 5)
    found = []
    for call in (prog.module(), lambda t: net()(t) + peft_arrow_layer_output(adapters, t, 2, 0.4)):
        mine = x.clone().requires_grad_()
        (call(mine) * weights).sum().backward()
        assert mine.grad is not None
        found.append(mine.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert not [n for n, p in prog.module().named_parameters() if p.requires_grad]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_compiled_code_takes_any_number(number):
    x, config = inputs(4, 3), ArrowConfig(2, 0.6)
    prog = program("inductor")
    with torch.no_grad():
        prog(x)
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(prog, methods.arrow_adapter(drawn(number, 4), config))
            got = prog(x)
    torch.testing.assert_close(
        got, net()(x) + peft_arrow_layer_output(drawn(number, 4), x, 2, 0.6), rtol=1e-9, atol=1e-9
    )


@pytest.mark.long
def test_a_package(tmp_path):
    prog, x, config = program(number=4), inputs(3, 4), ArrowConfig(3, 0.6)
    adaptc.swap(prog, methods.arrow_adapter(drawn(5), config))
    packaged = adaptc.load_package(adaptc.package(prog, tmp_path / "arrow.pt2", max_rank=20))
    for number in (5, 1, 3):
        adaptc.swap(packaged, methods.arrow_adapter(drawn(number, 2), config))
        expected = net()(x) + peft_arrow_layer_output(drawn(number, 2), x, 3, 0.6)
        torch.testing.assert_close(packaged(x), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(SwapError, match="has shape"):
        adaptc.swap(packaged, methods.arrow_adapter(drawn(6), config))


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_outputs(name, top_k):
    paths, options = [directory(name, s) for s in range(3)], {"top_k": top_k, "router_temperature": 0.7}
    prog = methods.create_arrow_model(shared_base_program(name), paths, ArrowConfig(**options))
    assert_valid(prog)
    theirs = peft_model(name, paths, **options)
    for batch, length in ((3, 7), (1, 5), (2, 2)):
        assert_same(run(prog, FAMILIES[name], batch, length), run(theirs, FAMILIES[name], batch, length))
    with torch.no_grad():
        assert_differs(run(prog, FAMILIES[name]), run(prog.base, FAMILIES[name]))
    adaptc.swap(prog, methods.arrow_adapter([directory(name, 4), directory(name, 0)], ArrowConfig()))
    theirs = peft_model(name, [directory(name, 4), directory(name, 0)], top_k=2)
    assert_same(run(prog, FAMILIES[name]), run(theirs, FAMILIES[name]))


def test_outputs_where_power_iteration_converges():
    """Nothing of PEFT's is changed here."""
    paths = [directory("llama", s, gap=True) for s in range(4)]
    theirs = peft_model("llama", paths, exact_prototypes=False, top_k=2, rng_seed=5)
    prog = methods.create_arrow_model(shared_base_program("llama"), paths, peft.ArrowConfig(top_k=2, rng_seed=5))
    assert_same(run(prog, FAMILIES["llama"]), run(theirs, FAMILIES["llama"]), 5e-5)


@pytest.mark.long
def test_general_knowledge_is_taken_away():
    tasks, general = [directory("llama", s) for s in range(3)], [directory("llama", s) for s in (5, 6)]
    theirs = peft_model("llama", tasks, general, use_gks=True)
    objects = [adaptc.load_adapter(p) for p in (*tasks, *general)]
    before = [{k: t.clone() for k, t in o.tensors.items()} for o in objects]
    prog = methods.create_arrow_model(shared_base_program("llama"), objects[:3], ArrowConfig(use_gks=True), objects[3:])
    assert_same(run(prog, FAMILIES["llama"]), run(theirs, FAMILIES["llama"]))
    assert all(torch.equal(t, o.tensors[k]) for o, b in zip(objects, before, strict=True) for k, t in b.items())
    plain = methods.create_arrow_model(shared_base_program("llama"), tasks, ArrowConfig())
    assert_differs(run(prog, FAMILIES["llama"]), run(plain, FAMILIES["llama"]))


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast):
    paths = [directory("llama", s, gap=True) for s in range(3)]
    model = FAMILIES["llama"].build().bfloat16()
    prog = methods.create_arrow_model(model, paths, ArrowConfig(3), autocast_adapter_dtype=autocast)
    wanted = torch.float32 if autocast else torch.bfloat16
    slots = [t for f, t in prog.binding.values.items() if "lora_" in f and t.is_floating_point()]
    assert {t.dtype for t in slots} == {wanted}
    with quiet(*EXPECTED_WARNINGS):
        options: dict[str, Any] = {"autocast_adapter_dtype": autocast}
        theirs = peft.create_arrow_model(
            FAMILIES["llama"].build().bfloat16(), [str(p) for p in paths], peft.ArrowConfig(3), **options
        ).eval()
    got, expected = (run(m, FAMILIES["llama"]).logits for m in (prog, theirs))
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.long
def test_rows_of_a_batch_and_adapters_beside_it():
    one, other = (methods.arrow_adapter(drawn(n, n), ArrowConfig(k)) for n, k in ((2, 1), (5, 3)))
    x, style = inputs(3, 4), random_lora_adapter(2, 3.0, 50)
    prog = program()
    bank = prog.bank({"one": one, "other": other})
    got = bank(x, adapters=["other", None, {"one": 0.5}])
    plain = net()(x)
    deltas = [
        peft_arrow_layer_output(drawn(5, 5), x, 3, 1.0),
        0 * plain,
        0.5 * peft_arrow_layer_output(drawn(2, 2), x, 1, 1.0),
    ]
    expected = torch.stack([plain[i] + d[i] for i, d in enumerate(deltas)])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    both = adaptc.compile(net(), {"routed": one, "style": style}, example_inputs=(x,))
    added = (
        peft_arrow_layer_output(drawn(2, 2), x, 1, 1.0)
        + 1.5 * x @ (style.tensors["layer.lora_B.weight"] @ style.tensors["layer.lora_A.weight"]).T
    )
    torch.testing.assert_close(both(x), plain + added, rtol=1e-9, atol=1e-9)
    mixed = adaptc.compile(net(), [style, one], example_inputs=(x,))
    adaptc.swap(mixed, one)
    torch.testing.assert_close(mixed(x), plain + peft_arrow_layer_output(drawn(2, 2), x, 1, 1.0), rtol=1e-9, atol=1e-9)
    assert_close_half(prog, one, x)


def assert_close_half(prog: adaptc.AdaptedProgram, adapter: adaptc.Adapter, x: Tensor) -> None:
    adaptc.swap(prog, adapter, scale=0.5)
    torch.testing.assert_close(
        prog(x), net()(x) + 0.5 * peft_arrow_layer_output(drawn(2, 2), x, 1, 1.0), rtol=1e-9, atol=1e-9
    )


@pytest.mark.long
def test_verify_report_save_and_status(tmp_path):
    prog = methods.create_arrow_model(
        shared_base_program("llama"), [directory("llama", s) for s in range(3)], ArrowConfig(2)
    )
    assert adaptc.verify(prog).ok
    assert "arrow" in str(adaptc.report(prog))
    assert adaptc.debug.get_model_status(prog).trainable_params == 0
    loaded = adaptc.load(adaptc.save(prog, tmp_path / "arrow.pt2"))
    assert_same(run(loaded, FAMILIES["llama"]), run(prog, FAMILIES["llama"]))
    other = methods.arrow_adapter([directory("llama", 4)] * 2, ArrowConfig(1))
    for p in (loaded, prog):
        adaptc.swap(p, other)
    assert_same(run(loaded, FAMILIES["llama"]), run(prog, FAMILIES["llama"]))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
def test_files_both_ways(name, tmp_path):
    paths, options = [directory(name, s, 2 + s % 2) for s in range(3)], {"top_k": 2, "router_temperature": 0.5}
    prog = methods.create_arrow_model(shared_base_program(name), paths, ArrowConfig(**options))
    written = adaptc.save_adapter(prog, tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "README.md",
        "arrow_router",
        "task_0",
        "task_1",
        "task_2",
    ]
    assert written == tmp_path / "ours" / "arrow_router"
    tasks = [tmp_path / "ours" / f"task_{i}" for i in range(3)]
    assert_same(run(peft_model(name, tasks, **options), FAMILIES[name]), run(prog, FAMILIES[name]))
    for again in (written, adaptc.load_adapter(written)):
        adaptc.swap(prog, methods.arrow_adapter(paths[:1], ArrowConfig()))
        adaptc.swap(prog, again)
        fresh = methods.create_arrow_model(shared_base_program(name), paths, ArrowConfig(**options))
        assert_same(run(prog, FAMILIES[name]), run(fresh, FAMILIES[name]))
    # One adapter's own file, but for the zeros of a smaller rank.
    mine, given_ = file_tensors(tasks[1]), file_tensors(paths[1])
    assert all(torch.equal(mine[k], t) for k, t in given_.items())


@pytest.mark.long
@pytest.mark.parametrize("use_gks", [False, True])
def test_what_peft_saves(use_gks, tmp_path):
    tasks, general = [directory("llama", s) for s in range(2)], [directory("llama", 5)] if use_gks else None
    with quiet(*EXPECTED_WARNINGS):
        theirs = peft_model("llama", tasks, general, exact_prototypes=False, top_k=1, use_gks=use_gks)
        theirs.save_pretrained(str(tmp_path))
    prog = adaptc.compile(shared_base_program("llama"), tmp_path / "arrow_router")
    again = methods.create_arrow_model(shared_base_program("llama"), tasks, ArrowConfig(1, use_gks=use_gks), general)
    assert_same(run(prog, FAMILIES["llama"]), run(again, FAMILIES["llama"]))
    stored = json.loads((adaptc.save_adapter(prog, tmp_path / "ours") / "adapter_config.json").read_text())
    # What was taken away is gone, and would be again.
    asked = json.loads((tmp_path / "arrow_router" / "adapter_config.json").read_text())["arrow_config"]
    assert stored["arrow_config"] == {**asked, "use_gks": False, "gks_adapter_names": []}
    (tmp_path / "task_1" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="routes between the adapters beside it"):
        adaptc.swap(prog, tmp_path / "arrow_router")


def test_a_failed_write_changes_nothing(tmp_path):
    prog = program()
    adaptc.swap(prog, methods.arrow_adapter(drawn(3), ArrowConfig(2)))
    adaptc.save_adapter(prog, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    adaptc.swap(prog, methods.arrow_adapter(drawn(2, 3), ArrowConfig(1)))

    failed: list[Any] = []

    def failing(old: Any, new: Any, rename: Any = os.rename) -> None:
        if str(new) == str(tmp_path / "task_1") and not failed:
            failed.append(new)
            raise OSError("no room")
        rename(old, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptc.adapter_files.multi_adapter.os.rename", failing)
        with pytest.raises(CheckpointError, match="no room"):
            adaptc.save_adapter(prog, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    for wrong, match in (({"format": "diffusers"}, "cannot hold"), ({"save_embedding_layers": True}, "embed_tokens")):
        with pytest.raises((CheckpointError, ConfigError), match=match):
            adaptc.save_adapter(prog, tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()


# -- what can go wrong -------------------------------------------------------------------------------------------------


def test_configs_are_those_of_peft():
    ours, theirs = ArrowConfig(), peft.ArrowConfig()
    assert vars(ours) == dataclasses.asdict(theirs)
    assert LoraConfig(arrow_config=theirs).to_dict()["arrow_config"] == dataclasses.asdict(theirs)
    read = LoraConfig.from_dict(LoraConfig(arrow_config={"task_adapter_names": ["a"], "top_k": 2}).to_dict())
    assert read.arrow_config.task_adapter_names == ["a"]
    for wrong in ({"top_k": 0}, {"top_k": 1.5}, {"router_temperature": 0}, {"rng_seed": "x"}, {"use_gks": 2}):
        with pytest.raises(ConfigError, match=f"ArrowConfig.{next(iter(wrong))}"):
            ArrowConfig(**wrong)
    for value, match in ((3, "arrow_config must be"), ({"topk": 3}, "nearest are 'top_k'")):
        with pytest.raises(ConfigError, match=match):
            LoraConfig(arrow_config=value)
    for more in ({"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ConfigError, match="arrow_config"):
            LoraConfig(arrow_config=ArrowConfig(), **more)


@pytest.mark.parametrize(
    ("tasks", "general", "config", "match"),
    [
        ([], None, {}, "at least one LoRA adapter"),
        ("a path", None, {}, "must be a list"),
        ([(2, {})], [], {"use_gks": True}, "there are none"),
        ([(2, {})], [(2, {})], {}, "use_gks=True"),
        ([(2, {})], [(3, {})], {"use_gks": True}, "of one rank"),
        ([(2, {}), (2, {"use_dora": True})], None, {}, "one of 'dora'"),
        ([(2, {}), (2, {"lora_bias": True})], None, {}, "lora_bias=True"),
        ([(2, {"bias": "all"})], None, {}, "bias='all'"),
        ([(2, {"init_lora_weights": "pissa"})], None, {}, "init_lora_weights"),
    ],
)
def test_adapters_that_do_not_go_together(tasks, general, config, match):
    def made(given_: Any) -> Any:
        return (
            [random_lora_adapter(r, 3, i, **o) for i, (r, o) in enumerate(given_)]
            if isinstance(given_, list)
            else given_
        )

    with pytest.raises(ConfigError, match=match):
        methods.arrow_adapter(made(tasks), ArrowConfig(**config), made(general))


def test_adapters_of_other_modules_and_shapes():
    one, wide = random_lora_adapter(2, 3, 0), random_lora_adapter(2, 3, 1, columns=9)
    elsewhere = adaptc.Adapter(one.config, {k.replace("layer", "head"): t for k, t in one.tensors.items()}, "elsewhere")
    for other, match in ((wide, "of different models"), (elsewhere, "same modules")):
        with pytest.raises(CheckpointError, match=match):
            methods.arrow_adapter([one, other], ArrowConfig())


def test_what_it_has_no_meaning_for():
    adapter = methods.arrow_adapter(drawn(2), ArrowConfig())
    prog = program()
    with pytest.raises(MergeError, match="no weight can hold"):
        adaptc.merge(prog)
    with pytest.raises(CheckpointError, match="nothing to train"):
        adaptc.compile(net(), adapter, example_inputs=(inputs(3, 4),), training=True)
    with pytest.raises(SwapError, match="have no slot"):
        adaptc.swap(prog, drawn(1)[0])
    with pytest.raises(ConfigError, match="create_arrow_model"):
        adaptc.compile(shared_base_program("llama"), LoraConfig(arrow_config=ArrowConfig(), target_modules=["q_proj"]))
    named = {"task_adapter_names": ["task_0"]}
    with pytest.raises(ConfigError, match="create_arrow_model"):
        adaptc.compile(shared_base_program("llama"), LoraConfig(arrow_config=named, target_modules=targets("llama")))
    for op in (Op("embedding", (5, 7), torch.ops.aten.embedding.default), Op("weight", (5, 7))):
        with pytest.raises(TargetError, match="linear layer"):
            Arrow().slots(op)
    with pytest.raises(TargetError, match="MultiheadAttention"):
        Arrow().inside_multihead_attention()


def test_whose_a_rank_is_must_be_known():
    adapter = methods.arrow_adapter(drawn(2), ArrowConfig())
    for wrong in (0, 2, -1):
        owner = torch.full_like(adapter.tensors["layer.lora_owner"], wrong)
        with pytest.raises(CheckpointError, match="from 0 to 1"):
            adaptc.swap(program(), adaptc.Adapter(adapter.config, {**adapter.tensors, "layer.lora_owner": owner}))
