"""What cannot be trained is refused by name before the first step, and nothing is written or changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import adaptc
from adaptc import AdaptcError, CheckpointError, ConfigError, LoraConfig
from tests.support.training import CONFIG, VOCABULARY, Data, arguments, batch, first_values, model, module, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Changed(Data):
    """Rows one column of which is another."""

    def __init__(self, column: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.column, self.change = column, change

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = super().__getitem__(i)
        return {**row, self.column: self.change(row[self.column])}


def unchanged(trained: Any, folder: Path) -> None:
    assert all(torch.equal(t, first_values()[k]) for k, t in trained.state_dict().items())
    assert list(folder.iterdir()) == []


COLUMNS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "labels of another length": ("labels", lambda t: t[:4], r"axis 1 of 'labels' has size 4, but must equal"),
    "a label a row": ("labels", lambda t: t[0], r"input 'labels': expected torch.int64 with 2 axes, got .* 1"),
    "labels that are not numbers": ("labels", lambda t: t * float("nan"), r"'labels': expected torch.int64"),
    "labels of another vocabulary": (
        "labels",
        lambda t: t + 200,
        r"'labels' holds \d+; expected .* 0 to 96, or -100",
    ),
    "labels below zero": ("labels", lambda t: t * 0 - 5, r"input 'labels' holds -5; expected numbers from 0 to 96"),
    "tokens of another vocabulary": ("input_ids", lambda t: t + 97, r"'input_ids' holds \d+; expected .* 0 to 96$"),
    "tokens of another type": ("input_ids", Tensor.int, r"'input_ids': expected torch.int64 .*, got torch.int32"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", list(COLUMNS))
def test_columns(case: str, tmp_path: Path) -> None:
    column, change, message = COLUMNS[case]
    trained = module()
    with pytest.raises(AdaptcError, match=message):
        train(trained, tmp_path, rows=Changed(column, change), save_strategy="steps", save_steps=1)
    unchanged(trained, tmp_path)


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_a_batch_on_another_device(name: str) -> None:
    rows = batch()
    with pytest.raises(AdaptcError, match=f"input '{name}' is on meta, and the module on cpu"):
        module()(**{**rows, name: rows[name].to("meta")})


@pytest.mark.long
def test_a_module_on_another_device_than_its_program() -> None:
    """Its state could not be made there, so it is not trained for nothing."""
    rows = {k: t.to("meta") for k, t in batch().items()}
    with pytest.raises(AdaptcError, match=r"moved from cpu to meta.*program.to\('meta'\).module\(\)"):
        module().to("meta")(**rows)


@pytest.mark.long
def test_no_rows_at_all(tmp_path: Path) -> None:
    """torch says it."""
    trained = module()
    with pytest.raises(ValueError, match="num_samples=0"):
        train(trained, tmp_path, rows=Data(0))
    unchanged(trained, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("how", ["inference", "merged", "base"])
def test_what_has_nothing_to_train(how: str, tmp_path: Path) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "inference": lambda: adaptc.compile(model(), LoraConfig(**CONFIG)),
        "merged": lambda: adaptc.merge(module().owner),
        "base": lambda: module().owner.base,
    }
    with pytest.raises(AdaptcError, match=r"compile\(model, config, training=True\)"):
        train(makers[how]().module(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_generation_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """By the callback, which knows the options, of a module that does not generate."""
    trained = module()
    base = trained.owner.base.module()
    options = {"predict_with_generate": True, "eval_strategy": "steps", "eval_steps": 1}
    callback = adaptc.training.trainer_callback(trained.owner)
    args = transformers.Seq2SeqTrainingArguments(**arguments(tmp_path, **options))
    with pytest.raises(ConfigError, match="predict_with_generate=True: this module does not generate"):
        callback.on_train_begin(args, None, None, model=base)
    unchanged(trained, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("where", [".", "checkpoint-2"])
def test_a_model_where_a_run_would_write_is_found_before_the_first_step(where: str, tmp_path: Path) -> None:
    """Of checkpoints, those that the run will come to; what an adapter has under that name is the run's own."""
    trained = module()
    whole = tmp_path / where / "model.safetensors"
    whole.parent.mkdir(exist_ok=True)
    whole.write_bytes(b"a whole model")
    callbacks = [adaptc.training.trainer_callback(trained.owner)]
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(CheckpointError, match=r"model.safetensors is there, and not an adapter's.*output_dir"):
        train(trained, tmp_path, callbacks=callbacks, **options)
    before = first_values()
    assert all(torch.equal(t, before[k]) for k, t in trained.state_dict().items()), "a step was taken"
    assert whole.read_bytes() == b"a whole model"
    whole.rename(whole.with_name("pytorch_model.bin"))
    (whole.parent / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it holds a model"):
        train(trained, tmp_path, callbacks=callbacks, **options)
    (whole.parent / "config.json").unlink()
    other = tmp_path / "checkpoint-9" / "model.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"of a longer run")
    for _ in range(2):
        _, trainer = train(trained, tmp_path, callbacks=[adaptc.training.trainer_callback(trained.owner)], **options)
    trainer.save_model()
    names = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names, "the adapter under a second name"
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file(), "Trainer resumes from that name"


@pytest.mark.long
@pytest.mark.parametrize("option", ["fp16_full_eval", "bf16_full_eval"])
def test_an_evaluation_in_another_dtype(option: str, tmp_path: Path) -> None:
    """Trainer leaves the model as it is while it trains, and converts it for an evaluation afterwards."""
    plain, _ = train(module(), tmp_path, max_steps=2)
    found, trainer = train(module(), tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, **{option: True})
    assert found == plain
    with pytest.raises(AdaptcError, match=r"was converted from torch.float32 to torch.b?float16.*not fp16_full_eval"):
        trainer.evaluate()


@pytest.mark.slow
def test_options_that_a_program_takes(tmp_path: Path) -> None:
    """``logits="labelled"`` in a compiled module."""
    plain, _ = train(module(), tmp_path, max_steps=2)
    labelled = copy.deepcopy(module().owner).module(logits="labelled")
    found, _ = train(labelled, tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=0)


def test_what_would_change_the_program() -> None:
    trained = module()
    for call in (trained.resize_token_embeddings, trained.set_input_embeddings):
        with pytest.raises(AdaptcError, match="compile it again"):
            call(VOCABULARY + 2)
    with pytest.raises(AdaptcError, match="a program is not pushed"):
        trained.push_to_hub("somebody/something")
    with pytest.raises(ConfigError, match="push_to_hub=True"):
        trained.save_pretrained("somewhere", push_to_hub=True)
