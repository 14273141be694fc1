"""Adapt layers that share the weight of the input embedding as one (``ensure_weight_tying``).

Of the tied modules that a config selects, only the embedding is adapted. The others follow it: they read its slots, and
files repeat the slots under each name, as PEFT's do.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.errors import AdaptcWarning, ConfigError, TargetError
from adaptc.methods import TargetedConfig
from adaptc.passes.analysis.sites import Site
from adaptc.targets.whole_and_rows import ParameterPlanner


@dataclass(frozen=True)
class TiedLayers:
    """The input embedding and the sites that are tied to it.

    ``embedding_module``: the module of the embedding, '' where nothing is to be tied. ``followers``: the sites that
    read its weight under another name.
    """

    embedding_module: str = ""
    followers: tuple[Site, ...] = ()

    @classmethod
    def find(cls, config: TargetedConfig, planner: ParameterPlanner) -> TiedLayers:
        """Return the ties for ``config``: none without ``ensure_weight_tying`` or without tied layers.

        Raises TargetError where the embedding is not known, or is tied to anything but a linear layer.
        """
        if not config.ensure_weight_tying:
            return cls()
        embedding_module = planner.embedding or planner.only_embedding()
        site = next((s for s in planner.sites if s.module == embedding_module and s.param == "weight"), None)
        if embedding_module is None or site is None or site.kind != "embedding":
            raise TargetError(
                f"ensure_weight_tying=True: the program has no one input embedding (found {embedding_module!r}); set "
                "it to False"
            )
        followers = tuple(planner.sites_tied_to(site))
        if not followers:
            warnings.warn(
                f"ensure_weight_tying=True has no effect: nothing is tied to the input embedding {embedding_module!r}",
                AdaptcWarning,
                stacklevel=2,
            )
            return cls()
        for f in followers:
            if f.kind != "linear":
                raise TargetError(
                    f"ensure_weight_tying=True: {f.fqn!r} is tied to {embedding_module!r} and is no linear layer "
                    f"({f.kind}), which alone can follow an embedding; set it to False"
                )
        return cls(embedding_module, followers)

    def replace_by_embedding(self, names: Sequence[str]) -> tuple[list[str], bool]:
        """Return ``names`` with all tied modules replaced by the embedding, and whether there were any."""
        tied = {self.embedding_module, *(f.module for f in self.followers)} if self.embedding_module else set()
        if tied.isdisjoint(names):
            return list(names), False
        return [self.embedding_module, *(n for n in names if n not in tied)], True

    def add_followers(self, entries: Any) -> Any:
        """Return a list of target entries with the followers added, so that PEFT ties them, too.

        ``entries`` of another type are returned as they are.
        """
        if not isinstance(entries, (list, set)):
            return entries
        return [*entries, *(f.module for f in self.followers if f.module.rpartition(".")[2] not in entries)]

    def check_used(self, is_used: bool) -> None:
        if self.embedding_module and not is_used:
            tied = [self.embedding_module, *(f.module for f in self.followers)]
            warnings.warn(
                f"ensure_weight_tying=True has no effect: the config trains none of {tied}", AdaptcWarning, stacklevel=2
            )

    def check_tokens(self, tokens: Mapping[str, Collection[int]]) -> None:
        """Raise ConfigError where ``tokens`` (module -> token indices) has different rows for tied modules."""
        tied = {self.embedding_module, *(f.module for f in self.followers)} if self.embedding_module else set()
        found = {e: list(rows) for e, rows in tokens.items() if any(m == e or m.endswith(f".{e}") for m in tied)}
        if len({tuple(rows) for rows in found.values()}) > 1:
            raise ConfigError(
                f"ensure_weight_tying=True, and trainable_token_indices has other rows for tied layers: {found}"
            )
