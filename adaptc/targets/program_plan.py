"""Plan the attachment of a method that changes the program as a whole, such as prompt tuning: at the token embedding.

The plan has one attachment at the embedding that looks up the caller's tokens, and those of the modules that are
trained as a whole. A TargetError names what was looked for and what there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.errors import ConfigError, EntryHandler, TargetError, listing, refuse_entry
from adaptc.methods import ModelFacts, ProgramConfig, TrainedParameter
from adaptc.passes.analysis.attention.attention_for_prefixes import find_self_attentions
from adaptc.passes.analysis.sites import Site, find_sites
from adaptc.passes.analysis.tokens.decoder_inputs import find_decoder_lookup, find_decoder_values
from adaptc.passes.analysis.tokens.token_inputs import Lookup, find_lookups, find_program_values, no_lookup_error
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import op_of
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import PROGRAM_FORM
from adaptc.targets.name_rules import select_modules_to_save
from adaptc.targets.plan_layers import Plan
from adaptc.targets.whole_and_rows import ParameterPlanner, outermost_modules

#: the prefix of the names of a decoder's inputs, in a model with an encoder and a decoder
_DECODER_PREFIX = "decoder_"
#: how the names of the inputs of that part begin
_PROMPT_PREFIX = "prompt_"


def plan_program(
    config: ProgramConfig,
    program: ExportedProgram,
    facts: ModelFacts,
    adapter: str = "default",
    lifted: LiftedProgram | None = None,
    tell: EntryHandler = refuse_entry,
) -> Plan:
    """Return the attachments of a method that changes the program as a whole, as a :class:`Plan`.

    ``facts``: what capture knows of the model. ``lifted``: the program opened, where the caller has it open. ``tell``
    is called for entries of ``modules_to_save`` that bind to nothing; by default, it raises TargetError. Raises
    TargetError where the program has no token embedding, or lacks a value that the method changes. Raises ConfigError
    where the virtual tokens leave no room for a call's tokens.
    """
    lifted = lifted or LiftedProgram(program, edit=False)
    sites = find_sites(program, dict(facts.module_types), lifted)
    site, lookup = find_token_embedding(config, facts, lifted, sites)
    op = op_of(site.kind, lifted.tensor(site.fqn), lookup.node)
    found = find_self_attentions(lifted, lookup, config.peft_type) if config.reads_attentions else None
    config = config.with_model_defaults(facts, op.out_features, found)
    config.check_stacks(has_encoder(facts, lifted))
    method = config.method(site.module, site.kind)
    find_program_values(lifted, method, lookup)
    if method.has_decoder_tokens():
        find_decoder_values(lifted, method)
    _check_length(config, program, lookup)
    names = (lookup.node.name,)
    a = Attachment("", site.module, site.param, site.kind, method, adapter, PROGRAM_FORM, names, name=site.module)
    buffers = find_sites(program, dict(facts.module_types), lifted, InputKind.BUFFER)
    trained = ParameterPlanner(lifted, sites, buffers, site.module, adapter)
    modules = {**dict.fromkeys([s.module for s in sites], ""), **facts.module_types}
    saved = outermost_modules(select_modules_to_save(modules, config.modules_to_save, config.task_type, tell))
    whole = [(m, TrainedParameter("")) for m in saved]
    attachments = [b for m, like in whole for b in trained.attach_module(m, like)]
    unread = trained.unread_tensors(whole, {b.fqn for b in attachments})
    return Plan(config, (*attachments, a), {}, (), unread)


def _check_length(config: ProgramConfig, program: ExportedProgram, lookup: Lookup) -> None:
    ranges = {str(k): v for k, v in program.range_constraints.items()}
    found = ranges.get(str(lookup.ids.meta["val"].shape[1]))
    count = config.num_virtual_tokens or 0
    if found is not None and count >= found.upper:
        raise ConfigError(
            f"{type(config).__name__}.num_virtual_tokens={count} leaves no room for a token of a call: the model takes "
            f"{found.upper} in all. Choose fewer."
        )


def has_encoder(facts: ModelFacts, lifted: LiftedProgram) -> bool:
    """Return whether the program has an encoder and a decoder."""
    known = getattr(facts.config, "is_encoder_decoder", False)
    return bool(known) or any(name.startswith(f"{_DECODER_PREFIX}input_ids") for name in lifted.input_specs)


def find_token_embedding(
    config: ProgramConfig, facts: ModelFacts, lifted: LiftedProgram, sites: Sequence[Site]
) -> tuple[Site, Lookup]:
    """Return the site of the token embedding, and its lookup.

    For a KV prefix in a model with an encoder and a decoder, it is the decoder's. Raises TargetError where there is
    none, or more than one.
    """
    site_by_consumer = {c: s for s in sites if s.kind == "embedding" for c in s.consumers}
    all_lookups = [(site_by_consumer[x.node.name], x) for x in find_lookups(lifted) if x.node.name in site_by_consumer]
    lookup_texts = [f"{s.module!r} (by {x.ids.name!r})" for s, x in all_lookups]
    weight = lifted.placeholders.get(f"{facts.input_embedding}.weight")
    chosen = [(s, x) for s, x in all_lookups if s.module == facts.input_embedding]
    if len(chosen) < 2 and weight is not None:  # T5's embedding is looked up under other names only
        chosen = [(s, x) for s, x in all_lookups if lifted.placeholders[s.fqn] is weight]
    if not chosen and facts.input_embedding is None:
        # A bare program does not name its embedding: take lookups of input_ids, or else all lookups.
        chosen = [(s, x) for s, x in all_lookups if x.ids.name == "input_ids"] or all_lookups
    if has_encoder(facts, lifted):
        if not config.supports_encoders:
            raise TargetError(f"{config.peft_type} is not supported for models with an encoder and a decoder")
        if config.reads_attentions:
            return _decoder_embedding(config, lifted, site_by_consumer)
        chosen = [(s, x) for s, x in chosen if not x.ids.name.startswith(_DECODER_PREFIX)]
        if not chosen:
            raise TargetError(
                f"{config.peft_type} puts tokens in front of those that an encoder reads, and the encoder of this "
                "program reads no token ids"
            )
    if not chosen:
        raise no_lookup_error(config.peft_type, lookup_texts, facts.input_embedding)
    if len(chosen) > 1:  # a program that reads images has a part for their prompts, which is no step
        chosen = [(s, x) for s, x in chosen if not x.ids.name.startswith(_PROMPT_PREFIX)]
    if len(chosen) > 1:
        where = listing(f"{s.module!r} (by {x.ids.name!r})" for s, x in chosen)
        raise TargetError(
            f"{config.peft_type} puts tokens in front of those of one stack, and the program looks tokens up "
            f"{len(chosen)} times: {where}."
        )
    return chosen[0]


def _decoder_embedding(
    config: ProgramConfig, lifted: LiftedProgram, site_by_consumer: Mapping[str, Site]
) -> tuple[Site, Lookup]:
    """Return the site and the lookup of the decoder's token embedding, in a model with an encoder and a decoder.

    Raises TargetError where the program has none.
    """
    lookup, instead = find_decoder_lookup(lifted)
    if lookup is None or lookup.node.name not in site_by_consumer:
        raise TargetError(
            f"{config.peft_type} puts keys and values in front of those of a decoder's tokens, and "
            f"{instead or 'the program has neither decoder_input_ids nor labels'}. Capture the model with its "
            "decoder_input_ids, or labels, as an input"
        )
    return site_by_consumer[lookup.node.name], lookup
