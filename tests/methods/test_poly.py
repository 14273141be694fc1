"""Poly and MHR next to PEFT's: a task for each row, training by the same random numbers, files, swaps, banks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import PolyConfig
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, MergeError, SwapError, TargetError
from adaptc.methods.routed.poly import LOGITS
from tests.support.families import FAMILIES
from tests.support.oracle import (
    Oracle,
    assert_differs,
    assert_same,
    file_key_of,
    file_tensors,
    gradients,
    load_peft,
    shared_base_program,
)

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "v", "wo"], "gpt2": ["c_attn", "c_proj"]}
TASKS = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}
SIZES = {"r": 3, "n_tasks": 5, "n_skills": 4, "n_splits": 2}
#: what another adapter for the same program may have
OTHERS: list[dict[str, Any]] = [
    {"r": 5, "n_tasks": 2, "n_skills": 7},
    {"r": 1, "n_tasks": 1, "n_skills": 1},
    {"r": 2, "n_tasks": 11, "n_skills": 2, "target_modules": ["v_proj"]},
]


def config_of(name: str, **options: Any) -> dict[str, Any]:
    return {**SIZES, "target_modules": TARGETS[name], "task_type": TASKS[name], **options}


def oracle_of(name: str, path: Path, seed: int = 0, **options: Any) -> Oracle:
    return Oracle.wrap_and_save(name, peft.PolyConfig(**config_of(name, **options)), path, seed=seed)


def inputs(name: str, batch: int, length: int, tasks: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A task for each row; the last one comes first."""
    ids = torch.tensor([(3 * i + tasks - 1 + seed) % tasks for i in range(batch)])
    return {**FAMILIES[name].inputs(batch, length), "task_ids": ids}


def called(module: Any, given: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return module(**given)


@pytest.fixture(scope="module", params=["llama", "t5"])
def pair(request: Any, tmp_path_factory: Any) -> tuple[str, Oracle, adaptc.AdaptedProgram]:
    name = request.param
    oracle = oracle_of(name, tmp_path_factory.mktemp(name))
    return name, oracle, adaptc.compile(shared_base_program(name), oracle.path)


@pytest.mark.long
@given(data=st.data(), batch=st.integers(1, 5), length=st.integers(1, 9))
def test_outputs(pair, data, batch, length):
    name, oracle, program = pair
    tasks = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    given = {**FAMILIES[name].inputs(batch, length), "task_ids": torch.tensor(tasks)}
    assert_same(called(program, given), called(oracle.model, given))


@pytest.mark.long
def test_rows_have_tasks_of_their_own(pair):
    name, _, program = pair
    program.validate()
    given = inputs(name, 4, 7)
    out = called(program, given).logits
    given["task_ids"] = given["task_ids"].clone()
    given["task_ids"][1] = (given["task_ids"][1] + 1) % 5
    other = called(program, given).logits
    torch.testing.assert_close(out[[0, 2, 3]], other[[0, 2, 3]])
    assert float((out[1] - other[1]).abs().max()) > 1e-2
    plain = called(FAMILIES[name].build(), FAMILIES[name].inputs(4, 7))
    assert_differs(called(program, given), plain)
    bare = adaptc.unload(program)
    bare.validate()
    assert_same(called(bare, FAMILIES[name].inputs(4, 7)), plain)
    assert_same(called(program.bind(None), FAMILIES[name].inputs(4, 7)), plain)


@pytest.mark.long
@pytest.mark.parametrize("bad", [5, -1])
def test_tasks_that_there_are_not(pair, bad):
    name, _, program = pair
    given = inputs(name, 2, 5)
    with pytest.raises(AdaptcError, match=f"task_ids has {bad}, and the adapter has tasks from 0 to 4"):
        program(**{**given, "task_ids": torch.tensor([0, bad])})
    del given["task_ids"]
    with pytest.raises(AdaptcError, match="missing input 'task_ids'"):
        program(**given)
    with pytest.raises(MergeError, match="its task chooses, which no weight can"):
        adaptc.merge(program)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("how", ["eval", "train"])
def test_training(name, how, tmp_path):
    """Loss and gradients, in training with the numbers that PEFT draws of the same seed; files both ways."""
    oracle = oracle_of(name, tmp_path / "peft")
    config = PolyConfig(**config_of(name))
    program = adaptc.compile(FAMILIES[name].build(), config, training=True)
    adaptc.swap(program, oracle.path)
    module, theirs = program.module().train(how == "train"), oracle.model.train(how == "train")
    given = inputs(name, 4, 7)
    given["labels"] = given.pop("decoder_input_ids", given["input_ids"])
    torch.manual_seed(5)
    got = module(**given)
    torch.manual_seed(5)
    want = theirs(**given)
    assert_same(got, want)
    theirs.zero_grad()
    expected = {file_key_of(n): g for n, g in gradients(theirs, want).items()}
    found = gradients(module, got)
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        mine = found[key].reshape(value.shape)
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    assert sum(float(g.abs().max()) > 0 for g in found.values()) > 0.6 * len(found)
    if how == "train":  # other numbers, another mix; none without
        assert_differs(module(**given), got, 1e-3)
        module.eval()
        assert_same(module(**given), module(**given), 0)
        assert_same(module(**given), oracle.model.eval()(**given))
    with pytest.raises(AdaptcError, match="task_ids has 7, and the adapter has tasks from 0 to 4"):
        module(**{**given, "task_ids": torch.tensor([0, 7, 1, 2])})
    saved = adaptc.save_adapter(program, tmp_path / "ours")
    mine, peers = file_tensors(saved), file_tensors(oracle.path)
    assert mine.keys() == peers.keys()
    assert all(torch.equal(t, peers[n]) for n, t in mine.items())
    loaded = load_peft(FAMILIES[name].build(), saved)
    assert_same(called(loaded, given), called(oracle.model.eval(), given))


@pytest.mark.parametrize("fresh", [True, False])
def test_first_values_are_those_of_peft(fresh):
    options = config_of("llama", init_weights=fresh)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(FAMILIES["llama"].build(), peft.PolyConfig(**options)).eval()
    torch.manual_seed(3)
    program = adaptc.compile(shared_base_program("llama"), PolyConfig(**options))
    assert_same(called(program, inputs("llama", 3, 5)), called(theirs, inputs("llama", 3, 5)))
    assert adaptc.report(program).trainable == theirs.get_nb_trainable_parameters()[0]
    values = {file_key_of(n): t for n, t in program.binding.values.items()}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            assert torch.equal(values[file_key_of(name)].reshape(p.shape), p)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_swaps_to_other_tasks_skills_and_ranks(backend, tmp_path):
    program = adaptc.compile(shared_base_program("llama"), PolyConfig(**config_of("llama")), backend=backend)
    called(program, inputs("llama", 2, 5))
    with adaptc.debug.assert_no_recompiles():
        for i, options in enumerate(OTHERS):
            oracle = oracle_of("llama", tmp_path / str(i), seed=i, **options)
            adaptc.swap(program, oracle.path)
            for size in ((4, 11), (1, 3)):
                given = inputs("llama", *size, options["n_tasks"])
                assert_same(called(program, given), called(oracle.model, given), 1e-5)
            program.validate()
            bound = program.bind(oracle.path)
            assert_same(called(bound, given), called(oracle.model, given), 1e-5)
    with pytest.raises(AdaptcError, match="task_ids has 11, and the adapter has tasks from 0 to 10"):
        called(program, {**given, "task_ids": torch.tensor([11])})
    three = oracle_of("llama", tmp_path / "splits", n_splits=4)
    with pytest.raises(SwapError, match=r"splits=2.*splits=4"):
        adaptc.swap(program, three.path)


@pytest.mark.long
def test_saved_programs(tmp_path):
    one = oracle_of("t5", tmp_path / "one")
    other = oracle_of("t5", tmp_path / "other", seed=1, **OTHERS[0])
    program = adaptc.compile(shared_base_program("t5"), one.path)
    assert adaptc.verify(program, FAMILIES["t5"].build()).ok
    adaptc.swap(program, other.path)
    torch.export.save(program, tmp_path / "torch.pt2")
    given = inputs("t5", 4, 5, 2)
    assert_same(called(torch.export.load(tmp_path / "torch.pt2").module(), given), called(other.model, given))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "ours.pt2"))
    assert_same(called(loaded, given), called(other.model, given))
    adaptc.swap(loaded, one.path)
    given = inputs("t5", 3, 6)
    assert_same(called(loaded, given), called(one.model, given))
    plain = {n: t for n, t in given.items() if n != "task_ids"}
    assert_same(called(adaptc.unload(loaded), plain), called(FAMILIES["t5"].build(), plain))


@pytest.mark.long
def test_beside_another_adapter(tmp_path):
    """Two adapters of one program read one input; a site that one of them lacks has its number of tasks."""
    oracle = oracle_of("llama", tmp_path, target_modules=["q_proj"])
    more = [PolyConfig(**config_of("llama", target_modules=["k_proj"], n_tasks=3, n_splits=1, init_weights=False))]
    program = adaptc.compile(
        shared_base_program("llama"), [PolyConfig(**config_of("llama", target_modules=["q_proj"])), *more]
    )
    adaptc.swap(program, oracle.path)
    given = inputs("llama", 3, 5)
    assert_same(called(program, given), called(oracle.model, given))
    for a in program.adaptation.attachments:  # a site that the adapter lacks has its tasks, and splits of its own
        down, _, logits = (program.binding.values[f] for f in a.slots.values())
        assert (len(down), len(logits)) == (1 if a.module.endswith("k_proj") else 2, 5)
    both = adaptc.compile(shared_base_program("llama"), {"one": oracle.path, "two": more[0].replace(n_tasks=5)})
    assert_differs(called(both, given), called(oracle.model, given))
    both.set_active(["one"])
    assert_same(called(both, given), called(oracle.model, given))


class Net(nn.Module):
    """Layers that have the rows of a batch first, among all tokens, or second."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.rows, self.turned = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.flat(x.reshape(-1, 6))).unflatten(0, (x.shape[0], -1))
        h = self.rows(h.amax(1)).unsqueeze(1) * h[..., :4]
        return h + self.turned(h.transpose(0, 1).contiguous()).transpose(0, 1)


class Told(nn.Module):
    """PEFT's layers with rows in the one place that they take them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.tasks = inner, torch.tensor([0])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unsqueeze(1) if len(x) == len(self.tasks) else x.unflatten(0, (len(self.tasks), -1))
        return self.inner(rows, task_ids=self.tasks).reshape(*x.shape[:-1], -1)


@pytest.mark.long
@given(batch=st.integers(1, 5), length=st.integers(2, 6), seed=st.integers(0, 9))
def test_rows_that_peft_does_not_find(net, batch, length, seed):
    model, theirs, program = net
    torch.manual_seed(seed)
    x, tasks = torch.randn(batch, length, 6), torch.randint(0, 5, (batch,))
    theirs.flat.tasks = theirs.rows.tasks = tasks
    with torch.no_grad():
        got, want = program(x, task_ids=tasks), theirs(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert float((got - model(x)).abs().max()) > 1e-3


@pytest.fixture(scope="module")
def net(tmp_path_factory: Any) -> tuple[nn.Module, Any, adaptc.AdaptedProgram]:
    torch.manual_seed(1)
    model = Net().eval()
    options = {**SIZES, "target_modules": ["flat", "rows"], "init_weights": False}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.PolyConfig(**options)).eval()
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if LOGITS.partition(".")[0] in n:
                p.normal_()
    path = tmp_path_factory.mktemp("net")
    wrapped.save_pretrained(str(path))
    program = adaptc.compile(model, path, example_inputs=(torch.randn(3, 4, 6),))
    theirs = wrapped.base_model.model
    theirs.flat, theirs.rows = Told(theirs.flat), Told(theirs.rows)
    return model, theirs, program


def test_layers_that_have_the_rows_elsewhere(net):
    config = PolyConfig(**{**SIZES, "target_modules": ["turned"]})
    with pytest.raises(TargetError, match=r"turned\.weight.*no input of the program has a row for each place"):
        adaptc.compile(net[0], config, example_inputs=(torch.randn(3, 5, 6),))


@pytest.mark.long
def test_conv1d_of_transformers(tmp_path):
    """GPT-2's layers have all tokens one after the other, and PEFT has no Poly at them: as linear layers, it has."""
    config = PolyConfig(**config_of("gpt2", target_modules=["c_attn"], init_weights=False))
    program = adaptc.compile(FAMILIES["gpt2"].build(), config)
    given = inputs("gpt2", 4, 5)
    out = called(program, given).logits
    for row in range(4):
        alone = {n: t[row : row + 1] for n, t in given.items()}
        torch.testing.assert_close(called(program, alone).logits, out[row : row + 1], rtol=1e-4, atol=1e-5)
    model = FAMILIES["gpt2"].build()
    values = program.binding.values
    task = int(given["task_ids"][1])
    with torch.no_grad():
        for a in program.adaptation.attachments:
            down, up, logits = (values[f] for f in a.slots.values())
            mix = torch.sigmoid(logits[task])
            mix = mix / mix.sum(-1, keepdim=True)
            A = torch.einsum("qs,qsdr->qdr", mix, down).flatten(0, 1)
            B = torch.einsum("qs,qsrd->rqd", mix, up).flatten(1)
            model.get_parameter(a.fqn).add_(A @ B / SIZES["r"])
        plain = model(**{n: t[1:2] for n, t in given.items() if n != "task_ids"}).logits
    torch.testing.assert_close(out[1:2], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_rows_with_adapters_of_their_own(tmp_path):
    """In a bank a row has its adapter and its task; adapters of other sizes cannot share a call."""
    oracles = {n: oracle_of("llama", tmp_path / n, seed=i) for i, n in enumerate(["fr", "de"])}
    program = adaptc.compile(shared_base_program("llama"), PolyConfig(**config_of("llama")))
    bank = program.bank({n: o.path for n, o in oracles.items()})
    given = inputs("llama", 4, 6)
    with torch.no_grad():
        out = bank(**given, adapters=["fr", "de", None, "fr"]).logits
    for row, name in ((0, "fr"), (1, "de"), (3, "fr")):
        want = called(oracles[name].model, given).logits
        torch.testing.assert_close(out[row], want[row], rtol=1e-4, atol=1e-5)
    plain = called(FAMILIES["llama"].build(), FAMILIES["llama"].inputs(4, 6)).logits
    torch.testing.assert_close(out[2], plain[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(AdaptcError, match="task_ids has 5, and the adapter has tasks from 0 to 4"):
        bank(**{**given, "task_ids": torch.tensor([0, 1, 2, 5])}, adapters=["fr", "de", None, "fr"])
    bank.add("other", oracle_of("llama", tmp_path / "other", **OTHERS[0]).path)
    with pytest.raises(AdaptcError, match="cannot share a call"):
        bank(**given, adapters=["fr", "other", None, "fr"])
    bank.replace("de", oracle_of("llama", tmp_path / "other", **OTHERS[0]).path)  # a mixed call kept both
    few = {**given, "task_ids": torch.tensor([0, 1, 1, 0])}
    torch.testing.assert_close(bank(**few, adapters=["de"] * 4).logits, bank(**few, adapters=["other"] * 4).logits)
    with pytest.raises(AdaptcError, match="cannot share a call"):
        bank(**given, adapters=["fr", "de", None, "fr"])


@pytest.mark.long
def test_a_state_dict_whose_config_does_not_fit(tmp_path):
    program = adaptc.compile(shared_base_program("llama"), PolyConfig(**config_of("llama")))
    tensors = file_tensors(oracle_of("llama", tmp_path / "one", r=7).path)
    adaptc.swap(program, tensors)
    assert program.binding.config.r == 7
    before = called(program, inputs("llama", 2, 3))
    with pytest.raises(CheckpointError, match="poly_"):
        adaptc.swap(program, file_tensors(oracle_of("llama", tmp_path / "two", n_skills=3).path))
    odd = {k: t[:, :-1].contiguous() if "logits" in k else t for k, t in tensors.items()}
    with pytest.raises(CheckpointError, match=r"module_logits.*multiple of n_splits=2"):
        adaptc.swap(program, odd)
    assert_same(called(program, inputs("llama", 2, 3)), before, 0)


@pytest.mark.parametrize(
    "option", [{"r": 0}, {"n_tasks": 0}, {"n_skills": 0}, {"n_splits": 0}, {"poly_type": "x"}, {"n_tasks": "3"}]
)
def test_values_without_a_meaning_are_refused_by_name(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        PolyConfig(**option)


def test_sites_without_a_meaning():
    for options, message in (
        ({"target_modules": ["embed_tokens"]}, "a linear layer, and this weight is one of kind 'embedding'"),
        ({"n_splits": 5}, "n_splits=5 cuts the 24 inputs"),
    ):
        with pytest.raises(TargetError, match=message):
            adaptc.compile(shared_base_program("llama"), PolyConfig(**config_of("llama", **options)))
