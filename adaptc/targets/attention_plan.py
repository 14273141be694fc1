"""Plan the attachments of a method that adds to attentions, such as adaption prompt.

The plan has an attachment at the output projection of each of the last attentions. A TargetError names what was looked
for and what there is.
"""

from __future__ import annotations

from torch import fx
from torch.export import ExportedProgram

from adaptc.errors import TargetError, did_you_mean, listing
from adaptc.methods import AttentionConfig, ModelFacts
from adaptc.passes.analysis.attention.attention_layers import find_attention_layer, find_output_projection
from adaptc.passes.analysis.attention.attention_patterns import describe_search, find_attention_cores
from adaptc.passes.analysis.sites import Site, find_sites
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.module_paths import module_path, module_paths_of
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import PROGRAM_FORM
from adaptc.targets.plan_layers import Plan


def plan_attention(
    config: AttentionConfig,
    program: ExportedProgram,
    facts: ModelFacts,
    adapter: str = "default",
    lifted: LiftedProgram | None = None,
) -> Plan:
    """Return the attachments of a method that adds to attentions, as a :class:`Plan`.

    ``facts``: what capture knows of the model. ``lifted``: the program opened, where the caller has it open. Raises
    TargetError where no attention fits the config, and for models with an encoder and a decoder.
    """
    lifted = lifted or LiftedProgram(program, edit=False)
    by_node = {c: s for s in find_sites(program, dict(facts.module_types), lifted) for c in s.consumers}
    chosen = _choose_attentions(config, facts, lifted)
    attachments: list[Attachment] = []
    for path, core in chosen:
        projection = find_output_projection(lifted, core)
        find_attention_layer(lifted, projection)
        site = _projection_site(by_node, projection)
        method = config.method(path, site.kind)
        attachments.append(
            Attachment(
                path,
                site.module,
                site.param,
                site.kind,
                method,
                adapter,
                PROGRAM_FORM,
                (projection.name,),
                entry=_last_name(path),
                name=path,
            )
        )
    config = config.with_missing_filled({"target_modules": _last_name(chosen[-1][0])})
    return Plan(config, tuple(attachments), {_last_name(chosen[-1][0]): tuple(path for path, _ in chosen)}, ())


def _choose_attentions(config: AttentionConfig, facts: ModelFacts, lifted: LiftedProgram) -> list[tuple[str, fx.Node]]:
    """Return the chosen attention modules as (module path, node of its attention), in the order of the program."""
    peft_type, known = config.peft_type, module_paths_of([*lifted.state_dict, *lifted.constants])
    if "decoder_input_ids" in lifted.input_specs or getattr(facts.config, "is_encoder_decoder", False):
        raise TargetError(f"{peft_type} is not supported for models with an encoder and a decoder, nor is it in PEFT")
    cores, near = find_attention_cores(lifted)
    attentions = [(module_path(core.node, known), core.node) for core in cores]
    if not attentions:
        raise TargetError(
            f"{peft_type} adds to what attentions give, and no attention in the program itself is understood: "
            f"{describe_search(near)}. Capture the model with attn_implementation='sdpa', if it has it, and with no "
            "part of it inside a block (no_grad, autocast, cond)"
        )
    name = config.target_modules or _last_name(attentions[-1][0])
    named = [(path, core) for path, core in attentions if path == name or path.endswith(f".{name}")]
    if not named:
        paths = list(dict.fromkeys(path for path, _ in attentions))
        raise TargetError(
            f"{peft_type}: target_modules={name!r} is the name of no module with an "
            f"attention{did_you_mean(name, paths)}; there are {listing(paths)}"
        )
    layers = config.adapter_layers or 0
    if len(named) < layers:
        raise TargetError(
            f"{peft_type}: adapter_layers={layers}, and {name!r} is the name of {len(named)} modules of attention"
        )
    chosen = named[-layers:]
    twice = [path for path, _ in chosen if [p for p, _ in chosen].count(path) > 1]
    if twice:
        raise TargetError(f"{peft_type}: {twice[0]!r} is called, or attends, more than once in one call of the program")
    return chosen


def _projection_site(site_by_consumer: dict[str, Site], projection: fx.Node) -> Site:
    site = site_by_consumer.get(projection.name)
    if site is None:
        raise TargetError(f"{projection.name!r}, the projection behind an attention, has no weight of the model's own")
    return site


def _last_name(path: str) -> str:
    return path.rpartition(".")[2]
