"""Select module names by a config's target options: PEFT's rules, as functions over names.

Nothing here sees a module or a graph. The caller lists what could be adapted, one :class:`TargetCandidate` per module
path, and fills in a default for ``target_modules``. Every candidate is then selected, or left out for a stated reason.
Every entry of the user's must match something; otherwise a :class:`TargetError` says what it could have meant.

The rules are those of PEFT 0.21.2. Entries that PEFT ignores silently are an error here. For the config of a file they
are a warning, since the file's tensors show what was adapted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from adaptc.errors import MAX_LISTED, ConfigError, EntryHandler, and_more, did_you_mean, listing, refuse_entry
from adaptc.patterns import compile_pattern

ALL_LINEAR = "all-linear"
# PEFT writes this into files of adapters that target no module at all, such as trainable tokens only.
NO_TARGETS = "dummy-target-modules"
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# "weight" stands for a linear class with a matmul of its own, such as falcon's
_LINEAR_KINDS = ("linear", "addmm", "weight")
#: qualified names of classes that PEFT takes for linear layers
LINEAR_CLASS = re.compile(r"(Linear(\d\w*)?|\bConv1D)$")
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True)
class TargetCandidate:
    """A module that could be adapted.

    ``name``: its path in the model. ``class_name``: its qualified class name. ``kind``: the kind of op that consumes
    its weight ("linear", "addmm", "embedding", "conv2d", "weight", ...). ``linear``: whether its class derives from a
    linear layer's, whatever the class is called.
    """

    name: str
    class_name: str
    kind: str
    has_linear_base: bool = False

    @property
    def is_linear(self) -> bool:
        """Return whether PEFT takes the module for a linear layer."""
        return self.kind in _LINEAR_KINDS and (self.has_linear_base or bool(LINEAR_CLASS.search(self.class_name)))

    def not_linear_reason(self) -> str:
        if self.kind not in ("linear", "addmm"):
            return "not a linear layer"
        return f"a matmul, but its class{_class_suffix(self.class_name)} is no linear layer; name it to adapt it"


@dataclass(frozen=True)
class Selection:
    """The result of the rules.

    ``names``: selected module paths, in the order of the candidates. ``matches``: target entry -> the selected names
    that it matches. An entry is an item of a list, the regular expression, or "all-linear". ``left_out``: (name, why)
    for every other candidate, and for modules that an entry names but that cannot be adapted.
    """

    names: tuple[str, ...]
    matches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[tuple[str, str], ...] = ()


def select_targets(
    candidates: Sequence[TargetCandidate],
    *,
    target_modules: str | Iterable[str] | None,
    exclude_modules: str | Iterable[str] | None = None,
    layers_to_transform: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    modules_to_save: Iterable[str] | None = None,
    output_embedding: str | None = None,
    task_type: str | None = None,
    all_names: Sequence[str] | Mapping[str, str] = (),
    parameters: Sequence[str] = (),
    tell: EntryHandler = refuse_entry,
) -> Selection:
    """Return the candidates that ``target_modules`` selects.

    A list or set holds full names or dotted suffixes; a string is a regular expression for the whole name, or
    "all-linear" (every linear layer but ``output_embedding``). ``exclude_modules`` is read the same way.
    ``layers_to_transform`` keeps the given layer indices among suffix matches; full names are not filtered by it.
    Everything at or below a name in ``modules_to_save``, or below the head that ``task_type`` trains, is left out.
    ``all_names`` are all module names of the model, best as a mapping to class names, and ``parameters`` names of
    parameters; they only improve messages.

    ``tell`` is called where an entry matches nothing, and where a list with entries selects nothing; by default, it
    raises TargetError. Raises :class:`ConfigError` for options that do not fit together and for invalid regular
    expressions.
    """
    if target_modules is None:
        raise ConfigError("target_modules is None and no default was filled in: name the modules to adapt")
    if isinstance(target_modules, str):
        for option, value in (("layers_to_transform", layers_to_transform), ("layers_pattern", layers_pattern)):
            if value is not None:
                raise ConfigError(
                    f"{option}={value!r} cannot be combined with the string target_modules={target_modules!r}: "
                    "write the layer indices into the regular expression, or give target_modules as a list"
                )
    known = dict(all_names) if isinstance(all_names, Mapping) else dict.fromkeys(all_names, "")
    names = list(dict.fromkeys(c.name for c in candidates))
    adaptable = set(names)
    model = _ModelNames(names, {n: t for n, t in known.items() if n and n not in adaptable}, parameters)

    excluded = _OptionEntries("exclude_modules", exclude_modules or ())
    _check_exclusions_used(excluded, model, tell)
    saved_reason = _make_saved_rule(_entries_to_save(modules_to_save, task_type))
    if isinstance(target_modules, str) and target_modules == NO_TARGETS:
        return Selection((), {}, tuple((n, "the adapter targets no module") for n in names))
    targets = _OptionEntries("target_modules", target_modules)
    if not targets.keys:
        return Selection((), {}, tuple((n, "target_modules is empty") for n in names))
    layer_filter = _LayerFilter(layers_to_transform, layers_pattern)
    not_linear_reasons = None
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        not_linear_reasons = {c.name: "" if c.is_linear else c.not_linear_reason() for c in candidates}

    matches: dict[str, list[str]] = {}
    used_keys: set[str] = set()
    seen_layers: set[int] = set()
    left_out: list[tuple[str, str]] = []
    chosen: list[str] = []
    for name in names:
        if not_linear_reasons is None:
            keys, unmatched_reason = targets.matching_keys(name), "no entry names it"
        elif name == output_embedding:
            keys, unmatched_reason = [], "the output head"
        else:
            keys, unmatched_reason = [] if not_linear_reasons[name] else list(targets.keys), not_linear_reasons[name]
        used_keys.update(keys)
        if keys and layer_filter.indices is not None:
            seen_layers.update(i for i in [layer_filter.layer_index(name)] if i is not None)
        why = _format_first(excluded.matching_keys(name), "excluded by {!r}") or saved_reason(name)
        why = why or (None if keys else unmatched_reason)
        if why is None and not (not_linear_reasons is None and name in targets.names):
            why = layer_filter.exclusion_reason(name)
        if why is not None:
            left_out.append((name, why))
            continue
        chosen.append(name)
        for key in keys:
            matches.setdefault(key, []).append(name)

    missing = [key for key in targets.keys if key not in used_keys]
    if missing:
        tell(_explain_missing(targets, missing, model))
    lost = [] if layer_filter.indices is None else sorted(layer_filter.indices - seen_layers)
    if lost:
        tell(
            f"layers_to_transform: no targeted module lies in layer {listing(lost)}; layers with targeted modules "
            f"are {listing(sorted(seen_layers)) or 'none'}" + layer_filter.patterns_hint()
        )
    if not chosen and len(missing) < max(len(targets.keys), 1):  # or all was told
        tell(_explain_empty_selection(targets, left_out))
    if not_linear_reasons is None:
        for name, type_ in model.not_adaptable.items():
            keys = targets.matching_keys(name)
            if (
                keys
                and not (targets.is_single_string and name in model.containers)
                and not (excluded.matching_keys(name) or saved_reason(name))
            ):
                left_out.append((name, f"named by {keys[0]!r} but not adaptable{_class_suffix(type_)}"))
    return Selection(tuple(chosen), {k: tuple(matches.get(k, ())) for k in targets.keys}, tuple(left_out))


def select_modules_to_save(
    names: Iterable[str],
    modules_to_save: Iterable[str] | None = None,
    task_type: str | None = None,
    tell: EntryHandler = refuse_entry,
) -> list[str]:
    """Return the modules to train and save whole: every name that ends with an entry, in the order of ``names``.

    The head of a classification or question answering task is added. ``tell`` is called for an entry that ends no name;
    by default, it raises TargetError. PEFT writes all usual heads of the task into files, so in a list that has all of
    them only one must exist.
    """
    names = [n for n in names if n]
    entries = _entries_to_save(modules_to_save, task_type)
    wanted = _as_list("modules_to_save", modules_to_save)
    endings = {n[i:] for n in names for i in range(len(n))}
    present = {e for e in entries if e in endings}
    heads = set(TASK_HEADS.get(_task_name(task_type), ()))
    optional = heads if heads <= set(wanted) and heads & present else set()
    missing = [e for e in wanted if e not in present and e not in optional]
    if missing:
        hints = [f"{e!r} ends no module name{did_you_mean(e, names)}" for e in missing[:MAX_LISTED]]
        tell("modules_to_save: " + "; ".join(hints) + and_more(missing))
    return [n for n in names if n.endswith(tuple(present))]


class _ModelNames:
    """The names in a model: adaptable modules, other modules with their class, modules that hold others, parameters."""

    def __init__(self, names: list[str], not_adaptable: dict[str, str], parameters: Sequence[str]):
        self.names, self.not_adaptable, self.parameters = names, not_adaptable, parameters
        self.containers = {n.rpartition(".")[0] for n in (*names, *not_adaptable)}


class _OptionEntries:
    """The entries of one option.

    A name is looked up in a list by its dotted suffixes, so that long lists are as fast as short ones.
    """

    def __init__(self, option: str, value: str | Iterable[str]):
        self.option = option
        self.is_single_string = isinstance(value, str)
        self.keys: tuple[str, ...] = (value,) if isinstance(value, str) else tuple(_as_list(option, value))
        self.names = frozenset(() if self.is_single_string else self.keys)
        is_regex = self.is_single_string and self.keys[0].lower() != ALL_LINEAR
        self._fullmatch = compile_pattern(option, self.keys[0]).fullmatch if is_regex else None

    def matching_keys(self, name: str) -> list[str]:
        if self.is_single_string:
            return [self.keys[0]] if self._fullmatch and self._fullmatch(name) else []
        return [s for s in dotted_suffixes(name) if s in self.names] if self.names else []


class _LayerFilter:
    """The options ``layers_to_transform`` and ``layers_pattern``: the layer of a name, and whether it is wanted."""

    def __init__(self, wanted: int | Iterable[int] | None, pattern: str | Iterable[str] | None):
        patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
        self.patterns = [p for p in patterns if p]
        if self.patterns and wanted is None:
            raise ConfigError(f"layers_pattern={pattern!r} needs layers_to_transform: say which layers")
        indices = {wanted} if isinstance(wanted, int) else set(wanted or ())
        self.indices = indices or None
        self._regexes = [
            compile_pattern("layers_pattern", rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", p) for p in self.patterns
        ]

    def layer_index(self, name: str) -> int | None:
        for regex in self._regexes or [_ANY_LAYER]:
            match = regex.match(name)
            if match:
                return int(match["idx"])
        return None

    def exclusion_reason(self, name: str) -> str | None:
        if self.indices is None:
            return None
        index = self.layer_index(name)
        if index is None:
            return "in no numbered layer" + self.patterns_hint()
        return None if index in self.indices else f"layer {index} not in layers_to_transform"

    def patterns_hint(self) -> str:
        return f" (layers_pattern={self.patterns})" if self.patterns else ""


def _make_saved_rule(entries: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function that tells why a name must not be adapted: it, or a module above it, is trained whole.

    The function returns None for any other name.
    """
    # By PEFT's rules an entry is a regular expression between dots here, but a plain ending in select_modules_to_save.
    # A module that only select_modules_to_save picks must not be adapted either, so both rules apply.
    rules = [(e, compile_pattern("modules_to_save", rf"(^|.*\.){e}($|\..*)", e), f"{e}.") for e in entries]

    def reason_for(name: str) -> str | None:
        for entry, regex, inside in rules:
            if regex.match(name) or name.endswith(entry) or inside in name:
                return f"under modules_to_save ({entry!r})"
        return None

    return reason_for


def _entries_to_save(modules_to_save: Iterable[str] | None, task_type: str | None) -> list[str]:
    return list(
        dict.fromkeys((*_as_list("modules_to_save", modules_to_save), *TASK_HEADS.get(_task_name(task_type), ())))
    )


def _task_name(task_type: object) -> str:
    return str(getattr(task_type, "value", task_type))


def _as_list(option: str, value: str | Iterable[str] | None) -> list[str]:
    if value is None:
        return []
    items = [value] if isinstance(value, str) else list(value)
    wrong = [i for i in items if not isinstance(i, str) or not i]
    if wrong:
        raise ConfigError(f"{option}: entries must be non-empty strings, found {wrong[0]!r}")
    # A set has no order of its own, and messages and reports must not depend on hash seeds.
    return sorted(items) if isinstance(value, (set, frozenset)) else list(dict.fromkeys(items))


def dotted_suffixes(name: str) -> Iterable[str]:
    """Yield ``name``, and then the part of it behind each of its dots."""
    yield name
    dot = name.find(".")
    while dot >= 0:
        yield name[dot + 1 :]
        dot = name.find(".", dot + 1)


def _check_exclusions_used(excluded: _OptionEntries, model: _ModelNames, tell: EntryHandler) -> None:
    """Call ``tell`` for an exclusion that names neither a module that could be adapted, nor one without submodules.

    An exclusion of a container by name would leave its children adapted, which nobody means.
    """
    leaves = (n for n in model.not_adaptable if n not in model.containers)
    used = {key for name in (*model.names, *leaves) for key in excluded.matching_keys(name)}
    missing = [key for key in excluded.keys if key not in used]
    if missing:
        tell(_explain_missing(excluded, missing, model))


def _explain_missing(entries: _OptionEntries, missing: Sequence[str], model: _ModelNames) -> str:
    lines = [f"{entry!r} {_missing_reason(entries, entry, model)}" for entry in missing[:MAX_LISTED]]
    return f"{entries.option}: " + "; ".join(lines) + and_more(missing)


def _missing_reason(entries: _OptionEntries, entry: str, model: _ModelNames) -> str:
    if entries.is_single_string:
        if entry.lower() == ALL_LINEAR:
            return "finds no linear layer to adapt"
        tail = next((n for n in model.names if entry in dotted_suffixes(n)), None)
        if tail is not None:
            return f"is a regular expression for whole names; to match endings such as {tail!r} write [{entry!r}]"
        part = next((n for n in model.names if compile_pattern(entries.option, entry).search(n)), None)
        if part is not None:
            return f"is a regular expression for whole names and matches only a part of {part!r}"
    named = [n for n in model.not_adaptable if entry in entries.matching_keys(n)]
    if named:
        what = f"exists but is not adaptable: {named[0]!r}{_class_suffix(model.not_adaptable[named[0]])}"
        inside = [n for n in model.names if n.startswith(named[0] + ".")]
        if inside and entries.option == "exclude_modules":
            below = "(.*\\.)?" + re.escape(entry) + "\\..*"
            return f"{what} is a container, and what it holds stays adapted; to exclude all of it write {below!r}"
        return what + (f"; it holds {listing(map(repr, inside))}" if inside else "")
    held = next((f for f in model.parameters if entry in entries.matching_keys(f)), None)
    if held is not None and entries.option == "target_modules":
        way = repr([held if entries.is_single_string else entry])
        return f"matches no module, but the parameter {held!r}: name it in target_parameters={way}"
    if not entries.is_single_string and re.search(r"[*\\|()\[\]^$+?]", entry):
        return "matches nothing: list items are names, not regular expressions; pass one string instead of a list"
    return "matches no module" + did_you_mean(entry, model.names)


def _explain_empty_selection(entries: _OptionEntries, left_out: Sequence[tuple[str, str]]) -> str:
    reasons = Counter(why for _, why in left_out if why != "no entry names it")
    listed = "; ".join(f"{n} {why}" for why, n in reasons.most_common(8))
    return f"{entries.option}: everything that {listing(map(repr, entries.keys))} matches was left out: {listed}"


def _format_first(keys: Sequence[str], text: str) -> str | None:
    return text.format(keys[0]) if keys else None


def _class_suffix(type_: str) -> str:
    return f" ({type_.rpartition('.')[2]})" if type_ else ""
