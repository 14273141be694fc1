"""Keep a module's state dict in PEFT's keys: what torch's functions write, load and miss.

Private torch use, with the public route that was tried: ``_fqn_modifiers``. ``torch.distributed.checkpoint`` asks it
for the attributes that a state's keys stand for. There is no public name for it. Without it, ``get_model_state_dict``
fails on keys that are not attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adaptc.adapter_files.format import bare_key, file_key
from adaptc.binding.bind import file_tensors
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding
from adaptc.errors import CheckpointError, did_you_mean
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.state.core import ProgramCore
from adaptc.training.sharded_tensors import gather, shard_like


class AnyKey:
    """An object that is its own attribute under every name without a leading underscore, for code that only tests
    whether a key exists."""

    def __getattr__(self, name: str) -> AnyKey:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class AdapterStateDict(nn.Module):
    """A module of a program, as far as its tensors are written and loaded. ``program``: a snapshot of ``owner``."""

    program: ProgramCore
    owner: ProgramCore
    _includes_base = False

    def _register_state_hooks(self) -> None:
        """Let torch's functions write and load PEFT's keys; called once, when the module is made."""
        self.register_state_dict_post_hook(keep_only_adapter)
        self.register_load_state_dict_pre_hook(adapter_keys_to_slots)
        self.register_load_state_dict_post_hook(ignore_missing_base)

    def binding(self) -> Binding:
        """Return the program's binding, with the tensors that the module has now. Raises AdaptcError for a program
        without an adapter.

        The owner's binding is taken while it has the same tensors. It may know more: AdaLoRA's ranks, which training
        cuts.
        """
        own, binding, now = self.tensors(), self.program.binding, self.owner.current
        if now is not None and all(now.values.get(k) is t for k, t in binding.values.items()):
            binding = now
        return replace(binding, values={k: own.get(k, t) for k, t in binding.values.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by FQN, tied ones under each of their names."""
        parameters = self.named_parameters(remove_duplicate=False)
        return dict(parameters) | dict(self.named_buffers(remove_duplicate=False))

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the adapter's current tensors in the keys of PEFT's files; empty without an adapter. Several adapters
        that act together have their slots by FQN instead."""
        program = self.program
        if program.current is None:
            return {}
        binding = self.binding()
        if binding.joint_adapters:
            return {k: t.detach() for k, t in binding.values.items()}
        return {file_key(k, binding.config.peft_type): t for k, t in file_tensors(program.spec(), binding).items()}

    def state_dict(self, *args: Any, base: bool = False, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the adapter's tensors in PEFT's keys; the arguments are torch's. With ``base``, and for a program
        without an adapter, return all tensors by FQN."""
        self._includes_base = base or self.program.current is None
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self._includes_base = False

    @property
    def includes_base(self) -> bool:
        """Return whether the state dict that is being made includes the base."""
        return self._includes_base

    def _fqn_modifiers(self) -> dict[str, str]:
        """Return a map from the first part of a key to the attribute under which torch looks for the rest."""
        return {"base_model": "adapter_keys"}

    @property
    def adapter_keys(self) -> AnyKey:
        """Return an object that has all of PEFT's keys as attributes."""
        return AnyKey()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of the adapter or of all tensors, as torch's method does. Raises CheckpointError or
        SwapError for one that does not fit, and then loads nothing."""
        tensors, current = self.tensors(), self.program.current
        kind = "" if current is None else current.config.peft_type
        if (
            strict
            and current is not None
            and not any(bare_key(k, kind) is not None for k in state_dict.keys() - tensors)
        ):
            missing = [k for k in self.state_dict(base=True) if k in current.values and k not in state_dict]
            if missing:
                raise CheckpointError(
                    f"state dict: {missing[0]!r} is missing, and the keys of the adapter as PEFT has them are, too"
                )
        for key, value in state_dict.items():
            if key not in tensors and strict and (current is None or bare_key(key, kind) is None):
                near = did_you_mean(key, [*tensors, *self.adapter_state()])
                raise CheckpointError(
                    f"state dict: {key!r} is no tensor of the module{near}; drop it, or load with strict=False"
                )
            if isinstance(value, Tensor) and key in tensors and value.shape != tensors[key].shape:
                raise CheckpointError(
                    f"state dict: {key!r} has shape {tuple(value.shape)}, and the module has it as "
                    f"{tuple(tensors[key].shape)}: the state is of another model, or of an adapter of another rank"
                )
        quantized = {k: t for k, t in tensors.items() if isinstance(t, QuantizedTensor) and k in state_dict}
        if quantized and not assign:
            state_dict = {**state_dict, **{k: _keep_quantized(k, state_dict[k], t) for k, t in quantized.items()}}
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise CheckpointError(f"the module does not take this state dict: {error}") from error


def _keep_quantized(key: str, value: Any, own: QuantizedTensor) -> Tensor:
    """Return the module's ``own`` weight in the place of an equal ``value``.

    Raises CheckpointError for another value, since a quantised weight is frozen.
    """
    if own.has_same_values(value):
        return own.detach()
    found = f"stored as {value.scheme}" if isinstance(value, QuantizedTensor) else f"{value.dtype} and not quantised"
    raise CheckpointError(
        f"state dict: {key!r} is {found}, with other values than those of the module, which is stored as {own.scheme} "
        "and frozen. Load the adapter alone, which state_dict() gives, or compile the model of this state"
    )


def keep_only_adapter(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave in ``state`` the adapter alone, under PEFT's keys, unless the base was asked for."""
    if module.includes_base:
        return
    for name in module.tensors():
        state.pop(prefix + name, None)
    state.update({prefix + key: t for key, t in module.adapter_state().items()})


def adapter_keys_to_slots(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace tensors in ``state`` that are under PEFT's keys by the slots that they stand for. Raises as
    ``adaptc.swap`` does."""
    program = module.program
    if program.current is None or program.binding.joint_adapters:
        return
    module_tensors, kind = module.tensors(), program.binding.config.peft_type
    theirs = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    adapter = {k: t for k, t in theirs.items() if k not in module_tensors and bare_key(k, kind) is not None}
    if not adapter:
        return
    values = bind_adapter(program, {k: gather(t) for k, t in adapter.items()}, copy_tensors=False).values
    for fqn, t in values.items():
        if t.shape != module_tensors[fqn].shape:
            raise CheckpointError(
                f"state dict: {fqn!r} would have shape {tuple(t.shape)}, and the module has it as "
                f"{tuple(module_tensors[fqn].shape)}: an adapter of another rank is for prog.swap(), and a module made "
                "after it"
            )
    for key in adapter:
        del state[prefix + key]
    state.update({prefix + fqn: shard_like(t, module_tensors[fqn]) for fqn, t in values.items()})


def ignore_missing_base(module: Any, load_result: Any) -> None:
    """Take base tensors out of the missing keys of a load, where there is an adapter: a state dict need not hold the
    base."""
    current = module.program.current
    if current is None:
        return
    slots = set(current.values)
    base = module.tensors().keys() - slots
    missing: list[str] = load_result.missing_keys
    missing[:] = [k for k in missing if not _is_suffix_in(k, base) or _is_suffix_in(k, slots)]


def _is_suffix_in(key: str, names: Any) -> bool:
    """Return whether ``key``, or what is left of it without a prefix, is one of ``names``."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))
