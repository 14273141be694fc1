"""``prog.module()``: an ``nn.Module`` in all that others do to one."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import adaptc
from adaptc import AdaptcError, CheckpointError, LoraConfig
from tests.support.method_table import ENTRIES
from tests.support.subject import subject
from tests.support.training import CONFIG, batch, first_values, model, module, peft_model, trainable


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop, self.down = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3)

    def forward(self, x: Tensor, *, shift: Tensor | None = None) -> Tensor:
        y = self.down(self.drop(self.norm(self.up(x))))
        return y if shift is None else y + shift


def net() -> Any:
    torch.manual_seed(2)
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    example = {"x": torch.randn(4, 5), "shift": torch.randn(4, 3)}
    return adaptc.compile(Net().eval(), config, example_inputs=example, training=True).module()


def call(trained: Any, rows: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return trained(x=torch.randn(rows, 5, generator=g), shift=torch.randn(rows, 3, generator=g))


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [e.name for e in ENTRIES])
def test_the_state_of_every_method_is_its_file(entry: str, tmp_path: Path) -> None:
    s = subject(entry, "linear")
    program = copy.deepcopy(s.program)
    trained = program.module()
    adaptc.save_adapter(program, tmp_path / "a")
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    state = trained.state_dict()
    assert state.keys() == written.keys()
    for key, value in written.items():
        assert torch.equal(state[key], value), key
    before = {k: t.clone() for k, t in trained.state_dict(base=True).items()}
    with torch.no_grad():
        for t in program.binding.values.values():
            if t.is_floating_point() and t.ndim:
                t.mul_(0.5)
    changed = [k for k, t in trained.state_dict().items() if not torch.equal(t, written[k])]
    assert changed
    found = trained.load_state_dict(written)
    assert not found.missing_keys
    assert not found.unexpected_keys
    for key, value in trained.state_dict(base=True).items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_keys_are_those_of_peft() -> None:
    state = module().state_dict()
    assert state.keys() == get_peft_model_state_dict(peft_model()).keys()
    assert all(torch.equal(state[k], t) for k, t in first_values().items())


def test_the_base_comes_on_request_and_goes_back() -> None:
    trained = net()
    whole = {k: t.clone() for k, t in trained.state_dict(base=True).items()}
    assert {"up.weight", "norm.running_mean", "down.bias"} <= whole.keys()
    assert whole.keys() >= trained.program.binding.values.keys()
    y = call(trained.eval())
    call(trained.train())  # moves the statistics of the norm
    assert not torch.equal(trained.state_dict(base=True)["norm.running_mean"], whole["norm.running_mean"])
    trained.load_state_dict(whole)
    assert torch.equal(call(trained.eval()), y)


def test_inside_another_module_its_state_has_a_prefix() -> None:
    outer = nn.ModuleDict({"one": net(), "head": nn.Linear(3, 2)})
    state = {k: t.clone() for k, t in outer.state_dict().items()}
    assert {k.partition(".")[0] for k in state} == {"one", "head"}
    assert sum("lora_" in k for k in state) == 4
    assert len(state) == 6
    found = outer.load_state_dict({k: t + 1 for k, t in state.items()})
    assert found.missing_keys == found.unexpected_keys == []
    assert all(torch.equal(t, state[k] + 1) for k, t in outer.state_dict().items())


def test_what_does_not_fit_is_named_and_changes_nothing() -> None:
    trained = net()
    state = {k: t.clone() for k, t in trained.state_dict().items()}
    missing = dict(list(state.items())[1:])
    with pytest.raises(CheckpointError, match=r"lora_A.weight' is missing"):
        trained.load_state_dict(missing)
    wider = {k: torch.ones(7, t.shape[1]) if "lora_A" in k else torch.ones(t.shape[0], 7) for k, t in state.items()}
    with pytest.raises(CheckpointError, match=r"'up\.lora_A\S*' would have shape \(7, .*another rank is for prog.swap"):
        trained.load_state_dict(wider)
    base = trained.state_dict(base=True)
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        (
            {**state, "strange": torch.ones(1)},
            r"'strange' is no tensor of the module; drop it",
        ),
        ({**base, "up.wight": torch.ones(1)}, r"'up\.wight' is no tensor of the module.*up\.weight"),
        ({**base, "up.weight": torch.ones(2, 2)}, r"'up\.weight' has shape \(2, 2\), and the module has it as"),
        (
            {k: t + 1 for k, t in base.items() if "lora_A" not in k},
            r"lora_A\S*' is missing, and the keys of the adapter as PEFT has them",
        ),
    ]
    for wrong, match in bad:
        with pytest.raises(CheckpointError, match="(?s)" + match):
            trained.load_state_dict(wrong)
    assert trained.load_state_dict({}, strict=False).missing_keys
    assert all(torch.equal(t, state[k]) for k, t in trained.state_dict().items())


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("fuse", [True, False])
def test_copies_are_equal_and_their_own(way: str, fuse: bool) -> None:
    trained = module()
    trained.program.fuse = fuse
    trained = trained.program.module().eval()
    twin = copy.deepcopy(trained) if way == "deepcopy" else pickle.loads(pickle.dumps(trained))
    assert type(twin).__name__ == "LlamaForCausalLM"
    assert twin.config.to_dict() == trained.config.to_dict()
    assert not twin.training
    assert torch.equal(twin(**batch()).loss, trained(**batch()).loss)
    names = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (trained, twin)]
    assert names[0] == names[1] != []
    with torch.no_grad():
        for p in trainable(twin):
            p.add_(0.1)
    assert all(torch.equal(t, first_values()[k]) for k, t in trained.state_dict().items())
    assert not torch.equal(twin(**batch()).loss, trained(**batch()).loss)
    twin.train()(**batch()).loss.backward()
    assert all(p.grad is not None for p in trainable(twin))


def test_what_was_frozen_stays_frozen_in_a_copy() -> None:
    trained = net()
    trained.get_parameter("up.lora_A.default.weight").requires_grad_(False)
    assert not copy.deepcopy(trained).get_parameter("up.lora_A.default.weight").requires_grad


# -- what others put around it -----------------------------------------------------------------------------------------


def test_hooks_run() -> None:
    trained, seen = net().eval(), []
    trained.register_forward_pre_hook(lambda m, args: seen.append("before"))
    trained.register_forward_hook(lambda m, args, y: seen.append("after") or y * 2)
    y = call(trained)
    assert seen == ["before", "after"]
    torch.testing.assert_close(y, 2 * call(net().eval()))


def test_hooks_on_the_embeddings_change_what_they_give() -> None:
    trained = module().eval()
    embeddings = trained.get_input_embeddings()
    assert embeddings.weight is trained.get_parameter("model.embed_tokens.weight")
    assert (embeddings.num_embeddings, embeddings.embedding_dim) == model().get_input_embeddings().weight.shape
    plain = trained(**batch()).logits
    handle = embeddings.register_forward_hook(lambda m, args, y: y * 0.5)
    theirs = peft_model().eval()
    theirs.get_input_embeddings().register_forward_hook(lambda m, args, y: y * 0.5)
    found = trained(**batch()).logits
    torch.testing.assert_close(found, theirs(**batch()).logits, rtol=1e-5, atol=1e-6)
    assert (found - plain).abs().max() > 1e-2
    handle.remove()
    assert torch.equal(trained(**batch()).logits, plain)


@pytest.mark.long
def test_a_checkpoint_around_it_changes_no_gradient() -> None:
    prog = adaptc.compile(model(), LoraConfig(**CONFIG, lora_dropout=0.3), training=True)
    trained = prog.module().train()
    trained.load_state_dict(first_values())

    def gradients(loss_of: Any) -> list[Tensor]:
        torch.manual_seed(4)
        trained.zero_grad()
        loss_of().backward()
        return [p.grad.clone() for p in trainable(trained)]  # type: ignore[union-attr]

    plain = gradients(lambda: trained(**batch()).loss)
    again = gradients(lambda: checkpoint(lambda: trained(**batch()).loss, use_reentrant=False))
    assert all(g.abs().max() > 0 for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in its compiler
def test_torch_compile_takes_it_in_one_graph() -> None:
    trained = module()
    torch._dynamo.reset()
    # The compiler of torch 2.11 takes no sym_min of plain numbers, and breaks the graph there.
    whole = TorchVersion(torch.__version__) >= (2, 12)
    compiled = torch.compile(trained, fullgraph=whole, backend="aot_eager")
    compiled(**batch()).loss.backward()
    ours = [p.grad.clone() for p in trainable(trained)]  # type: ignore[union-attr]
    trained.zero_grad()
    trained(**batch()).loss.backward()
    torch.testing.assert_close(ours, [p.grad for p in trainable(trained)], rtol=1e-4, atol=1e-7)


def test_parameters_that_others_replace_are_what_it_computes_with() -> None:
    trained = net().eval()
    before = call(trained)
    assert trained.double().get_parameter("up.weight").dtype == torch.float64
    trained.float()
    torch.testing.assert_close(call(trained), before)
    new = nn.Parameter(trained.get_parameter("down.bias") + 1)
    trained.get_submodule("down").bias = new
    torch.testing.assert_close(call(trained), before + 1)


# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_language_model_takes_what_its_forward_takes() -> None:
    trained, theirs = module().eval(), peft_model().eval()
    ids = batch()["input_ids"]
    wanted = theirs(ids)
    for out in (trained(ids), trained(ids, None), trained(input_ids=ids, use_cache=False, return_dict=True)):
        assert list(out) == ["logits"], "a loss without labels"
        torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-5, atol=1e-6)
    for keyword, value in {"use_cache": True, "output_attentions": True, "logits_to_keep": 2}.items():
        with pytest.raises(AdaptcError, match=keyword):
            trained(input_ids=ids, **{keyword: value})


@pytest.mark.parametrize("count", [None, 5, 40])
def test_losses_are_divided_by_what_all_batches_of_a_step_count(count: int | None) -> None:
    trained, theirs = module().eval(), peft_model().eval()
    more = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
    torch.testing.assert_close(trained(**batch(), **more).loss, theirs(**batch(), **more).loss, rtol=1e-6, atol=0)


def test_a_batch_without_labels_adds_nothing() -> None:
    trained = module()
    rows = {**batch(), "labels": torch.full_like(batch()["labels"], -100)}
    loss = trained(**rows, num_items_in_batch=torch.tensor(7)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.isnan().any() for p in trainable(trained))
    assert all(not p.grad.any() for p in trainable(trained) if p.grad is not None)


def test_inputs_that_do_not_fit_are_named() -> None:
    trained = net()
    with pytest.raises(AdaptcError, match=r"input 'x': expected torch\.float32 with 2 axes, got torch\.float64"):
        trained(x=torch.randn(3, 5).double(), shift=torch.randn(3, 3))
    with pytest.raises(AdaptcError, match="keywords"):
        trained(torch.randn(3, 5))
    with pytest.raises(AdaptcError, match="input 'x' is on meta, and the module on cpu"):
        trained(x=torch.randn(3, 5, device="meta"), shift=torch.randn(3, 3))


# -- memory for work ---------------------------------------------------------------------------------------------------


def kept(loss_of: Any) -> tuple[int, Tensor]:
    """Bytes that a loss keeps for its backward, but for parameters; and the loss."""
    seen: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            seen[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = loss_of()
    return sum(seen.values()), loss


def test_checkpoints_are_turned_on_and_off_by_trainers() -> None:
    trained = module()
    rows = batch(5)

    def gradients(loss_of: Any) -> tuple[int, list[Tensor]]:
        trained.zero_grad()
        size, loss = kept(loss_of)
        loss.backward()
        return size, [p.grad.clone() for p in trainable(trained)]  # type: ignore[union-attr]

    ways = (
        lambda: trained(**rows).loss,
        lambda: trained.base_model(input_ids=rows["input_ids"], use_cache=False).last_hidden_state.square().sum(),
    )
    plain = [gradients(way) for way in ways]
    for _ in range(2):
        trained.gradient_checkpointing_enable({"use_reentrant": False})
        assert trained.is_gradient_checkpointing
        for way, (size, grads) in zip(ways, plain, strict=True):
            less, again = gradients(way)
            assert less < 0.7 * size
            assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
        trained.gradient_checkpointing_disable()
        assert not trained.is_gradient_checkpointing
        assert [gradients(way)[0] for way in ways] == [size for size, _ in plain]
    trained.activation_checkpointing_enable()
    twin = copy.deepcopy(trained)
    assert twin.is_activation_checkpointing
    assert kept(lambda: twin(**rows).loss)[0] < 0.7 * plain[0][0]
    assert kept(lambda: twin.base_model(rows["input_ids"]).last_hidden_state)[0] < 0.7 * plain[1][0]
    with pytest.raises(adaptc.ConfigError, match="use_reentrant"):
        trained.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(adaptc.ConfigError, match="offload"):
        trained.activation_checkpointing_enable(offload=True)


def test_another_number_of_blocks_needs_another_module() -> None:
    trained = module()
    trained.checkpoint(2)
    trained.keep_activations()
    trained.checkpoint()
    assert trained.checkpoint_every == 2
    with pytest.raises(adaptc.AdaptcError, match=r"computes 2 blocks at a time again, and cannot change to 1"):
        trained.checkpoint(1)
    assert trained.checkpoint_every == 2


@pytest.mark.long
def test_the_part_before_the_head_is_in_the_mode_of_the_whole() -> None:
    prog = adaptc.compile(model(), LoraConfig(**CONFIG, lora_dropout=0.5), training=True)
    trained = prog.module()
    trained.load_state_dict(first_values())
    ids = batch()["input_ids"]

    def hidden() -> Tensor:
        return trained.base_model(input_ids=ids).last_hidden_state

    assert not torch.equal(hidden(), hidden())
    trained.eval()
    assert torch.equal(hidden(), hidden())
    logits = nn.functional.linear(hidden(), trained.get_output_embeddings().weight)
    torch.testing.assert_close(logits, trained(ids).logits, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        trained.get_parameter("model.layers.1.mlp.down_proj.lora_B.default.weight").mul_(2)
    changed = nn.functional.linear(hidden(), trained.get_output_embeddings().weight)
    assert (changed - logits).abs().max() > 1e-3
    torch.testing.assert_close(changed, trained(ids).logits, rtol=1e-5, atol=1e-6)
    trained.train()
    assert not torch.equal(hidden(), hidden())


def test_what_torch_makes_of_programs_finds_what_it_expects() -> None:
    """Its compilers ask for a module without guards, its decompositions for one that is a graph module."""
    trained = net()
    program = trained.owner
    assert isinstance(program.module(check_guards=False), torch.fx.GraphModule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        core = program.run_decompositions()
    g = torch.Generator().manual_seed(3)
    inputs = {"x": torch.randn(6, 5, generator=g), "shift": torch.randn(6, 3, generator=g)}
    assert core.module()(**inputs).shape == (6, 3)
    assert trained.graph is trained.graph_module.graph
    assert "def forward" in trained.code
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = trained.nothing_like_it


# -- directories -------------------------------------------------------------------------------------------------------


def test_a_model_beside_the_adapter_is_not_lost(tmp_path: Path) -> None:
    """A directory may hold a whole model under the name that Trainer looks for in its checkpoints."""
    trained = module()
    for name in ("checkpoint-3", "last"):
        folder = tmp_path / name
        folder.mkdir()
        whole = folder / "model.safetensors"
        whole.write_bytes(b"a whole model")
        if name == "last":
            trained.save_pretrained(folder)
            assert load_file(folder / "adapter_model.safetensors").keys() == trained.state_dict().keys()
        else:
            with pytest.raises(CheckpointError, match="not this adapter's"):
                trained.save_pretrained(folder)
            assert [p.name for p in folder.iterdir()] == ["model.safetensors"]
        assert whole.read_bytes() == b"a whole model"


def test_the_second_name_is_of_the_last_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there in Trainer's checkpoints alone, and of no older adapter where a directory was one."""
    trained, folder = module(), tmp_path / "checkpoint-3"
    for copies in (False, True):  # of filesystems without links
        if copies:
            monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
        for _ in range(2):
            with torch.no_grad():
                trainable(trained)[0].add_(1)
            trained.save_pretrained(folder)
            found = load_file(folder / "model.safetensors")
            assert all(torch.equal(found[k], t) for k, t in trained.state_dict().items())
    last = folder.rename(tmp_path / "last")
    with torch.no_grad():
        trainable(trained)[0].add_(1)
    trained.save_pretrained(last)
    assert not (last / "model.safetensors").exists()


@pytest.mark.long
def test_dropout_is_found_as_a_layer_and_turned_off() -> None:
    """As trainers do it, which go through the modules. Copies are as it is, and changes of mode leave it so."""
    config = adaptc.LoraConfig(**{**CONFIG, "lora_dropout": 0.5})
    trained = adaptc.compile(model(), config, training=True).module().train()
    trained.load_state_dict(first_values())
    found = [m for m in trained.modules() if isinstance(m, nn.Dropout)]
    assert found
    ids = batch()["input_ids"]

    def draws(one: Any) -> bool:
        return not torch.equal(one(input_ids=ids).logits, one(input_ids=ids).logits)

    assert draws(trained)
    with pytest.raises(adaptc.AdaptcError, match=r"dropout of 0\.3 is not set"):
        found[0].p = 0.3
    for m in found:
        m.p = 0
    assert [m.p for m in found] == [0]
    assert not draws(trained)
    assert not draws(trained.eval().train())
    assert not draws(copy.deepcopy(trained))
    kept = [n for n, _ in trained.named_modules() if "drop" in n]
    assert kept == [], "a module of its own among those that hold tensors"


def test_the_part_that_trains_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """As PEFT's models tell it, of the parameters that there are, tied ones once."""
    trained = module()
    mine = {id(p): p.numel() for p in trained.parameters()}
    tuned = sum(p.numel() for p in trainable(trained))
    assert trained.get_nb_trainable_parameters() == (tuned, sum(mine.values()))
    trained.print_trainable_parameters()
    part = f"{100 * tuned / sum(mine.values()):.4f}"
    assert capsys.readouterr().out == (
        f"trainable params: {tuned:,d} || all params: {sum(mine.values()):,d} || trainable%: {part}\n"
    )


def test_options_of_save_pretrained_are_taken_or_refused(tmp_path: Path) -> None:
    with pytest.raises(adaptc.ConfigError, match="max_shard_size, variant"):
        module().save_pretrained(tmp_path / "a", max_shard_size="1GB", variant="fp16")
    assert not (tmp_path / "a").exists()
