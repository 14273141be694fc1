"""Values that a method's regions read beside the slots."""

from __future__ import annotations

from collections.abc import Mapping

from adaptc.passes.protocol.coefficients import Coefficient, ExtraInput, ExtraValues
from adaptc.passes.protocol.parts.method_part import MethodPart, Slots


class ExtraInputs(MethodPart):
    """The coefficients that a method reads, and the inputs that it adds to the program. By default there are none.

    Arguments of the functions:
        - `slots`: name -> tensor of the adapter.
        - `given`: the values of the added inputs, by name.

    Example:
        >>> class Tasks(adaptc.methods.ExtraInputs):
        ...     def extras(self):
        ...         return {"task_ids": adaptc.methods.ExtraInput(torch.int64)}
        >>> Tasks().extras()["task_ids"].axes
        ('batch',)
    """

    def coefficients(self) -> Mapping[str, Coefficient]:
        """Return the coefficients that the method's regions read, by the name under which they are among the slots.

        A program makes each coefficient once in a call; see ``passes.protocol.coefficients``.
        """
        return {}

    def extras(self) -> Mapping[str, ExtraInput]:
        """Return the inputs that the method adds to the program, by name. At a layer they are among the slots."""
        return {}

    def check_inputs(self, slots: Slots, given: ExtraValues) -> str:
        """Return what is wrong with the values of the added inputs, checked before they are used; '' for nothing."""
        return ""
