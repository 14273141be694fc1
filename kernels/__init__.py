"""Triton kernels, one family per file: jit kernels, launcher, op with a fake, and a torch reference.

Importing ``adaptc.kernels`` needs triton, and registers the ops with torch. This file lists them. Each op runs its
kernels on a GPU and its reference elsewhere.
"""

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
