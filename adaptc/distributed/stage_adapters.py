"""Divide an adapter among the stages of a program, and put it together again.

A key of a file belongs to the stage that has its module. Slots that all sites share belong to each stage. Whatever is
of no module that a stage knows is given to the first stage, which refuses it as a program does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from adaptc.adapter_files.adapter_data import FILE_KEYS, AdapterData
from adaptc.adapter_files.format import bare_key
from adaptc.adapter_files.load import load
from adaptc.binding.bind import file_tensors, initial_values
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.errors import CheckpointError
from adaptc.passes.protocol.attachment import Attachment
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.state.core import ProgramCore


@dataclass(frozen=True)
class StageSites:
    """The sites of all stages of a program, by which each process knows which stage has what."""

    attachments: Sequence[Sequence[Attachment]]

    def stages_of(self, key: str) -> list[int]:
        """Return the stages that have the tensor of a bare ``key``."""
        shared = [
            i
            for i, own in enumerate(self.attachments)
            for a in own
            for name in a.slots
            if key == name or key.startswith(f"{name}.")
        ]
        lengths = [
            max((len(p) for a in own for p in (a.key, a.module) if key.startswith(f"{p}.")), default=0)
            for own in self.attachments
        ]
        longest = max(lengths)
        if longest:
            return [i for i, n in enumerate(lengths) if n == longest]
        return sorted(set(shared)) or [0]

    def divide(self, tensors: Mapping[str, Tensor], peft_type: str) -> list[dict[str, Tensor]]:
        """Return the tensors of each stage, under the keys that they have in ``tensors``."""
        divided: list[dict[str, Tensor]] = [{} for _ in self.attachments]
        for key, value in tensors.items():
            for stage in self.stages_of(bare_key(key, peft_type) or key):
                divided[stage][key] = value
        return divided


def binding_of_stage(binding: Binding, sites: StageSites, stage: int, base_names: Collection[str]) -> Binding:
    """Return the part of a binding of the program that was cut that a stage has.

    ``base_names``: the FQNs of the stage's base tensors.
    """
    own = sites.attachments[stage]
    slots, ids = {n for a in own for n in a.tensor_names}, {a.id for a in own}

    def kept(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
        return {n: v for n, v in values.items() if n in names}

    def of_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: t for k, t in tensors.items() if stage in sites.stages_of(k)}

    def part(b: Binding) -> Binding:
        return replace(
            b,
            values=kept(b.values, slots),
            methods=kept(b.methods, ids),
            changed_base=kept(b.changed_base, base_names),
            base_fingerprints=kept(b.base_fingerprints, base_names),
            scale_factors=kept(b.scale_factors, ids),
            extra_tensors=of_keys(b.extra_tensors),
            idle_tensors=of_keys(b.idle_tensors),
            joint_adapters={n: part(p) for n, p in b.joint_adapters.items()},
            active_form=None if b.active_form is None else part(b.active_form),
        )

    return part(binding)


def bind_to_stages(
    programs: Mapping[int, AdaptedProgram], sites: StageSites, adapter: Any, **options: Any
) -> dict[int, Binding]:
    """Return the adapter bound to each of ``programs``, which are stages by number; no program is changed.

    ``options``: those of ``adaptc.swap``. Raises as that does, and CheckpointError for files whose keys only the whole
    model can tell.
    """
    adapted = {i: p for i, p in programs.items() if p.current is not None}
    binding = adapter if isinstance(adapter, Binding) else getattr(adapter, "binding", None)
    if isinstance(binding, Binding):
        parts = {i: binding_of_stage(binding, sites, i, p.base_tensors) for i, p in adapted.items()}
        return {i: bind_adapter(p, parts[i], **options) for i, p in adapted.items()}
    loading = {n: options.pop(n) for n in ("adapter_name", "key_mapping") if n in options}
    data: AdapterData[Any] = load(adapter, **loading)
    if data.format == FILE_KEYS:
        raise CheckpointError(
            f"{data.source} is in the format {data.origin}, and which modules its keys mean is known with the whole "
            "model alone: swap before adaptc.split, or write it as a PEFT directory"
        )
    if not adapted:
        return {}
    config = data.config or next(iter(adapted.values())).binding.config.to_dict()
    divided = sites.divide(data.tensors, str(config.get("peft_type", "")))
    bound: dict[int, Binding] = {}
    for i, program in adapted.items():
        training = program.adaptation.training
        if divided[i]:
            part = replace(data, tensors=divided[i], flat_tensors=())
            bound[i] = bind_adapter(program, part, trainable=training, **options)
        else:
            now = program.binding
            blank = initial_values(program.spec(training), now.config, methods_by_id={})
            bound[i] = replace(blank, name=now.name, source=data.source)
    return bound


def tensors_for_file(program: ProgramCore, binding: Binding) -> dict[str, Tensor]:
    """Return a stage's tensors under the bare keys of PEFT's files."""
    return file_tensors(program.spec(), binding)
