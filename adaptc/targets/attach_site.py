"""Attach a config's method to a site, and refuse sites where it could not act.

A refusal names the site, why the method cannot act there, and what to do instead. The rules on which sites are meant
are in ``plan_layers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaptc.errors import ConfigError, TargetError
from adaptc.methods import PerExpertMethod, TargetedConfig
from adaptc.passes.adapt.embedding_max_norm import RENORM_FUNCTIONAL
from adaptc.passes.analysis.sites import Site, possible_fqns
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import has_mutable_schema
from adaptc.passes.graph.ops import op_of
from adaptc.passes.protocol.attachment import Attachment

#: the kinds of sites that multiply an input by the weight
MATRIX_KINDS = ("linear", "addmm", "conv1d", "conv2d", "conv3d", "embedding")


@dataclass(frozen=True, eq=False)
class SiteAttacher:
    """A maker of attachments at the sites of one program, for one config. ``adapter``: the adapter's name."""

    config: TargetedConfig
    lifted: LiftedProgram
    adapter: str

    def attach(
        self, site: Site, key: str, name: str, entry: str, kind: str | None = None, embedding_module: str = ""
    ) -> Attachment:
        """Return the attachment of the config's method at ``site``.

        ``key``: its key in files. ``name``: the module or parameter that the user's ``entry`` matched. ``kind``: None
        for the site's own. ``embedding_module``: the embedding that the site follows, if it is tied to one. Raises
        TargetError or ConfigError where the method cannot act at the site.
        """
        kind = kind or site.kind
        method = self.config.method(name, kind)
        if embedding_module and (method := method.sharing.tied_to(embedding_module)) is None:
            raise TargetError(f"ensure_weight_tying=True: {self.config.peft_type} has no form at {site.fqn!r}")
        if kind.startswith("experts") and not method.stacks:
            method = PerExpertMethod(method)
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
        self._check_consumers(site)
        op = op_of(kind, self.lifted.tensor(site.fqn), self.lifted.nodes[site.consumers[0]])
        try:
            self.config.check_layer(name)
            method = method.sizes.specialized_for(op)
            method.slots(op)
            if self.lifted.tensor(site.fqn).is_complex() and not method.takes_complex:
                raise TargetError(
                    f"{method.name} is defined for real weights, and this one is {self.lifted.tensor(site.fqn).dtype}; "
                    "leave it out, or use another method (LoRA, IA3, LoHa, LoKr, ...)"
                )
        except (TargetError, ConfigError) as error:
            raise type(error)(f"site {site.fqn!r} ({site.module_type or kind}): {error}") from error
        return replace(a, method=method)

    def _check_consumers(self, site: Site) -> None:
        """Raise TargetError for a weight that calls write to, and for one that is not known among tied weights."""
        readers = [self.lifted.nodes[c] for c in site.consumers]
        if writers := [n for n in readers if has_mutable_schema(n) or n.target is RENORM_FUNCTIONAL]:
            raise TargetError(
                f"site {site.fqn!r} is changed by {writers[0].target} in every call. An embedding with max_norm "
                "does that where its weight has rows that are too long, and something else reads it, too (a tied head, "
                "a lookup with another max_norm). Call "
                "torch.embedding_renorm_(weight.detach(), torch.arange(len(weight)), max_norm, norm_type) once before "
                "the model is captured, or leave the module out of the targets."
            )
        unknown = {f for n in readers for f in possible_fqns(n)}
        if unknown:
            raise TargetError(
                f"site {site.fqn!r}: inside a block of control flow (cond, map, ...) nothing tells which of the tied "
                f"{sorted(unknown)} is meant. Untie them, export the model with strict=True and pass the program, or "
                "leave them out of the targets."
            )


def check_dropout(config: TargetedConfig, attachments: Sequence[Attachment]) -> None:
    """Raise ConfigError where ``config`` has dropout, and an attachment has no input to drop."""
    option = config.dropout_field
    if not option or not getattr(config, option):
        return
    for a in attachments:
        if a.kind not in MATRIX_KINDS:
            raise ConfigError(
                f"{option} has no meaning at {a.fqn!r}: its consumer ({a.kind}) reads the changed weight, so "
                f"there is no input to drop. Set {option}=0.0 or leave the module out."
            )


def check_unique(attachments: Sequence[Attachment]) -> None:
    """Raise TargetError where two attachments change the same tensor."""
    seen: dict[str, Attachment] = {}
    for a in attachments:
        first = seen.setdefault(a.fqn, a)
        if first is not a:
            raise TargetError(
                f"{a.fqn!r} is adapted twice, as {first.key or first.fqn!r} ({first.method.name}) and as "
                f"{a.key or a.fqn!r} ({a.method.name}). Take it out of one of target_modules, target_parameters, "
                "modules_to_save and trainable_token_indices."
            )
