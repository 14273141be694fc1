"""A program in stages, in two and four processes, trains as it does in one: losses, gradients and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import adaptc
from tests.distributed.models import (
    batch,
    even_batch,
    exact_loss,
    gradients_alone,
    llama,
    mean_of_tokens,
    own_program,
    seq2seq_batch,
    seq2seq_program,
    trained_alone,
    upper_program,
)
from tests.ecosystem.two_processes import together

JOBS = "tests.distributed.pipeline_jobs"


def check(found: dict[str, Any], folder: Path, dtype: torch.dtype, **tolerance: float) -> None:
    """The losses, and the adapter after Adam's steps, which follow from the gradients."""
    whole, exact = own_program(dtype=dtype), dtype == torch.float64
    losses, module = trained_alone(whole, 3, exact)
    torch.testing.assert_close(found["losses"], losses, **tolerance)
    make = even_batch if exact else batch
    for name, rows in {"evaluated": make(seed=5), "longer": make(rows=8, tokens=9, seed=7)}.items():
        with torch.no_grad():
            out = module(**rows)
            loss = exact_loss(out, rows["labels"]) if exact else out.loss
        torch.testing.assert_close(found[name], loss.item(), **tolerance)
    path = adaptc.save_adapter(whole, folder.with_name(f"{folder.name}_alone"))
    names = {p.name for p in path.iterdir()}
    assert {p.name for p in folder.iterdir()} == names
    assert (folder / "adapter_config.json").read_text() == (path / "adapter_config.json").read_text()
    theirs, own = load_file(path / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    assert list(own) == list(theirs)
    torch.testing.assert_close(own, theirs, rtol=100 * tolerance["rtol"], atol=tolerance["atol"])


@pytest.mark.long
def test_two_processes_train_as_one_under_each_schedule(tmp_path: Path) -> None:
    names = ["gpipe", "one_f_one_b", "interleaved", "looped"]
    jobs = together(tmp_path, *names, "single", "refused", jobs=JOBS)
    for name in names:
        check(jobs[name], tmp_path / name, torch.float64, rtol=1e-9, atol=1e-9)
    check(jobs["single"], tmp_path / "single", torch.float32, rtol=1e-5, atol=1e-5)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(llama()), str(tmp_path / "gpipe")).eval()
    trained = own_program()
    adaptc.swap(trained, tmp_path / "gpipe")
    inputs = {k: t for k, t in batch().items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(trained(**inputs).logits, wrapped(**inputs).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_stages_that_train_nothing_or_pass_on_what_they_got(tmp_path: Path) -> None:
    found = together(tmp_path, "upper", "seq2seq", jobs=JOBS)
    expected = {
        "upper": gradients_alone(upper_program(), even_batch(), exact_loss),
        "seq2seq": gradients_alone(seq2seq_program(), seq2seq_batch(), mean_of_tokens),
    }
    for name, gradients in expected.items():
        assert found[name].keys() == gradients.keys()
        torch.testing.assert_close(found[name], gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.long
def test_four_processes_train_as_one(tmp_path: Path) -> None:
    jobs = together(tmp_path, "gpipe", "one_f_one_b", jobs=JOBS, processes=4)
    for name, found in jobs.items():
        check(found, tmp_path / name, torch.float64, rtol=1e-9, atol=1e-9)
