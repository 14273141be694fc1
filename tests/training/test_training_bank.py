"""Many adapters in one step: each is trained as it would be alone, and none is touched by another."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig, matmul_tuning
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol.low_rank_rows import low_rank_rows_in_place
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, ONEDNN
from adaptc.passes.train.base_products import frozen_linear
from tests.support.gated_net import net
from tests.training.alone import Alone, assert_equal, batch, config, loss, program, values_of

ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"rank": 2, "layers": ["up", "down"], "lr": 3e-2, "clip": None},
    "large": {"rank": 7, "layers": ["up", "side", "down"], "lr": 1e-3, "clip": 0.05},
    "one": {"rank": 3, "layers": ["side"], "lr": 1e-2, "clip": None},
}
ROWS = ["small", "large", None, "one", "large", "small", "small", "one", "large", None, "large"]


def adam(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)


def two_groups(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)


def decay(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def bank_and_alone(dtype: torch.dtype = torch.float64, names: Any = ADAPTERS) -> tuple[Any, dict[str, Alone]]:
    bank = program(dtype).bank(training=True)
    alone = {}
    for seed, name in enumerate(names):
        a = ADAPTERS[name]
        made = config(a["rank"], a["layers"])
        bank.add(name, made, optimizer=adam(a["lr"]), scheduler=decay, max_grad_norm=a["clip"], seed=seed)
        alone[name] = Alone(bank[name], a["rank"], adam(a["lr"]), decay, a["clip"])
    return bank, alone


def train(bank: Any, alone: dict[str, Alone], rows: list[Any], seed: int, tolerance: float) -> Any:
    x, target = batch(len(rows), seed, next(iter(alone.values())).net.up.weight.dtype)
    found = bank.forward_backward(x, rows, loss, target)
    for name in dict.fromkeys(n for n in rows if n is not None):
        own = [i for i, n in enumerate(rows) if n == name]
        want = alone[name].backward(x[own], target[own])
        assert found[name].value() == pytest.approx(want, rel=tolerance, abs=tolerance)
        alone[name].step()
    return bank.step()


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(torch.float64, 9, 1e-9), (torch.float32, 50, 1e-5)])
def test_each_trains_as_alone(dtype: torch.dtype, steps: int, tolerance: float) -> None:
    bank, alone = bank_and_alone(dtype)
    for i in range(steps):
        rows = [n for n in ROWS if n != ("small", "large", "one", "none")[i % 4]]
        report = train(bank, alone, rows, i, tolerance)
        assert set(report) == {n for n in rows if n is not None}
        for name in report:
            assert report[name].steps == alone[name].steps
    for name, one in alone.items():
        assert_equal(bank, name, one, tolerance)
        assert bank.trainer(name).learning_rates == (one.optimizer.param_groups[0]["lr"],)


def test_rows_of_many_positions_use_the_fastest_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matmuls of the base are chosen as those of modules are, and each adapter is computed for its own rows alone."""
    monkeypatch.delenv("ADAPTC_PRODUCTS")
    for name in ("choose_matmul", "choose_for_gradient"):
        monkeypatch.setattr(matmul_tuning, name, lambda *_: MatmulChoice(ONEDNN, ALL_ROW_CLASSES, "faster here"))
    draw = torch.Generator().manual_seed(3)
    x, target = torch.randn(6, 9, 5, generator=draw), torch.randn(6, 9, 3, generator=draw)
    trained = adaptc.compile(net(), config(3), example_inputs=x, training=True)
    bank, alone = trained.bank(training=True), dict[str, Alone]()
    for seed, (name, a) in enumerate(ADAPTERS.items()):
        bank.add(name, config(a["rank"], a["layers"]), optimizer=adam(a["lr"]), seed=seed)
        alone[name] = Alone(bank[name], a["rank"], adam(a["lr"]))
    for rows in (["small", "large", "one"] * 2, ["one", "one", "one", "one", "small", "large"]):
        found = bank.forward_backward(x, rows, loss, target)
        for name, one in alone.items():
            own = [i for i, n in enumerate(rows) if n == name]
            assert found[name].value() == pytest.approx(one.backward(x[own], target[own]), rel=1e-5)
            one.step()
        bank.step()
    for name, one in alone.items():
        assert_equal(bank, name, one, 1e-5)
    (code,) = bank.placement.code_cache.executors
    targets = [n.target for n in code.variants.get(code.fixed_variant).code.graph.nodes]
    assert targets.count(frozen_linear) == targets.count(low_rank_rows_in_place) == 3
    assert len(code.matmuls.choices) == 3


def test_first_values_are_those_of_the_seed_alone() -> None:
    bank = program().bank(training=True)
    bank.add("a", config(4, ["up", "down"]), seed=11)
    torch.manual_seed(5)
    bank.add("b", config(4, ["up", "down"]), seed=11)
    bank.add("c", config(4, ["up", "down"]), seed=12)
    made = adaptc.compile(
        net().double(),
        config(4, ["up", "down"]),
        example_inputs=torch.randn(2, 5, dtype=torch.float64),
        generator=torch.Generator().manual_seed(11),
    )
    a, b, c, alone = (values_of(x) for x in (bank["a"], bank["b"], bank["c"], made.binding))
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], alone[k]) for k in a)
    assert not torch.equal(a["up", "lora_A"], c["up", "lora_A"])


def test_gradients_accumulate_over_batches_until_the_step() -> None:
    bank, alone = bank_and_alone(names=["small", "large"])
    for seed in (3, 4):
        x, target = batch(4, seed)
        bank.forward_backward(x, ["small", "large", "small", "small"], loss, target)
        alone["small"].backward(x[[0, 2, 3]], target[[0, 2, 3]])
        alone["large"].backward(x[[1]], target[[1]])
    before = {k: t.detach().clone() for k, t in values_of(bank["large"]).items()}
    assert list(bank.step(["small"])) == ["small"]
    assert all(torch.equal(t, values_of(bank["large"])[k]) for k, t in before.items())
    alone["small"].step()
    alone["large"].step()
    assert list(bank.step()) == ["large"]
    assert_equal(bank, "small", alone["small"])
    assert_equal(bank, "large", alone["large"])


def test_a_plain_loop_trains_too() -> None:
    bank, alone = bank_and_alone(names=["small", "one"])
    x, target = batch(3, 8)
    out = bank(x, adapters=["small", None, "one"])
    (loss(out[:1], target[:1]) + loss(out[2:], target[2:])).backward()
    bank.step()
    for name, row in (("small", slice(0, 1)), ("one", slice(2, 3))):
        alone[name].backward(x[row], target[row])
        alone[name].step()
        assert_equal(bank, name, alone[name])


@pytest.mark.parametrize("where", ["input", "loss", "gradient", "raises", "overflow"])
def test_what_is_wrong_in_one_adapter_is_told_and_reaches_no_other(where: str) -> None:
    """The others are to the bit what they are in a batch without it."""
    bank, _ = bank_and_alone()
    other, _ = bank_and_alone()
    x, target = batch(len(ROWS), 2)
    bad = [i for i, n in enumerate(ROWS) if n == "large"]
    good = [i for i, n in enumerate(ROWS) if n != "large"]
    losses: dict[str, Any] = dict.fromkeys(ADAPTERS, loss)
    if where == "input":
        x[bad[1]] = float("nan")
    elif where == "loss":
        losses["large"] = lambda out, t: loss(out, t) * float("inf")
    elif where == "gradient":
        losses["large"] = lambda out, t: (out - out.detach()).abs().sum().sqrt()  # zero, with an infinite slope
    elif where == "raises":
        losses["large"] = lambda out, t: [][0]
    else:
        with torch.no_grad():
            for t in bank.trainer("large").parameters.values():
                t.fill_(1e200)
    state = copy.deepcopy(bank.trainer("large").state_dict())
    for _ in range(2):
        found = bank.forward_backward(x, ROWS, losses, target)
        assert isinstance(found["large"].error, Exception)
        with pytest.raises(adaptc.AdaptcError, match="'large' got no gradients"):
            found["large"].value()
        want = other.forward_backward(x[good], [ROWS[i] for i in good], loss, target[good])
        assert set(bank.step()) == {"small", "one"} == set(other.step())
        for name in ("small", "one"):
            assert torch.equal(found[name].loss, want[name].loss)
            for key, t in values_of(other[name]).items():
                assert torch.equal(values_of(bank[name])[key], t), (name, key)
    now = bank.trainer("large").state_dict()
    assert all(torch.equal(t, now["parameters"][k]) for k, t in state["parameters"].items())
    assert now["steps"] == 0
    assert not now["optimizer"]["state"]


def test_a_step_with_bad_gradients_is_skipped_and_told() -> None:
    bank, alone = bank_and_alone(names=["small", "one"])
    x, target = batch(2, 1)
    bank.forward_backward(x, ["small", "one"], loss, target)
    bank.trainer("one").gradients[0].fill_(float("nan"))
    before = {k: t.detach().clone() for k, t in values_of(bank["one"]).items()}
    report = bank.step()
    assert "not finite" in report.skipped["one"]
    assert "side" in report["one"].skipped
    assert list(report.skipped) == ["one"]
    assert report["one"].steps == 0 == bank.trainer("one").steps
    assert "1 skipped" in str(report)
    assert report.to_dict()["adapters"]["small"]["skipped"] is None
    assert all(torch.equal(t, values_of(bank["one"])[k]) for k, t in before.items())
    alone["small"].backward(x[:1], target[:1])
    alone["small"].step()
    assert_equal(bank, "small", alone["small"])
    with pytest.raises(adaptc.AdaptcError, match="no adapter has gradients"):
        bank.step()


def test_an_adapter_may_leave_between_forward_and_step() -> None:
    bank, alone = bank_and_alone()
    x, target = batch(len(ROWS), 6)
    bank.forward_backward(x, ROWS, loss, target)
    bank.remove("large")
    assert set(bank.step()) == {"small", "one"}
    for name in ("small", "one"):
        own = [i for i, n in enumerate(ROWS) if n == name]
        alone[name].backward(x[own], target[own])
        alone[name].step()
        assert_equal(bank, name, alone[name])
    out = bank(x[:2], adapters=["small", "one"])
    bank.remove("one")
    out.sum().backward()
    assert list(bank.step()) == ["small"]
    bank.add("one", config(4, ["side"]), seed=3)
    with pytest.raises(adaptc.AdaptcError, match="no adapter has gradients"):
        bank.step()


def test_a_run_goes_on_from_its_files(tmp_path: Path) -> None:
    bank, alone = bank_and_alone()
    for i in range(3):
        train(bank, alone, ROWS, i, 1e-9)
    for name in ADAPTERS:
        assert bank.save_state(name, tmp_path / name) == tmp_path / name
    other = program().bank(training=True)
    for name, a in reversed(ADAPTERS.items()):
        other.load_state(name, tmp_path / name, optimizer=adam(a["lr"]), scheduler=decay, max_grad_norm=a["clip"])
    for i in range(3, 6):
        x, target = batch(len(ROWS), i)
        for one in (bank, other):
            one.forward_backward(x, ROWS, loss, target)
            one.step()
    for name in ADAPTERS:
        for key, t in values_of(bank[name]).items():
            torch.testing.assert_close(values_of(other[name])[key], t, rtol=1e-12, atol=1e-12)
        assert other.trainer(name).steps == 6
        assert other.trainer(name).learning_rates == bank.trainer(name).learning_rates
    with pytest.raises(adaptc.CheckpointError, match="scheduler"):
        other.load_state("again", tmp_path / "one", optimizer=adam(0.1))
    with pytest.raises(adaptc.CheckpointError, match="another optimizer"):
        other.load_state("again", tmp_path / "one", optimizer=two_groups, scheduler=decay)
    (tmp_path / "one" / "training_state.pt").write_bytes(b"PK")
    with pytest.raises(adaptc.CheckpointError, match="damaged"):
        other.load_state("again", tmp_path / "one", optimizer=adam(0.1), scheduler=decay)
    assert "again" not in other
    assert adaptc.compile(net().double(), tmp_path / "large", example_inputs=batch(2, 0)[0]).binding.methods


def test_a_state_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, alone = bank_and_alone(names=["small"])
    bank.save_state("small", tmp_path / "a")

    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = content()
    train(bank, alone, ["small", "small"], 0, 1e-9)

    def full(_: Any, file: Any) -> None:
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for place in ("a", "b", "c/d"):
        with pytest.raises(adaptc.CheckpointError, match="No space left"):
            bank.save_state("small", tmp_path / place)
        assert content() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_directory_begins_with_a_new_optimizer(tmp_path: Path) -> None:
    bank, alone = bank_and_alone(names=["small"])
    train(bank, alone, ["small", "small"], 0, 1e-9)
    bank.save_adapter("small", tmp_path / "small")
    bank.add("copy", tmp_path / "small", optimizer=adam(1e-3))
    bank.add("of binding", bank["small"], optimizer=adam(1e-3))
    assert bank.trainer("copy").steps == 0
    x, target = batch(2, 1)
    before = {k: t.detach().clone() for k, t in values_of(bank["small"]).items()}
    bank.forward_backward(x, ["copy", "of binding"], loss, target)
    bank.step()
    assert all(torch.equal(t, values_of(bank["small"])[k]) for k, t in before.items())
    with pytest.raises(adaptc.CheckpointError, match=r"training_state\.pt does not exist"):
        bank.load_state("again", tmp_path / "small")


def test_options_and_limits_are_refused_by_name() -> None:
    made = program()
    bank = made.bank({"a": config(2)}, training=True, capacity=2, max_rank=5, optimizer=adam(1e-2))
    assert bank.trainer("a").learning_rates == (1e-2,)
    error = adaptc.ConfigError
    with pytest.raises(error, match="has an adapter 'a'"):
        bank.add("a", config(2))
    with pytest.raises(error, match="rank 6"):
        bank.add("b", config(6))
    with pytest.raises(error, match=r"dropout of 0\.5"):
        bank.add("b", config(2, lora_dropout=0.5))
    with pytest.raises(error, match=r"optimizer=.* must be a function"):
        bank.add("b", config(2), optimizer=1e-3)
    with pytest.raises(error, match="no torch optimizer"):
        bank.add("b", config(2), optimizer=lambda p: p)
    with pytest.raises(error, match="not the adapter's"):
        bank.add("b", config(2), optimizer=lambda p: torch.optim.SGD([*p, torch.zeros(1)], lr=1.0))
    with pytest.raises(error, match="get_last_lr"):
        bank.add("b", config(2), scheduler=lambda o: o)
    with pytest.raises(error, match="max_grad_norm=-1"):
        bank.add("b", config(2), max_grad_norm=-1)
    with pytest.raises(error, match="seed='x'"):
        bank.add("b", config(2), seed="x")
    with pytest.raises(error, match="seed=3 is for the first values"):
        bank.add("b", made.binding, seed=3)
    with pytest.raises(adaptc.SwapError, match="wants"):
        bank.add("b", adaptc.LoHaConfig(r=2, target_modules=["up"]))
    with pytest.raises(adaptc.TargetError, match="nowhere"):
        bank.add("b", LoraConfig(r=2, target_modules=["nowhere"]))
    assert list(bank) == ["a"]
    bank.add("b", config(2))
    with pytest.raises(error, match="no room for 'c'"):
        bank.add("c", config(2))
    assert list(bank) == ["a", "b"]
    x, target = batch(2, 0)
    with pytest.raises(adaptc.AdaptcError, match="no adapter 'c'"):
        bank.forward_backward(x, ["a", "c"], loss, target)
    with pytest.raises(adaptc.AdaptcError, match="is a mix"):
        bank.forward_backward(x, ["a", {"a": 0.5, "b": 0.5}], loss, target)
    with pytest.raises(error, match="loss of adapter 'b'"):
        bank.forward_backward(x, ["a", "b"], {"a": loss}, target)
    with pytest.raises(adaptc.AdaptcError, match="nothing to train"):
        bank.forward_backward(x, [None, None], loss, target)
    with pytest.raises(adaptc.AdaptcError, match="rows"):
        bank.forward_backward(x, ["a", "b", "a"], loss, target)
    failed = bank.forward_backward(x, ["a", "b"], {"a": lambda out, t: out, "b": lambda out, t: t.sum()}, target)
    assert "scalar" in str(failed["a"].error)
    assert "does not depend" in str(failed["b"].error)
    with pytest.raises(adaptc.AdaptcError, match="not replaced"):
        bank.replace("a", config(2))
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(adaptc.AdaptcError, match="not copied"):
            copied(bank)
    for wrong, match in (({"evict": True}, "evict"), ({"loader": print}, "loader"), ({"optimzer": 1}, "optimzer")):
        with pytest.raises(error, match=match):
            made.bank(training=True, **wrong)
    with pytest.raises(error, match="captured for inference"):
        adaptc.compile(net(), config(2), example_inputs=torch.randn(2, 5)).bank(training=True)
    with pytest.raises(error, match="training='yes'"):
        made.bank(training="yes")


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)

    def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
        return {"y": self.up(x) + shift, "total": self.up(x).sum()}


def test_keyword_inputs_and_trees_of_outputs_are_cut_by_rows() -> None:
    torch.manual_seed(0)
    x, shift = torch.randn(5, 5).double(), torch.randn(5, 7).double()
    made = adaptc.compile(
        Halves().double(),
        LoraConfig(r=2, target_modules=["up"]),
        example_inputs={"x": x[:2], "shift": shift[:2]},
        training=True,
    )
    bank = made.bank({"a": LoraConfig(r=3, target_modules=["up"]), "b": made.binding}, training=True)
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        def of(out: Any, target: Any) -> Tensor:
            seen[name] = out, target
            return (out["y"] - target["y"]).square().mean()

        return of

    bank.forward_backward(
        {"x": x, "shift": shift}, ["a", "b", "b", None, "a"], {"a": note("a"), "b": note("b")}, {"y": shift}
    )
    assert torch.equal(seen["a"][1]["y"], shift[[0, 4]])
    assert torch.equal(seen["b"][1]["y"], shift[1:3])
    assert seen["b"][0]["y"].shape == (2, 7)
    assert seen["b"][0]["total"].shape == ()
