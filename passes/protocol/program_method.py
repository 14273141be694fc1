"""Methods that change the program and not one weight: its tokens, its attention_mask, its labels.

Such a method is attached to the site where the program looks its tokens up. Its slots are bound, saved and swapped as
all slots are. It does not define a function on the weight, but one function per *program value*, which graph
analysis finds and names (``passes.analysis.tokens.token_inputs``). A method has a function for each program value that
it changes, with the value's name:

    tokens(value, slots, given, plain) -> value'      token ids (batch, length), for all their readers; ``plain`` is
                                                      an id with no special meaning in the program (no padding)
    attention_mask(value, slots, given) -> value'     (batch, length), one where a token counts
    position_ids(value, slots, given) -> value'       (batch, length), or (1, length)
    token_type_ids(value, slots, given) -> value'     (batch, length)
    labels(value, slots, given) -> value'             a label per token (batch, length)
    inputs_embeds(value, slots, given) -> value'      token embeddings (batch, length as of tokens(), width)
    loss(value, slots, given, logits, labels)         the loss; optional, for programs that give logits and take labels
    past_key_values(slots, given)                     KV prefix of all attentions, keys and values in turn:
                                                      (2 * attentions, heads, virtual tokens, head width)
    prompt(slots, given)                              embeddings of virtual tokens: (count, width), or
                                                      (batch, count, width) where rows of a batch differ

In a program with an encoder and a decoder these are the encoder's values. A method whose
:meth:`~ProgramMethod.has_decoder_tokens` is True also puts virtual tokens in front of the decoder's tokens
(``passes.analysis.tokens.decoder_inputs``). It has functions for the decoder's values:

    decoder_tokens, decoder_attention_mask, decoder_labels, decoder_inputs_embeds: called as tokens() and so on
    decoder_shifted(value, slots, given) -> value'    token ids (batch, length as of decoder_labels()) that the program
                                                      makes by shifting the labels behind a first token

A method with ``past_key_values`` has no ``labels``, ``inputs_embeds`` or ``loss``. The tokens of a call stay the
program's own. Only what the attentions compute sees a longer attention_mask, position_ids and token_type_ids
(``passes.virtual_tokens.insert_kv_prefix``).

If the caller gives the program its cache, ``past_key_values`` or ``prompt`` gives the beginning of that cache. No
program value is changed then (``passes.virtual_tokens.insert_cache_prefix``). So ``prompt`` must give all that
``inputs_embeds`` changes.

All functions are pure and plain PyTorch. They are traced for all sizes at once. A size read from a slot's free axis, as
in ``slots["prompt"].shape[0]``, is read in every call, so that swaps change it. ``given`` holds the inputs that the
method adds to the program, by name (:meth:`~adaptc.passes.protocol.parts.extra_inputs.ExtraInputs.extras`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.coefficients import ExtraValues
from adaptc.passes.protocol.method import InitialValues, Method
from adaptc.passes.protocol.parts.method_part import Slots
from adaptc.passes.protocol.parts.size_rule import SizeRule

#: the form of a program method's attachments, which stand neither around a layer nor in front of a weight
PROGRAM_FORM = "program"
#: all program values, in the order in which they are changed
PROGRAM_VALUES = (
    "tokens",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "labels",
    "inputs_embeds",
    "loss",
    "past_key_values",
)
#: the program values of a decoder in a program that also has an encoder
DECODER_VALUES = (
    "decoder_tokens",
    "decoder_attention_mask",
    "decoder_labels",
    "decoder_shifted",
    "decoder_inputs_embeds",
)
#: the decoder's program values that are inputs of the same length as its tokens
DECODER_TOKEN_VALUES = ("decoder_tokens", "decoder_labels")
#: the kind of the region that computes the beginning of a cache
CACHE_PREFIX = "begins"
#: the functions that give the beginning of a cache
PREFIX_FUNCTIONS = ("past_key_values", "prompt")
#: program value -> its name in the tags of nodes, which saved programs hold, where the two differ
_REGION_KINDS = {
    "attention_mask": "attended",
    "position_ids": "positions",
    "token_type_ids": "segments",
    "inputs_embeds": "embedded",
    "decoder_attention_mask": "decoder_attended",
    "decoder_inputs_embeds": "decoder_embedded",
}
#: the name of the size that an adapter may choose: its number of virtual tokens
TOKEN_COUNT_SIZE = "free"


@dataclass(frozen=True)
class ProgramValue:
    """A value of a program that a method changes.

    ``node`` has the value, and ``readers`` are the nodes that will read the changed one. ``constants`` are further
    constant arguments of the value's function. ``read_nodes`` are nodes whose values the function gets after ``given``.
    """

    name: str
    node: fx.Node
    readers: tuple[fx.Node, ...]
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    read_nodes: tuple[fx.Node, ...] = ()

    @property
    def region_kind(self) -> str:
        """Return what the tags of its region's nodes call the value."""
        return _REGION_KINDS.get(self.name, self.name)


@dataclass(frozen=True)
class ProgramMethod(Method):
    """A method that changes values of the program; the module docstring lists its functions.

    ``op`` in the hooks is that of the token embedding, with the width ``op.out_features``.

    Arguments of the functions:
        - `value`: the value to change.
        - `slots`: name -> tensor of the adapter.
        - `given`: the inputs that the method adds to the program, by name.
        - `plain`: a token id with no special meaning in the program (no padding).
        - `logits`: the logits of the program.
        - `labels`: the labels of the call.

    Example:
        >>> class Louder(adaptc.methods.ProgramMethod):
        ...     name = "louder"
        ...     def inputs_embeds(self, value, slots, given):
        ...         return value * slots["gain"]
        >>> Louder().inputs_embeds(torch.ones(2, 3, 4), {"gain": torch.tensor(2.0)}, {}).sum()
        tensor(48.)
    """

    sizes = SizeRule(exact=True)

    def virtual_token_count(self, slots: Slots) -> int:
        """Return how many virtual tokens these slots put in front of a call's tokens."""
        return 0

    def tokens(self, value: Tensor, slots: Slots, given: ExtraValues, plain: int) -> Tensor:
        """Return the token ids (batch, length) for all their readers."""
        raise AssertionError(f"{type(self).__name__} has no tokens()")

    def attention_mask(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        """Return the attention_mask (batch, length), one where a token counts."""
        raise AssertionError(f"{type(self).__name__} has no attention_mask()")

    def position_ids(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        """Return the position_ids (batch, length), or (1, length)."""
        raise AssertionError(f"{type(self).__name__} has no position_ids()")

    def token_type_ids(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        """Return the token_type_ids (batch, length)."""
        raise AssertionError(f"{type(self).__name__} has no token_type_ids()")

    def labels(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        """Return a label per token (batch, length)."""
        raise AssertionError(f"{type(self).__name__} has no labels()")

    def inputs_embeds(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        """Return the token embeddings (batch, length, width), as long as what :meth:`tokens` returns."""
        raise AssertionError(f"{type(self).__name__} has no inputs_embeds()")

    def past_key_values(self, slots: Slots, given: ExtraValues) -> Tensor:
        """Return the KV prefix of all attentions, keys and values in turn.

        Its shape is (2 * attentions, heads, virtual tokens, head width).
        """
        raise AssertionError(f"{type(self).__name__} has no past_key_values()")

    def prompt(self, slots: Slots, given: ExtraValues) -> Tensor:
        """Return the embeddings of virtual tokens, (count, width).

        Their shape is (batch, count, width) where rows of a batch differ.
        """
        raise AssertionError(f"{type(self).__name__} has no prompt()")

    def has_decoder_tokens(self) -> bool:
        """Return whether the method also puts virtual tokens in front of a decoder's tokens.

        It then has functions for the decoder's program values.
        """
        return False

    def opening(self) -> str:
        """Return which of its functions gives the beginning of a cache: one of :data:`PREFIX_FUNCTIONS`, or '' for
        none."""
        return next((name for name in PREFIX_FUNCTIONS if self.changes(name)), "")

    def free_size(self, slot: str) -> str:
        """Return the name of the size along a slot's free axes; sizes with one name are equal in all slots."""
        return TOKEN_COUNT_SIZE

    def loss(self, value: Tensor, slots: Slots, given: ExtraValues, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, for programs that give logits and take labels."""
        raise AssertionError(f"{type(self).__name__} has no loss()")

    def changes(self, value_name: str) -> bool:
        """Return whether the method has a function for a program value."""
        return getattr(type(self), value_name) is not getattr(ProgramMethod, value_name)

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        raise AssertionError(f"{type(self).__name__} must define init()")

    def check_merge(self, op: Op) -> str | None:
        return f"{self.name} changes what the program reads, which no weight can hold"
