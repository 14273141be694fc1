"""Encoder-decoders that make their decoder's inputs from labels are captured for labels of any length, as PEFT runs
them."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.capture import dynamic_shapes
from adaptc.capture.replacements.shifted_labels import shift_labels_of_any_length
from tests.support.families import FAMILIES
from tests.support.oracle import quiet, randomize


def batch(labels: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(labels)
    ids = torch.randint(4, 50, (3, 5), generator=made)
    target = torch.randint(4, 50, (3, labels), generator=made)
    if labels > 1:
        target[0, -1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target}


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["t5", "bart", "mbart"])
def test_losses_are_pefts_for_labels_of_one_token_too(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet():
        theirs = peft.get_peft_model(
            FAMILIES[family].build(), peft.LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
        ).eval()
        randomize(theirs)
        theirs.save_pretrained(str(tmp_path))
    exports: list[Any] = []
    original = torch.export.export
    monkeypatch.setattr(dynamic_shapes.torch.export, "export", lambda *a, **k: exports.append(a) or original(*a, **k))
    program = adaptc.compile(FAMILIES[family].build(), tmp_path, training=True)
    assert len(exports) == 1
    module = program.module().eval()
    for labels in (1, 2, 3, 7):
        call = batch(labels)
        ours, want = module(**call), theirs(**call)
        torch.testing.assert_close(ours.loss, want.loss)
        torch.testing.assert_close(ours.logits, want.logits, rtol=1e-4, atol=1e-5)


class ShiftsByCat(nn.Module):
    """A model that uses all labels but the last in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(50, 5)

    def _shift_right(self, ids: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)

    def forward(self, labels: Tensor) -> Tensor:
        return self.head(self._shift_right(labels))


class ShiftsInPlace(ShiftsByCat):
    """A model that shifts as transformers' models do, with the first column taken from elsewhere."""

    def _shift_right(self, ids: Tensor) -> Tensor:
        shifted = ids.new_full(ids.shape, 9)
        shifted[..., 1:] = ids[..., :-1].clone()
        return shifted


class ShiftsWithoutSelf(ShiftsByCat):
    """A model whose method needs no model."""

    @staticmethod
    def _shift_right(ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)


@pytest.mark.parametrize("kind", [ShiftsByCat, ShiftsInPlace, ShiftsWithoutSelf])
def test_other_shifts_stay_as_they_are(kind: type[nn.Module]) -> None:
    model = kind()
    config = adaptc.LoraConfig(r=2, target_modules=["head"], init_lora_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adaptc.AdaptcWarning)
        program = adaptc.compile(model, config, example_inputs=torch.randint(0, 50, (3, 6)))
    for length in (1, 2, 4, 9) if kind is ShiftsInPlace else (3, 4, 9):
        labels = torch.randint(0, 50, (2, length))
        assert torch.equal(program(labels), model(labels))


class Starts(nn.Module):
    """A model that computes where each sound begins, from their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(50, 5)

    def _build_audio_timestamps(self, lengths: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.long), torch.cumsum(lengths, dim=0)[:-1]])

    def forward(self, lengths: Tensor) -> Tensor:
        return self.head(self._build_audio_timestamps(lengths))


class RowsBefore(Starts):
    """A model whose method takes all rows of a matrix but the last."""

    def _build_audio_timestamps(self, lengths: Tensor) -> Tensor:
        out = lengths.new_full((3, 3), 9)
        out[:, 1:] = lengths.view(-1, 2)[:2][:-1].clone()
        return out


@pytest.mark.parametrize(("kind", "least"), [(Starts, 1), (RowsBefore, 6)])
def test_starts_of_any_number_of_sounds(kind: type[nn.Module], least: int) -> None:
    model = kind()
    config = adaptc.LoraConfig(r=2, target_modules=["head"], init_lora_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adaptc.AdaptcWarning)
        program = adaptc.compile(model, config, example_inputs=torch.tensor([3, 5, 2, 4, 6, 1]))
    for count in (1, 2, 3, 6, 8):
        lengths = torch.arange(1, count + 1)
        if count >= least:
            assert torch.equal(program(lengths), model(lengths))


class TellsWhatItSlices(ShiftsByCat):
    """A model that says of which type all labels but the last are."""

    def _shift_right(self, ids: Tensor) -> Any:
        return type(ids[:, :-1]).__name__


def test_other_threads_and_what_comes_after_are_untouched() -> None:
    model, labels = TellsWhatItSlices(), torch.randint(0, 50, (2, 4))
    seen: list[str] = []

    def interrupted() -> None:
        with shift_labels_of_any_length(model):
            seen.append(model._shift_right(labels))
            thread = threading.Thread(target=lambda: seen.append(model._shift_right(labels)))
            thread.start()
            thread.join()
            raise KeyboardInterrupt

    method = TellsWhatItSlices._shift_right
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == ["_AllButLast", "Tensor"]
    assert TellsWhatItSlices._shift_right is method
