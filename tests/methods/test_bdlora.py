"""BD-LoRA next to PEFT's: outputs, training, first values, dropout, files both ways, merges; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc import BdLoraConfig, LoraConfig
from adaptc.errors import CheckpointError, ConfigError, SwapError, TargetError
from adaptc.methods.lora_family.lora import Lora
from adaptc.methods.lora_family.variants.bdlora import BdLora
from adaptc.passes.graph.ops import Op
from tests.support.oracle import assert_differs
from tests.support.subject import FILE, quiet

BLOCKS: dict[str, Any] = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["block.up"], "nblocks": 3}
OPTIONS: dict[str, Any] = {"r": 6, "lora_alpha": 7, "target_modules": ["up", "down"], "use_bdlora": BLOCKS}


class Net(nn.Module):
    """A layer whose outputs have three parts, and one whose inputs do; neither is square."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.block = nn.ModuleDict({"up": nn.Linear(13, 21), "down": nn.Linear(21, 10, bias=False)})
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.block["down"](torch.tanh(self.block["up"](x)))


def inputs(*shape: int) -> Tensor:
    torch.manual_seed(len(shape))
    return torch.randn(*shape, 13, dtype=torch.float64)


X = inputs(4, 3)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def peft_model(path: Path | None = None, seed: int = 5, **options: Any) -> Any:
    """PEFT's model with random tensors, saved to ``path``."""
    options = {**OPTIONS, **options}
    config = peft.LoraConfig(**{**options, "use_bdlora": peft.BdLoraConfig(**options["use_bdlora"])})
    with quiet():  # of a bias at a layer without one
        model = peft.get_peft_model(Net(), config)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, dtype=p.dtype) * 0.5
    if path is not None:
        with quiet():
            model.save_pretrained(str(path))
    return model.eval()


def compiled(adapter: Any = None, **options: Any) -> adaptc.AdaptedProgram:
    adapter = LoraConfig(**OPTIONS) if adapter is None else adapter
    return adaptc.compile(Net(), adapter, example_inputs=X, **options)


def trained(module: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    target, losses = torch.linspace(-1, 1, 120, dtype=torch.float64).reshape(4, 3, 10), []
    for _ in range(4):
        optimizer.zero_grad()
        value = (module(X) - target).square().mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def test_training_files_and_merges_are_pefts(tmp_path: Path) -> None:
    theirs = peft_model(tmp_path / "peft")
    program = compiled(tmp_path / "peft", training=True)
    assert [a.method.name for a in program.adaptation.attachments] == ["bdlora"] * 2
    module = program.module()
    close(module(X), theirs(X))
    assert_differs(module(X), Net()(X))
    expected, found = trained(theirs), trained(module)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < found[0]
    close(module(X), theirs(X))

    adaptc.save_adapter(program, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    one, other = (load_file(tmp_path / n / FILE) for n in ("ours", "theirs"))
    assert one.keys() == other.keys()
    for key in one:
        close(one[key], other[key])
    shapes = {k.removeprefix("base_model.model.block."): tuple(t.shape) for k, t in one.items()}
    assert shapes == {
        "up.lora_A.weight": (6, 13),
        "up.lora_B.weight": (21, 2),
        "down.lora_A.weight": (6, 7),
        "down.lora_B.weight": (10, 6),
    }
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs")]
    assert configs[0]["use_bdlora"] == configs[1]["use_bdlora"] == {**BLOCKS, "match_strict": True}
    close(peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ours")).eval()(X), module(X))
    merged, unloaded = adaptc.merge(program), theirs.merge_and_unload()
    for name in ("block.up.weight", "block.down.weight"):
        close(merged.state_dict[name], unloaded.state_dict()[name])
    assert torch.equal(adaptc.unmerge(merged)(X), program(X))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_first_values_are_pefts(init: bool | str) -> None:
    """But where PEFT forgets the option: its A of blocks is never normal, and its B of blocks never random."""
    base = adaptc.unload(adaptc.compile(Net(torch.float32), LoraConfig(**OPTIONS), example_inputs=X.float()))
    options, net = {**OPTIONS, "init_lora_weights": init}, Net(torch.float32)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(net, peft.LoraConfig(**options))
    program = adaptc.compile(base, LoraConfig(**options), generator=torch.Generator().manual_seed(1))
    adapter = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    found = {}
    for a in program.adaptation.attachments:
        slots = {n: program.binding.values[f] for n, f in a.slots.items()}
        own = a.method.files.write(program.ops[a.id], slots)
        found |= {f"base_model.model.{a.module}.{n}": t for n, t in own.items()}
    assert found.keys() == adapter.keys()
    forgotten = {False: "up.lora_B.weight", "gaussian": "down.lora_A.weight"}.get(init, "")
    for name, value in found.items():
        assert torch.equal(value, adapter[name]) is not (bool(forgotten) and name.endswith(forgotten)), name
        assert bool(value.any()) is ("lora_A" in name or init is False), name
    assert bool((program(X.float()) == Net(torch.float32)(X.float())).all()) is (init is not False)


def test_a_random_b_has_the_diagonal_blocks_of_loras() -> None:
    op, W = Op("linear", (21, 13), torch.ops.aten.linear.default, ()), torch.ones(21, 13)
    whole, own = (
        m.init(op, W, torch.float32, torch.Generator().manual_seed(4)).slots
        for m in (Lora(r=6, scheme=False), BdLora(r=6, scheme=False, blocks=3, factor="B"))
    )
    for i, block in enumerate(own["lora_B.weight"]):
        assert torch.equal(block, whole["lora_B.weight"][7 * i : 7 * i + 7, 2 * i : 2 * i + 2])
    assert torch.equal(own["lora_A.weight"].flatten(0, 1), whole["lora_A.weight"])


@given(st.data())
def test_the_weight_is_that_of_pefts_layers(data: st.DataObject) -> None:
    """For sizes of all kinds."""
    blocks, rank, shared = (data.draw(st.integers(1, n)) for n in (4, 3, 5))
    other, letter = data.draw(st.integers(1, 9)), data.draw(st.sampled_from("ab"))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer = nn.Linear(blocks * shared, other) if letter == "a" else nn.Linear(other, blocks * shared)
    layer = layer.double()
    config: Any = {f"target_modules_bd_{letter}": ["0"], "nblocks": blocks}
    options = {"r": blocks * rank, "lora_alpha": 5, "target_modules": ["0"]}
    model = peft.get_peft_model(
        nn.Sequential(layer), peft.LoraConfig(**options, use_bdlora=peft.BdLoraConfig(**config))
    )
    theirs = model.base_model.model[0]
    for p in (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight):
        nn.init.normal_(p)
    op = Op("linear", tuple(layer.weight.shape), torch.ops.aten.linear.default, ())
    method = LoraConfig(**options, use_bdlora=config).method("0", "linear")
    assert isinstance(method, BdLora)
    in_file = {"lora_A.weight": theirs.lora_A["default"].weight, "lora_B.weight": theirs.lora_B["default"].weight}
    slots = method.files.read(op, in_file)
    assert {n: s.shape for n, s in method.slots(op).items()} == {n: tuple(t.shape) for n, t in slots.items()}
    assert all(torch.equal(t, in_file[n]) for n, t in method.files.write(op, slots).items())
    x, scale = torch.randn(5, layer.in_features, dtype=torch.float64), method.scale(op)
    full = method.weight(op, layer.weight, slots, scale)
    torch.testing.assert_close(op(x, full, layer.bias), theirs(x), rtol=1e-9, atol=1e-9)
    close(method.apply(op, x, layer(x), layer.weight, layer.bias, slots, scale), theirs(x))


def test_dropout_acts_on_the_input(tmp_path: Path) -> None:
    theirs = peft_model(tmp_path, lora_dropout=0.5).train()
    module = compiled(tmp_path, training=True).module()
    torch.manual_seed(0)
    expected = theirs(X)
    torch.manual_seed(0)
    close(module(X), expected)
    assert_differs(module(X), expected)


def test_layers_in_no_list_have_plain_lora(tmp_path: Path) -> None:
    blocks = {"target_modules_bd_a": ["down"], "nblocks": 3, "match_strict": False}
    theirs = peft_model(tmp_path, use_bdlora=blocks, lora_bias=True)
    program = compiled(tmp_path)
    assert {a.module: a.method.name for a in program.adaptation.attachments} == {
        "block.up": "lora",
        "block.down": "bdlora",
    }
    close(program(X), theirs(X))
    with pytest.raises(ConfigError, match=r"'block\.up' matches neither target_modules_bd_a nor .*match_strict=False"):
        compiled(LoraConfig(**{**OPTIONS, "use_bdlora": {"target_modules_bd_a": ["down"]}}))
    with pytest.raises(ConfigError, match=r"'block\.down' matches target_modules_bd_a and target_modules_bd_b"):
        compiled(
            LoraConfig(
                **{**OPTIONS, "use_bdlora": {"target_modules_bd_a": ["up", "down"], "target_modules_bd_b": ["dow"]}}
            )
        )


def test_swaps_and_what_they_refuse(tmp_path: Path) -> None:
    """Another rank, scale or choice of the layers is a swap; other blocks are other code."""
    theirs = peft_model(tmp_path / "a", r=9, lora_alpha=2, use_rslora=True)
    only_up = {**BLOCKS, "target_modules_bd_a": ["nothing"]}
    part = peft_model(tmp_path / "b", 6, use_bdlora=only_up, target_modules=["up"])
    peft_model(tmp_path / "c", use_bdlora={**BLOCKS, "nblocks": 1})
    program = compiled()
    for directory, expected in (("a", theirs), ("b", part), ("a", theirs)):
        adaptc.swap(program, tmp_path / directory)
        close(program(X), expected(X))
    with pytest.raises(SwapError, match="blocks"):
        adaptc.swap(program, tmp_path / "c")
    close(program(X), theirs(X))
    bank = program.bank({"a": tmp_path / "a", "b": tmp_path / "b"})
    close(
        bank(X, adapters=["a", "b", None, "a"]), torch.cat([theirs(X)[:1], part(X)[1:2], Net()(X)[2:3], theirs(X)[3:]])
    )


def test_combined_adapters_are_plain_lora(tmp_path: Path) -> None:
    """PEFT combines the tensors of blocks as if they were whole."""
    a, b = peft_model(tmp_path / "a", 5), peft_model(tmp_path / "b", 6, r=3)
    made = adaptc.combine({str(tmp_path / "a"): 0.5, str(tmp_path / "b"): -2.0}, method="cat")
    assert made.config.use_bdlora is None
    found = adaptc.merge(compiled(made)).state_dict
    for name in ("block.up.weight", "block.down.weight"):
        base = Net().state_dict()[name]
        changes = [m.merge_and_unload().state_dict()[name] - base for m in (peft_model(), peft_model(None, 6, r=3))]
        torch.testing.assert_close(found[name], base + 0.5 * changes[0] - 2 * changes[1], rtol=1e-5, atol=1e-5)
    converted = adaptc.convert_to_lora(compiled(tmp_path / "a"), rank=6)
    torch.testing.assert_close(compiled(converted)(X), a(X), rtol=1e-5, atol=1e-5)
    assert_differs(a(X), b(X))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    peft_model(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = "base_model.model.block.down.lora_A.weight"
    for shape, said in (((5, 7), r"lora_A.weight' has shape \(5, 7\).*multiple of nblocks=3"), ((6, 21), "lora_A")):
        save_file({**tensors, key: torch.ones(shape, dtype=torch.float64)}, tmp_path / FILE)
        with pytest.raises(CheckpointError, match=said):
            compiled(tmp_path)


def test_its_options_as_peft_has_them() -> None:
    assert dataclasses.asdict(BdLoraConfig()) == dataclasses.asdict(peft.BdLoraConfig())
    for value in (peft.BdLoraConfig(**BLOCKS), BdLoraConfig(**BLOCKS), BLOCKS):
        config = LoraConfig(use_bdlora=value)
        assert config.use_bdlora == BdLoraConfig(**BLOCKS)
        assert LoraConfig.from_dict(config.to_dict()).use_bdlora == config.use_bdlora
        assert type(config.method("block.head", "linear")) is Lora
    both = {**BLOCKS, "target_modules_bd_b": ["down", "block.up"]}
    with pytest.raises(ValueError, match="down"):
        peft.BdLoraConfig(**both)
    for options, said in (
        ({"use_bdlora": both}, "'down' in target_modules_bd_a and in target_modules_bd_b"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks must be a positive integer"),
        ({"use_bdlora": {"blocks": 2}}, "BdLoraConfig has no field 'blocks'.*nblocks"),
        ({"use_bdlora": True}, "use_bdlora must be a BdLoraConfig"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' has no meaning for BD-LoRA"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True has no meaning with use_bdlora"),
        ({"lora_bias": True}, "lora_bias=True has no meaning with target_modules_bd_b"),
        ({"use_dora": True}, "use_dora and use_bdlora .*do not combine"),
        ({"kasa_config": {}}, "use_bdlora and kasa_config .*do not combine"),
    ):
        with pytest.raises(ConfigError, match=said):
            LoraConfig(**{**OPTIONS, **options})


def test_what_is_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"use_bdlora": {**BLOCKS, "nblocks": 2}}, "outputs of a layer into nblocks=2 parts, and this one has 21"),
        (
            {"use_bdlora": {**BLOCKS, "target_modules_bd_b": [], "match_strict": False, "nblocks": 6}},
            "inputs .*nblocks=3 fits",
        ),
        ({"r": 7}, "nblocks=3 blocks, got r=7; r=9 fits"),
    ):
        with pytest.raises(TargetError, match=said):
            compiled(LoraConfig(**{**OPTIONS, **options}))
    op = Op("linear", (21, 13), torch.ops.aten.linear.default, ())
    method = BdLora(r=6, blocks=3, factor="B")
    assert "block-diagonal" in method.kernels.why_missing(op)
    assert not method.bank.has_kernel(op)
    assert method.sizes.with_rank(op, 7).r == 9
    conv = nn.Sequential(nn.Conv1d(15, 6, 3))
    with pytest.raises(TargetError, match="blocks of the features that a matrix multiplies"):
        adaptc.compile(
            conv,
            LoraConfig(use_bdlora={"target_modules_bd_a": ["0"], "nblocks": 2}, target_modules=["0"]),
            example_inputs=torch.randn(2, 15, 9),
        )
    peft_model(tmp_path)
    with pytest.raises(ConfigError, match="use_bdlora"):
        adaptc.methods.create_arrow_model(Net(), [tmp_path], adaptc.ArrowConfig(top_k=1), example_inputs=X)
