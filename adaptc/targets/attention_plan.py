"""Plan the attachments of a method that adds to attentions, such as adaption prompt.

The plan has an attachment at the output projection of each of the last attentions. A TargetError names what was looked
for and what there is.
"""

from __future__ import annotations

from torch import fx
from torch.export import ExportedProgram

from adaptc.errors import TargetError, did_you_mean, listing
from adaptc.methods import AttentionConfig, ModelFacts
from adaptc.passes.analysis.attention.attention_layers import layer_behind, projection_behind
from adaptc.passes.analysis.attention.attention_patterns import find_cores, none_found
from adaptc.passes.analysis.sites import Site, find_sites
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.module_paths import module_path, owners
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import PROGRAM
from adaptc.targets.plan_layers import Plan


def plan_attention(
    config: AttentionConfig,
    program: ExportedProgram,
    facts: ModelFacts,
    adapter: str = "default",
    lifted: Lifted | None = None,
) -> Plan:
    """Return the attachments of a method that adds to attentions, as a :class:`Plan`.

    ``facts``: what capture knows of the model. ``lifted``: the program opened, where the caller has it open. Raises
    TargetError where no attention fits the config, and for models with an encoder and a decoder.
    """
    lifted = lifted or Lifted(program, edit=False)
    by_node = {c: s for s in find_sites(program, dict(facts.types), lifted) for c in s.consumers}
    found = _chosen(config, facts, lifted)
    attachments: list[Attachment] = []
    for path, core in found:
        behind = projection_behind(lifted, core)
        layer_behind(lifted, behind)
        site = _site(by_node, behind)
        method = config.method(path, site.kind)
        attachments.append(
            Attachment(
                path,
                site.module,
                site.param,
                site.kind,
                method,
                adapter,
                PROGRAM,
                (behind.name,),
                entry=_last(path),
                name=path,
            )
        )
    config = config.completed({"target_modules": _last(found[-1][0])})
    return Plan(config, tuple(attachments), {_last(found[-1][0]): tuple(path for path, _ in found)}, ())


def _chosen(config: AttentionConfig, facts: ModelFacts, lifted: Lifted) -> list[tuple[str, fx.Node]]:
    """Return the chosen attention modules as (module path, node of its attention), in the order of the program."""
    kind, known = config.peft_type, owners([*lifted.state_dict, *lifted.constants])
    if "decoder_input_ids" in lifted.specs or getattr(facts.config, "is_encoder_decoder", False):
        raise TargetError(f"{kind} is not supported for models with an encoder and a decoder, nor is it in PEFT")
    cores, near = find_cores(lifted)
    found = [(module_path(core.node, known), core.node) for core in cores]
    if not found:
        raise TargetError(
            f"{kind} adds to what attentions give, and no attention in the program itself is understood: "
            f"{none_found(near)}. Capture the model with attn_implementation='sdpa', if it has it, and with no part of "
            "it inside a block (no_grad, autocast, cond)"
        )
    name = config.target_modules or _last(found[-1][0])
    named = [(path, core) for path, core in found if path == name or path.endswith(f".{name}")]
    if not named:
        paths = list(dict.fromkeys(path for path, _ in found))
        raise TargetError(
            f"{kind}: target_modules={name!r} is the name of no module with an attention{did_you_mean(name, paths)}; "
            f"there are {listing(paths)}"
        )
    layers = config.adapter_layers or 0
    if len(named) < layers:
        raise TargetError(
            f"{kind}: adapter_layers={layers}, and {name!r} is the name of {len(named)} modules of attention"
        )
    chosen = named[-layers:]
    twice = [path for path, _ in chosen if [p for p, _ in chosen].count(path) > 1]
    if twice:
        raise TargetError(f"{kind}: {twice[0]!r} is called, or attends, more than once in one call of the program")
    return chosen


def _site(by_node: dict[str, Site], behind: fx.Node) -> Site:
    site = by_node.get(behind.name)
    if site is None:
        raise TargetError(f"{behind.name!r}, the projection behind an attention, has no weight of the model's own")
    return site


def _last(path: str) -> str:
    return path.rpartition(".")[2]
