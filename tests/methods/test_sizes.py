"""Sizes that no machine has, and scales that are no numbers, are refused before anything is made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any, ClassVar

import pytest
import sympy
import torch
from torch import Tensor, nn

import adaptc
from adaptc.errors import AdaptcError, ConfigError, MergeError, TargetError
from adaptc.methods import check_sizes
from adaptc.methods._shared.name_patterns import unused_patterns
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method, Scale, Slot, Slots
from adaptc.patterns import pattern_value

HUGE = 10**15


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.table = nn.Embedding(13, 6)
        self.conv = nn.Conv1d(10, 15, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up(self.table(x)).mT)


X = (torch.arange(21).reshape(3, 7) % 13,)


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), X)


CONFIGS: dict[str, Any] = {
    "lora": lambda: adaptc.LoraConfig(r=HUGE),
    "lora rank_pattern": lambda: adaptc.LoraConfig(rank_pattern={"up": HUGE}),
    "dora": lambda: adaptc.LoraConfig(r=HUGE, use_dora=True),
    "adalora": lambda: adaptc.AdaLoraConfig(init_r=HUGE, total_step=9),
    "vera": lambda: adaptc.VeraConfig(r=HUGE),
    "pvera": lambda: adaptc.PveraConfig(r=HUGE),
    "unilora": lambda: adaptc.UniLoraConfig(r=HUGE),
    "unilora vector": lambda: adaptc.UniLoraConfig(theta_d_length=HUGE),
    "tinylora vector": lambda: adaptc.TinyLoraConfig(u=HUGE),
    "randlora": lambda: adaptc.RandLoraConfig(r=HUGE),
    "vblora rank": lambda: adaptc.VBLoRAConfig(r=HUGE, vector_length=2),
    "vblora vectors": lambda: adaptc.VBLoRAConfig(num_vectors=HUGE, vector_length=2),
    "vblora length": lambda: adaptc.VBLoRAConfig(vector_length=HUGE),
    "loha": lambda: adaptc.LoHaConfig(r=HUGE),
    "hra": lambda: adaptc.HRAConfig(r=HUGE),
    "hira": lambda: adaptc.HiraConfig(r=HUGE),
    "delora": lambda: adaptc.DeloraConfig(r=HUGE),
    "peanut": lambda: adaptc.PeanutConfig(r=HUGE),
    "peanut depth": lambda: adaptc.PeanutConfig(depth=HUGE),
    "psoft": lambda: adaptc.PsoftConfig(r=HUGE),
    "osf": lambda: adaptc.OSFConfig(effective_rank=HUGE),
    "supertuning": lambda: adaptc.SupertuningConfig(r=HUGE, sparsity=0.5),
    "miss": lambda: adaptc.MissConfig(r=HUGE),
    "gralora": lambda: adaptc.GraloraConfig(r=HUGE),
    "gralora hybrid": lambda: adaptc.GraloraConfig(hybrid_r=HUGE),
    "gralora grid": lambda: adaptc.GraloraConfig(r=HUGE, gralora_k=HUGE),
    "glora": lambda: adaptc.GloraConfig(r=HUGE),
    "shira": lambda: adaptc.ShiraConfig(r=HUGE),
    "fourierft": lambda: adaptc.FourierFTConfig(n_frequency=HUGE),
    "waveft": lambda: adaptc.WaveFTConfig(n_frequency=HUGE),
    "c3a": lambda: adaptc.C3AConfig(block_size=HUGE),
    "boft factors": lambda: adaptc.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=HUGE),
    "boft size": lambda: adaptc.BOFTConfig(boft_block_size=HUGE),
    "boft number": lambda: adaptc.BOFTConfig(boft_block_size=0, boft_block_num=HUGE),
    "oft terms": lambda: adaptc.OFTConfig(num_cayley_neumann_terms=HUGE),
    "road": lambda: adaptc.RoadConfig(group_size=HUGE),
    "pissa": lambda: adaptc.LoraConfig(init_lora_weights="pissa_niter_1000000000", r=3),
    "pissa digits": lambda: adaptc.LoraConfig(init_lora_weights="pissa_niter_" + "9" * 5000, r=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_absurd_sizes_are_refused(exported, name):
    def attempt() -> None:
        config = CONFIGS[name]()
        config.target_modules = ["up"]
        adaptc.compile(exported, config)

    with pytest.raises((ConfigError, TargetError)) as caught:
        attempt()
    option = name.split()[-1] if "pattern" in name else {"adalora": "init_r"}.get(name, "")
    assert option in str(caught.value)


def test_the_message_says_which_option_and_what_there_is(exported):
    with pytest.raises(ConfigError, match=rf"LoraConfig with r={HUGE}: 'lora_A.weight' of .*'up'.*\(10, 6\).*memory"):
        adaptc.compile(exported, adaptc.LoraConfig(target_modules=["up"], r=HUGE))


@pytest.mark.parametrize("rank", [11, 1009])
def test_a_rank_above_the_sizes_of_a_layer_is_legal(exported, rank):
    prog = adaptc.compile(exported, adaptc.LoraConfig(target_modules=["up", "table", "conv"], r=rank))
    assert {m.sizes.rank() for m in prog.binding.methods.values()} == {rank}


def test_a_size_that_became_negative_is_refused(exported):
    config = adaptc.LoraConfig(target_modules=["up"])
    config.r = -3
    with pytest.raises(AdaptcError, match=r"r=-3|\(-3, 6\)"):
        adaptc.compile(exported, config)
    config.r = "3"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"LoraConfig\.r must be an integer, got '3'"):
        adaptc.compile(exported, config)


def test_a_swap_checks_sizes_too(exported, tmp_path):
    """Projections that are not in the file would be drawn in the size the config asks for."""
    config = adaptc.VeraConfig(target_modules=["up"], r=3, save_projection=False)
    prog = adaptc.compile(exported, config)
    path = adaptc.save_adapter(prog, tmp_path) / "adapter_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "r": HUGE}))
    before = prog(*X)
    with pytest.raises(ConfigError, match=f"r={HUGE}.*memory"):
        adaptc.swap(prog, tmp_path)
    assert torch.equal(prog(*X), before)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "ranges", [[(0, 1)] * 10**6, [(0, HUGE)], [(-1, 2)], [(2, 1)]], ids=["many", "long", "-", "back"]
)
def test_absurd_layer_replications_are_refused(ranges):
    config = adaptc.LoraConfig(target_modules=["0"], layer_replication=ranges)
    with pytest.raises(ConfigError, match="layer_replication") as caught:
        adaptc.compile(Layers(), config, example_inputs=torch.randn(2, 7))
    assert len(str(caught.value)) < 1000


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "modules_to_save", "target_parameters"])
def test_lists_of_a_million_names(exported, option):
    """Each entry is looked up, and none is compared with every module."""
    names = [f"block.{i}" for i in range(10**6)]
    options = {"target_modules": ["up"], option: names}
    with pytest.raises(TargetError, match=f"{option}: 'block.0'") as caught:
        adaptc.compile(exported, adaptc.LoraConfig(**options))
    assert len(str(caught.value)) < 1000


# -- scales ------------------------------------------------------------------------------------------------------------


def test_a_scale_that_overflows_is_refused(exported):
    config = adaptc.LoraConfig(target_modules=["up"], r=1, lora_alpha=3e38)
    assert math.isfinite(adaptc.compile(exported, config).binding.methods["up.weight|lora"].scale(None))  # type: ignore
    prog = adaptc.compile(exported, adaptc.LoraConfig(target_modules=["up"], r=2))
    for bad in (float("nan"), float("inf"), 1e39, 10**400, 1j, sympy.Symbol("a")):
        with pytest.raises(ConfigError, match="lora_alpha"):
            adaptc.LoraConfig(target_modules=["up"], lora_alpha=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"alpha_pattern\['up'\]"):
            adaptc.LoHaConfig(target_modules=["up"], alpha_pattern={"up": bad})  # type: ignore[dict-item]
    before = prog(*X)
    for name in ("lora_alpha", "lora_dropout"):
        config = adaptc.LoraConfig(target_modules=["up"], r=2)
        setattr(config, name, float("nan"))
        with pytest.raises(ConfigError, match=name):
            adaptc.swap(prog, prog.binding.values, config=config)
    assert torch.equal(prog(*X), before)


@dataclasses.dataclass(frozen=True)
class Growing(Method):
    """A method of a user's own, whose scale follows from an option in a way no annotation knows of."""

    name: ClassVar[str] = "growing"
    factor: Any = 1.0

    def slots(self, op: Op) -> dict[str, Slot]:
        return {"growing_v": Slot((op.shape[0], 1))}

    def scale(self, op: Op) -> Any:
        return self.factor * 1e30

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return W + (slots["growing_v"] + 1) * scale * 1e-30


@dataclasses.dataclass
class GrowingConfig(adaptc.methods.TargetedConfig):
    peft_type: ClassVar[str] = "GROWING"
    factor: float = 1.0
    size: "NoSuchName" = 7  # type: ignore[name-defined]  # noqa: F821, UP037

    def method(self, name: str, kind: str) -> Growing:
        return Growing(self.factor)


def test_the_rules_hold_for_configs_of_users(exported):
    assert GrowingConfig(size="anything").size == "anything"  # type: ignore[arg-type]
    for bad in ("1", True, None, float("nan"), 1e39):
        with pytest.raises(ConfigError, match=r"GrowingConfig\.factor must be a number"):
            GrowingConfig(factor=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"GrowingConfig\.factor must be a number"):
            GrowingConfig.from_dict({"factor": bad})


@pytest.mark.parametrize("scale", [1e39, float("nan"), 1j, "many", 10**400, sympy.Symbol("s")], ids=str)
def test_scales_are_checked_where_a_binding_is_made(scale):
    from adaptc.binding import check_tensors

    class Place:
        method, key, fqn = Growing(), "up", "up.weight"

    with pytest.raises(ConfigError, match=r"the scale of 'growing' at 'up' must be a number .* of LoraConfig"):
        check_tensors.finite_scale(scale, Place(), adaptc.LoraConfig())  # type: ignore[arg-type]
    assert check_tensors.finite_scale(sympy.Integer(2), Place(), adaptc.LoraConfig()) == 2.0  # type: ignore[arg-type]


# -- what a user chooses is never a fault of a pass ------------------------------------------------------------------


def test_a_form_that_does_not_exist_is_a_config_error(exported):
    config = adaptc.LoHaConfig(target_modules=["up"], r=2)
    with pytest.raises(ConfigError, match=r"'up.weight.*apply form.*form='auto'"):
        adaptc.compile(exported, config, form="apply")
    for form in ("around", None, [], 5, "APPLY"):
        with pytest.raises(ConfigError, match="form"):
            adaptc.compile(exported, config, form=form)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="form"):
            adaptc.compile(exported, config).bind(
                adaptc.compile(exported, config).binding,
                form=form,  # type: ignore[arg-type]
            )


class Taken(nn.Module):
    """It has a module where PEFT would put the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.up.lora_A = nn.ModuleDict({"default": nn.Linear(6, 3, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) + self.up.lora_A["default"](x).sum()  # type: ignore[index]


def test_a_name_that_is_taken_is_a_config_error():
    config = adaptc.LoraConfig(target_modules=["up"], r=3)
    model, x = Taken(), torch.randn(2, 6)
    with pytest.raises(ConfigError, match=r"already has a tensor named 'up.lora_A.default.weight'.*adapter_name"):
        adaptc.compile(model, config, example_inputs=x)
    assert torch.equal(adaptc.compile(model, config, example_inputs=x, adapter_name="other")(x), model(x))


@pytest.mark.parametrize(
    ("option", "bad"),
    [("adapter_name", 5), ("training", "yes"), ("generator", 7), ("key_mapping", {"a": 1}), ("fuse", [[]])],
)
def test_options_of_functions_are_checked_too(exported, option, bad):
    with pytest.raises(ConfigError, match=option):
        adaptc.compile(exported, adaptc.LoraConfig(target_modules=["up"]), **{option: bad})


def test_what_cannot_be_merged_is_a_merge_error(exported):
    assert issubclass(MergeError, AdaptcError)
    with pytest.raises(MergeError):
        adaptc.unmerge(adaptc.compile(exported, adaptc.LoraConfig(target_modules=["up"])))


def test_no_sites_have_no_sizes():
    check_sizes(adaptc.LoraConfig(), [])


@pytest.mark.long
def test_tables_of_many_patterns(exported):
    """The first key that matches rules, however many there are, and all that match nothing are found."""
    with pytest.raises(ConfigError, match=r"rank_pattern has 1000000 entries, and 100000 are the most"):
        adaptc.LoraConfig(target_modules=["up"], rank_pattern={f"block.{i}": 3 for i in range(10**6)})
    many: dict[str, int] = {f"block.{i}": 3 for i in range(50_000)}
    with pytest.raises(TargetError, match=r"rank_pattern: 'block.0' matches no adapted module.*and 49997 more"):
        adaptc.compile(exported, adaptc.LoraConfig(target_modules=["up"], rank_pattern=many))
    names = [f"layers.{i}.{n}" for i in range(40) for n in ("up", "q_proj")]
    patterns = {n: i for i, n in enumerate(names)}
    for table in (
        patterns,
        {"q_proj": -1, **patterns},
        {**patterns, "proj": 3, r".*\.up": 5},
        {r"layers\.\d\.up": 4, **patterns, "layers.1.": 7, "l.yers.3.up": 2},
        {n.replace(".", r"\."): i for n, i in patterns.items()},
    ):
        for name in (*names, "layers.99.up", "up", "model.layers.3.up", "xup"):
            slowly = next((v for k, v in table.items() if re.match(rf"(.*\.)?({k})$", name)), 8)
            assert pattern_value(table, name, 8) == slowly
        unused = [k for k in table if not any(re.match(rf"(.*\.)?({k})$", n) for n in names[:50])]
        assert unused_patterns(table, names[:50]) == unused
