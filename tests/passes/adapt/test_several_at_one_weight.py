"""Several adapters on one weight: each changes what those before it made of it, however they are injected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.errors import ConfigError
from adaptc.methods import TokenRows, TrainedParameter
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from tests.support.custom_models import Tied
from tests.support.pass_checks import attach, export, inject_all, random_values


def tied(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], ExportedProgram]:
    torch.manual_seed(3)
    args = (torch.tensor([[1, 2, 28], [5, 0, 3]]),)
    return args, export(Tied().to(dtype), *args)


LATER: dict[str, tuple[Method, dict[str, Any]]] = {
    "tokens": (TokenRows(indices=(2, 5, 28)), {}),
    "whole": (TrainedParameter(shape=(29, 7), dtype=torch.float64), {"kind": "weight", "form": "weight"}),
}


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("later", list(LATER))
@pytest.mark.parametrize("fqn", ["embed.weight", "head.weight"])
def test_two_methods_on_one_weight(fqn: str, later: str, lora_first: bool) -> None:
    """Whatever the forms, the second changes what the first made of the weight, as a merge does."""
    args, program = tied(torch.float64)
    method, changes = LATER[later]
    attachments = [attach(program, fqn), attach(program, fqn, method, **changes)]
    attachments = attachments if lora_first else attachments[::-1]
    values = random_values(program, attachments)
    result = Inject(attachments, values)(program)
    merged = Merge(result.data, values)(result.program).program
    got = result.program.module()(*args)
    torch.testing.assert_close(got, merged.module()(*args), rtol=1e-12, atol=1e-12)
    back = Unload()(result.program).program
    assert torch.equal(back.module()(*args), program.module()(*args))
    lora, other = ("apply", "apply") if fqn == "embed.weight" else ("weight" if lora_first else "apply", "apply")
    if later == "whole":
        lora, other = ("weight" if lora_first else "apply"), "weight"
    assert {a.method.name: a.form for a in result.data} == {"lora": lora, method.name: other}


def test_adapters_of_one_weight_in_two_passes() -> None:
    """A second injection goes on top of the first: in half precision too, where a region ends in a cast."""
    args, program = tied(torch.bfloat16)
    first, done, values = inject_all(program, [attach(program, "embed.weight")])
    tokens = Attachment("embed", "embed", "weight", "embedding", TokenRows((2, 28)), consumers=("embedding",))
    more = random_values(program, [tokens])
    second = Inject([tokens], more)(first)
    merged = Merge([*done, *second.data], values | more)(second.program).program
    torch.testing.assert_close(second.program.module()(*args), merged.module()(*args), rtol=2e-2, atol=2e-2)
    rows = merged.state_dict["embed.weight"]
    assert torch.equal(rows[2], more[second.data[0].slots[TokenRows().delta_slot]][0].bfloat16())


def test_an_apply_form_that_cannot_be() -> None:
    """The form asked for is taken or refused, never exchanged."""
    _, program = tied(torch.float64)
    attachments = [attach(program, "head.weight", form="apply"), attach(program, "head.weight", TokenRows((2, 5)))]
    values = random_values(program, attachments)
    with pytest.raises(ConfigError, match=r"head.weight\|lora.* cannot take the apply form"):
        Inject(attachments, values)(program)
    alone = Inject(attachments[:1], values)(program)
    assert [a.form for a in alone.data] == ["apply"]
