"""List the adapters that lie by name in the file of a program or a package, for the reports of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptc.binding.stored_adapters import StoredAdapters
from adaptc.tables import Column, Table, format_bytes


def stored_adapters_data(stored: StoredAdapters) -> dict[str, Mapping[str, Any]]:
    """Return name -> ``peft_type``, the numbers of ``tensors`` and ``parameters``, and ``bytes``, of each adapter."""
    return {
        name: {
            "peft_type": (data.config or {}).get("peft_type", ""),
            "tensors": len(data.tensors),
            "parameters": sum(t.numel() for t in data.tensors.values()),
            "bytes": data.nbytes,
        }
        for name, data in stored.items()
    }


def stored_adapters_table(stored: StoredAdapters) -> Table:
    """Return a table with a row for each adapter; it is empty where the file has none."""
    rows = [
        (name, row["peft_type"], row["tensors"], f"{row['parameters']:,d}", format_bytes(row["bytes"]))
        for name, row in stored_adapters_data(stored).items()
    ]
    numbers = [Column(name, right=True, no_wrap=True) for name in ("tensors", "parameters", "size")]
    return Table(["adapter in the file", Column("method", no_wrap=True), *numbers], rows)
