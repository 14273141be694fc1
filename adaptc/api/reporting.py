"""Compute the scalings that X-LoRA's classifier gives for the tokens of a call, for programs and generators.

Nothing is written to the caller's cache.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, overload

from torch import Tensor

from adaptc.bank.bank import Bank
from adaptc.bank.bank_report import BankReport
from adaptc.errors import AdaptcError
from adaptc.generation.cache.step_cache import StepCache
from adaptc.generation.causal_generator import CausalGenerator
from adaptc.generation.generator import Generator
from adaptc.packages.package_report import PackageReport
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import adds_notes, check_program
from adaptc.program.xlora_scalings import check_scalings, expert_scalings
from adaptc.reports.coverage import CoverageReport
from adaptc.state.core import ProgramCore
from adaptc.state.runner import Runner
from adaptc.value_types import validates_options


def xlora_scalings(
    program: ProgramCore | Runner | Generator, *args: Any, adapter_name: str | None = None, **inputs: Any
) -> Tensor:
    """Return the scalings that X-LoRA's classifier gives for the tokens of one call, as PEFT's ``get_latest_scalings``.

    They are the scalings before ``top_k_lora`` and ``global_scaling_weight`` are applied. Without
    ``layerwise_scalings`` all layers have the same ones.

    Args:
        program: an :class:`AdaptedProgram`, a result of ``bind``, or a :class:`Generator`, whose cache stays as it is.
        *args: the inputs of a call, of which only the pass that the classifier reads is computed.
        adapter_name: which adapter, where several act.
        **inputs: the keyword inputs of a call. Of a generator those of a step: ``input_ids``, ``attention_mask``,
            ``position_ids``, ``past_key_values``.

    Returns:
        (batch, length, layers, experts) for the given tokens, in the adapter's dtype and without a gradient. The
        layers are the adapted ones, in the model's order.

    Raises:
        ConfigError: the program has no adapter of X-LoRA.
        AdaptcError: the inputs do not fit.

    Example:
        >>> expert = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        >>> paths = {n: str(adaptc.save_adapter(adaptc.compile(lm, expert), f"expert-{n}")) for n in ("0", "1")}
        >>> routed = adaptc.compile(lm, adaptc.XLoraConfig(hidden_size=32, adapters=paths))
        >>> adaptc.debug.xlora_scalings(routed, input_ids=ids).shape
        torch.Size([2, 7, 1, 2])
    """
    if not isinstance(program, Generator):
        return expert_scalings(program, *args, adapter_name=adapter_name, **inputs)
    runner: Any = program.runner
    check_scalings(runner, adapter_name)
    looking = program.shallow_copy()
    assert isinstance(looking, CausalGenerator)  # no model with an encoder has an adapter that reads its first pass
    looking.step = partial(expert_scalings, runner, adapter_name=adapter_name)
    given = {n: copy.copy(inputs.pop(n, None)) for n in ("past_key_values", "cache")}
    before = next((past.length for past in given.values() if isinstance(past, StepCache)), 0)
    found: Tensor = looking.forward(*args, **inputs, **given).logits
    return (
        found[:, before:] if not program.spec.cache_mode.has_cache else found
    )  # a step without a cache computes the whole text


@overload
def report(program: AdaptedProgram, *, changes: bool = False) -> CoverageReport: ...


@overload
def report(program: PackagedProgram, *, changes: bool = False) -> PackageReport: ...


@overload
def report(program: Bank, *, changes: bool = False) -> BankReport: ...


@adds_notes
@validates_options("changes")
def report(
    program: AdaptedProgram | PackagedProgram | Bank, *, changes: bool = False
) -> CoverageReport | PackageReport | BankReport:
    """Return a report of what was adapted, what was left out, and the adapter's norms; it prints as tables.

    Args:
        program: a program, a package, a generator, or a bank of one of these.
        changes: whether to tell how much the adapter changes each weight, relative to the weight's own norm. That
            computes every adapted weight once, one at a time.

    Returns:
        for a program its sites, the layers left alone, and norms. For a package its file, its adapter, the room for
        others and its inputs. For a bank its adapters, as :meth:`Bank.report` gives them.

    Raises:
        AdaptcError: ``changes`` is set for a package, whose weights are in compiled code, or for a bank.

    Example:
        >>> adaptc.report(prog).trainable
        24
    """
    if isinstance(program, Bank):
        if changes:
            raise AdaptcError("changes=True is of one adapter: ask the program, swapped to each of the bank's")
        return program.report()
    if isinstance(program, PackagedProgram):
        if changes:
            raise AdaptcError(
                "changes=True compares with the base weights, which a package has in its compiled code alone; ask the "
                "program that it was made from"
            )
        return PackageReport.from_package(program)
    check_program(program, "report")
    return CoverageReport.from_program(program, changes)
