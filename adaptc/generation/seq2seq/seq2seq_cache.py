"""Keep the decoder's own positions and the cross-attention's keys and values of an encoder-decoder.

A new cache holds nothing but an adapter's virtual tokens for the decoder. :meth:`CrossCache.attach_encoder_states`
gives it the encoder's states, their mask, and their keys and values. All rows change together: beams that are
reordered, repeated or selected take their states along. The cache reports the number of decoded tokens as its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Self

from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.generation.cache.step_cache import StepCache


def check_equal_rows(encoded: int, decoded: int) -> None:
    """Raise AdaptcError where the encoder and the decoder have different numbers of rows."""
    if encoded != decoded:
        raise AdaptcError(f"{encoded} rows were encoded, and decoder_input_ids has {decoded}: give as many")


class CrossCache(StepCache):
    """A cache for an encoder-decoder, with the encoder's states beside the decoder's keys and values.

    ``states`` is (rows, positions, hidden) and ``states_mask`` (rows, positions). ``cross`` has the keys and values of
    the states, layer by layer. Without states they are None, None and empty.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.states: Tensor | None = None
        self.states_mask: Tensor | None = None
        self.cross_tensors: Sequence[Tensor] = ()

    @property
    def decoded_length(self) -> int:
        """Return the number of decoded tokens."""
        return self.length - self.prefix_length

    def attach_encoder_states(self, states: Tensor, mask: Tensor, cross: Sequence[Tensor]) -> None:
        """Set the encoder's ``states``, their ``mask``, and their keys and values ``cross``, which all decoded tokens
        attend to."""
        self._set_attributes(rows=states.shape[0], states=states, states_mask=mask, cross_tensors=tuple(cross))

    def write_mask(self, mask: Tensor | None, tokens: int) -> None:
        """Write the mask of the next ``tokens`` positions; ``mask`` (rows, positions) leaves out virtual tokens."""
        if mask is None:
            super().write_mask(None, tokens)
        else:
            self.mask[:, self.prefix_length : self.length + tokens] = mask

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(t.nbytes for t in self.cross_tensors)

    def copy(self) -> Self:
        """Return a cache with its own memory, to continue from these positions in another way.

        The encoder's states are shared, because nothing writes to them.
        """
        new = super().copy()
        new.states, new.states_mask, new.cross_tensors = self.states, self.states_mask, self.cross_tensors
        return new

    def _empty_attributes(self) -> dict[str, Any]:
        gone = {"rows": 0, "states": None, "states_mask": None, "cross_tensors": ()}
        return {**gone, "tensors": [], "mask": self.mask.new_ones(0, 0)}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.decoded_length

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove + self.prefix_length if tokens_to_remove > 0 else tokens_to_remove)

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        seen = {"states": self.states, "states_mask": self.states_mask}
        made = {name: None if t is None else change(t) for name, t in seen.items()}
        return {**super()._map_rows(change), **made, "cross_tensors": tuple(change(t) for t in self.cross_tensors)}

    def check_rows(self, rows: int) -> None:
        if self.rows:
            check_equal_rows(self.rows, rows)

    def prepend_prefix_mask(self, mask: Tensor) -> Tensor:
        """Return ``mask`` as it is: masks of the decoder's tokens leave out virtual tokens (see :meth:`write_mask`)."""
        return mask

    # -- as transformers' own whisper reads one ------------------------------------------------------------------------

    @property
    def self_attention_cache(self) -> Any:
        return _as_layers([t[:, :, : self.length] for t in self.tensors])

    @property
    def cross_attention_cache(self) -> Any:
        return _as_layers(self.cross_tensors)

    def __repr__(self) -> str:
        of = 0 if self.states is None else self.states.shape[1]
        return f"CrossCache({self.rows} rows of {of} states, {self.length} positions of {self.max_length})"


def _as_layers(tensors: Sequence[Tensor]) -> Any:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=values) for keys, values in pairs])
