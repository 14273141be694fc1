"""Triton kernels, one family per file: jit kernels, launcher, op with a fake, and a torch reference.

Importing ``adaptc.kernels`` needs triton, and registers the ops with torch. This file lists them. Each op runs its
kernels on a GPU and its reference elsewhere.

In a checkout this folder is also what Python finds first as ``kernels``, the name of a distribution of Hugging Face
that transformers imports. Imported by that name, this file gives Python the distribution instead.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import sys
    from pathlib import Path

    _checkout = Path(__file__).resolve().parent.parent
    _other_entries = [entry for entry in sys.path if Path(entry).resolve() != _checkout]
    _spec = importlib.machinery.PathFinder.find_spec(__name__, _other_entries)
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
else:
    from adaptc.kernels._launch import INTERPRETED
    from adaptc.kernels._packed_products import FEW_ROWS
    from adaptc.kernels.dora_linear import dora_epilogue, dora_norm
    from adaptc.kernels.grouped_lora import grouped_expand, grouped_lora, grouped_outer, grouped_shrink
    from adaptc.kernels.grouped_rows import grouped_rows, grouped_rows_in_place
    from adaptc.kernels.lora_epilogue import lora_down, lora_up_add
    from adaptc.kernels.lora_linear import lora_linear
    from adaptc.kernels.merge_weight import merge_, merge_saving_, unmerge_
    from adaptc.kernels.packed_lora import packed_lora, packed_lora_direct, sibling_table_op

__all__ = [
    "FEW_ROWS",
    "INTERPRETED",
    "dora_epilogue",
    "dora_norm",
    "grouped_expand",
    "grouped_lora",
    "grouped_outer",
    "grouped_rows",
    "grouped_rows_in_place",
    "grouped_shrink",
    "lora_down",
    "lora_linear",
    "lora_up_add",
    "merge_",
    "merge_saving_",
    "packed_lora",
    "packed_lora_direct",
    "sibling_table_op",
    "unmerge_",
]
