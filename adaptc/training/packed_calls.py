"""Choose the module that takes a call: the program's own, or one of the same model captured with ``position_ids``.

The second module is made when a call first needs it. Trainers that pack sequences also pass the bounds of these
sequences, for kernels that need to be told. These keywords are dropped; where the model reads them, the call is
refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError, listing
from adaptc.runtime.dynamo_boundary import not_traced

#: keywords that say where the sequences of packed rows begin, for kernels that do not read position_ids
SEQUENCE_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class PackedCalls:
    """The modules for calls of ``module``, a ``PretrainedModule``, with ``position_ids``. ``packed_modules``: whether a
    call has an attention_mask -> the module that takes it."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.packed_modules: dict[bool, Any] = {}
        self._bounds_read: Collection[str] | None = None

    def choose_module(self, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the module for a call with ``kwargs``, and the keywords to call it with.

        The keywords lack the bounds of sequences, and ``position_ids`` of one row are expanded to the batch. Raises
        AdaptcError for bounds of sequences that the model reads.
        """
        module, kwargs, positions = self.module, dict(kwargs), kwargs.get("position_ids")
        if not isinstance(positions, Tensor) or not module.can_recapture or module.config.is_encoder_decoder:
            return module, kwargs
        if told := [n for n in SEQUENCE_BOUNDS if kwargs.pop(n, None) is not None]:
            known = self._bounds_read
            if known is None:
                known = self._bounds_read = not_traced(module.factory.find_bounds_read)(module)
            if read := [n for n in told if n in known]:
                raise AdaptcError(
                    f"{listing(map(repr, read))} cannot be given: the model computes something else with it than "
                    "without, and is captured without. Train without packing and padding_free"
                )
        if "position_ids" in module.inputs.names:
            return module, kwargs
        ids = kwargs.get("input_ids")
        if isinstance(ids, Tensor) and positions.ndim == ids.ndim and len(positions) == 1 < len(ids):
            kwargs["position_ids"] = positions.expand(len(ids), -1)
        masked = kwargs.get("attention_mask") is not None
        if masked not in self.packed_modules:
            self.packed_modules[masked] = not_traced(module.factory.make_packed_module)(module, masked)
        found = self.packed_modules[masked]
        if found.checkpoint_every != module.checkpoint_every:
            found.keep_activations() if module.checkpoint_every is None else found.checkpoint(module.checkpoint_every)
        if found.is_dropout_on != module.is_dropout_on:
            found.set_dropout(module.is_dropout_on)
        if found.training != module.training:
            found.train(module.training)
        return found, kwargs
