"""What is trained as it is: whole modules, biases, and single rows of tables.

Before: names that the rules have selected. After: attachments of ``Whole`` and ``TokenRows``, with the keys PEFT's
files have for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaptc.errors import ConfigError, TargetError, nearest
from adaptc.methods import TokenRows, Whole
from adaptc.passes.analysis.sites import Site, consumers
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.ops import op_of


@dataclass(frozen=True)
class Trained:
    """The sites of an opened program, as modules, biases and rows. ``embedding``: path of the input embedding."""

    lifted: Lifted
    sites: Sequence[Site]
    buffers: Sequence[Site]
    embedding: str | None
    adapter: str

    # -- whole modules and biases ----------------------------------------------------------------------------------

    def modules(self, names: Iterable[str]) -> dict[str, list[Site]]:
        """Those of ``names`` that hold anything the program reads -> the sites inside."""
        inside: dict[str, list[Site]] = {}
        for site in (*self.sites, *self.buffers):
            path = site.module
            while path:
                inside.setdefault(path, []).append(site)
                path = path.rpartition(".")[0]
        return {n: inside[n] for n in names if n in inside}

    def whole(self, module: str, like: Whole) -> list[Attachment]:
        """All of ``module``; the slots of ``like`` begin as its own does, and go on with the path inside the module."""
        inside = [s for s in (*self.sites, *self.buffers) if f"{s.module}.".startswith(f"{module}.")]
        if not inside:
            raise TargetError(f"modules_to_save: {module!r} holds no parameter that the program reads")
        return [self._whole(s, module, s.fqn.removeprefix(f"{module}."), like) for s in inside]

    def follower(self, site: Site, home: str) -> Attachment:
        """The weight of a site that is the one of ``home``, which is trained whole."""
        a = self._whole(site, site.module, site.param, Whole("").following(home))
        return replace(a, consumers=site.consumers)  # the other readers are those of the leader

    def unread(self, whole: Iterable[tuple[str, Whole]], read: Collection[str]) -> dict[str, str]:
        """Key in files -> FQN of all else that these modules hold, of which ``read`` are taken care of."""
        out: dict[str, str] = {}
        for module, like in whole:
            inside = [f for f in self.lifted.state_dict if f.startswith(f"{module}.") and f not in read]
            out |= {f"{module}.{like.at_path(f.removeprefix(f'{module}.'))}": f for f in inside}
        return out

    def biases(self, wanted: str, taken: Collection[str], main: Sequence[Attachment]) -> list[Attachment]:
        """``wanted``: "none", "all", or those of the modules of ``main``. ``taken``: ids that are trained already."""
        if wanted == "none":
            return []
        keys = {a.module: f"{a.key}.base_layer" for a in main}
        sites = [s for s in self.sites if s.param == "bias" and (wanted == "all" or s.module in keys)]
        found = [self._whole(s, keys.get(s.module, s.module), "bias", Whole("", place="trained_bias")) for s in sites]
        return [a for a in found if a.id not in taken]

    def _whole(self, site: Site, key: str, inside: str, like: Whole) -> Attachment:
        method = replace(
            like,
            slot=like.at_path(inside),
            shape=site.shape,
            dtype=self.lifted.tensor(site.fqn).dtype,
            trainable=site not in self.buffers,
        )
        names = (*site.consumers, *self._unclaimed(site))
        return Attachment(key, site.module, site.param, "weight", method, self.adapter, "weight", names)

    def _unclaimed(self, site: Site) -> list[str]:
        """Consumers in no site of their own: a parent that reads the weight sees what the module trains."""
        node = self.lifted.placeholders[site.fqn]
        same = [s for s in (*self.sites, *self.buffers) if self.lifted.placeholders[s.fqn] is node]
        claimed = {c for s in same for c in s.consumers}
        return [n.name for n, _ in consumers(node) if n.name not in claimed]

    # -- rows --------------------------------------------------------------------------------------------------------

    def tables(self) -> dict[str, list[Site]]:
        """Modules with a weight of two axes -> the sites that read it. A module that only lends its weight to others,
        as T5's ``shared`` does, has theirs."""
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

    def tokens(self, tokens: Any) -> list[Attachment]:
        """The rows that ``trainable_token_indices`` names: of the input embedding, or by module."""
        if not tokens:
            return []
        tables = self.tables()
        if not isinstance(tokens, Mapping):
            name = self.embedding or self.only_embedding()
            if name is None:
                raise TargetError(
                    f"trainable_token_indices: say for which embedding, as a dict; it may be {self._embeddings()}"
                )
            tokens = {name: tokens}
        chosen = [(m, e, TokenRows(tuple(tokens[e]))) for e in tokens for m in self._named(e, tables)]
        return self.rows(chosen, seen=True)

    def rows(self, chosen: Sequence[tuple[str, str, TokenRows]], *, seen: bool = False) -> list[Attachment]:
        """Rows of modules (their path, the entry that named them, the method); whoever is tied to the input embedding
        follows it, unless other rows of it are trained. ``seen``: so does whoever reads the weight itself, which PEFT's
        wrapper for ``trainable_token_indices`` shows changed, and its layer of the method on its own does not."""
        tables, own = self.tables(), {m: like for m, _, like in chosen}
        out: dict[str, Attachment] = {}
        for module, entry, like in chosen:
            mine = [s for s in tables[module] if s.module == module]
            for site in mine:
                if site.fqn not in out:
                    out[site.fqn] = replace(self._rows(site, module, like, seen), entry=entry)
            # A head follows the embedding it is tied to, and not the other way round.
            leads = self.embedding in (None, module) and (not mine or mine[0].kind == "embedding")
            followers = self.tied_to(mine[0]) if mine and leads else [] if mine else tables[module]
            for site in followers:
                if own.get(site.module, like).indices == like.indices:
                    out[site.fqn] = replace(self._rows(site, module, like, seen), entry=entry if not mine else "")
        return list(out.values())

    def only_embedding(self) -> str | None:
        """The one embedding there is, if there is one."""
        found = self._embeddings()
        return found[0] if len(found) == 1 else None

    def _embeddings(self) -> list[str]:
        return [s.module for s in self.sites if s.kind == "embedding"]

    def _named(self, entry: str, tables: Mapping[str, list[Site]]) -> list[str]:
        """Like PEFT any name that ends with the entry; whole dotted parts are preferred."""
        found = [m for m in tables if m == entry or m.endswith(f".{entry}")]
        found = found or [m for m in tables if m.endswith(entry)]
        if not found:
            raise TargetError(
                f"trainable_token_indices: {entry!r} is no module with rows to train; "
                f"nearest: {nearest(entry, tables)}, embeddings: {self._embeddings()}"
            )
        return found

    def _rows(self, site: Site, key: str, method: TokenRows, seen: bool) -> Attachment:
        try:
            method.slots(op_of(site.kind, self.lifted.tensor(site.fqn), self.lifted.nodes[site.consumers[0]]))
        except (TargetError, ConfigError) as error:
            raise type(error)(f"site {site.fqn!r} ({site.module_type or site.kind}): {error}") from error
        more = self._unclaimed(site) if seen else []
        names, form = (*site.consumers, *more), "weight" if more else "auto"
        return Attachment(key, site.module, site.param, site.kind, method, self.adapter, form, names)

    def tied_to(self, site: Site) -> list[Site]:
        """The sites that read the same weight under another name."""
        node = self.lifted.placeholders[site.fqn]
        return [s for s in self.sites if s.fqn != site.fqn and self.lifted.placeholders[s.fqn] is node]


def outermost(modules: Sequence[str]) -> list[str]:
    """Without the modules inside another one of them: that one holds them already."""
    return [m for m in modules if not any(m.startswith(f"{other}.") for other in modules)]
