"""Write the table of slots by which a C++ program can fill them: a short text in the metadata of a package.

``AOTIModelPackageLoader::get_metadata()`` gives it under the name :data:`METADATA_KEY`. Lines end with a newline and
have fields with tabs between them, ``-`` where a field is empty:

    adaptc_slots  1
    input     name  dtype  sizes  axes         a size that may differ has a name; axes from the outermost in memory
    constant  name                             an input that was captured as a constant, and is not passed
    site      fqn   method  scale  dtype       scale: the constant that holds the site's scale
    slot      key   constant  dtype  sizes  padded  blocks  fill  identity
    closed    fqn   why                        a site whose slots are not what files hold; load it with adaptc

A ``slot`` belongs to the site above it. ``key`` is its key in PEFT's files, without ``base_model.model.``. ``padded``
has the axes that may be shorter in a file. Such an axis is ``blocks`` blocks of equal size, and each gets ``fill`` at
its end. Where every element has the value ``identity``, the site computes the base: it fills the slots of adapters that
lack the site. Lists have commas between their numbers. examples/cpp reads the table.

The table is enough for methods whose slots are the files' own tensors. Sites of other methods are ``closed``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from adaptc.binding.binding_plan_cache import takes_file_tensors
from adaptc.packages.manifest import Input, Manifest, SlotCapacity
from adaptc.program.files.stored_sites import StoredSite
from adaptc.tables import dtype_name
from adaptc.torch_typing import is_list_or_tuple

METADATA_KEY = "adaptc_slots"
VERSION = 1


def slot_table(m: Manifest) -> str:
    """Return the table of a package. A tab or newline in a name is escaped, so that name fits no constant."""
    lines = [(METADATA_KEY, VERSION), *map(_input_line, m.inputs)]
    written_slots: set[str] = set()
    for s in m.sites:
        lines += _site_lines(s, m, written_slots)
    return "".join("\t".join(_format_field(v) for v in line) + "\n" for line in lines)


def _input_line(i: Input) -> tuple[Any, ...]:
    if i.tensor is None:
        return "constant", i.name
    return "input", i.name, dtype_name(i.tensor.dtype), i.tensor.shape, i.order


def _site_lines(s: StoredSite, m: Manifest, written_slots: set[str]) -> Iterator[tuple[Any, ...]]:
    a = s.attachment
    if reason := _reason_closed(s, m):
        yield "closed", a.fqn, reason
        return
    scale = None if a.scale_slot is None else m.rooms[a.scale_slot]
    yield "site", a.fqn, a.method.name, a.scale_slot, None if scale is None else dtype_name(scale.dtype)
    for name, slot in a.method.slots(s.op).items():
        fqn = a.slots[name]
        if fqn not in written_slots:
            written_slots.add(fqn)
            yield "slot", a.file_key(name, slot), fqn, *_capacity_fields(m.rooms[fqn], slot.free)


def _capacity_fields(r: SlotCapacity, free_axes: Iterable[int]) -> tuple[Any, ...]:
    padding = r.padding
    if padding is None:
        return dtype_name(r.dtype), r.shape, None, None, None, r.identity
    return dtype_name(r.dtype), r.shape, tuple(free_axes), padding.blocks, padding.fill, r.identity


def _reason_closed(s: StoredSite, m: Manifest) -> str:
    """Return why a file's tensors cannot be copied to the slots of a site as they are; '' where they can."""
    a = s.attachment
    if not takes_file_tensors(a.method, s.op):
        return f"the method {a.method.name} makes slots of what files hold"
    if any(m.rooms[fqn].unread for fqn in a.tensor_names):
        return "who makes a cache reads its slots, and not the code"
    if a.fqn in m.bases:
        return "the adapter changes the base weight"
    return ""


def _format_field(value: Any) -> str:
    if value is None or value == () or value == []:
        return "-"
    text = ",".join(map(str, value)) if is_list_or_tuple(value) else str(value)
    return text.replace("\t", "\\t").replace("\n", "\\n")
