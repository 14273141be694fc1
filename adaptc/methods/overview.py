"""Find out what each method supports, for the table in the guide and in ``adaptc methods``.

Each method of the registry is asked at sample layers; only these layers are written by hand. The first paragraph of a
method's module docstring, ``Name: meaning (source).``, gives three of the columns.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptc.errors import AdaptcError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.program_config import ProgramConfig
from adaptc.methods._shared.refused import UNSUPPORTED_METHODS
from adaptc.methods._shared.registry import CONFIGS, config_class
from adaptc.methods._shared.saved_modules import TokenRows, TrainedParameter
from adaptc.methods._shared.stacked import PerExpertMethod
from adaptc.methods.prompt.attention_config import AttentionConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from adaptc.tables import render_table

aten = torch.ops.aten

#: heading of a column -> sample ops, with sizes that every default block size divides
SAMPLE_OPS: dict[str, tuple[Op, ...]] = {
    "linear": (Op("linear", (512, 768), aten.linear.default), Op("addmm", (512, 768), aten.addmm.default)),
    "embedding": (Op("embedding", (512, 768), aten.embedding.default, (-1, False, False)),),
    "conv": (
        Op("conv1d", (512, 768, 3), aten.conv1d.default, ((1,), (0,), (1,), 1)),
        Op("conv2d", (512, 256, 3, 3), aten.conv2d.default, ((1, 1), (0, 0), (1, 1), 1)),
        Op("conv3d", (512, 256, 3, 1, 1), aten.conv3d.default, ((1, 1, 1), (0, 0, 0), (1, 1, 1), 1)),
    ),
    "grouped conv": (Op("conv2d", (512, 256, 3, 3), aten.conv2d.default, ((1, 1), (0, 0), (1, 1), 2)),),
    "any other": (Op("weight", (512, 768)), Op("conv_transpose", (512, 768, 3))),
    "experts": (Op("experts", (2, 512, 768)),),
}


@dataclass(frozen=True)
class MethodRow:
    """A row of the table: a method.

    ``kinds``: heading -> "around" (the layer), "weight" (in front of it) or "" where the method is refused; empty for a
    method of the program as a whole. ``rank``: whether a swap may change a size. ``shared``: whether sites share slots.
    ``method``, ``meaning`` and ``source`` are read from the method's module docstring.
    """

    config: str
    method: str
    meaning: str
    source: str
    kinds: dict[str, str]
    rank: bool
    shared: bool


def method_rows() -> list[MethodRow]:
    """Return a row for each sample of each registered config, in the registry's order: first methods of layers."""
    classes = list(dict.fromkeys(map(config_class, CONFIGS)))
    layers = [_layer_row(c, sample) for c in classes if issubclass(c, TargetedConfig) for sample in c.samples]
    return layers + [_program_row(c) for c in classes if issubclass(c, (ProgramConfig, AttentionConfig))]


def _program_row(cls: type[ProgramConfig | AttentionConfig]) -> MethodRow:
    config = cls(**cls.samples[0])
    kind = "embedding" if issubclass(cls, ProgramConfig) else "linear"
    method = config.method(kind, kind)
    free = any(s.free for s in method.slots(SAMPLE_OPS[kind][0]).values())
    return MethodRow(_constructor_text(cls, cls.samples[0]), *_parse_docstring(method.__module__), {}, free, False)


def _layer_row(cls: type[TargetedConfig], sample: Mapping[str, Any]) -> MethodRow:
    config = cls(target_modules=["layer"], **sample)
    method = type(config.method("layer", "linear"))
    # Several configs share Whole and TokenRows: the module of the config says what the method does there.
    home = (
        CONFIGS[config.peft_type].partition(":")[0]
        if issubclass(method, (TrainedParameter, TokenRows))
        else method.__module__
    )
    title, meaning, source = _parse_docstring(home)
    kinds: dict[str, str] = {}
    has_free_size = shared = False
    for heading, ops in SAMPLE_OPS.items():
        forms: list[str] = []
        if config.target_unit == "rows":
            ops = tuple(op for op in ops if len(op.shape) == 2)
        for op in ops:
            method = _method_for(config, op)
            if method is None:
                break
            slots = method.slots(op).values()
            has_free_size, shared = has_free_size or any(s.free for s in slots), shared or any(s.shared for s in slots)
            forms.append("around" if method.has_apply_form(op) else "weight")
        kinds[heading] = "" if not ops or len(forms) < len(ops) else "/".join(dict.fromkeys(forms))
    return MethodRow(_constructor_text(cls, sample), title, meaning, source, kinds, has_free_size, shared)


def _constructor_text(cls: type, sample: Mapping[str, Any]) -> str:
    return f"{cls.__name__}({', '.join(f'{k}={v!r}' for k, v in sample.items())})" if sample else cls.__name__


def _method_for(config: TargetedConfig, op: Op) -> Method | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = config.method("layer", op.kind)
            if op.experts and not method.stacks:
                method = PerExpertMethod(method)
            method = method.sizes.specialized_for(op)
            method = method.sharing.settle_shared_sizes([(method, op)])[0]
            method.slots(op)
    except AdaptcError:
        return None
    return method


def _parse_docstring(module: str) -> tuple[str, str, str]:
    """Return name, meaning and arXiv number from the module's docstring, ``Name: meaning (source).``"""
    text = " ".join((inspect.getdoc(importlib.import_module(module)) or "").split("\n\n")[0].split())
    title, _, rest = text.partition(": ")
    found = re.search(r"(?:arXiv )?(\d{4}\.\d{5})", rest)
    meaning = re.sub(r"\s*\([^()]*(\([^()]*\)[^()]*)*\)\.?$", "", rest).rstrip(".")
    return title, meaning, found.group(1) if found else ""


def render_markdown() -> str:
    """Return the overview as two Markdown tables: methods of layers, and methods of the program as a whole."""
    rows = method_rows()
    parts = [
        _markdown_table([r for r in rows if r.kinds], list(SAMPLE_OPS)),
        _markdown_table([r for r in rows if not r.kinds], []),
    ]
    between = "These speak of the program, whose token embedding or attentions they find, and not of single weights:"
    return f"\n\n{between}\n\n".join(parts)


def _markdown_table(rows: Sequence[MethodRow], kinds: Sequence[str]) -> str:
    heads = ["method", "config", "meaning", *kinds, "other sizes by swap", "paper"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        link = f"[{r.source}](https://arxiv.org/abs/{r.source})" if r.source else ""
        cells = [r.method, f"`{r.config}`", r.meaning.replace("|", "\\|"), *(v or "-" for v in r.kinds.values())]
        lines.append("| " + " | ".join([*cells, "yes" if r.rank else "no", link]) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class CoverageRow:
    """A method type of PEFT. ``config`` is the config's name here, "-" for a type that is refused.

    ``refused`` maps what is refused to the reason: options of the config, or the type's own name.
    """

    peft_type: str
    config: str
    refused: dict[str, str]


def coverage_rows() -> list[CoverageRow]:
    """Return a row for each method type of PEFT that is known here, in alphabetical order."""
    rows = [CoverageRow(kind, "-", {kind: why}) for kind, why in UNSUPPORTED_METHODS.items()]
    for kind in CONFIGS:
        cls = config_class(kind)
        rows.append(CoverageRow(kind, cls.__name__, dict(cls.unsupported_fields)))
    return sorted(rows, key=lambda row: row.peft_type)


def render_coverage(width: int) -> str:
    """Return the method types of PEFT and what is refused of each, as plain text ``width`` characters wide."""
    cells = [
        (row.peft_type, row.config, "; ".join(f"{name}: {why}" for name, why in row.refused.items()) or "all options")
        for row in coverage_rows()
    ]
    return render_table(["type in PEFT", "config", "refused, and why"], cells, width=width)


def render_text(width: int) -> str:
    """Return the overview as a table of plain text, ``width`` characters wide."""
    rows = [
        (r.config, r.meaning, *(r.kinds.get(k) or "-" for k in SAMPLE_OPS), "yes" if r.rank else "no")
        for r in method_rows()
    ]
    return render_table(["config", "meaning", *SAMPLE_OPS, "other sizes"], rows, width=width)
