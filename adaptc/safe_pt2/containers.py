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

from adaptc.passes.graph.pytree import pytree
from adaptc.safe_pt2.names import identifier, loads, plain
from adaptc.safe_pt2.refusal import UnsafeFile, shown

_LISTS = frozenset(["builtins.tuple", "builtins.list", "torch.Size", "torch.fx.immutable_collections.immutable_list"])
_DICTS = frozenset(["builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict"])
_FACTORIES = frozenset(
    [("collections", "OrderedDict")]
    + [("builtins", n) for n in ("list", "dict", "set", "tuple", "int", "float", "str", "bool")]
)
#: output types of transformers, which torch knows once their module is imported; a file can name no other module to
#: import
_TRANSFORMERS = re.compile(r"(transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+))\.(\w+)", re.ASCII)
# The classes from which a transformers cache may be rebuilt (see transformers.exporters).
_PARTS = re.compile(
    r"builtins:(tuple|list|set|frozenset|dict)|collections:(OrderedDict|deque)|transformers(\.\w+)+:[A-Z]\w*", re.ASCII
)
_KEYS = frozenset(["type", "context", "children_spec"])
_MOST_DEPTH = 100


@dataclass
class Tree:
    """A checked tree spec: its number of leaves, and the types that must be registered."""

    leaves: int = 0
    types: set[str] = field(default_factory=set)
    #: names of keyword inputs, which are the keys of the second of two children; None where that is no dict
    keywords: list[Any] | None = None


def read_tree(text: str) -> Tree:
    """Return the tree of a tree spec as torch writes it. Raises UnsafeFile for any other text."""
    data = loads(text, "a tree of inputs or outputs")
    if not isinstance(data, list) or len(data) != 2 or data[0] != 1 or isinstance(data[0], bool):
        raise UnsafeFile(f"expected a tree of inputs or outputs of format 1, found {shown(text)}")
    tree = Tree()
    _node(data[1], tree, 0)
    children = data[1]["children_spec"]
    if data[1]["type"] == "builtins.tuple" and len(children) == 2 and children[1]["type"] == "builtins.dict":
        tree.keywords = loads(children[1]["context"])
    return tree


def _node(node: Any, tree: Tree, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise UnsafeFile("expected a tree of inputs or outputs, found one nested too deeply")
    if not isinstance(node, dict) or set(node) != _KEYS or not isinstance(node["children_spec"], list):
        raise UnsafeFile(f"expected type, context and children_spec of a container, found {shown(node)}")
    kind, context, children = node["type"], node["context"], node["children_spec"]
    if kind is None:
        if context is not None or children:
            raise UnsafeFile(f"expected a leaf, found one with {shown(context)} and {len(children)} children")
        tree.leaves += 1
        return
    if not isinstance(kind, str):
        raise UnsafeFile(f"expected the name of a container, found {shown(kind)}")
    _context(kind, context, len(children), tree)
    for at, child in enumerate(children):
        try:
            _node(child, tree, depth + 1)
        except UnsafeFile as error:
            raise error.inside(f".children_spec[{at}]") from None


def _context(kind: str, context: Any, count: int, tree: Tree) -> None:
    if kind in _LISTS:
        if context != "null":
            raise UnsafeFile(f"expected no context of a {kind}, found {shown(context)}")
    elif kind in _DICTS:
        _keys(_text(context), count)
    elif kind == "collections.defaultdict":
        if not isinstance(context, dict) or set(context) != {
            "default_factory_module",
            "default_factory_name",
            "dict_context",
        }:
            raise UnsafeFile(f"expected the factory and the keys of a defaultdict, found {shown(context)}")
        factory = (context["default_factory_module"], context["default_factory_name"])
        if factory not in _FACTORIES:
            raise UnsafeFile(f"expected a factory such as builtins.list, found {shown('.'.join(map(str, factory)))}")
        _keys(context["dict_context"], count)
    elif kind == "collections.deque":
        most = _text(context)
        if most is not None and (type(most) is not int or most < count):
            raise UnsafeFile(f"expected the length of a deque, found {shown(most)}")
    elif kind == "collections.namedtuple":
        if not isinstance(context, str):
            raise UnsafeFile(f"expected the name of a named tuple, found {shown(context)}")
        tree.types.add(plain(context))
    elif _TRANSFORMERS.fullmatch(kind):
        keys = _text(context)
        _keys(keys, count)
        for key in keys:
            identifier(key) if isinstance(key, str) else _keys([key], -1)
        tree.types.add(kind)
    else:
        tree.types.add(plain(kind))
        _harmless(loads(context, f"the context of a {kind}") if isinstance(context, str) else context)


def _text(context: Any) -> Any:
    if not isinstance(context, str):
        raise UnsafeFile(f"expected a context as text, found {shown(context)}")
    return loads(context, "a context")


def _keys(keys: Any, count: int) -> None:
    if not isinstance(keys, list) or len(keys) != count:
        raise UnsafeFile(f"expected {count} keys of a dict, found {shown(keys)}")
    for key in keys:
        if isinstance(key, str):
            plain(key)
        elif not (key is None or isinstance(key, (bool, int, float))):
            raise UnsafeFile(f"expected a key of a dict that is a text or a number, found {shown(key)}")
    if len(set(keys)) != count:
        raise UnsafeFile("expected keys of a dict that differ, found one twice")


def _harmless(value: Any) -> None:
    """Refuse the context of a registered type where it names a class to import or call.

    Only classes that are parts of a transformers cache may be named.
    """
    if isinstance(value, dict):
        if "__enum__" in value:
            raise UnsafeFile(f"it names the enum {shown(value.get('fqn'))}, which would be imported")
        if "p" in value and "_t" in value:
            if not isinstance(value["p"], str) or not _PARTS.fullmatch(value["p"]):
                raise UnsafeFile(f"it names the class {shown(value['p'])}, which would be imported")
            if value["_t"] in ("seq", "map") and value["p"].startswith("transformers"):
                raise UnsafeFile(f"it names the class {shown(value['p'])}, which would be called")
        if value.get("_t") in ("dtype", "layout") and not str(value.get("n")).isidentifier():
            raise UnsafeFile(f"expected a dtype or a layout, found {shown(value.get('n'))}")
        value = list(value.values())
    if isinstance(value, list):
        for v in value:
            _harmless(v)


def check_registered(types: set[str]) -> None:
    """Import the output types of transformers among these, and refuse a type that torch then does not know."""
    for name in sorted(types):
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and (match := _TRANSFORMERS.fullmatch(name)):
            try:
                importlib.import_module(match[1])
            except ImportError as error:
                raise UnsafeFile(f"it takes or returns a {name}, and {match[1]} cannot be imported: {error}") from error
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE or name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
            raise UnsafeFile(
                f"it takes or returns a {shown(name)}, which nothing has registered here; import what registers it "
                "with torch (torch.utils._pytree.register_pytree_node, torch.export.register_dataclass), then load"
            )
