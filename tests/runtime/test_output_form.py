"""The form of an answer, and inputs that are no tensors: alike for all that is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.utils.generic import ModelOutput

import adaptc
from adaptc import AdaptcError, LoraConfig
from tests.generation.models import generator, prompt
from tests.support.families import FAMILIES

CONFIG = LoraConfig(r=2, init_lora_weights=False)
INPUTS = FAMILIES["llama"].inputs(2, 5)


@cache
def program(hidden: bool = False) -> Any:
    model = FAMILIES["llama"].build()
    model.config.output_hidden_states = hidden
    return adaptc.compile(model, CONFIG)


@cache
def package() -> Any:
    return adaptc.load_package(adaptc.package(program(), Path(mkdtemp()) / "p.pt2"))


def runs() -> Iterator[tuple[str, Callable[..., Any]]]:
    prog = program()
    bank = prog.bank({"one": prog.binding})
    yield "program", prog
    yield "module", prog.module()
    yield "bound", prog.bind(prog.binding)
    yield "base", prog.base
    yield "merged", adaptc.merge(prog)
    yield "bank", lambda *args, **kwargs: bank(*args, adapters=["one", None], **kwargs)
    yield "assignment", bank.select(["one", None])
    yield "trained", adaptc.compile(FAMILIES["llama"].build(), CONFIG, training=True).module()


def check_answers(run: Callable[..., Any], given: dict[str, Any], expected: Any = None) -> None:
    out = run(**given)
    expected = out if expected is None else expected
    assert isinstance(out, ModelOutput)
    for asked in (None, True):
        assert type(run(**given, return_dict=asked)) is type(out)
    found = run(**given, return_dict=False)
    assert type(found) is tuple
    assert len(found) == len(expected.to_tuple())
    torch.testing.assert_close(found[0], expected.to_tuple()[0])
    for asked in ("yes", 0):
        with pytest.raises(AdaptcError, match="return_dict"):
            run(**given, return_dict=asked)


def check_inputs(run: Callable[..., Any]) -> None:
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    lists = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    for strange in (ids.tolist(), ids.numpy(), BatchEncoding(lists), BatchEncoding(dict(INPUTS)), "a text", 3.5):
        for call in (
            lambda strange=strange: run(strange),
            lambda strange=strange: run(input_ids=strange),
            lambda strange=strange: run(input_ids=strange, attention_mask=mask),
        ):
            with pytest.raises(AdaptcError, match=r"\(.*input_ids=torch.as_tensor\(input_ids\).*return_tensors='pt'"):
                call()
    for strange in (mask.tolist(), np.ones((2, 5))):
        with pytest.raises(
            AdaptcError, match=r"'attention_mask' must be a tensor, got (list|ndarray).*torch.as_tensor"
        ):
            run(input_ids=ids, attention_mask=strange)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::adaptc.AdaptcWarning")
def test_whatever_is_called_answers_as_transformers() -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        oracle = model(**INPUTS, use_cache=False)
        asked = model(**INPUTS, use_cache=False, return_dict=False)
    for _, run in runs():
        check_answers(run, INPUTS)
        check_inputs(run)
    check_answers(program().base, INPUTS, oracle)
    torch.testing.assert_close(program().base(**INPUTS, return_dict=False), asked)


@pytest.mark.slow
def test_so_do_packages() -> None:
    check_answers(package(), INPUTS)
    check_inputs(package())
    check_answers(package().bind(program().binding), INPUTS)


@pytest.mark.long
def test_outputs_that_were_captured_are_asked_for() -> None:
    plain, more = program(), program(hidden=True)
    for asked in (None, True):
        found = more(**INPUTS, output_hidden_states=asked, output_attentions=False, return_dict=False)
        assert len(found) == 2
        assert len(found[1]) == 3
    for run, name, value in (
        (more, "output_hidden_states", False),
        (more, "output_attentions", True),
        (plain, "output_hidden_states", True),
        (plain.module(), "output_attentions", True),
        (plain.bind(None), "output_router_logits", True),
        (plain, "use_cache", True),
        (plain, "output_hidden_states", 1),
    ):
        with pytest.raises(AdaptcError, match=f"'{name}' would change the answer"):
            run(**INPUTS, **{name: value})


class Pair(nn.Module):
    """Gives a tuple, or a tensor alone."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.lin, self.both = nn.Linear(5, 7), both

    def forward(self, x: Tensor, return_dict: bool | None = None) -> Any:
        y = self.lin(x)
        return (y, y + 1) if self.both else y


def test_programs_without_a_class_of_output() -> None:
    x, config = torch.randn(3, 5), LoraConfig(r=2, target_modules=["lin"])
    both, one = (adaptc.compile(Pair(b), config, example_inputs=(x,)) for b in (True, False))
    assert type(both(x, return_dict=False)) is tuple
    assert type(both(x, False)) is tuple
    for run, value, kind in ((both, True, "a tuple"), (one, True, "values without"), (one, False, "values without")):
        with pytest.raises(AdaptcError, match=f"'return_dict' is {value}, and the program gives {kind}"):
            run(x, return_dict=value)
    for strange in ([[1.0] * 5], x.numpy()):
        with pytest.raises(AdaptcError, match=r"'x' must be a tensor.*prog\(x=torch.as_tensor\(x\)\)"):
            one(strange)


@pytest.mark.long
def test_options_that_were_captured_as_inputs_may_be_left_out() -> None:
    model = FAMILIES["llama"].build()
    prog = adaptc.compile(model, CONFIG, example_inputs={**INPUTS, "output_hidden_states": True, "return_dict": True})
    for given in ({}, {"output_hidden_states": True}, {"return_dict": True, "output_hidden_states": None}):
        assert len(prog(**INPUTS, **given).hidden_states) == 3
    assert len(prog(**INPUTS, return_dict=False)) == 2
    with pytest.raises(AdaptcError, match="'output_hidden_states' would change the answer"):
        prog(**INPUTS, output_hidden_states=False)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_steps_of_a_generation(family: str) -> None:
    gen, given = generator(family), prompt(2, 5)
    if family == "t5":
        given |= {"decoder_input_ids": torch.ones(2, 1, dtype=torch.int64)}
        assert type(gen.get_encoder()(**prompt(2, 5), return_dict=False)) is tuple
    out, found = gen(**given), gen(**given, return_dict=False)
    assert len(found) == len(out.to_tuple())
    assert torch.equal(found[0], out.logits)
    assert torch.equal(gen.bind(None)(**given, return_dict=False)[0], gen.base(**given)[0])
