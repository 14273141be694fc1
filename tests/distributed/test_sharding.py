"""A base read from files straight into shards and stages, and training that a killed process does not lose."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

import adaptc
from adaptc import CheckpointError, ConfigError, LoraConfig
from adaptc.distributed import StagedModule, compile_from_config, load_base, load_state, save_state
from tests.distributed.models import CONFIG, batch, llama, optimizer_of, own_program, program, trained_alone
from tests.distributed.sharding_jobs import large_config
from tests.ecosystem.two_processes import together

JOBS = "tests.distributed.sharding_jobs"


def same_adapter(path: Path, module: Any) -> None:
    own, theirs = load_file(path / "adapter_model.safetensors"), module.state_dict()
    assert own.keys() == theirs.keys()
    # Adam divides a gradient near zero by one near zero.
    torch.testing.assert_close(own, dict(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.long
def test_a_streamed_base_trains_as_one_that_was_loaded(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len([*(tmp_path / "base").glob("*.safetensors")]) > 1
    jobs = together(tmp_path, "meta_fsdp", "meta_pipeline", jobs=JOBS)
    losses, module = trained_alone(own_program(), 3, exact=True)
    for name, found in jobs.items():
        torch.testing.assert_close(found["losses"], losses, rtol=1e-9, atol=0)
        same_adapter(tmp_path / name, module)
    whole = sum(t.numel() for t in module.parameters() if not t.requires_grad)
    assert jobs["meta_pipeline"]["held"] < 0.7 * whole


@pytest.mark.long
def test_no_process_has_memory_for_the_whole_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory that is freed goes back to the system, and is not counted any more.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    model = transformers.LlamaForCausalLM(large_config())
    model.save_pretrained(tmp_path / "large", max_shard_size="20MB")
    size = sum(p.nbytes for p in model.parameters())
    assert size > 80e6
    found = together(tmp_path, "memory_of_start", jobs=JOBS, processes=4)["memory_of_start"]
    assert found["compile"] < 0.5 * size
    # A quarter of it; and in a step two of eight blocks, each of them twice, while FSDP2 gathers one and computes one.
    assert found["start"] < 0.35 * size
    assert found["step"] < 0.8 * size


@pytest.mark.long
def test_a_killed_process_loses_no_more_than_the_last_steps(tmp_path: Path) -> None:
    together(tmp_path, "pipeline_killed", "sharded_killed", jobs=JOBS, ends_well=False)
    losses, module = trained_alone(own_program(), 6, exact=True)
    # A process alone goes on from what two stages left, too.
    alone = own_program().module()
    optimizer = optimizer_of([p for p in alone.parameters() if p.requires_grad])
    begun = load_state(tmp_path / "states", alone, optimizer)
    assert begun is not None
    assert begun[0] == 4
    assert {p.name for p in (tmp_path / "states").iterdir()} == {".lock", "step-2", "step-4"}
    # What a process was writing when it was killed does not count.
    shutil.copytree(tmp_path / "states/step-4", tmp_path / "states/.step-6")
    found = together(tmp_path, "pipeline_goes_on:4", "sharded_goes_on:3", jobs=JOBS)
    for name, one in found.items():
        assert one["first"] == 4
        torch.testing.assert_close(one["losses"], losses, rtol=1e-9, atol=0)
        same_adapter(tmp_path / name.removesuffix("_goes_on"), module)
    assert {p.name for p in (tmp_path / "states").iterdir()} == {".lock", "step-4", "step-6"}


@pytest.mark.long
def test_a_state_gives_back_weights_optimizer_and_its_options(tmp_path: Path) -> None:
    def begin() -> tuple[Any, torch.optim.Optimizer]:
        module = own_program().module()
        return module, optimizer_of([p for p in module.parameters() if p.requires_grad])

    def step(module: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
        optimizer.zero_grad()
        loss = module(**batch(seed=seed)).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    module, optimizer = begin()
    assert load_state(tmp_path / "none", module, optimizer) is None
    step(module, optimizer, 0)
    optimizer.param_groups[0]["lr"] = 3e-3
    assert save_state(tmp_path, module, optimizer, 1, extra={"row": 7}) == tmp_path / "step-1"
    expected = [step(module, optimizer, i) for i in (1, 2)]
    module, optimizer = begin()
    assert load_state(tmp_path, module, optimizer) == (1, {"row": 7})
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert [step(module, optimizer, i) for i in (1, 2)] == expected
    other = adaptc.compile(llama(), LoraConfig(**CONFIG | {"r": 3}), training=True).module()
    before = {k: t.clone() for k, t in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"in shape \(5, 40\), and it is \(3, 40\) here.*another rank"):
        load_state(tmp_path, other, optimizer_of([p for p in other.parameters() if p.requires_grad]))
    assert all(torch.equal(t, before[k]) for k, t in other.state_dict().items())
    for file in (tmp_path / "step-1").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot read the state of training .*step-1.*Delete it"):
        load_state(tmp_path, *begin())
    with pytest.raises(adaptc.AdaptcError, match=r"expected a TrainingPipeline, a StagedModule or prog.module"):
        save_state(tmp_path, program(), optimizer, 2)  # type: ignore[arg-type]


def test_a_second_training_does_not_write_into_the_states_of_the_first(tmp_path: Path) -> None:
    module = own_program().module()
    optimizer = optimizer_of([p for p in module.parameters() if p.requires_grad])
    lock = FileLock(tmp_path / ".lock")  # a lock of this process, too, is another's for whoever did not take it
    with lock, pytest.raises(CheckpointError, match=r"step-1: another training writes its states there: give this one"):
        save_state(tmp_path, module, optimizer, 1)
    assert {p.name for p in tmp_path.iterdir()} == {".lock"}
    for step in (1, 2):
        save_state(tmp_path, module, optimizer, step)
    with pytest.raises(Timeout):
        lock.acquire(timeout=0)
    assert load_state(tmp_path, module, optimizer) == (2, {})


@pytest.mark.long
def test_every_process_is_told_that_the_first_cannot_write(tmp_path: Path) -> None:
    """The others would wait for it."""
    (tmp_path / "file").write_text("")
    found = together(tmp_path, "state_in_a_file", jobs=JOBS)["state_in_a_file"]
    assert all(re.fullmatch(r"cannot write the state of training .*file.step-1: .*exists.*", text) for text in found)
    assert len(found) == 2


@pytest.mark.long
def test_a_program_without_weights_gets_those_of_the_files(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    whole = program()
    empty = compile_from_config(tmp_path, LoraConfig(**CONFIG), generator=torch.Generator().manual_seed(1))
    assert {t.device.type for t in empty.base_tensors.values() if isinstance(t, torch.nn.Parameter)} == {"meta"}
    assert all(torch.equal(t, whole.binding.values[n]) for n, t in empty.binding.values.items())
    module = empty.module()
    with pytest.raises(adaptc.AdaptcError, match=r"the module on meta; adaptc.distributed.load_base"):
        module(**batch())
    assert load_base(module, tmp_path) is module
    staged = load_base(StagedModule(adaptc.split(empty, 2)), tmp_path)
    expected = whole.module()(**batch())
    for one in (module, staged):
        assert torch.equal(one(**batch()).logits, expected.logits)
    adaptc.save_adapter(module, tmp_path / "adapter")
    again = own_program()
    again.swap(tmp_path / "adapter")
    assert torch.equal(again(**batch()).logits, whole(**batch()).logits)
    for config in (
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        with pytest.raises(ConfigError, match="follow from the base's weights, which are not read yet"):
            compile_from_config(tmp_path, config)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    for change, said in (
        ({}, "does not hold 'model.norm.weight'"),
        ({"model.norm.weight": torch.ones(41)}, r"'model.norm.weight' in shape \(41,\), and the model has"),
    ):
        save_file(tensors | change, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            load_base(empty.module(), tmp_path)
    file.write_bytes(b"none")
    with pytest.raises(CheckpointError, match="cannot read the safetensors files"):
        load_base(empty.module(), tmp_path)
