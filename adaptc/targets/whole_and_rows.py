"""Make the attachments of parameters that are trained themselves: whole modules, biases, and single rows of tables.

They are attachments of ``TrainedParameter`` and ``TokenRows``, for names that the rules have selected, with the keys of
PEFT's files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaptc.errors import ConfigError, TargetError, nearest
from adaptc.methods import TokenRows, TrainedParameter
from adaptc.passes.analysis.sites import Site, find_consumers
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import op_of
from adaptc.passes.protocol.attachment import Attachment


@dataclass(frozen=True)
class ParameterPlanner:
    """The sites of an opened program, as modules, biases and rows. ``embedding``: the path of the input embedding."""

    lifted: LiftedProgram
    sites: Sequence[Site]
    buffers: Sequence[Site]
    embedding: str | None
    adapter: str

    # -- whole modules and biases ----------------------------------------------------------------------------------

    def sites_in_modules(self, names: Iterable[str]) -> dict[str, list[Site]]:
        """Return, for each of ``names`` that holds a tensor the program reads, the sites inside."""
        inside: dict[str, list[Site]] = {}
        for site in (*self.sites, *self.buffers):
            path = site.module
            while path:
                inside.setdefault(path, []).append(site)
                path = path.rpartition(".")[0]
        return {n: inside[n] for n in names if n in inside}

    def attach_module(self, module: str, method: TrainedParameter) -> list[Attachment]:
        """Return the attachments of all tensors of ``module`` that the program reads.

        The name of each slot is ``like.slot`` followed by the path inside the module. Raises TargetError where the
        program reads none.
        """
        inside = [s for s in (*self.sites, *self.buffers) if f"{s.module}.".startswith(f"{module}.")]
        if not inside:
            raise TargetError(f"modules_to_save: {module!r} holds no parameter that the program reads")
        return [self._attach_parameter(s, module, s.fqn.removeprefix(f"{module}."), method) for s in inside]

    def attach_tied_site(self, site: Site, leader: str) -> Attachment:
        """Return the attachment of a ``site`` whose weight is that of ``leader``, a module that is trained as a
        whole."""
        a = self._attach_parameter(site, site.module, site.param, TrainedParameter("").sharing.tied_to(leader))
        return replace(a, consumers=site.consumers)  # the other readers are those of the leader

    def unread_tensors(
        self, full_modules: Iterable[tuple[str, TrainedParameter]], read_fqns: Collection[str]
    ) -> dict[str, str]:
        """Return the tensors of the modules in ``full_modules`` that are not in ``read_fqns``: key in files -> FQN."""
        out: dict[str, str] = {}
        for module, like in full_modules:
            inside = [f for f in self.lifted.state_dict if f.startswith(f"{module}.") and f not in read_fqns]
            out |= {f"{module}.{like.slot_for_path(f.removeprefix(f'{module}.'))}": f for f in inside}
        return out

    def attach_biases(
        self, bias_option: str, trained_ids: Collection[str], layer_attachments: Sequence[Attachment]
    ) -> list[Attachment]:
        """Return the attachments of the biases that are trained.

        ``bias_option``: "none", "all", or any other value for the biases of the modules of ``layer_attachments``.
        ``trained_ids``: the ids of attachments that train a bias already.
        """
        if bias_option == "none":
            return []
        keys = {a.module: f"{a.key}.base_layer" for a in layer_attachments}
        sites = [s for s in self.sites if s.param == "bias" and (bias_option == "all" or s.module in keys)]
        found = [
            self._attach_parameter(s, keys.get(s.module, s.module), "bias", TrainedParameter("", place="trained_bias"))
            for s in sites
        ]
        return [a for a in found if a.id not in trained_ids]

    def _attach_parameter(self, site: Site, key: str, inner_path: str, template: TrainedParameter) -> Attachment:
        method = replace(
            template,
            slot=template.slot_for_path(inner_path),
            shape=site.shape,
            dtype=self.lifted.tensor(site.fqn).dtype,
            trainable=site not in self.buffers,
        )
        names = (*site.consumers, *self._unclaimed_consumers(site))
        return Attachment(key, site.module, site.param, "weight", method, self.adapter, "weight", names)

    def _unclaimed_consumers(self, site: Site) -> list[str]:
        """Return the names of the weight's consumers that are in no site.

        Such a consumer is in a parent module that reads the weight; it must read the trained weight, too.
        """
        node = self.lifted.placeholders[site.fqn]
        same = [s for s in (*self.sites, *self.buffers) if self.lifted.placeholders[s.fqn] is node]
        claimed = {c for s in same for c in s.consumers}
        return [n.name for n, _ in find_consumers(node) if n.name not in claimed]

    # -- rows --------------------------------------------------------------------------------------------------------

    def sites_of_tables(self) -> dict[str, list[Site]]:
        """Return the modules with a weight of two axes: module path -> the sites that read the weight.

        A module that only lends its weight to others, such as T5's ``shared``, has their sites.
        """
        readers: dict[Any, list[Site]] = {}
        for site in self.sites:
            readers.setdefault(self.lifted.placeholders[site.fqn], []).append(site)
        out: dict[str, list[Site]] = {}
        for fqn, node in self.lifted.placeholders.items():
            module, _, param = fqn.rpartition(".")
            found = [s for s in readers.get(node, []) if len(s.shape) == 2]
            if param == "weight" and found:
                out[module] = [s for s in found if s.fqn == fqn] or found
        return out

    def attach_tokens(self, tokens: Any) -> list[Attachment]:
        """Return the attachments for ``trainable_token_indices``: a list for the input embedding, or a dict by module.

        Raises TargetError where the embedding of a list, or a module of a dict, is not found.
        """
        if not tokens:
            return []
        tables = self.sites_of_tables()
        if not isinstance(tokens, Mapping):
            name = self.embedding or self.only_embedding()
            if name is None:
                raise TargetError(
                    "trainable_token_indices: say for which embedding, as a dict; it may be "
                    f"{self._embedding_modules()}"
                )
            tokens = {name: tokens}
        chosen = [(m, e, TokenRows(tuple(tokens[e]))) for e in tokens for m in self._modules_matching(e, tables)]
        return self.attach_rows(chosen, all_consumers=True)

    def attach_rows(
        self, chosen: Sequence[tuple[str, str, TokenRows]], *, all_consumers: bool = False
    ) -> list[Attachment]:
        """Return the attachments that train rows of modules.

        ``chosen``: (module path, the entry that named it, the method). Sites tied to the input embedding follow it,
        unless other rows of them are trained. ``all_consumers``: consumers that read the weight outside any site read
        the trained rows, too. PEFT's wrapper for ``trainable_token_indices`` works that way; PEFT's layer for the
        method itself does not.
        """
        tables, method_by_module = self.sites_of_tables(), {m: like for m, _, like in chosen}
        out: dict[str, Attachment] = {}
        for module, entry, like in chosen:
            own_sites = [s for s in tables[module] if s.module == module]
            for site in own_sites:
                if site.fqn not in out:
                    out[site.fqn] = replace(self._attach_row_site(site, module, like, all_consumers), entry=entry)
            # A head follows the embedding that it is tied to; an embedding does not follow its head.
            leads = self.embedding in (None, module) and (not own_sites or own_sites[0].kind == "embedding")
            followers = self.sites_tied_to(own_sites[0]) if own_sites and leads else [] if own_sites else tables[module]
            for site in followers:
                if method_by_module.get(site.module, like).indices == like.indices:
                    out[site.fqn] = replace(
                        self._attach_row_site(site, module, like, all_consumers), entry=entry if not own_sites else ""
                    )
        return list(out.values())

    def only_embedding(self) -> str | None:
        """Return the module of the program's embedding, None unless there is exactly one."""
        found = self._embedding_modules()
        return found[0] if len(found) == 1 else None

    def _embedding_modules(self) -> list[str]:
        return [s.module for s in self.sites if s.kind == "embedding"]

    def _modules_matching(self, entry: str, tables: Mapping[str, list[Site]]) -> list[str]:
        """Return the modules that ``entry`` names: those that end with it, preferably at a dot.

        As in PEFT, without a match at a dot any name that ends with the entry counts. Raises TargetError where none
        does.
        """
        found = [m for m in tables if m == entry or m.endswith(f".{entry}")]
        found = found or [m for m in tables if m.endswith(entry)]
        if not found:
            raise TargetError(
                f"trainable_token_indices: {entry!r} is no module with rows to train; "
                f"nearest: {nearest(entry, tables)}, embeddings: {self._embedding_modules()}"
            )
        return found

    def _attach_row_site(self, site: Site, key: str, method: TokenRows, all_consumers: bool) -> Attachment:
        try:
            method.slots(op_of(site.kind, self.lifted.tensor(site.fqn), self.lifted.nodes[site.consumers[0]]))
        except (TargetError, ConfigError) as error:
            raise type(error)(f"site {site.fqn!r} ({site.module_type or site.kind}): {error}") from error
        more = self._unclaimed_consumers(site) if all_consumers else []
        names, form = (*site.consumers, *more), "weight" if more else "auto"
        return Attachment(key, site.module, site.param, site.kind, method, self.adapter, form, names)

    def sites_tied_to(self, site: Site) -> list[Site]:
        """Return the sites that read the same weight under another name."""
        node = self.lifted.placeholders[site.fqn]
        return [s for s in self.sites if s.fqn != site.fqn and self.lifted.placeholders[s.fqn] is node]


def outermost_modules(modules: Sequence[str]) -> list[str]:
    """Return ``modules`` without those that lie inside another one of them."""
    return [m for m in modules if not any(m.startswith(f"{other}.") for other in modules)]
