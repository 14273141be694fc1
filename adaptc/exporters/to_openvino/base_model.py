"""Take the adapter out of an OpenVINO model, for calls that have none.

The converter's graph has four nodes at each site, which cost their time also where factors have a rank of zero. Here
they are left out: a product over an axis of no elements is zero, and a sum with it is its other term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: operators that keep a tensor of zeros as one
_KEEP_ZEROS = {"Convert", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Broadcast"}


def remove_adapter(ov: Any, model: Any, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Take the inputs of an adapter out of an ``openvino.Model``, in place.

    Args:
        ov: the module ``openvino``.
        model: the model.
        shapes: the name of each input of the adapter -> the shape of its value for the base.

    Returns:
        the names of the inputs that the base needs, which stay. They are those of DoRA, for example.
    """
    ports = {name: port for port in model.inputs for name in port.get_names() if name in shapes}
    model.reshape({port: ov.PartialShape(list(shapes[name])) for name, port in ports.items()})
    numbers = {port.get_node().get_name() for port in ports.values()}
    zero: set[tuple[str, int]] = set()
    for node in model.get_ordered_ops():
        sources = [i.get_source_output() for i in node.inputs()]
        kind, zeros = node.get_type_name(), [_key(s) in zero for s in sources]
        if kind == "MatMul":
            sizes = sources[0].get_partial_shape()
            summed = sizes[len(sizes) - (2 if node.get_attributes()["transpose_a"] else 1)]
            if summed.is_static and summed.get_length() == 0:
                zero.add(_key(node.output(0)))
        elif kind in _KEEP_ZEROS and zeros[0]:
            zero.add(_key(node.output(0)))
        elif kind == "Multiply" and any(zeros):
            # Zeros times an activation may be no number.
            if all(z or _is_given(s.get_node(), numbers) for z, s in zip(zeros, sources, strict=True)):
                zero.add(_key(node.output(0)))
        elif kind == "Add" and any(zeros):
            term = sources[0] if zeros[1] else sources[1]
            if term.get_partial_shape() == node.get_output_partial_shape(0):
                node.output(0).replace(term)
    # A node that nothing reads is no node of the model, but reads its inputs for as long as it lives.
    read = {s.get_node().get_name() for n in model.get_ordered_ops() for s in n.input_values()}
    for port in ports.values():
        if port.get_node().get_name() not in read:
            model.remove_parameter(port.get_node())
    left = {name for port in model.inputs for name in port.get_names()}
    return [name for name in shapes if name in left]


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()


def _is_given(node: Any, names: set[str]) -> bool:
    """Return whether a node gives an input of the adapter or a constant, of another form perhaps."""
    while node.get_type_name() in _KEEP_ZEROS:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" or node.get_name() in names
