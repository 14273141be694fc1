"""Methods that speak of the program and not of one weight: its tokens, its mask, its labels.

Such a method is attached to a site as all are, the one where the program looks its tokens up, and its slots are bound,
saved and swapped as all slots are. What it means is said place by place instead of on the weight. A *place* is a value
of the program that graph analysis finds and names (``passes.analysis.token_places``), and the method has a function for
each one it changes, called as the place is:

    tokens(value, slots, given, plain) -> value'      token ids (batch, length), for whatever reads them; ``plain`` is
                                                      an id that means nothing special to the program (no padding)
    attended(value, slots, given) -> value'    attention mask (batch, length), one where a token counts
    positions(value, slots, given) -> value'   position ids (batch, length), or (1, length)
    segments(value, slots, given) -> value'    token types (batch, length)
    labels(value, slots, given) -> value'      a label per token (batch, length)
    embedded(value, slots, given) -> value'    token embeddings (batch, length as of tokens(), width)
    loss(value, slots, given, logits, labels)  the loss; optional, of programs that give logits and take labels
    cached(slots, given)                       keys and values of tokens that come before those of a call, for each
                                               attention: (2 * attentions, heads, count, width of a head), in turn
    prompt(slots, given)                       embeddings of tokens that come before those of a call: (count, width), or
                                               (batch, count, width) where rows of a batch differ

In a program with an encoder and a decoder these are the encoder's. A method that :meth:`~ProgramMethod.decodes` puts
tokens in front of the decoder's, too (``passes.analysis.decoder_places``), and has functions for its places:

    decoder_tokens, decoder_attended, decoder_labels, decoder_embedded: called as tokens() and so on
    decoder_shifted(value, slots, given) -> value'    token ids (batch, length as of decoder_labels()) that the program
                                                      makes of labels: these moved one on, behind a first token

A method that has ``cached`` has none of labels, embedded and loss: the tokens of a call stay those of the program, and
mask, positions and segments are longer for what is computed beside them only (``passes.adapt.change_attention``).

In a program that takes its cache from its caller, ``cached`` or ``prompt`` says what that begins with, and no place is
changed (``passes.adapt.begin_cache``). So ``prompt`` must be all that ``embedded`` changes.

All are pure and plain PyTorch. They are traced for all sizes at once: a size read off a slot's free axis, as in
``slots["prompt"].shape[0]``, is read in every call, so that swaps change it. ``given`` has the inputs that the method
adds to the program, by name (:meth:`~adaptc.passes.ir.method_hooks.Hooks.extras`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.ir.coefficients import Given
from adaptc.passes.ir.method import Initial, Method
from adaptc.passes.ir.method_hooks import Slots
from adaptc.passes.ir.ops import Op

#: the form of its attachments, which stand neither around a layer nor in front of a weight
PROGRAM = "program"
#: the places there are, in the order in which they are changed
PLACES = ("tokens", "attended", "positions", "segments", "labels", "embedded", "loss", "cached")
#: those of a decoder beside an encoder
DECODER_PLACES = ("decoder_tokens", "decoder_attended", "decoder_labels", "decoder_shifted", "decoder_embedded")
#: of these the ones that are inputs as long as its tokens
DECODER_LENGTHS = ("decoder_tokens", "decoder_labels")
#: the region of what a cache begins with
BEGINS = "begins"
#: functions that say what a cache begins with
OPENINGS = ("cached", "prompt")
#: the name of the size that an adapter may choose
FREE = "free"


@dataclass(frozen=True)
class Place:
    """A value of a program: the place's name, the node that has it, the nodes that read it and are to read what the
    method makes of it, and further arguments of its function: constants, and nodes whose values come behind ``given``.
    """

    name: str
    node: fx.Node
    readers: tuple[fx.Node, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class ProgramMethod(Method):
    """See the module docstring. ``op`` in the hooks is that of the token embedding: width ``op.out_features``."""

    exact_sizes: ClassVar[bool] = True

    def lengthens(self, slots: Slots) -> int:
        """How many tokens it puts in front of those that a call has."""
        return 0

    def tokens(self, value: Tensor, slots: Slots, given: Given, plain: int) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no tokens()")

    def attended(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no attended()")

    def positions(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no positions()")

    def segments(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no segments()")

    def labels(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no labels()")

    def embedded(self, value: Tensor, slots: Slots, given: Given) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no embedded()")

    def cached(self, slots: Slots, given: Given) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no cached()")

    def prompt(self, slots: Slots, given: Given) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no prompt()")

    def decodes(self) -> bool:
        """Whether it puts tokens in front of a decoder's, too: it has the functions of a decoder's places then."""
        return False

    def opening(self) -> str:
        """Which of its functions says what a cache begins with: one of :data:`OPENINGS`, or '' for none."""
        return next((name for name in OPENINGS if self.changes(name)), "")

    def free_size(self, slot: str) -> str:
        """The name of the size that a slot has along its free axes: slots of one name are as long as each other."""
        return FREE

    def loss(self, value: Tensor, slots: Slots, given: Given, logits: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no loss()")

    def changes(self, place: str) -> bool:
        """Whether it has a function for a place."""
        return getattr(type(self), place) is not getattr(ProgramMethod, place)

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Initial:
        raise AssertionError(f"{type(self).__name__} must define init()")

    def check_merge(self, op: Op) -> str | None:
        return f"{self.name} changes what the program reads, which no weight can hold"
