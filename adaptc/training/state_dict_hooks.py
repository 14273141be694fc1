"""Keep a module's state dict in PEFT's keys: what torch's functions write, load and miss."""

from __future__ import annotations

from typing import Any

from adaptc.adapter_files.format import bare_key
from adaptc.binding.sources.source import bind_adapter
from adaptc.errors import CheckpointError
from adaptc.training.sharded_tensors import as_held, whole


class AnyKey:
    """An object that is its own attribute under every name without a leading underscore, for code that only tests
    whether a key exists."""

    def __getattr__(self, name: str) -> AnyKey:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def keep_adapter(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave in ``state`` the adapter alone, under PEFT's keys, unless the base was asked for."""
    if module.whole:
        return
    for name in module.tensors():
        state.pop(prefix + name, None)
    state.update({prefix + key: t for key, t in module.adapter_state().items()})


def take_adapter(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace tensors in ``state`` that are under PEFT's keys by the slots that they stand for. Raises as
    ``adaptc.swap`` does."""
    program = module.program
    if program.current is None or program.binding.parts:
        return
    own, kind = module.tensors(), program.binding.config.peft_type
    theirs = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    adapter = {k: t for k, t in theirs.items() if k not in own and bare_key(k, kind) is not None}
    if not adapter:
        return
    values = bind_adapter(program, {k: whole(t) for k, t in adapter.items()}, own=False).values
    for fqn, t in values.items():
        if t.shape != own[fqn].shape:
            raise CheckpointError(
                f"state dict: {fqn!r} would have shape {tuple(t.shape)}, and the module has it as "
                f"{tuple(own[fqn].shape)}: an adapter of another rank is for prog.swap(), and a module made after it"
            )
    for key in adapter:
        del state[prefix + key]
    state.update({prefix + fqn: as_held(t, own[fqn]) for fqn, t in values.items()})


def miss_no_base(module: Any, found: Any) -> None:
    """Take base tensors out of the missing keys of a load, where there is an adapter: a state dict need not hold the
    base."""
    current = module.program.current
    if current is None:
        return
    slots = set(current.values)
    base = module.tensors().keys() - slots
    missing: list[str] = found.missing_keys
    missing[:] = [k for k in missing if not _one_of(k, base) or _one_of(k, slots)]


def _one_of(key: str, names: Any) -> bool:
    """Return whether ``key``, or what is left of it without a prefix, is one of ``names``."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))
