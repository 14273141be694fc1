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
from tests.support.method_table import Experts

#: hooks that are right as they are: the stacked method has no form around a layer and no bias, no dropout there, and
#: nothing nested; it is wrapped anew by those who settle sizes; what a method says of its files where there is no model
#: is asked of the method alone; methods of a whole program, which say whether sizes mean something and what cannot be
#: trained on, are never stacked, nor are those with coefficients or extras, which do experts themselves or refuse them;
#: the rest follows from what it does say
OWN = {
    *("file_names", "summed", "low_rank", "with_low_rank"),
    *("akin", "defines", "drops_input", "nested", "settle_shared_sizes", "grouped_slots", "name", "kin", "swappable"),
    *("training", "coefficients", "extras", "why_wrong"),
    *("dropout", "filled", "exact_sizes", "untrainable"),
}


def test_every_hook_is_handed_to_the_inner_method() -> None:
    hooks = {n for n in vars(Hooks) if not n.startswith("_")}
    handed = {n for n in vars(PerExpertMethod) if not n.startswith("_")}
    assert hooks - handed - OWN == set()
    assert not handed & OWN - {"name"}


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


@pytest.mark.parametrize("hook", ["check_merge", "has_weight", "replaces", "in_place", "inner_path"])
def test_what_the_inner_method_says_is_said_of_the_whole(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = adaptc.methods.Op("experts", (3, 5, 7))
    answers: dict[str, Any] = {
        "check_merge": lambda self, op: f"not at {op.shape}",
        "has_weight": lambda self: False,
        "replaces": True,
        "in_place": lambda self: True,
        "inner_path": lambda self, rest: f"inner.{rest}",
    }
    inner = type("Saying", (Lora,), {hook: answers[hook]})()
    asked: dict[str, Any] = {"check_merge": (op,), "has_weight": (), "in_place": (), "inner_path": ("x",)}
    found = getattr(PerExpertMethod.wrap(inner), hook)
    found = found(*asked[hook]) if hook in asked else found
    assert found == {"check_merge": "not at (5, 7)", "has_weight": False, "inner_path": "inner.x"}.get(hook, True)
