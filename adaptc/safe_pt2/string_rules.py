"""Check each text of a program's JSON by a table over the fields of torch's schema.

A text in a field that is not in the table is refused, so that fields of a later torch never reach torch unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from adaptc.safe_pt2 import operators
from adaptc.safe_pt2.containers import read_tree
from adaptc.safe_pt2.expressions import guard, is_symbol, sizes
from adaptc.safe_pt2.names import identifier, lines, loads, message, one_line, plain
from adaptc.safe_pt2.refusal import UnsafeFile, shown

Check = Callable[[str], str]

_DEVICES = re.compile(r"[a-z][a-z0-9_]{0,30}")
_PAYLOAD = re.compile(r"(weight|tensor)_\d{1,7}")
# A path of attributes below torch, which torch looks up to describe where a node came from, and never calls.
_SOURCE = re.compile(r"[\w$]+,[A-Za-z_][\w.$]*", re.ASCII)
_MESSAGES = frozenset(["msg", "assert_msg", "message", "err_msg"])


def _device(text: str) -> str:
    if not _DEVICES.fullmatch(text):
        raise UnsafeFile(f"expected a kind of device, found {shown(text)}")
    return text


def _optional_identifier(text: str) -> str:
    return text and identifier(text)


def _payload(text: str) -> str:
    if not _PAYLOAD.fullmatch(text):
        raise UnsafeFile(
            f"expected the record of a tensor, such as weight_0, found {shown(text)}; objects of other kinds are "
            "pickles, which can run code, and are not read"
        )
    return text


def _range_name(text: str) -> str:
    if not is_symbol(text) and text[:1] in ("u", "z"):
        raise UnsafeFile(f"expected a symbol such as s7, found {shown(text)}")
    return sizes(text)


def _tree(text: str) -> str:
    read_tree(text)
    return text


def _no_object(text: str) -> str:
    raise UnsafeFile(f"the program holds the object {shown(text)}, which is a pickle and can run code; it is not read")


def _custom(text: str) -> str:
    if not isinstance(loads(text), dict):
        raise UnsafeFile(f"expected an object, found {shown(text)}")
    return text


def _sources(text: str) -> str:
    for part in text.split(";"):
        if not _SOURCE.fullmatch(part) or "__" in part.partition(",")[2]:
            raise UnsafeFile(f"expected where a node came from, as name,function, found {shown(part)}")
    return text


def _from_node(text: str) -> str:
    _origins(loads(text))
    return text


def _origins(data: Any) -> None:
    """Check the nodes that a node came from, since compilers print their names after a comment sign."""
    if not isinstance(data, list):
        raise UnsafeFile(f"expected a list of the nodes that a node came from, found {shown(data)}")
    for entry in data:
        if entry is None:
            continue
        if not isinstance(entry, dict):
            raise UnsafeFile(f"expected a node that a node came from, found {shown(entry)}")
        for key, value in entry.items():
            if key == "from_node":
                _origins(value if value is not None else [])
            elif key == "graph_id":
                if type(value) is not int:
                    raise UnsafeFile(f"expected the number of a graph, found {shown(value)}")
            elif not isinstance(value, str):
                raise UnsafeFile(f"expected a text as {shown(key)}, found {shown(value)}")
            else:
                one_line(value)


def _metadata_text(key: str) -> Check:
    return {
        "stack_trace": lines,
        "nn_module_stack": message,
        "source_fn_stack": _sources,
        "torch_fn": message,
        "custom": _custom,
        "from_node": _from_node,
    }.get(key, message)


#: (class, field) of the schema -> the check of its texts, which may also change them
FIELDS: dict[tuple[str, str], Check] = {
    ("Device", "type"): _device,
    ("SymExpr", "expr_str"): sizes,
    ("SymIntArgument", "as_name"): identifier,
    ("SymFloatArgument", "as_name"): identifier,
    ("SymBoolArgument", "as_name"): identifier,
    ("TensorArgument", "name"): identifier,
    ("TokenArgument", "name"): identifier,
    ("GraphArgument", "name"): identifier,
    ("CustomObjArgument", "name"): _no_object,
    ("CustomObjArgument", "class_fqn"): _no_object,
    ("Argument", "as_string"): one_line,
    ("Argument", "as_strings"): one_line,
    ("Argument", "as_operator"): operators.syntax,
    ("NamedArgument", "name"): _optional_identifier,
    ("Node", "target"): operators.syntax,
    ("Node", "name"): _optional_identifier,
    ("ConstantValue", "as_string"): plain,
    ("InputToConstantInputSpec", "name"): identifier,
    ("InputToParameterSpec", "parameter_name"): plain,
    ("InputToBufferSpec", "buffer_name"): plain,
    ("InputToTensorConstantSpec", "tensor_constant_name"): plain,
    ("InputToCustomObjSpec", "custom_obj_name"): _no_object,
    ("BufferMutationSpec", "buffer_name"): plain,
    ("ParameterMutationSpec", "parameter_name"): plain,
    ("GradientToParameterSpec", "parameter_name"): plain,
    ("GradientToUserInputSpec", "user_input_name"): identifier,
    ("UserInputMutationSpec", "user_input_name"): identifier,
    ("ModuleCallSignature", "in_spec"): _tree,
    ("ModuleCallSignature", "out_spec"): _tree,
    ("ModuleCallSignature", "forward_arg_names"): identifier,
    ("ModuleCallEntry", "fqn"): plain,
    ("NamedTupleDef", "field_names"): identifier,
    ("ExportedProgram", "verifiers"): _optional_identifier,
    ("ExportedProgram", "torch_version"): plain,
    ("ExportedProgram", "guards_code"): guard,
    ("PayloadMeta", "path_name"): _payload,
}

#: (class, field) -> the check of a dict's keys
KEYS: dict[tuple[str, str], Check] = {
    ("Argument", "as_string_to_argument"): plain,
    ("Node", "metadata"): one_line,
    ("Graph", "tensor_values"): identifier,
    ("Graph", "sym_int_values"): identifier,
    ("Graph", "sym_bool_values"): identifier,
    ("Graph", "sym_float_values"): identifier,
    ("Graph", "custom_obj_values"): _no_object,
    ("GraphModule", "metadata"): one_line,
    ("GraphModule", "treespec_namedtuple_fields"): plain,
    ("ExportedProgram", "opset_version"): plain,
    ("ExportedProgram", "range_constraints"): _range_name,
    ("PayloadConfig", "config"): plain,
}

#: (class, field) of a dict of texts -> a function from key to the check of its text
BY_KEY: dict[tuple[str, str], Callable[[str], Check]] = {
    ("Node", "metadata"): _metadata_text,
    ("GraphModule", "metadata"): lambda key: _custom if key == "custom" else message,
}


def spoken(arguments: Any) -> None:
    """Replace line ends by spaces in the message texts of an assertion's arguments, in place in the JSON data."""
    for entry in arguments if isinstance(arguments, list) else ():
        if isinstance(entry, dict) and entry.get("name") in _MESSAGES and isinstance(entry.get("arg"), dict):
            text = entry["arg"].get("as_string")
            if isinstance(text, str):
                entry["arg"]["as_string"] = message(text)
