"""Models that branch on what they read of masks and other integers: captured for what the example has, and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc

ALL, SOME = torch.ones(3, 6, dtype=torch.long), torch.tensor([[1, 1, 0, 1, 1, 1]] * 3)


class Reads(nn.Module):
    """Computes one thing or another by a number of the mask; ``way`` is how it reads the number."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(7, 5), way

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.linear(x)
        if self.way == "branch" and (mask == 0).any():
            return 3 * y * mask[..., None]
        if self.way == "padded branch" and nn.functional.pad(mask, (0, x.shape[1] % 4), value=1).all():
            return y * 2
        if self.way == "item behind a check":
            torch._check_tensor_all(mask >= 0)
        if self.way.startswith("item") and mask.sum().item() > 17:
            return y * 2
        if self.way == "int" and int(mask.min()) == 1:
            return y * 2
        if self.way == "float" and float(mask.float().mean()) > 0.9:
            return y * 2
        if self.way == "contains" and 0 in mask:
            return y * mask[..., None]
        if self.way == "loop":
            for _ in range(mask[:, 1:].sum(-1).max() % 4):
                y = y * 2
        if self.way == "sizes":
            places = mask.nonzero(as_tuple=True)
            return torch.stack([y[places][i] for i in range(len(places[0]))]).sum(0, keepdim=True)
        if self.way == "behind a write":
            whole = mask.sum()
            y = y.clone()
            y[:, 0] = 0
            return y * 2 if whole > 17 else y
        if self.way == "quotient":
            windows = torch.div(x.shape[1], 2, rounding_mode="trunc")
            return y.view(y.shape[0], windows, -1) * (2 if mask.all() else 3)
        return y


def compile_reads(way: str, mask: Tensor) -> tuple[nn.Module, adaptc.AdaptedProgram]:
    torch.manual_seed(0)
    model = Reads(way).eval()
    config = adaptc.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    with pytest.warns(adaptc.AdaptcWarning, match=r"computes with what it reads in \S*test_read_values.py:\d+, and is"):
        program = adaptc.compile(model, config, example_inputs={"x": numbers(), "mask": mask})
    return model, program


def numbers(rows: int = 3, length: int = 6) -> Tensor:
    return torch.randn(rows, length, 7, generator=torch.Generator().manual_seed(rows))


WAYS = ["branch", "padded branch", "item", "int", "float", "contains", "loop", "sizes", "behind a write", "quotient"]
WAYS += ["item behind a check"]


@pytest.mark.filterwarnings("ignore:.*was captured for some sizes alone:adaptc.AdaptcWarning")
@pytest.mark.parametrize("example", ["all", "some"])
@pytest.mark.parametrize("way", WAYS)
def test_a_program_is_of_what_the_example_has(way: str, example: str) -> None:
    same, other = (ALL, SOME) if example == "all" else (SOME, ALL)
    model, program = compile_reads(way, same)
    for x in (numbers(), -numbers()):
        torch.testing.assert_close(program.base(x=x, mask=same), model(x, same))
    merged = adaptc.merge(program)
    torch.testing.assert_close(program(x=numbers(), mask=same), merged(x=numbers(), mask=same))
    with pytest.raises(adaptc.AdaptcError, match=r"captured for other values of .*'mask'|do not pass the check in"):
        program(x=numbers(), mask=other)


@pytest.mark.parametrize("way", ["branch", "padded branch", "int", "float", "contains", "quotient"])
def test_sizes_stay_free(way: str) -> None:
    model, program = compile_reads(way, ALL)
    for rows, length in ((2, 6), (5, 8), (4, 10)):
        x, mask = numbers(rows, length), torch.ones(rows, length, dtype=torch.long)
        torch.testing.assert_close(program.base(x=x, mask=mask), model(x, mask))


def test_a_text_is_not_fixed() -> None:
    """A model that reads all tokens into Python is refused, as before."""

    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.linear(x)[:, [bool(n) for n in mask[0].tolist()]]

    with pytest.raises(adaptc.CaptureError, match="could not be captured"):
        adaptc.compile(
            Lists(),
            adaptc.LoraConfig(r=2, target_modules=["linear"]),
            example_inputs={"x": numbers(), "mask": SOME},
        )


def test_a_saved_program_checks_too(tmp_path: Any) -> None:
    model, program = compile_reads("branch", ALL)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(loaded.base(x=numbers(), mask=ALL), model(numbers(), ALL))
    with pytest.raises(adaptc.AdaptcError, match="captured for other values of 'mask'"):
        loaded(x=numbers(), mask=SOME)
