"""Methods at stacked weights of experts: whatever a method says of itself, it says there, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaptc
from adaptc import AdaLoraConfig, LoraConfig
from adaptc.methods import PerExpertMethod
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.protocol.method_hooks import Hooks
from adaptc.passes.protocol.parts.bank_form import BankForm
from adaptc.passes.protocol.parts.file_format import FileFormat
from tests.support.layer_table import Experts

#: hooks that are right as they are: the stacked method has no form around a layer and no bias, no dropout there, and
#: nothing nested; methods of a whole program, which say what cannot be trained on, are never stacked, nor are those
#: with coefficients or extras, which do experts themselves or refuse them; the rest follows from what it does say
OWN = {
    *(
        "is_variant_of",
        "defines",
        "drops_input",
        "is_random",
        "trains_at_layer",
        "noiseless",
        "with_layer_bias",  # stacked experts have no layer's bias
        "inside_multihead_attention",
        "name",
        "slot_family",
        "swappable",
    ),
    *("training", "dropout", "filled", "untrainable", "kernels", "extra_inputs"),
}
#: the same of its objects: it is wrapped anew by those who settle sizes; what a method says of its files where there is
#: no model is asked of the method alone; an embedding has no experts
OWN_OF_PARTS = {"files.summed", "files.low_rank", "files.with_low_rank", "files.with_names"}
OWN_OF_PARTS |= {"sharing.settle_shared_sizes", "sharing.grouped_slots", "sharing.with_weights", "sharing.tied_to"}


def public(cls: type) -> set[str]:
    return {n for n in vars(cls) if not n.startswith("_")}


def test_every_hook_is_handed_to_the_inner_method() -> None:
    handed = public(PerExpertMethod)
    assert public(Hooks) - handed - OWN == set()
    assert not handed & OWN - {"name"}


@pytest.mark.parametrize("part", ["files", "sizes", "sharing"])
def test_every_function_of_an_object_is_handed_to_that_of_the_inner_method(part: str) -> None:
    own, kind = type(getattr(PerExpertMethod, part)), type(getattr(adaptc.methods.Method, part))
    functions = {n for n in public(kind) if callable(vars(kind)[n])}
    assert {f"{part}.{n}" for n in functions - public(own)} == {n for n in OWN_OF_PARTS if n.startswith(f"{part}.")}


def test_lora_and_adalora_at_the_same_experts_have_slots_of_their_own(tmp_path: Any) -> None:
    """LoRA does experts itself and AdaLoRA is stacked; both call their factors lora_A and lora_B."""
    torch.manual_seed(3)
    net, x = Experts(7, 5).double().eval(), torch.randn(3, 7, dtype=torch.float64)
    one = LoraConfig(r=2, target_parameters=["matrices"], init_lora_weights=False)
    two = AdaLoraConfig(
        init_r=3, target_r=2, total_step=9, target_parameters=["matrices"], target_modules=[], init_lora_weights=False
    )
    alone = [adaptc.compile(net, c, example_inputs=x) for c in (one, two)]
    both = adaptc.compile(net, [one, two], example_inputs=x)
    slots = [set(a.slots.values()) for a in both.adaptation.attachments]
    assert len(slots) == 2
    assert not set.intersection(*slots)
    for program in alone:
        adaptc.swap(both, adaptc.save_adapter(program, tmp_path / program.binding.config.peft_type))
        torch.testing.assert_close(both(x), program(x))


class SayingFiles(FileFormat):
    def in_place(self) -> bool:
        return True

    def inner_path(self, rest: str) -> str:
        return f"inner.{rest}"


class Saying(Lora):
    replaces = True
    files = SayingFiles()
    bank = BankForm(row_wise=False)

    def check_merge(self, op: adaptc.methods.Op) -> str:
        return f"not at {op.shape}"

    def has_weight(self) -> bool:
        return False


def test_what_the_inner_method_says_is_said_of_the_whole() -> None:
    method = PerExpertMethod(Saying())
    assert method.check_merge(adaptc.methods.Op("experts", (3, 5, 7))) == "not at (5, 7)"
    assert not method.has_weight()
    assert method.replaces
    assert method.files.in_place()
    assert method.files.inner_path("x") == "inner.x"
    assert not method.bank.row_wise
