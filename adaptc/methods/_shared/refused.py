"""List the methods of PEFT that adaptc refuses, with the reason that the error for their configs and adapters gives."""

from __future__ import annotations

from collections.abc import Mapping

#: PEFT's type name -> why it is refused, and what to do instead
UNSUPPORTED_METHODS: Mapping[str, str] = {
    "SHADOW": (
        "its adapter is a second decoder, of the base's own class, which runs in front of the base in every call, with "
        "a cache of its own in generation, and whose state then goes from block to block. An adapter here is tensors "
        "at places of a program that was captured, and holds no model that is to be captured beside it. Run it with "
        "PEFT, or train a method that adapts layers"
    ),
}
