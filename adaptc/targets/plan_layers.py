"""Plan the attachments of a config: which sites of a program get which method, under which key in files.

In a :class:`Plan` every entry of the user's has bound to at least one site; otherwise a TargetError names what exists
instead. The rules on names are in ``name_rules``; this module applies them to the sites of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.errors import EntryHandler, TargetError, nearest, refuse_entry, short_repr
from adaptc.methods import (
    NO_GRAPH_DEFAULTS,
    AttentionConfig,
    ModelFacts,
    ProgramConfig,
    TargetedConfig,
    TokenRows,
    TrainedParameter,
    adds_default_modules,
    check_patterns,
)
from adaptc.passes.analysis.attention.attention_targets import default_targets
from adaptc.passes.analysis.sites import Site, find_sites
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.protocol.attachment import Attachment
from adaptc.targets.attach_site import MATRIX_KINDS, SiteAttacher, check_dropout, check_unique
from adaptc.targets.computed_weights import find_computed_weights
from adaptc.targets.expert_targets import check_no_single_experts
from adaptc.targets.name_rules import (
    NO_TARGETS,
    Selection,
    TargetCandidate,
    dotted_suffixes,
    select_modules_to_save,
    select_targets,
)
from adaptc.targets.tied import TiedLayers
from adaptc.targets.whole_and_rows import ParameterPlanner, outermost_modules

#: names of parameters that are added, not multiplied: no method adapts them
BIAS_NAMES = ("bias", "bias_k", "bias_v")


@dataclass(frozen=True)
class Plan:
    """The attachments that a config asks for at a program.

    ``config``: the planned config, with all fields that it left to the model filled in. ``attachments``: in the order
    of injection. ``matches``: target entry -> the names that it matched. ``left_out``: (module, why).

    ``unread``: key in files -> FQN, for tensors that the program does not read but that files hold. They belong to
    modules that are trained as a whole.
    """

    config: TargetedConfig | ProgramConfig | AttentionConfig
    attachments: tuple[Attachment, ...]
    matches: Mapping[str, tuple[str, ...]]
    left_out: tuple[tuple[str, str], ...]
    unread_tensors: Mapping[str, str] = field(default_factory=dict)


def plan_layers(
    config: TargetedConfig,
    program: ExportedProgram,
    facts: ModelFacts,
    adapter: str = "default",
    lifted: LiftedProgram | None = None,
    tell: EntryHandler = refuse_entry,
) -> Plan:
    """Return all attachments that ``config`` asks for, as a :class:`Plan`.

    ``facts``: what capture knows of the model. ``lifted``: the program opened, where the caller has it open. ``tell``
    is called for entries that bind to nothing; by default, it raises TargetError. Raises TargetError where there are no
    attachments, ConfigError for options without a meaning at a selected site.
    """
    return _LayerPlanner(config, program, facts, adapter, lifted or LiftedProgram(program, edit=False), tell).run()


def guess_output_head(
    vocabularies: Collection[int], outputs: Mapping[str, int], is_tied: Callable[[str], bool]
) -> str | None:
    """Return the module that seems to be a program's output head; None where there is not exactly one.

    It is the linear layer tied to an embedding, or else the linear layer with as many outputs as an embedding has rows.
    ``vocabularies``: the rows of embeddings. ``outputs``: linear layer -> its outputs.
    """
    linear = [module for module, count in outputs.items() if count in vocabularies]
    heads = [module for module in linear if is_tied(module)] or linear
    return heads[0] if len(heads) == 1 else None


class _LayerPlanner:
    def __init__(
        self,
        config: TargetedConfig,
        program: ExportedProgram,
        facts: ModelFacts,
        adapter: str,
        lifted: LiftedProgram,
        tell: EntryHandler,
    ) -> None:
        # Copied, since fields that are found in the graph are set on it, and the caller's config must not change.
        self.config = copy.copy(config.with_model_defaults(facts))
        self.program, self.facts, self.lifted, self.tell = program, facts, lifted, tell
        self.site_attacher = SiteAttacher(self.config, lifted, adapter)
        self.sites = find_sites(program, dict(facts.module_types), lifted)
        buffers = find_sites(program, dict(facts.module_types), lifted, InputKind.BUFFER)
        self.sites_by_module: dict[str, list[Site]] = {}
        for site in self.sites:
            self.sites_by_module.setdefault(site.module, []).append(site)
        # A module whose weight is a parameter is adaptable even where another of its tensors, such as the bias, is
        # computed.
        plain = {s.module for s in self.sites if s.param == "weight"}
        computed = find_computed_weights(lifted.state_dict)
        self.computed_weights = {m: c for m, c in computed.items() if m not in plain}
        self.module_types = {**dict.fromkeys(self.sites_by_module, ""), **facts.module_types}
        for module in list(self.sites_by_module):  # containers a bare program does not list
            parts = module.split(".")
            for i in range(1, len(parts)):
                self.module_types.setdefault(".".join(parts[:i]), "")
        self.parameter_planner = ParameterPlanner(lifted, self.sites, buffers, facts.input_embedding, adapter)
        self.output_head = facts.output_embedding or self._guess_output_head()

    def run(self) -> Plan:
        tied_layers = TiedLayers.find(self.config, self.parameter_planner)
        saved = outermost_modules(
            select_modules_to_save(self.module_types, self.config.modules_to_save, self.config.task_type, self.tell)
        )
        parameters = self.config.target_parameters
        tokens = self.config.trainable_token_indices
        targets = self.config.target_modules
        if targets is None:
            targets = [] if parameters and not adds_default_modules(self.facts.model_type) else self._default_targets()
        # PEFT refuses an empty list in a file, even where something else is trained.
        self.config.target_modules = targets or ([] if parameters else NO_TARGETS)
        modules = self._candidates()
        check_no_single_experts(targets, self.module_types, self.lifted.state_dict)
        selection = self._select(modules, targets)
        saved, saves_tied = tied_layers.replace_by_embedding(saved)
        names, adapts_tied = tied_layers.replace_by_embedding(selection.names)
        tied_layers.check_used(bool(saves_tied or adapts_tied or tokens))
        if adapts_tied:
            self.config.target_modules = tied_layers.add_followers(self.config.target_modules)
        if saves_tied:
            self.config.modules_to_save = tied_layers.add_followers(self.config.modules_to_save)
        full_modules = [(m, TrainedParameter("")) for m in saved]
        layer_attachments: list[Attachment] = []
        row_attachments: list[Attachment] = []
        if self.config.target_unit == "modules":
            full_modules += [
                (m, cast(TrainedParameter, self.config.method(m, "weight"))) for m in outermost_modules(selection.names)
            ]
        elif self.config.target_unit == "rows":
            row_attachments = self.parameter_planner.attach_rows(
                [(m, "", cast(TokenRows, self.config.method(m, ""))) for m in selection.names]
            )
        else:
            # The followers' sites come first, so that they draw the shared first values, as in PEFT.
            layer_attachments = [
                self.site_attacher.attach(
                    s, s.module, tied_layers.embedding_module, "", embedding_module=tied_layers.embedding_module
                )
                for s in tied_layers.followers
                if adapts_tied
            ]
            layer_attachments += [a for name in names for a in self._attach_module(name, modules[name], selection)]
        adapted_names = list(dict.fromkeys((*selection.names, *names)))
        parameter_attachments = self._attach_parameters(parameters, adapted_names)
        for option, endings in self.config.name_endings().items():
            lost = [e for e in sorted(endings) if not any(name.endswith(e) for name in self.module_types)]
            if lost:
                self.tell(
                    f"{option}: {lost[0]!r} ends no name of a module; nearest: {nearest(lost[0], self.module_types)}"
                )
        own = type(self.config).pattern_matches is not TargetedConfig.pattern_matches
        for option, pattern in self.config.pattern_entries().items():
            check_patterns(option, pattern, adapted_names, self.config.pattern_matches if own else None, self.tell)
        check_dropout(self.config, [*layer_attachments, *parameter_attachments])
        replaced = [a for m, like in full_modules for a in self.parameter_planner.attach_module(m, like)]
        replaced += [
            self.parameter_planner.attach_tied_site(s, tied_layers.embedding_module)
            for s in tied_layers.followers
            if saves_tied
        ]
        if isinstance(tokens, Mapping):
            tied_layers.check_tokens(tokens)
        row_attachments += self.parameter_planner.attach_tokens(tokens)
        biases = self.parameter_planner.attach_biases(self.config.bias, {a.id for a in replaced}, layer_attachments)
        attachments = [*biases, *replaced, *layer_attachments, *parameter_attachments, *row_attachments]
        if not attachments:
            c = self.config
            if named := [n for n in (c.target_modules, c.target_parameters, c.modules_to_save) if n]:
                raise TargetError(
                    f"the config adapts nothing here: the program has none of {short_repr(named[0])}, but "
                    f"{self._sample_names(modules)}. Is it the model that the adapter was made for?"
                )
            raise TargetError(
                "the config adapts nothing: target_modules, target_parameters, modules_to_save and "
                "trainable_token_indices are all empty. Name at least one module; the program has "
                f"{self._sample_names(modules)}."
            )
        check_unique(attachments)
        matches = dict(selection.matches)
        for a in parameter_attachments:
            matches[a.entry] = (*matches.get(a.entry, ()), a.fqn)
        unread = self.parameter_planner.unread_tensors(full_modules, {a.fqn for a in attachments})
        return Plan(self.config, tuple(attachments), matches, selection.left_out, unread)

    # -- modules ---------------------------------------------------------------------------------------------------

    def _candidates(self) -> dict[str, list[Site]]:
        """Return the modules that could be adapted: module path -> the sites that adapting the module changes."""
        if self.config.target_unit == "modules":
            return self.parameter_planner.sites_in_modules(self.module_types)
        if self.config.target_unit == "rows":
            return self.parameter_planner.sites_of_tables()
        out: dict[str, list[Site]] = {}
        for module, sites in self.sites_by_module.items():
            owner, _, inner = module.rpartition("parametrizations.")
            if inner and owner.removesuffix(".") in self.computed_weights:
                out.setdefault(owner.removesuffix("."), sites)
                continue
            main = [s for s in sites if s.param == "weight" and s.kind in MATRIX_KINDS]
            rest = [s for s in sites if len(s.shape) > 1 and s.param.rpartition(".")[2] not in BIAS_NAMES]
            if main or rest:
                out[module] = main or rest
            if sites[0].module_type.endswith("MultiheadAttention") and module in out:
                outer = self.sites_by_module.get(f"{module}.out_proj", [])
                out[module] = [*out[module], *(s for s in outer if s.param == "weight")]
        return out

    def _select(self, modules: Mapping[str, list[Site]], targets: Any) -> Selection:
        c = self.config
        return select_targets(
            [self._candidate(name, sites) for name, sites in modules.items()],
            target_modules=targets,
            exclude_modules=c.exclude_modules,
            layers_to_transform=c.layers_to_transform,
            layers_pattern=c.layers_pattern,
            modules_to_save=c.modules_to_save,
            output_embedding=self.output_head,
            task_type=c.task_type,
            all_names=self.module_types,
            parameters=[s.fqn for s in self.sites],
            tell=self.tell,
        )

    def _candidate(self, name: str, sites: Sequence[Site]) -> TargetCandidate:
        type_, main = self.module_types.get(name, ""), sites[0]
        kind = "linear" if name in self.computed_weights and type_.endswith("Linear") else main.kind
        return TargetCandidate(name, type_, kind, name in self.facts.linear_modules or main.is_linear_class)

    def _attach_module(self, name: str, sites: Sequence[Site], selection: Selection) -> Iterable[Attachment]:
        if name in self.computed_weights:
            raise self.computed_weights[name].make_error()
        entry = next((e for e, names in selection.matches.items() if name in names), "")
        alone = sum(s.module == name for s in sites) == 1
        for site in sites:
            key = name if alone or site.param == "weight" else f"{name}.{site.param}"
            if site.module != name:
                # PEFT wraps MultiheadAttention as a whole, so the key of its out_proj has the wrapper's base_layer.
                key = f"{name}.base_layer{site.module.removeprefix(name)}"
            a = self.site_attacher.attach(site, key, name, entry)
            yield a if site.module == name else replace(a, method=a.method.inside_multihead_attention())

    def _default_targets(self) -> list[str]:
        if self.config.target_unit == "rows" and (only := self.parameter_planner.only_embedding()) is not None:
            return [only]
        if self.config.peft_type in NO_GRAPH_DEFAULTS:
            raise TargetError(
                f"target_modules is None, and {self.config.peft_type} has no default for model type "
                f"{self.facts.model_type!r}. Name the modules; candidates: {self._sample_names(self._candidates())}."
            )
        found = default_targets(self.program)
        if not found:
            raise TargetError(
                "target_modules is None and no attention was found in the graph to take query and value projections "
                f"from. Name the modules to adapt; candidates: {self._sample_names(self._candidates())}; or use "
                "'all-linear', or [] for none beside what else is trained."
            )
        return found

    def _guess_output_head(self) -> str | None:
        """Return the module that seems to be the output head of a bare program; None for a captured model."""
        if not self.facts.is_bare_program:
            return None
        layers = {s.module: s for s in self.sites if s.kind == "linear" and s.param == "weight"}
        return guess_output_head(
            {s.shape[0] for s in self.sites if s.kind == "embedding"},
            {m: s.shape[0] for m, s in layers.items()},
            lambda m: any(t.kind == "embedding" for t in self.parameter_planner.sites_tied_to(layers[m])),
        )

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _attach_parameters(self, entries: Sequence[str] | None, names: list[str]) -> list[Attachment]:
        if not entries:
            return []
        by_fqn = {s.fqn: s for s in self.sites}
        ending: dict[str, list[str]] = {}
        for f in by_fqn:
            for e in dotted_suffixes(f):
                ending.setdefault(e, []).append(f)
        hits = {e: ending.get(e, []) for e in entries}
        for entry, found in hits.items():
            if not found:
                near = nearest(entry, by_fqn)
                self.tell(f"target_parameters: {entry!r} matches no parameter; did you mean one of {near}?")
        chosen = {f: e for e, found in hits.items() for f in found}
        per_module: dict[str, list[str]] = {}
        for fqn in by_fqn:
            if fqn in chosen:
                per_module.setdefault(by_fqn[fqn].module, []).append(fqn)
        out: list[Attachment] = []
        for module, fqns in per_module.items():
            order = self._parameter_order(module, fqns)
            for i, fqn in enumerate(order):
                # PEFT nests one wrapper per parameter, the last one outermost.
                key = module + ".base_layer" * (len(order) - 1 - i)
                names.append(fqn)
                out.append(
                    self.site_attacher.attach(by_fqn[fqn], key, fqn, chosen[fqn], self._parameter_kind(by_fqn[fqn]))
                )
        return out

    def _parameter_order(self, module: str, fqns: list[str]) -> list[str]:
        """Return ``fqns`` in the order in which the module registered them, which is their order in the state dict."""
        order = {f: i for i, f in enumerate(self.lifted.state_dict)}
        return sorted(fqns, key=lambda f: order.get(f, len(order)))

    def _parameter_kind(self, site: Site) -> str:
        if len(site.shape) == 3 and site.kind == "weight":
            return "experts_t" if site.module in self.facts.transposed_experts else "experts"
        if len(site.shape) != 2:
            raise TargetError(f"target_parameters: {site.fqn!r} has shape {site.shape}; two or three axes are needed")
        return "linear" if site.kind == "linear" else "weight"

    def _sample_names(self, modules: Iterable[str], n: int = 12) -> str:
        tails = list(dict.fromkeys(m.rpartition(".")[2] for m in modules))
        return ", ".join(tails[:n]) + (", ..." if len(tails) > n else "")
