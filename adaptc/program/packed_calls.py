"""Which module takes a call: that of the program, or one of the same model captured with ``position_ids`` as well.

Before: the keywords of a call. After: a module that takes them, made when it is first needed. Of what trainers say to
kernels that have to be told where sequences begin nothing is left; where the model reads it, the call is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from adaptc.errors import AdaptcError, listing
from adaptc.runtime.outside_compilers import outside

#: where the sequences of packed rows begin, for kernels that do not find it in their positions
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class PackedCalls:
    """Those of ``module``, a ``PretrainedModule``. ``modules``: whether there is a mask -> the one that takes it."""

    #: of a module and whether there is a mask: the module that takes ``position_ids``; see ``packing``
    packing: ClassVar[Callable[[Any, bool], Any]]
    #: of a module: which of :data:`BOUNDS` its model reads
    reading: ClassVar[Callable[[Any], Collection[str]]]

    def __init__(self, module: Any) -> None:
        self.module = module
        self.modules: dict[bool, Any] = {}
        self._read: Collection[str] | None = None

    def taking(self, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The module for a call with these keywords, and what it is called with. Raises AdaptcError for bounds of
        sequences that the model reads."""
        module, kwargs, positions = self.module, dict(kwargs), kwargs.get("position_ids")
        if not isinstance(positions, Tensor) or not module.again or module.config.is_encoder_decoder:
            return module, kwargs
        if told := [n for n in BOUNDS if kwargs.pop(n, None) is not None]:
            known = self._read
            if known is None:
                known = self._read = outside(type(self).reading)(module)
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
        if masked not in self.modules:
            self.modules[masked] = outside(type(self).packing)(module, masked)
        found = self.modules[masked]
        if found.checkpointed != module.checkpointed:
            found.keep_activations() if module.checkpointed is None else found.checkpoint(module.checkpointed)
        if found.drops != module.drops:
            found.set_dropout(module.drops)
        if found.training != module.training:
            found.train(module.training)
        return found, kwargs
