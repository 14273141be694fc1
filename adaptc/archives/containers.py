"""Check the trees of inputs and outputs (torch's tree specs): which containers, with which keys, a file may name.

torch imports what such a text names: the class of an enum, the factory of a defaultdict, and, through transformers, the
class of a cache's parts. So allowed are the containers of Python and torch, output types of transformers, and types
that somebody registered in this process.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Any

from adaptc.archives.names import check_identifier, check_plain, parse_json
from adaptc.archives.refusal import UnsafeFile, short_repr
from adaptc.passes.graph.pytree import pytree

_LIST_TYPES = frozenset(
    ["builtins.tuple", "builtins.list", "torch.Size", "torch.fx.immutable_collections.immutable_list"]
)
_DICT_TYPES = frozenset(["builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict"])
_FACTORIES = frozenset(
    [("collections", "OrderedDict")]
    + [("builtins", n) for n in ("list", "dict", "set", "tuple", "int", "float", "str", "bool")]
)
#: output types of transformers, which torch knows once their module is imported; a file can name no other module to
#: import
_TRANSFORMERS_OUTPUT = re.compile(r"(transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+))\.(\w+)", re.ASCII)
# The classes from which a transformers cache may be rebuilt (see transformers.exporters).
_CACHE_CLASSES = re.compile(
    r"builtins:(tuple|list|set|frozenset|dict)|collections:(OrderedDict|deque)|transformers(\.\w+)+:[A-Z]\w*", re.ASCII
)
_NODE_KEYS = frozenset(["type", "context", "children_spec"])
_MAX_DEPTH = 100


@dataclass
class TreeSpec:
    """A checked tree spec: its number of leaves, and the types that must be registered."""

    leaf_count: int = 0
    types: set[str] = field(default_factory=set)
    #: names of keyword inputs, which are the keys of the second of two children; None where that is no dict
    keyword_names: list[Any] | None = None


def read_tree_spec(text: str) -> TreeSpec:
    """Return the tree of a tree spec as torch writes it. Raises UnsafeFile for any other text."""
    data = parse_json(text, "a tree of inputs or outputs")
    if not isinstance(data, list) or len(data) != 2 or data[0] != 1 or isinstance(data[0], bool):
        raise UnsafeFile(f"expected a tree of inputs or outputs of format 1, found {short_repr(text)}")
    tree = TreeSpec()
    _check_node(data[1], tree, 0)
    children = data[1]["children_spec"]
    if data[1]["type"] == "builtins.tuple" and len(children) == 2 and children[1]["type"] == "builtins.dict":
        tree.keyword_names = parse_json(children[1]["context"])
    return tree


def _check_node(node: Any, tree: TreeSpec, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise UnsafeFile("expected a tree of inputs or outputs, found one nested too deeply")
    if not isinstance(node, dict) or set(node) != _NODE_KEYS or not isinstance(node["children_spec"], list):
        raise UnsafeFile(f"expected type, context and children_spec of a container, found {short_repr(node)}")
    container, context, children = node["type"], node["context"], node["children_spec"]
    if container is None:
        if context is not None or children:
            raise UnsafeFile(f"expected a leaf, found one with {short_repr(context)} and {len(children)} children")
        tree.leaf_count += 1
        return
    if not isinstance(container, str):
        raise UnsafeFile(f"expected the name of a container, found {short_repr(container)}")
    _check_context(container, context, len(children), tree)
    for at, child in enumerate(children):
        try:
            _check_node(child, tree, depth + 1)
        except UnsafeFile as error:
            raise error.prepend_location(f".children_spec[{at}]") from None


def _check_context(container: str, context: Any, count: int, tree: TreeSpec) -> None:
    if container in _LIST_TYPES:
        if context != "null":
            raise UnsafeFile(f"expected no context of a {container}, found {short_repr(context)}")
    elif container in _DICT_TYPES:
        _check_keys(_load_context(context), count)
    elif container == "collections.defaultdict":
        if not isinstance(context, dict) or set(context) != {
            "default_factory_module",
            "default_factory_name",
            "dict_context",
        }:
            raise UnsafeFile(f"expected the factory and the keys of a defaultdict, found {short_repr(context)}")
        factory = (context["default_factory_module"], context["default_factory_name"])
        if factory not in _FACTORIES:
            raise UnsafeFile(
                f"expected a factory such as builtins.list, found {short_repr('.'.join(map(str, factory)))}"
            )
        _check_keys(context["dict_context"], count)
    elif container == "collections.deque":
        most = _load_context(context)
        if most is not None and (type(most) is not int or most < count):
            raise UnsafeFile(f"expected the length of a deque, found {short_repr(most)}")
    elif container == "collections.namedtuple":
        if not isinstance(context, str):
            raise UnsafeFile(f"expected the name of a named tuple, found {short_repr(context)}")
        tree.types.add(check_plain(context))
    elif _TRANSFORMERS_OUTPUT.fullmatch(container):
        keys = _load_context(context)
        _check_keys(keys, count)
        for key in keys:
            check_identifier(key) if isinstance(key, str) else _check_keys([key], -1)
        tree.types.add(container)
    else:
        tree.types.add(check_plain(container))
        _check_no_imports(parse_json(context, f"the context of a {container}") if isinstance(context, str) else context)


def _load_context(context: Any) -> Any:
    if not isinstance(context, str):
        raise UnsafeFile(f"expected a context as text, found {short_repr(context)}")
    return parse_json(context, "a context")


def _check_keys(keys: Any, count: int) -> None:
    if not isinstance(keys, list) or len(keys) != count:
        raise UnsafeFile(f"expected {count} keys of a dict, found {short_repr(keys)}")
    for key in keys:
        if isinstance(key, str):
            check_plain(key)
        elif not (key is None or isinstance(key, (bool, int, float))):
            raise UnsafeFile(f"expected a key of a dict that is a text or a number, found {short_repr(key)}")
    if len(set(keys)) != count:
        raise UnsafeFile("expected keys of a dict that differ, found one twice")


def _check_no_imports(value: Any) -> None:
    """Refuse the context of a registered type where it names a class to import or call.

    Only classes that are parts of a transformers cache may be named.
    """
    if isinstance(value, dict):
        if "__enum__" in value:
            raise UnsafeFile(f"it names the enum {short_repr(value.get('fqn'))}, which would be imported")
        if "p" in value and "_t" in value:
            if not isinstance(value["p"], str) or not _CACHE_CLASSES.fullmatch(value["p"]):
                raise UnsafeFile(f"it names the class {short_repr(value['p'])}, which would be imported")
            if value["_t"] in ("seq", "map") and value["p"].startswith("transformers"):
                raise UnsafeFile(f"it names the class {short_repr(value['p'])}, which would be called")
        if value.get("_t") in ("dtype", "layout") and not str(value.get("n")).isidentifier():
            raise UnsafeFile(f"expected a dtype or a layout, found {short_repr(value.get('n'))}")
        value = list(value.values())
    if isinstance(value, list):
        for v in value:
            _check_no_imports(v)


def check_registered(types: set[str]) -> None:
    """Import the output types of transformers among these, and refuse a type that torch then does not know."""
    for name in sorted(types):
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and (match := _TRANSFORMERS_OUTPUT.fullmatch(name)):
            try:
                importlib.import_module(match[1])
            except ImportError as error:
                raise UnsafeFile(f"it takes or returns a {name}, and {match[1]} cannot be imported: {error}") from error
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE or name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
            raise UnsafeFile(
                f"it takes or returns a {short_repr(name)}, which nothing has registered here; import what registers "
                "it with torch (torch.utils._pytree.register_pytree_node, torch.export.register_dataclass), then load"
            )
