"""Each prompt of an encoder-decoder on adapters of its own, in the encoder, in what is made of its states, and in
every step: what it gets alone, and what PEFT gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.generation.models import case, generator, prompt
from tests.generation.test_bank import NAMES, Mixed, row
from tests.generation.test_encoder_decoders import WITH_ENCODER, expected, read, said

BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}


def bank(family: str) -> Any:
    return generator(family).bank(case(family).adapters)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("family", WITH_ENCODER)
def test_a_prompt_gets_what_peft_gives_it_alone(family: str) -> None:
    """Greedy and in beams; rows of the base among them."""
    made, given = bank(family), read(family, 4, 9, (4, 0, 1))
    # Whisper's generation takes each recording several times for several answers, and the bank none but all once.
    for how in ({}, {"num_beams": 3} if family == "whisper" else BEAMS):
        out = said(Mixed(made, NAMES), given, **how)
        each = len(out) // 4
        for i, name in enumerate(NAMES[:3]):
            alone = expected(family, name, row(given, i), **how)
            found = out[i * each : (i + 1) * each]
            assert torch.equal(found[:, : alone.shape[1]], alone), (name, how)
            assert not found[:, alone.shape[1] :].any()
        mix = said(Mixed(made, NAMES[3:]), row(given, 3), **how)
        assert torch.equal(out[3 * each :, : mix.shape[1]], mix)


@pytest.mark.long
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_logits_of_each_row_are_those_of_its_program(family: str) -> None:
    """Tokens may be equal by chance; logits are not. Of the base to the bit of a call with the base alone."""
    gen, given = generator(family), prompt(4, 7, (2, 0, 3))
    given["decoder_input_ids"] = prompt(4, 5, seed=3)["input_ids"]
    with torch.no_grad():
        mixed = bank(family).select(NAMES).forward(**given).logits
        alone = {n: gen.bind(d).forward(**given).logits for n, d in case(family).adapters.items()}
        base = bank(family).select([None] * 4).forward(**given).logits
    torch.testing.assert_close(mixed[0], alone["first"][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(mixed[2], alone["second"][2], rtol=0, atol=2e-5)
    torch.testing.assert_close(mixed[1], base[1], rtol=0, atol=2e-5)
    for name, i in (("second", 0), ("first", 2), ("first", 1), ("first", 3), ("second", 3)):
        assert float((mixed[i] - alone[name][i]).abs().max()) > 1e-3
    same = bank(family).select(["second"] * 4)
    with torch.no_grad():
        torch.testing.assert_close(same.forward(**given).logits, alone["second"], rtol=0, atol=2e-5)


@pytest.mark.long
def test_what_the_encoder_gave_is_decoded() -> None:
    made, given = bank("bart"), prompt(4, 9, (4, 0, 1))
    states = made.select(NAMES).get_encoder()(**given)
    mask = {"attention_mask": given["attention_mask"]}
    again = said(Mixed(made, NAMES), {**mask, "encoder_outputs": states})
    assert torch.equal(again, said(Mixed(made, NAMES), given))


@pytest.mark.slow
def test_inductor_compiles_each_part_once() -> None:
    """Other rows, beams and adapters take the code that there is."""
    made, plain = generator("t5", "inductor").bank(case("t5").adapters, capacity=3), bank("t5")
    for names, length, how in ((NAMES, 9, {}), (NAMES[::-1], 6, BEAMS), (["second", None], 4, {})):
        given = prompt(len(names), length)
        assert torch.equal(said(Mixed(made, names), given, **how), said(Mixed(plain, names), given, **how))
        with adaptc.debug.assert_no_recompiles():
            said(Mixed(made, names), given, **how)


@pytest.mark.slow
def test_a_package_hears_what_its_bank_hears(tmp_path: Path) -> None:
    """Three models of code, of which each takes the coefficients of its rows."""
    made, dirs, given = bank("whisper"), case("whisper").adapters, read("whisper", 4, 9)
    packaged = adaptc.load_package(adaptc.package(made, tmp_path / "whisper.pt2", capacity=3, max_rank=5))
    for how in ({}, {"num_beams": 3}):
        assert torch.equal(said(Mixed(packaged, NAMES), given, **how), said(Mixed(made, NAMES), given, **how))
    packaged.replace("first", dirs["second"])
    packaged.add("third", dirs["first"])
    turned: list[Any] = ["third", None, "first", {"third": 0.6, "first": -0.4}]
    assert torch.equal(said(Mixed(packaged, turned), given), said(Mixed(made, NAMES), given))
    with pytest.raises(adaptc.AdaptcError, match="part by part"):
        packaged(**given, adapters=NAMES)
