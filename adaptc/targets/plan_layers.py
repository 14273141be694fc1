"""Plan the attachments of a config: which sites of a program get which method, under which key in files.

In a :class:`Plan` every entry of the user's has bound to at least one site; otherwise a TargetError names what exists
instead. The rules on names are in ``name_rules``; this module applies them to the sites of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.errors import ConfigError, TargetError, Tell, nearest, refuse_entry, shown
from adaptc.methods import (
    OTHER_MEANING,
    AttentionConfig,
    ModelFacts,
    ProgramConfig,
    Stacked,
    TargetedConfig,
    TokenRows,
    Whole,
    adapts_defaults,
    check_patterns,
)
from adaptc.passes.adapt.embedding_max_norm import RENORMED
from adaptc.passes.analysis.attention.attention_targets import default_targets
from adaptc.passes.analysis.sites import Site, find_sites, rivals
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.mutation import writes
from adaptc.passes.graph.ops import op_of
from adaptc.passes.protocol.attachment import Attachment
from adaptc.targets.computed_weights import computed_weights
from adaptc.targets.expert_targets import refuse_old_targets
from adaptc.targets.name_rules import NO_TARGETS, Candidate, Selection, select, select_to_save, suffixes
from adaptc.targets.tied import Ties
from adaptc.targets.whole_and_rows import Trained, outermost

#: names of parameters that are added, not multiplied: no method adapts them
ADDED = ("bias", "bias_k", "bias_v")
MATRIX_KINDS = ("linear", "addmm", "conv1d", "conv2d", "conv3d", "embedding")


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
    unread: Mapping[str, str] = field(default_factory=dict)


def plan(
    config: TargetedConfig,
    program: ExportedProgram,
    facts: ModelFacts,
    adapter: str = "default",
    lifted: Lifted | None = None,
    tell: Tell = refuse_entry,
) -> Plan:
    """Return all attachments that ``config`` asks for, as a :class:`Plan`.

    ``facts``: what capture knows of the model. ``lifted``: the program opened, where the caller has it open. ``tell``
    is called for entries that bind to nothing; by default, it raises TargetError. Raises TargetError where there are no
    attachments, ConfigError for options without a meaning at a selected site.
    """
    return _Planner(config, program, facts, adapter, lifted or Lifted(program, edit=False), tell).run()


class _Planner:
    def __init__(
        self,
        config: TargetedConfig,
        program: ExportedProgram,
        facts: ModelFacts,
        adapter: str,
        lifted: Lifted,
        tell: Tell,
    ) -> None:
        # Copied, since fields that are found in the graph are set on it, and the caller's config must not change.
        self.config = copy.copy(config.resolved(facts))
        self.program, self.facts, self.adapter, self.lifted, self.tell = program, facts, adapter, lifted, tell
        self.sites = find_sites(program, dict(facts.types), lifted)
        buffers = find_sites(program, dict(facts.types), lifted, InputKind.BUFFER)
        self.by_module: dict[str, list[Site]] = {}
        for site in self.sites:
            self.by_module.setdefault(site.module, []).append(site)
        # A module whose weight is a parameter is adaptable even where another of its tensors, such as the bias, is
        # computed.
        plain = {s.module for s in self.sites if s.param == "weight"}
        computed = computed_weights(lifted.state_dict)
        self.computed = {m: c for m, c in computed.items() if m not in plain}
        self.names = {**dict.fromkeys(self.by_module, ""), **facts.types}
        for module in list(self.by_module):  # containers a bare program does not list
            parts = module.split(".")
            for i in range(1, len(parts)):
                self.names.setdefault(".".join(parts[:i]), "")
        self.trained = Trained(lifted, self.sites, buffers, facts.input_embedding, adapter)
        self.head = facts.output_embedding or self._guess_head()

    def run(self) -> Plan:
        ties = Ties.of(self.config, self.trained)
        saved = outermost(select_to_save(self.names, self.config.modules_to_save, self.config.task_type, self.tell))
        parameters = self.config.target_parameters
        tokens = self.config.trainable_token_indices
        targets = self.config.target_modules
        if targets is None:
            targets = [] if parameters and not adapts_defaults(self.facts.model_type) else self._defaults()
        # PEFT refuses an empty list in a file, even where something else is trained.
        self.config.target_modules = targets or ([] if parameters else NO_TARGETS)
        modules = self._candidates()
        refuse_old_targets(targets, self.names, self.lifted.state_dict)
        selection = self._select(modules, targets)
        saved, saves = ties.led(saved)
        names, adapts = ties.led(selection.names)
        ties.check_used(bool(saves or adapts or tokens))
        if adapts:
            self.config.target_modules = ties.named(self.config.target_modules)
        if saves:
            self.config.modules_to_save = ties.named(self.config.modules_to_save)
        whole = [(m, Whole("")) for m in saved]
        main: list[Attachment] = []
        rows: list[Attachment] = []
        if self.config.unit == "modules":
            whole += [(m, cast(Whole, self.config.method(m, "weight"))) for m in outermost(selection.names)]
        elif self.config.unit == "rows":
            rows = self.trained.rows([(m, "", cast(TokenRows, self.config.method(m, ""))) for m in selection.names])
        else:
            # The followers' sites come first, so that they draw the shared first values, as in PEFT.
            main = [self._attach(s, s.module, ties.home, "", home=ties.home) for s in ties.followers if adapts]
            main += [a for name in names for a in self._module(name, modules[name], selection)]
        check_names = list(dict.fromkeys((*selection.names, *names)))
        extra = self._parameters(parameters, check_names)
        for option, endings in self.config.name_endings().items():
            lost = [e for e in sorted(endings) if not any(name.endswith(e) for name in self.names)]
            if lost:
                self.tell(f"{option}: {lost[0]!r} ends no name of a module; nearest: {nearest(lost[0], self.names)}")
        own = type(self.config).pattern_matches is not TargetedConfig.pattern_matches
        for option, pattern in self.config.pattern_entries().items():
            check_patterns(option, pattern, check_names, self.config.pattern_matches if own else None, self.tell)
        self._check_dropout([*main, *extra])
        replaced = [a for m, like in whole for a in self.trained.whole(m, like)]
        replaced += [self.trained.follower(s, ties.home) for s in ties.followers if saves]
        if isinstance(tokens, Mapping):
            ties.check_tokens(tokens)
        rows += self.trained.tokens(tokens)
        biases = self.trained.biases(self.config.bias, {a.id for a in replaced}, main)
        attachments = [*biases, *replaced, *main, *extra, *rows]
        if not attachments:
            c = self.config
            if named := [n for n in (c.target_modules, c.target_parameters, c.modules_to_save) if n]:
                raise TargetError(
                    f"the config adapts nothing here: the program has none of {shown(named[0])}, but "
                    f"{self._some(modules)}. Is it the model that the adapter was made for?"
                )
            raise TargetError(
                "the config adapts nothing: target_modules, target_parameters, modules_to_save and "
                "trainable_token_indices are all empty. Name at least one module; the program has "
                f"{self._some(modules)}."
            )
        _check_once(attachments)
        matches = dict(selection.matches)
        for a in extra:
            matches[a.entry] = (*matches.get(a.entry, ()), a.fqn)
        unread = self.trained.unread(whole, {a.fqn for a in attachments})
        return Plan(self.config, tuple(attachments), matches, selection.left_out, unread)

    # -- modules ---------------------------------------------------------------------------------------------------

    def _candidates(self) -> dict[str, list[Site]]:
        """Return the modules that could be adapted: module path -> the sites that adapting the module changes."""
        if self.config.unit == "modules":
            return self.trained.modules(self.names)
        if self.config.unit == "rows":
            return self.trained.tables()
        out: dict[str, list[Site]] = {}
        for module, sites in self.by_module.items():
            owner, _, inner = module.rpartition("parametrizations.")
            if inner and owner.removesuffix(".") in self.computed:
                out.setdefault(owner.removesuffix("."), sites)
                continue
            main = [s for s in sites if s.param == "weight" and s.kind in MATRIX_KINDS]
            rest = [s for s in sites if len(s.shape) > 1 and s.param.rpartition(".")[2] not in ADDED]
            if main or rest:
                out[module] = main or rest
            if sites[0].module_type.endswith("MultiheadAttention") and module in out:
                outer = self.by_module.get(f"{module}.out_proj", [])
                out[module] = [*out[module], *(s for s in outer if s.param == "weight")]
        return out

    def _select(self, modules: Mapping[str, list[Site]], targets: Any) -> Selection:
        c = self.config
        return select(
            [self._candidate(name, sites) for name, sites in modules.items()],
            target_modules=targets,
            exclude_modules=c.exclude_modules,
            layers_to_transform=c.layers_to_transform,
            layers_pattern=c.layers_pattern,
            modules_to_save=c.modules_to_save,
            output_embedding=self.head,
            task_type=c.task_type,
            all_names=self.names,
            parameters=[s.fqn for s in self.sites],
            tell=self.tell,
        )

    def _candidate(self, name: str, sites: Sequence[Site]) -> Candidate:
        type_, main = self.names.get(name, ""), sites[0]
        kind = "linear" if name in self.computed and type_.endswith("Linear") else main.kind
        return Candidate(name, type_, kind, name in self.facts.linear or main.linear)

    def _module(self, name: str, sites: Sequence[Site], selection: Selection) -> Iterable[Attachment]:
        if name in self.computed:
            raise self.computed[name].refusal()
        entry = next((e for e, names in selection.matches.items() if name in names), "")
        alone = sum(s.module == name for s in sites) == 1
        for site in sites:
            key = name if alone or site.param == "weight" else f"{name}.{site.param}"
            if site.module != name:
                # PEFT wraps MultiheadAttention as a whole, so the key of its out_proj has the wrapper's base_layer.
                key = f"{name}.base_layer{site.module.removeprefix(name)}"
            a = self._attach(site, key, name, entry)
            yield a if site.module == name else replace(a, method=a.method.nested())

    def _attach(
        self, site: Site, key: str, name: str, entry: str, kind: str | None = None, home: str = ""
    ) -> Attachment:
        kind = kind or site.kind
        method = self.config.method(name, kind)
        if home and (method := method.following(home)) is None:
            raise TargetError(f"ensure_weight_tying=True: {self.config.peft_type} has no form at {site.fqn!r}")
        if kind.startswith("experts") and not method.stacks:
            method = Stacked.of(method)
        a = Attachment(
            key,
            site.module,
            site.param,
            kind,
            method,
            self.adapter,
            "auto",
            site.consumers,
            entry=entry,
            name=name,
            tied=site.tied,
        )
        readers = [self.lifted.nodes[c] for c in site.consumers]
        if writers := [n for n in readers if writes(n) or n.target is RENORMED]:
            raise TargetError(
                f"site {site.fqn!r} is changed by {writers[0].target} in every call. An embedding with max_norm "
                "does that where its weight has rows that are too long, and something else reads it, too (a tied head, "
                "a lookup with another max_norm). Call "
                "torch.embedding_renorm_(weight.detach(), torch.arange(len(weight)), max_norm, norm_type) once before "
                "the model is captured, or leave the module out of the targets."
            )
        unknown = {f for c in site.consumers for f in rivals(self.lifted.nodes[c])}
        if unknown:
            raise TargetError(
                f"site {site.fqn!r}: inside a block of control flow (cond, map, ...) nothing tells which of the tied "
                f"{sorted(unknown)} is meant. Untie them, export the model with strict=True and pass the program, or "
                "leave them out of the targets."
            )
        op = op_of(kind, self.lifted.tensor(site.fqn), self.lifted.nodes[site.consumers[0]])
        try:
            method = method.at(op)
            method.slots(op)
            if self.lifted.tensor(site.fqn).is_complex() and not method.takes_complex:
                raise TargetError(
                    f"{method.name} is defined for real weights, and this one is {self.lifted.tensor(site.fqn).dtype}; "
                    "leave it out, or use another method (LoRA, IA3, LoHa, LoKr, ...)"
                )
        except (TargetError, ConfigError) as error:
            raise type(error)(f"site {site.fqn!r} ({site.module_type or kind}): {error}") from error
        return replace(a, method=method)

    def _defaults(self) -> list[str]:
        if self.config.unit == "rows" and (only := self.trained.only_embedding()) is not None:
            return [only]
        if self.config.peft_type in OTHER_MEANING:
            raise TargetError(
                f"target_modules is None, and {self.config.peft_type} has no default for model type "
                f"{self.facts.model_type!r}. Name the modules; candidates: {self._some(self._candidates())}."
            )
        found = default_targets(self.program)
        if not found:
            raise TargetError(
                "target_modules is None and no attention was found in the graph to take query and value projections "
                f"from. Name the modules to adapt; candidates: {self._some(self._candidates())}; or use 'all-linear', "
                "or [] for none beside what else is trained."
            )
        return found

    def _guess_head(self) -> str | None:
        """Return the module that seems to be the output head of a bare program; None where there is not exactly one.

        It is the linear layer tied to an embedding, or else the linear layer with as many outputs as an embedding has
        rows.
        """
        if not self.facts.bare:
            return None
        vocab = {s.shape[0] for s in self.sites if s.kind == "embedding"}
        linear = [s for s in self.sites if s.kind == "linear" and s.shape[0] in vocab and s.param == "weight"]
        tied = [s for s in linear if any(t.kind == "embedding" for t in self.trained.tied_to(s))]
        heads = tied or linear
        return heads[0].module if len(heads) == 1 else None

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _parameters(self, entries: Sequence[str] | None, names: list[str]) -> list[Attachment]:
        if not entries:
            return []
        by_fqn = {s.fqn: s for s in self.sites}
        ending: dict[str, list[str]] = {}
        for f in by_fqn:
            for e in suffixes(f):
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
                out.append(self._attach(by_fqn[fqn], key, fqn, chosen[fqn], self._parameter_kind(by_fqn[fqn])))
        return out

    def _parameter_order(self, module: str, fqns: list[str]) -> list[str]:
        """Return ``fqns`` in the order in which the module registered them, which is their order in the state dict."""
        order = {f: i for i, f in enumerate(self.lifted.state_dict)}
        return sorted(fqns, key=lambda f: order.get(f, len(order)))

    def _parameter_kind(self, site: Site) -> str:
        if len(site.shape) == 3 and site.kind == "weight":
            return "experts_t" if site.module in self.facts.transposed else "experts"
        if len(site.shape) != 2:
            raise TargetError(f"target_parameters: {site.fqn!r} has shape {site.shape}; two or three axes are needed")
        return "linear" if site.kind == "linear" else "weight"

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_dropout(self, attachments: Sequence[Attachment]) -> None:
        option = self.config.dropout_field
        if not option or not getattr(self.config, option):
            return
        for a in attachments:
            if a.kind not in MATRIX_KINDS:
                raise ConfigError(
                    f"{option} has no meaning at {a.fqn!r}: its consumer ({a.kind}) reads the changed weight, so "
                    f"there is no input to drop. Set {option}=0.0 or leave the module out."
                )

    def _some(self, modules: Iterable[str], n: int = 12) -> str:
        tails = list(dict.fromkeys(m.rpartition(".")[2] for m in modules))
        return ", ".join(tails[:n]) + (", ..." if len(tails) > n else "")


def _check_once(attachments: Sequence[Attachment]) -> None:
    seen: dict[str, Attachment] = {}
    for a in attachments:
        first = seen.setdefault(a.fqn, a)
        if first is not a:
            raise TargetError(
                f"{a.fqn!r} is adapted twice, as {first.key or first.fqn!r} ({first.method.name}) and as "
                f"{a.key or a.fqn!r} ({a.method.name}). Take it out of one of target_modules, target_parameters, "
                "modules_to_save and trainable_token_indices."
            )
