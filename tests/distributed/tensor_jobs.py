"""What processes do together with layers that are divided among them; see ``tests.ecosystem.two_processes``."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

import adaptc
from adaptc import AdaptcError, ConfigError, LoHaConfig, LoraConfig
from adaptc.distributed import compile_from_config, load_base, load_state, save_state, shard_tensors
from tests.distributed.models import even_batch, exact_loss, grouped_llama, llama, optimizer_of
from tests.support.training import quantized_program

LORA: dict[str, Any] = {"r": 5, "lora_alpha": 11, "target_modules": "all-linear", "init_lora_weights": False}
SOME = {"target_modules": ["embed_tokens", "q_proj", "o_proj", "lm_head"]}
#: name -> the adapter, and the plan
CASES: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig(**LORA), "auto"),
    "rslora": (LoraConfig(**LORA | {"r": 7, "use_rslora": True}), {"gate_proj": "rowwise", "down_proj": "colwise"}),
    "dora": (LoraConfig(**LORA | {"use_dora": True}), "auto"),
    "embeddings": (LoraConfig(**LORA | SOME), {"layers.*.self_attn.*_proj": "colwise", "lm_head": "rowwise"}),
    "saved": (
        LoraConfig(**LORA | {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "bias": "all"}),
        "auto",
    ),
    "loha": (LoHaConfig(r=3, target_modules=["q_proj", "o_proj"], init_weights=False), "auto"),
}
QUERIES = {
    "q_proj": "colwise",
    "o_proj": "rowwise",
    "gate_proj": "colwise",
    "up_proj": "colwise",
    "down_proj": "rowwise",
}
CASES["queries"] = LoraConfig(**LORA), QUERIES
STEPS = 5


def own_program(name: str = "lora", seed: int = 1) -> adaptc.AdaptedProgram:
    generator = torch.Generator().manual_seed(seed)
    return adaptc.compile(grouped_llama(), CASES[name][0], training=True, generator=generator)


def trained_of(module: Any) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad]


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(module: Any, optimizer: Any, steps: int = STEPS) -> dict[str, Any]:
    """The loss and the norm of the gradients of each step, the first outputs and the first gradients."""
    losses, norms, gradients, logits = [], [], {}, torch.empty(0)
    for i in range(steps):
        optimizer.zero_grad()
        rows = even_batch(seed=i)
        out = module(**rows)
        loss = exact_loss(out, rows["labels"])
        loss.backward()
        if not i:
            logits = out.logits.detach()
            gradients = {n: whole(p.grad).clone() for n, p in module.named_parameters() if p.requires_grad}
        norms.append(whole(clip_grad_norm_(trained_of(module), 0.7)).item())
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "gradients": gradients, "logits": logits}


def run_case(name: str, folder: Path) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = shard_tensors(own_program(name), mesh, CASES[name][1]).train()
    found = train(module, optimizer_of(trained_of(module)))
    for n, p in module.named_parameters():
        assert p.grad is None or p.grad.placements == p.placements, n
    path = adaptc.save_adapter(module, folder / f"{name}-{mesh.size()}")
    held = {n: p.to_local().numel() for n, p in module.named_parameters()}
    return found | {"held": held, "adapter": load_file(path / "adapter_model.safetensors")}


def all_cases(folder: Path) -> Any:
    return {name: run_case(name, folder) for name in CASES}


def four(folder: Path) -> Any:
    """Four processes cannot divide two heads of keys, which are whole in each of them then."""
    with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn': .* would cut through heads"):
        shard_tensors(own_program(), init_device_mesh("cpu", (4,)))
    return {"queries": run_case("queries", folder)}


def swapped(folder: Path) -> Any:
    """An adapter of a file takes the place of the one that the module began with."""
    other = own_program(seed=2)
    adaptc.save_adapter(other, folder / f"other-{dist.get_rank()}")
    module = shard_tensors(own_program(), init_device_mesh("cpu", (2,)))
    before = {n: p.placements for n, p in module.named_parameters()}
    module.load_state_dict(load_file(folder / f"other-{dist.get_rank()}/adapter_model.safetensors"))
    assert {n: p.placements for n, p in module.named_parameters()} == before
    rows = even_batch()
    torch.testing.assert_close(module(**rows).logits, other(**rows).logits, rtol=1e-9, atol=1e-9)
    return {}


def states(folder: Path) -> Any:
    """Three steps, a state, and two more steps of a new module."""
    mesh = init_device_mesh("cpu", (2,))
    module = shard_tensors(own_program(), mesh).train()
    optimizer = optimizer_of(trained_of(module))
    train(module, optimizer, 3)
    save_state(folder / "states", module, optimizer, 3)
    expected = train(module, optimizer, 2)["losses"]
    again = shard_tensors(own_program(seed=3), mesh).train()
    optimizer = optimizer_of(trained_of(again))
    assert load_state(folder / "states", again, optimizer) == (3, {})
    assert train(again, optimizer, 2)["losses"] == expected
    return {"losses": expected}


def streamed(folder: Path) -> Any:
    """A base that is read from files straight into the parts of each process."""
    generator = torch.Generator().manual_seed(1)
    made = compile_from_config(folder / "base", CASES["lora"][0], generator=generator)
    module = load_base(shard_tensors(made, init_device_mesh("cpu", (2,))), folder / "base").train()
    return train(module, optimizer_of(trained_of(module)), 2)


def dropout(folder: Path) -> Any:
    """Processes whose own random numbers differ drop the same elements.

    All outputs of the layer are one sum over its inputs, and each process computes half of them.
    """
    config = LoraConfig(r=3, lora_dropout=0.4, target_modules=["0"], init_lora_weights=False)
    model = torch.nn.Sequential(torch.nn.Linear(7, 6, bias=False))
    torch.nn.init.zeros_(model[0].weight)
    x = torch.linspace(1, 2, 35).view(5, 7)
    made = adaptc.compile(model, config, example_inputs=(x,), training=True)
    module = shard_tensors(made, init_device_mesh("cpu", (2,)), {"0": "colwise"}).train()
    for name, p in module.named_parameters():
        if "lora_B" in name:
            p.data.to_local().fill_(1)
    torch.manual_seed(dist.get_rank())  # not before: to shard a tensor may make them equal
    outs = [module(x).detach() for _ in range(2)]
    assert not torch.equal(*outs)
    for out in outs:
        torch.testing.assert_close(out, out[:, :1].expand_as(out))
    return {}


def half(folder: Path) -> Any:
    """Three steps in bfloat16, with adapters in float32."""
    made = adaptc.compile(grouped_llama().to(torch.bfloat16), LoraConfig(**LORA), training=True)
    generator = torch.Generator().manual_seed(5)
    for p in made.binding.values.values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    module = (made.module() if processes == 1 else shard_tensors(made, init_device_mesh("cpu", (processes,)))).train()
    return train(module, optimizer_of(trained_of(module)), 3)


def refused(folder: Path) -> Any:
    """What is refused by name; the program is as it was."""
    mesh, program = init_device_mesh("cpu", (2,)), own_program()
    before = {n: t.clone() for n, t in program.state_dict.items()}
    for plan, said in (
        ({"q_prj": "colwise"}, r"plan: 'q_prj' names no module; nearest are .*q_proj"),
        ({"input_layernorm": "colwise"}, r"names 'model.layers.0.input_layernorm', which is no linear layer"),
        ({"embed_tokens": "rowwise"}, r"names 'model.embed_tokens', which is no linear layer"),
        ({"q_proj": "packed_colwise"}, "'q_proj' is 'packed_colwise', and a layer is one of 'colwise'"),
        ({"q_proj": "colwise", "layers.1.self_attn.*": "rowwise"}, "'model.layers.1.self_attn.q_proj' is both"),
        ({}, 'neither "auto" nor a dict'),
    ):
        with pytest.raises(ConfigError, match=said):
            shard_tensors(program, mesh, plan)
    with pytest.raises(ConfigError, match="must be a device mesh of one axis"):
        shard_tensors(program, init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b")))
    with pytest.raises(ConfigError, match=r"is quantised as nf4.*, and quantised weights are not sharded"):
        shard_tensors(quantized_program(), mesh)
    tied = adaptc.compile(llama(), LoraConfig(**LORA), training=True)
    with pytest.raises(ConfigError, match=r"names 'lm_head', whose weight (is tied|other kinds of layers read)"):
        shard_tensors(tied, mesh, {"lm_head": "colwise"})
    with pytest.raises(
        ConfigError, match=r"'model.layers.0.self_attn': aten.view.default of a tensor .* through heads"
    ):
        shard_tensors(tied, mesh, {"q_proj": "colwise"})
    plain = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).double()
    odd = adaptc.compile(plain, LoraConfig(r=2, target_modules=["0"]), example_inputs=torch.ones(2, 7).double())
    with pytest.raises(ConfigError, match="'0' has 5 outputs, which 2 processes cannot divide"):
        shard_tensors(odd, mesh, {"0": "colwise"})
    with pytest.raises(ConfigError, match="transformers has no plan of tensor parallelism for this model"):
        shard_tensors(odd, mesh)
    module = shard_tensors(program, mesh)
    for call, what in (
        (lambda: copy.deepcopy(module), "copy.deepcopy"),
        (lambda: pickle.dumps(module), "pickle"),
        (lambda: torch.compile(module)(**even_batch()), "torch.compile"),
        (module.checkpoint, "gradient checkpointing"),
        (lambda: module.base_model, "base_model"),
    ):
        with pytest.raises(AdaptcError, match=f"{what} does not work for a module of shard_tensors"):
            call()
    ids = even_batch()["input_ids"]
    with pytest.raises(AdaptcError, match=r"held in parts \(FSDP2, shard_tensors\) cannot be captured again"):
        module(input_ids=ids, position_ids=torch.zeros_like(ids))
    with pytest.raises(AdaptcError, match=r"called in every process"):
        adaptc.save_adapter(program, folder / "stale")
    assert all(torch.equal(t, before[n]) for n, t in program.state_dict.items())
    return {}
