"""aLoRA next to PEFT's: where it acts, outputs, gradients, files, swaps, rows of a batch; and what can go wrong."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError, MergeError, SwapError, TargetError
from adaptc.methods.lora_family.alora import Alora, token_gate
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.regions import COEFFICIENT_ROLE, node_tag
from tests.support.families import FAMILIES
from tests.support.invoked import alora_oracle, config_of, inputs_with_invocations, targets
from tests.support.oracle import assert_differs, assert_same, file_tensors, load_peft, quiet, shared_base_program
from tests.support.training import check_gradient_checkpointing

NAMES = ["llama", "gpt2", "qwen3"]
CALL = (5, 7)
LINEAR = Op("linear", (5, 3), torch.ops.aten.linear.default, ())


def called(module: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    with torch.no_grad():
        return module(**inputs, **more)


def sought(tokens: list[int]) -> Tensor:
    return Alora(tokens=tuple(tokens)).init(LINEAR, torch.zeros(5, 3), torch.float32).slots["alora_invocation_tokens"]


@given(st.data())
def test_it_acts_where_peft_says(data):
    """Rows of few different ids, so that the tokens come often, overlap, and are cut off at the end."""
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    few = st.integers(0, 2)
    rows = data.draw(st.lists(st.lists(few, min_size=length, max_size=length), min_size=batch, max_size=batch))
    tokens = data.draw(st.lists(few, min_size=1, max_size=data.draw(st.sampled_from([1, 2, 3, 11]))))
    ids = torch.tensor(rows, dtype=data.draw(st.sampled_from([torch.int64, torch.int32])))
    offsets = calculate_alora_offsets({"a": peft.LoraConfig(**config_of("llama", tokens))}, "a", ids)
    expected = [[offset is not None and t >= length - offset for t in range(length)] for offset in offsets]
    assert token_gate(ids, sought(tokens)).tolist() == expected


def test_no_token_is_that_of_identity_values():
    method = Alora(tokens=(3,))
    nowhere = method.identity(LINEAR, torch.zeros(5, 3), torch.float32)["alora_invocation_tokens"]
    assert not token_gate(torch.arange(20).reshape(2, 10), nowhere).any()


@pytest.mark.few(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["right", "left", None])
def test_outputs(name, padding, tmp_path):
    oracle = alora_oracle(name, tmp_path, CALL)
    program = adaptc.compile(shared_base_program(name), tmp_path)
    program.validate()
    for batch, length in ((5, 11), (1, 7), (2, 3), (3, 2)):
        inputs = inputs_with_invocations(CALL, batch, length, padding)
        assert_same(called(program, inputs), called(oracle.model, inputs))
    inputs = inputs_with_invocations(CALL, 5, 11, padding)
    model = FAMILIES[name].build()
    got, plain = called(program, inputs).logits, called(model, inputs).logits
    # The third and the fourth row are not invoked; the second is at its end.
    torch.testing.assert_close(got[2:4], plain[2:4], rtol=0, atol=2e-6)
    assert float((got[1, -2:] - plain[1, -2:]).abs().max()) > 1e-2
    assert_same(called(adaptc.unload(program), inputs), called(model, inputs))


def test_one_value_serves_all_sites(tmp_path):
    alora_oracle("llama", tmp_path, CALL)
    program = adaptc.compile(shared_base_program("llama"), tmp_path)
    tags = [(n, t) for n in program.graph.nodes if (t := node_tag(n)) and t["role"] == COEFFICIENT_ROLE]
    made = {n for n, _ in tags if any(u not in dict(tags) for u in n.users)}
    assert {t["site"] for _, t in tags} == {"input_ids|alora_acts"}
    assert len(made) == 1
    assert len({node_tag(u)["site"] for u in made.pop().users}) == len(program.adaptation.attachments) > 4
    bare = adaptc.unload(program)
    assert len(bare.graph.nodes) == len(shared_base_program("llama").graph.nodes)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_training(name, tmp_path):
    """Gradients, all parameters that train, and files both ways."""
    tokens = FAMILIES[name].inputs(3, 7)["input_ids"][1, 2:4].tolist()
    oracle = alora_oracle(name, tmp_path / "peft", tokens)
    config = config_of(name, tokens)
    with quiet("fan_in_fan_out is set to False but the target module is `Conv1D`.*"):
        oracle.check_trained(adaptc.compile(FAMILIES[name].build(), LoraConfig(**config)), tmp_path / "ours")
    stored = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft")]
    assert stored[0]["alora_invocation_tokens"] == stored[1]["alora_invocation_tokens"] == tokens
    assert sorted(stored[0]) == sorted(stored[1])


@pytest.mark.long
def test_a_training_step_with_dropout_and_checkpoints():
    """Rows that are not invoked train nothing, and the value is there when a block is computed again."""
    config = LoraConfig(**config_of("llama", CALL, lora_dropout=0.4))
    program = adaptc.compile(FAMILIES["llama"].build(), config, training=True)
    inputs = inputs_with_invocations(CALL, 4, 11)
    module, grads = check_gradient_checkpointing(program, **inputs, labels=inputs["input_ids"])
    assert all(float(grad.abs().max()) > 0 for name, grad in grads.items() if "lora_B" in name)
    not_invoked = {"input_ids": inputs_with_invocations(CALL, 4, 11)["input_ids"][3:]}
    module(**not_invoked, labels=not_invoked["input_ids"]).loss.backward()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_swaps_to_other_tokens_and_ranks(backend, tmp_path):
    """From a directory, a state dict and a binding; more tokens than the slot has room for, and one."""
    program = adaptc.compile(
        shared_base_program("llama"), LoraConfig(**config_of("llama", [9, 8, 7], r=4)), backend=backend
    )
    called(program, inputs_with_invocations(CALL, 2, 5))
    oracles = {}
    for i, tokens in enumerate([(6,), CALL, tuple(range(3, 14)), (9, 9, 2)]):
        oracles[tokens] = alora_oracle("llama", tmp_path / str(i), tokens, seed=i, r=i + 1)
    with adaptc.debug.assert_no_recompiles():
        for tokens, oracle in oracles.items():
            adaptc.swap(program, oracle.path)
            for size in ((5, 13), (1, 2)):
                inputs = inputs_with_invocations(tokens, *size)
                assert_same(called(program, inputs), called(oracle.model, inputs))
            program.validate()
            inputs = inputs_with_invocations(tokens, 3, 12)
            bound = program.bind(oracle.path)
            assert bound.binding.config.alora_invocation_tokens == list(tokens)
            assert_same(called(bound, inputs), called(oracle.model, inputs))
    # A bare state dict has no tokens of its own: those of the program's adapter are meant.
    adaptc.swap(program, file_tensors(oracles[CALL].path))
    assert program.binding.config.alora_invocation_tokens == [9, 9, 2]
    plain = called(FAMILIES["llama"].build(), inputs_with_invocations(CALL, 3, 12))
    assert_same(called(program.bind(None), inputs_with_invocations(CALL, 3, 12)), plain)
    assert adaptc.verify(program, FAMILIES["llama"].build()).ok


@pytest.mark.long
def test_saved_programs(tmp_path):
    """A program that torch or adaptc saved acts where it did, and takes other tokens."""
    one, other = (alora_oracle("gpt2", tmp_path / str(n), range(4, 4 + n), seed=n) for n in (2, 9))
    program = adaptc.compile(shared_base_program("gpt2"), one.path)
    adaptc.swap(program, other.path)
    inputs = inputs_with_invocations(range(4, 13), 4, 12, "left")
    torch.export.save(program, tmp_path / "torch.pt2")
    assert_same(called(torch.export.load(tmp_path / "torch.pt2").module(), inputs), called(other.model, inputs))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "ours.pt2"))
    assert_same(called(loaded, inputs), called(other.model, inputs))
    adaptc.swap(loaded, one.path)
    assert_same(
        called(loaded, inputs_with_invocations((4, 5), 4, 7)), called(one.model, inputs_with_invocations((4, 5), 4, 7))
    )
    assert_same(called(adaptc.unload(loaded), inputs), called(FAMILIES["gpt2"].build(), inputs))
    adaptc.save_adapter(loaded, tmp_path / "again")
    assert_same(
        called(load_peft(FAMILIES["gpt2"].build(), tmp_path / "again"), inputs_with_invocations((4, 5), 4, 7)),
        called(one.model, inputs_with_invocations((4, 5), 4, 7)),
    )


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_rows_with_adapters_of_their_own(name, tmp_path):
    """As PEFT's adapter_names: each row is invoked by its own adapter's tokens."""
    one, other = (alora_oracle(name, tmp_path / n, t, seed=len(n)) for n, t in (("one", CALL), ("other", (6,))))
    one.model.load_adapter(str(other.path), "other")
    bank = adaptc.compile(shared_base_program(name), one.path).bank({"one": one.path, "other": other.path})
    inputs = inputs_with_invocations(CALL, 5, 11)
    inputs["input_ids"][:4, 6] = 6
    rows = ["other", "one", None, "other", "one"]
    names = [{"one": "default", None: "__base__"}.get(n, n) for n in rows]
    expected = called(one.model, inputs, adapter_names=names)
    assert_same(called(bank, inputs, adapters=rows), expected)
    assert_differs(called(bank, inputs, adapters=["one"] * 5), expected)


@pytest.mark.long
def test_beside_virtual_tokens(tmp_path):
    """Tokens in front move what is adapted with the text. PEFT is told where it acts."""
    oracle = alora_oracle("llama", tmp_path, CALL)
    program = adaptc.compile(
        shared_base_program("llama"), {"a": tmp_path, "p": adaptc.PromptTuningConfig(num_virtual_tokens=3)}
    )
    prompt = next(v for f, v in program.binding.values.items() if f.startswith("prompt_encoder"))
    inputs = inputs_with_invocations(CALL, 2, 9)
    with torch.no_grad(), oracle.model.base_model._enable_peft_forward_hooks(alora_offsets=[5, 2]):
        embedded = oracle.model.get_input_embeddings()(inputs["input_ids"])
        embedded = torch.cat([prompt.expand(2, -1, -1), embedded], 1)
        expected = oracle.model.base_model(inputs_embeds=embedded)
    assert_same(called(program, inputs), expected)


@pytest.mark.slow
def test_packages(tmp_path):
    one, other, longer = (
        alora_oracle("llama", tmp_path / str(i), t, seed=i) for i, t in enumerate([CALL, (6,), range(3, 14)])
    )
    runner = adaptc.load_package(
        adaptc.package(adaptc.compile(shared_base_program("llama"), one.path), tmp_path / "package.pt2")
    )
    assert_same(
        called(runner, inputs_with_invocations(CALL, 4, 11)), called(one.model, inputs_with_invocations(CALL, 4, 11))
    )
    runner.swap(other.path)
    assert_same(
        called(runner, inputs_with_invocations((6,), 4, 7)), called(other.model, inputs_with_invocations((6,), 4, 7))
    )
    with pytest.raises(SwapError, match="alora_invocation_tokens"):
        runner.swap(longer.path)


@pytest.mark.long
def test_half_precision(tmp_path):
    model = FAMILIES["llama"].build().bfloat16()
    oracle = alora_oracle("llama", tmp_path, CALL)
    program = adaptc.compile(model, tmp_path)
    inputs = inputs_with_invocations(CALL, 3, 9)
    want = called(load_peft(FAMILIES["llama"].build().bfloat16(), oracle.path), inputs)
    assert_same(called(program, inputs), want, 2e-2)


class Net(nn.Module):
    """Layers on tokens, on tokens in a row, on what they are pooled to, and on tokens in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.flat = nn.Embedding(17, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.pooled, self.turned, self.conv = nn.Linear(6, 5), nn.Linear(6, 5), nn.Conv1d(6, 6, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.up(self.embed(input_ids)))
        x = torch.tanh(self.flat(torch.tanh(x.flatten(0, 1)))).view(*input_ids.shape, 6)
        turned = self.turned(x.transpose(0, 1).reshape(-1, 6)).sum(0)
        return self.pooled(x.mean(1)) + turned + self.conv(x.transpose(1, 2)).sum()


def net(**config: Any) -> adaptc.AdaptedProgram:
    torch.manual_seed(3)
    size, config = config.pop("size", (3, 4)), {"alora_invocation_tokens": [1, 2], **config}
    return adaptc.compile(Net().eval(), LoraConfig(**config), example_inputs=torch.ones(size, dtype=torch.long))


@pytest.mark.long
def test_sites():
    assert len(net(target_modules=["up", "flat"]).adaptation.attachments) == 2
    for module, why in (
        ("pooled", r"its output \(.*\) is not one for each of the"),
        ("turned", r"its output \(.*\) is not one for each of the"),
        ("embed", "linear layers alone and not at a consumer of kind 'embedding'"),
        ("conv", "linear layers alone and not at a consumer of kind 'conv1d'"),
    ):
        with pytest.raises(TargetError, match=rf"{module}.weight.*{why}"):
            net(target_modules=["up", module])


@pytest.mark.long
def test_programs_without_tokens():
    linear = nn.Sequential(nn.Linear(6, 5))
    config = LoraConfig(target_modules=["0"], alora_invocation_tokens=[1])
    with pytest.raises(TargetError, match="one input of token ids"):
        adaptc.compile(linear, config, example_inputs=torch.ones(3, 6))
    with pytest.raises(TargetError, match=r"one input of token ids.*decoder_input_ids"):
        adaptc.compile(FAMILIES["t5"].build(), config.replace(target_modules=["q"]))
    program = torch.export.export(Net().eval(), (torch.ones(4, 4, dtype=torch.long),), strict=False)
    with pytest.raises(TargetError, match="captured for 4 rows of 4 tokens"):
        adaptc.compile(program, config.replace(target_modules=["up"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens is empty"),
        ({"alora_invocation_tokens": [3, -1]}, r"alora_invocation_tokens\[1\] must be an integer of at least 0"),
        ({"alora_invocation_tokens": ["x"]}, "alora_invocation_tokens"),
        ({"use_dora": True}, "use_dora and alora_invocation_tokens are variants"),
        ({"init_lora_weights": "pissa"}, "changes the base weight"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True has no meaning for aLoRA"),
    ],
)
def test_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**{"alora_invocation_tokens": [4], **options})


@pytest.mark.long
def test_refusals(tmp_path):
    alora_oracle("llama", tmp_path / "a", CALL)
    program = adaptc.compile(shared_base_program("llama"), tmp_path / "a")
    before = called(program, inputs_with_invocations(CALL, 2, 7))
    with pytest.raises(MergeError, match="aLoRA acts on some tokens"):
        adaptc.merge(program)
    plain = adaptc.compile(shared_base_program("llama"), LoraConfig(r=3, target_modules=targets("llama")))
    adaptc.save_adapter(plain, tmp_path / "plain")
    for to, what in ((program, "plain"), (plain, "a")):
        with pytest.raises(SwapError, match=r"was compiled for method='a?lora', and the adapter has method='a?lora'"):
            adaptc.swap(to, tmp_path / what)
    with pytest.raises(ConfigError, match="alora acts on activations"):
        adaptc.convert_to_lora(tmp_path / "a", program, rank=2)
    with pytest.raises(ConfigError, match=r"LORA \(alora\) adapters do together does not follow"):
        adaptc.combine({tmp_path / "a": 0.5, tmp_path / "plain": 1.0})
    assert_same(called(program, inputs_with_invocations(CALL, 2, 7)), before, 0)
    assert "alora" in str(adaptc.report(program))
    either = adaptc.compile(shared_base_program("llama"), [tmp_path / "plain", tmp_path / "a"])
    adaptc.swap(either, tmp_path / "a")
    assert_same(called(either, inputs_with_invocations(CALL, 2, 7)), before)
