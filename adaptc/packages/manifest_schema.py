"""Define the form of a package's manifest, which a file's fields are checked against."""

from __future__ import annotations

from typing import Any

from adaptc.program.adaptation import ATTACHMENT
from adaptc.pt2_files.json_schema import Each, Length, Maybe, Option

_CALLED: dict[str, Any] = {
    "inputs": [
        {
            "name": str,
            "tensor": Maybe({"dtype": str, "shape": [(Length, str)]}),
            "constant": object,
            "order": [Length],
            "written": Option(bool),
            "bounds": Option(Maybe([int])),
        }
    ],
    "ranges": Each([Maybe(int)]),
    "guards": Option([str]),
}
#: the form of a manifest; a form is a type, a list of one form, or an object of exactly these fields
FORM: dict[str, Any] = {
    "format": Length,
    "device": str,
    "torch": str,
    "header": dict,  # see adaptc.program.adaptation
    **_CALLED,
    "parts": Option(Each({**_CALLED, "outputs": [str]})),
    "sites": [
        {
            "attachment": ATTACHMENT,
            "op": {"kind": str, "shape": [Length], "target": Maybe(str), "rest": list, "bound": Option([str])},
            "shape": [Length],
            "dtype": str,
        }
    ],
    "rooms": Each(
        {
            "shape": [Length],
            "dtype": str,
            "padding": Maybe({"blocks": Length, "fill": (int, float)}),
            "identity": Maybe((int, float, bool)),
            "unread": Option(bool),
        }
    ),
    "bases": [str],
    "products": Option([{"kind": str, "rows": str, "why": str, "count": Length}]),
    "bank": Option(Maybe({"count": Length, "names": [str]})),
    "hashes": Each(str),
}
