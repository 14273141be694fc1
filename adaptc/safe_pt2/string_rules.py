"""Check each text of a program's JSON by a table over the fields of torch's schema.

A text in a field that is not in the table is refused, so that fields of a later torch never reach torch unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from adaptc.archives.containers import read_tree_spec
from adaptc.archives.names import check_identifier, check_one_line, check_plain, clean_lines, clean_message, parse_json
from adaptc.archives.refusal import UnsafeFile, short_repr
from adaptc.safe_pt2 import operators
from adaptc.safe_pt2.expressions import check_guard, check_size_expression, is_symbol

TextCheck = Callable[[str], str]

_DEVICE_TYPE = re.compile(r"[a-z][a-z0-9_]{0,30}")
_PAYLOAD_NAME = re.compile(r"(weight|tensor)_\d{1,7}")
# A path of attributes below torch, which torch looks up to describe where a node came from, and never calls.
_NODE_SOURCE = re.compile(r"[\w$]+,[A-Za-z_][\w.$]*", re.ASCII)
_MESSAGE_ARGUMENTS = frozenset(["msg", "assert_msg", "message", "err_msg"])


def _check_device(text: str) -> str:
    if not _DEVICE_TYPE.fullmatch(text):
        raise UnsafeFile(f"expected a kind of device, found {short_repr(text)}")
    return text


def _check_optional_name(text: str) -> str:
    return text and check_identifier(text)


def _check_payload_name(text: str) -> str:
    if not _PAYLOAD_NAME.fullmatch(text):
        raise UnsafeFile(
            f"expected the record of a tensor, such as weight_0, found {short_repr(text)}; objects of other kinds are "
            "pickles, which can run code, and are not read"
        )
    return text


def _check_range_name(text: str) -> str:
    if not is_symbol(text) and text[:1] in ("u", "z"):
        raise UnsafeFile(f"expected a symbol such as s7, found {short_repr(text)}")
    return check_size_expression(text)


def _check_tree(text: str) -> str:
    read_tree_spec(text)
    return text


def _refuse_object(text: str) -> str:
    raise UnsafeFile(
        f"the program holds the object {short_repr(text)}, which is a pickle and can run code; it is not read"
    )


def _check_custom(text: str) -> str:
    if not isinstance(parse_json(text), dict):
        raise UnsafeFile(f"expected an object, found {short_repr(text)}")
    return text


def _check_sources(text: str) -> str:
    for part in text.split(";"):
        if not _NODE_SOURCE.fullmatch(part) or "__" in part.partition(",")[2]:
            raise UnsafeFile(f"expected where a node came from, as name,function, found {short_repr(part)}")
    return text


def _check_from_node(text: str) -> str:
    _check_origins(parse_json(text))
    return text


def _check_origins(data: Any) -> None:
    """Check the nodes that a node came from, since compilers print their names after a comment sign."""
    if not isinstance(data, list):
        raise UnsafeFile(f"expected a list of the nodes that a node came from, found {short_repr(data)}")
    for entry in data:
        if entry is None:
            continue
        if not isinstance(entry, dict):
            raise UnsafeFile(f"expected a node that a node came from, found {short_repr(entry)}")
        for key, value in entry.items():
            if key == "from_node":
                _check_origins(value if value is not None else [])
            elif key == "graph_id":
                if type(value) is not int:
                    raise UnsafeFile(f"expected the number of a graph, found {short_repr(value)}")
            elif not isinstance(value, str):
                raise UnsafeFile(f"expected a text as {short_repr(key)}, found {short_repr(value)}")
            else:
                check_one_line(value)


def _metadata_check(key: str) -> TextCheck:
    return {
        "stack_trace": clean_lines,
        "nn_module_stack": clean_message,
        "source_fn_stack": _check_sources,
        "torch_fn": clean_message,
        "custom": _check_custom,
        "from_node": _check_from_node,
    }.get(key, clean_message)


#: (class, field) of the schema -> the check of its texts, which may also change them
FIELD_CHECKS: dict[tuple[str, str], TextCheck] = {
    ("Device", "type"): _check_device,
    ("SymExpr", "expr_str"): check_size_expression,
    ("SymIntArgument", "as_name"): check_identifier,
    ("SymFloatArgument", "as_name"): check_identifier,
    ("SymBoolArgument", "as_name"): check_identifier,
    ("TensorArgument", "name"): check_identifier,
    ("TokenArgument", "name"): check_identifier,
    ("GraphArgument", "name"): check_identifier,
    ("CustomObjArgument", "name"): _refuse_object,
    ("CustomObjArgument", "class_fqn"): _refuse_object,
    ("Argument", "as_string"): check_one_line,
    ("Argument", "as_strings"): check_one_line,
    ("Argument", "as_operator"): operators.check_target,
    ("NamedArgument", "name"): _check_optional_name,
    ("Node", "target"): operators.check_target,
    ("Node", "name"): _check_optional_name,
    ("ConstantValue", "as_string"): check_plain,
    ("InputToConstantInputSpec", "name"): check_identifier,
    ("InputToParameterSpec", "parameter_name"): check_plain,
    ("InputToBufferSpec", "buffer_name"): check_plain,
    ("InputToTensorConstantSpec", "tensor_constant_name"): check_plain,
    ("InputToCustomObjSpec", "custom_obj_name"): _refuse_object,
    ("BufferMutationSpec", "buffer_name"): check_plain,
    ("ParameterMutationSpec", "parameter_name"): check_plain,
    ("GradientToParameterSpec", "parameter_name"): check_plain,
    ("GradientToUserInputSpec", "user_input_name"): check_identifier,
    ("UserInputMutationSpec", "user_input_name"): check_identifier,
    ("ModuleCallSignature", "in_spec"): _check_tree,
    ("ModuleCallSignature", "out_spec"): _check_tree,
    ("ModuleCallSignature", "forward_arg_names"): check_identifier,
    ("ModuleCallEntry", "fqn"): check_plain,
    ("NamedTupleDef", "field_names"): check_identifier,
    ("ExportedProgram", "verifiers"): _check_optional_name,
    ("ExportedProgram", "torch_version"): check_plain,
    ("ExportedProgram", "guards_code"): check_guard,
    ("PayloadMeta", "path_name"): _check_payload_name,
}

#: (class, field) -> the check of a dict's keys
KEY_CHECKS: dict[tuple[str, str], TextCheck] = {
    ("Argument", "as_string_to_argument"): check_plain,
    ("Node", "metadata"): check_one_line,
    ("Graph", "tensor_values"): check_identifier,
    ("Graph", "sym_int_values"): check_identifier,
    ("Graph", "sym_bool_values"): check_identifier,
    ("Graph", "sym_float_values"): check_identifier,
    ("Graph", "custom_obj_values"): _refuse_object,
    ("GraphModule", "metadata"): check_one_line,
    ("GraphModule", "treespec_namedtuple_fields"): check_plain,
    ("ExportedProgram", "opset_version"): check_plain,
    ("ExportedProgram", "range_constraints"): _check_range_name,
    ("PayloadConfig", "config"): check_plain,
}

#: (class, field) of a dict of texts -> a function from key to the check of its text
CHECKS_BY_KEY: dict[tuple[str, str], Callable[[str], TextCheck]] = {
    ("Node", "metadata"): _metadata_check,
    ("GraphModule", "metadata"): lambda key: _check_custom if key == "custom" else clean_message,
}


def clean_assert_messages(arguments: Any) -> None:
    """Replace line ends by spaces in the message texts of an assertion's arguments, in place in the JSON data."""
    for entry in arguments if isinstance(arguments, list) else ():
        if isinstance(entry, dict) and entry.get("name") in _MESSAGE_ARGUMENTS and isinstance(entry.get("arg"), dict):
            text = entry["arg"].get("as_string")
            if isinstance(text, str):
                entry["arg"]["as_string"] = clean_message(text)
