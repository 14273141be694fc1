"""Triton kernels, one family per file: jit kernels, launcher, op with a fake, and a torch reference.

Importing ``adaptc.kernels`` needs triton, and registers the ops with torch. This file lists them. Each op runs its
kernels on a GPU and its reference elsewhere.
"""

from adaptc.kernels._launch import INTERPRETED
from adaptc.kernels.dora_linear import dora_epilogue, dora_norm
from adaptc.kernels.grouped_lora import grouped_expand, grouped_lora, grouped_outer, grouped_shrink
from adaptc.kernels.grouped_rows import grouped_rows
from adaptc.kernels.lora_epilogue import lora_down, lora_up_add
from adaptc.kernels.lora_linear import FEW_ROWS, lora_linear
from adaptc.kernels.lora_siblings import lora_up_add_siblings, sibling_table_op
from adaptc.kernels.merge_weight import merge_, merge_saving_, unmerge_

__all__ = [
    "FEW_ROWS",
    "INTERPRETED",
    "dora_epilogue",
    "dora_norm",
    "grouped_expand",
    "grouped_lora",
    "grouped_outer",
    "grouped_rows",
    "grouped_shrink",
    "lora_down",
    "lora_linear",
    "lora_up_add",
    "lora_up_add_siblings",
    "merge_",
    "merge_saving_",
    "sibling_table_op",
    "unmerge_",
]
