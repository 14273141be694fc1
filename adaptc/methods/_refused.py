"""Methods of PEFT that adaptc knows and does not have, each with the reason, for whoever hands in one of their configs
or adapters."""

from __future__ import annotations

from collections.abc import Mapping

#: PEFT's type name -> why, and what to do
REFUSED: Mapping[str, str] = {
    "SHADOW": (
        "its adapter is a second decoder, of the base's own class, which runs in front of the base in every call, with "
        "a cache of its own in generation, and whose state then goes from block to block. An adapter here is tensors "
        "at places of a program that was captured, and holds no model that is to be captured beside it. Run it with "
        "PEFT, or train a method that adapts layers"
    ),
}
