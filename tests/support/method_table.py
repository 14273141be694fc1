"""The table of methods: one entry per method and variant, which the generic checks cross with the kinds of layers.

To add a method, add an entry. ``tests.support.method_checks`` holds what must be true of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tests.support.block_diagonal  # noqa: F401  # for BOFT with several factors
from tests.support.layer_table import LAYERS


@dataclass(frozen=True)
class Entry:
    """A method in one variant.

    ``config``: the fields of its config but for the targets, for adaptc and PEFT alike; ``cls`` the name of both
    classes. ``peft``: the layers on which PEFT's own is the oracle; on all others but the ``refused_layers`` ones it is
    the layer with the weight that the method's ``has_weight_form`` makes. ``other_config``: fields in which another
    adapter differs that must run through the same code. ``widths``: inputs and outputs of the layers.
    ``is_identity_at_init``: whether a fresh adapter leaves the layer as it is. ``random_values``: legal random values
    of a tensor by its key, where normal ones are not. ``tolerance``: for methods that PEFT computes in float32 whatever
    the dtype. ``tested_layers``: layers enough for a variant of a method that another entry has on all of them.
    ``has_weight_form``: whether it means something for a weight, so that it can be merged; ``rows``: whether a row of a
    batch depends on that row alone. ``follows_from_base``: whether tensors that no file holds follow from the base
    weight, so that an adapter is another one where the base is rounded.
    """

    name: str
    cls: str
    config: Mapping[str, Any]
    peft: tuple[str, ...] = ("linear", "linear_nobias")
    refused_layers: tuple[str, ...] = ()
    other_config: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, int] = (15, 21)
    is_identity_at_init: bool = True
    random_values: Callable[[str, Tensor], Tensor] | None = None
    tolerance: float = 1e-9
    tested_layers: tuple[str, ...] = tuple(LAYERS)
    has_weight_form: bool = True
    follows_from_base: bool = False
    rows: bool = True

    def layers(self) -> list[str]:
        return [n for n in self.tested_layers if n not in self.refused_layers]

    def random_tensor(self, key: str, like: Tensor) -> Tensor:
        """Random values for a tensor of the adapter, in float64."""
        if self.random_values is not None:
            return self.random_values(key, like)
        return torch.randn(like.shape, dtype=torch.float64) * 0.5


CONVS = ("conv1d", "conv1d_same", "conv2d", "conv2d_1x1", "conv2d_odd", "conv2d_circular", "conv2d_groups", "conv3d")
#: where methods for matrices alone are PEFT's
MATRICES = ("linear", "linear_nobias", "addmm")
#: where LoHa and LoKr are PEFT's
LYCORIS_PEFT_LAYERS = (
    *("linear", "linear_nobias", "conv1d", "conv1d_same"),
    *("conv2d", "conv2d_1x1", "conv2d_odd", "conv2d_groups"),
)
#: convolutions whose kernels may have factors of their own
KERNELS = ("conv1d", "conv2d_odd", "conv2d_groups", "conv3d", "conv_transpose")
#: where IA3 is PEFT's
IA3_PEFT_LAYERS = (
    *("linear", "linear_nobias", "addmm"),
    *("conv2d", "conv2d_1x1", "conv2d_odd", "conv2d_circular", "conv2d_groups", "conv3d"),
)

#: layers whose inputs, outputs and weights are turned
ROTATION_LAYERS = ("linear", "embedding", "conv2d_1x1", "conv2d_groups", "experts")


def distinct_logits(key: str, like: Tensor) -> Tensor:
    """Logits that rounding keeps in their order, since another order is another choice of vectors."""
    if "logits" not in key:
        return torch.randn(like.shape, dtype=torch.float64) * 0.5
    return torch.rand(like.shape).argsort(-1).double() * 0.25


def near_first_values(key: str, like: Tensor) -> Tensor:
    """Values near the first ones: FRoD's basis, and its columns where the weight has none, follow from rounding."""
    return like.double() + torch.randn(like.shape, dtype=torch.float64) * 0.03


#: enough for methods that see of a layer but the matrix its weight is
MATRIX_VIEW_LAYERS = (
    "linear",
    "addmm",
    "embedding",
    "conv2d_odd",
    "conv2d_groups",
    "conv_transpose",
    "functional",
    "experts",
)

ENTRIES: list[Entry] = [
    Entry(
        "lora",
        "LoraConfig",
        {"r": 6, "lora_alpha": 5},
        peft=("linear", "linear_nobias", "addmm", "embedding", "conv1d", "conv2d", "conv2d_1x1", "conv3d"),
        other_config={"r": 3, "lora_alpha": 7, "use_rslora": True},
    ),
    Entry(
        "dora",
        "LoraConfig",
        {"r": 6, "lora_alpha": 5, "use_dora": True},
        peft=("linear", "linear_nobias", "addmm", "embedding", "conv1d", "conv2d", "conv2d_1x1", "conv3d"),
        other_config={"r": 3, "lora_alpha": 7, "use_rslora": True},
    ),
    # PEFT has it at GPTQ's layers alone, which test_qalora.py builds around plain ones.
    Entry(
        "qalora",
        "LoraConfig",
        {"r": 6, "lora_alpha": 5, "use_qalora": True, "qalora_group_size": 3},
        peft=(),
        refused_layers=("embedding", *CONVS, "conv_transpose"),
        other_config={"r": 3, "lora_alpha": 7, "use_rslora": True},
    ),
    Entry(
        "bdlora",
        "LoraConfig",
        {"r": 6, "lora_alpha": 5, "use_bdlora": {"target_modules_bd_a": ["layer", "other"], "nblocks": 3}},
        refused_layers=("embedding", *CONVS, "conv_transpose"),
        other_config={"r": 9, "lora_alpha": 7, "use_rslora": True},
    ),
    Entry(
        "bdlora_up",
        "LoraConfig",
        {"r": 6, "lora_alpha": 5, "use_bdlora": {"target_modules_bd_b": ["layer", "other"], "nblocks": 3}},
        refused_layers=("embedding", *CONVS, "conv_transpose"),
        other_config={"r": 3, "lora_alpha": 7, "init_lora_weights": False},
    ),
    # PEFT decomposes the weight in float32.
    Entry(
        "kasa",
        "LoraConfig",
        {"r": 6, "lora_alpha": 5, "kasa_config": {}},
        refused_layers=("conv2d_groups",),
        other_config={"r": 3, "lora_alpha": 7, "use_rslora": True},
        is_identity_at_init=False,
        tolerance=1e-5,
        follows_from_base=True,
    ),
    Entry(
        "velora",
        "LoraConfig",
        {"r": 6, "lora_alpha": 5, "velora_config": {"num_groups": 4, "init_type": "random"}},
        peft=MATRICES,
        refused_layers=("embedding", *CONVS, "conv_transpose", "functional", "experts"),
        other_config={"r": 3, "lora_alpha": 7, "velora_config": {"num_groups": 2, "scale": 3.0}},
    ),
    Entry(
        "monteclora",
        "LoraConfig",
        {"r": 6, "lora_alpha": 5, "monteclora_config": {"num_samples": 3, "sample_scaler": 0.2, "buffer_size": 150}},
        peft=MATRICES,
        refused_layers=("embedding", *CONVS, "conv_transpose", "functional", "experts"),
        other_config={"r": 3, "lora_alpha": 7, "monteclora_config": {"num_samples": 5}},
    ),
    Entry(
        "adalora",
        "AdaLoraConfig",
        {"init_r": 6, "lora_alpha": 5, "total_step": 10},
        peft=("linear", "linear_nobias", "addmm", "conv2d", "conv2d_1x1", "conv2d_odd"),
        other_config={"init_r": 3, "lora_alpha": 0},
    ),
    Entry(
        "oft",
        "OFTConfig",
        {"oft_block_size": 3},
        peft=("linear", "linear_nobias", "embedding", "conv2d_1x1"),
        other_config={"module_dropout": 0.1, "init_weights": False},
    ),
    Entry(
        "oft_cayley",
        "OFTConfig",
        {"r": 3, "oft_block_size": 0, "use_cayley_neumann": False},
        peft=("linear", "embedding", "conv2d_1x1"),
        tested_layers=ROTATION_LAYERS,
    ),
    Entry(
        "oft_shared",
        "OFTConfig",
        {"oft_block_size": 3, "block_share": True, "num_cayley_neumann_terms": 7},
        peft=("linear", "embedding", "conv2d_1x1"),
        tested_layers=ROTATION_LAYERS,
    ),
    Entry(
        "oft_constrained",
        "OFTConfig",
        {"oft_block_size": 3, "coft": True, "eps": 0.25},
        peft=("linear", "embedding", "conv2d_1x1"),
        tested_layers=ROTATION_LAYERS,
        tolerance=1e-7,  # PEFT rounds the radius to float32
    ),
    Entry(
        "boft",
        "BOFTConfig",
        {"boft_block_size": 3},
        peft=("linear", "conv2d_1x1"),
        other_config={"boft_dropout": 0.1, "init_weights": False},
        tested_layers=ROTATION_LAYERS,
    ),
    Entry(
        "boft_butterfly",
        "BOFTConfig",
        {"boft_block_size": 0, "boft_block_num": 6, "boft_n_butterfly_factor": 2},
        peft=("linear", "conv2d", "conv2d_1x1"),
        widths=(24, 36),
    ),
    Entry(
        "hra",
        "HRAConfig",
        {"r": 4},
        peft=("linear", "linear_nobias", "conv2d", "conv2d_1x1"),
        other_config={"r": 6},
    ),
    Entry(
        "hra_gs",
        "HRAConfig",
        {"r": 4, "apply_GS": True, "init_weights": False},
        peft=("linear", "conv2d_1x1"),
        tested_layers=ROTATION_LAYERS,
        other_config={"r": 3},
        is_identity_at_init=False,
    ),
    # PEFT refuses weights in float64, so test_psoft.py compares with it in float32.
    Entry(
        "psoft",
        "PsoftConfig",
        {"r": 4},
        peft=(),
        other_config={"ab_svd_init": "pissa_init", "init_weights": False},
        follows_from_base=True,
    ),
    Entry(
        "psoft_series",
        "PsoftConfig",
        {"r": 5, "use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.75},
        peft=(),
        other_config={"psoft_svd": "lowrank", "random_seed": 3},
        follows_from_base=True,
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "psoft_free",
        "PsoftConfig",
        {"r": 3, "psoft_orth": False, "psoft_mag_b": False, "ab_svd_init": "pissa_init"},
        peft=(),
        other_config={"init_weights": False},
        follows_from_base=True,
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "osf",
        "OSFConfig",
        {"effective_rank": 9},
        other_config={"effective_rank": 0.5, "init_weights": False},
        follows_from_base=True,
    ),
    Entry(
        "osf_wide",
        "OSFConfig",
        {"rank_pattern": {"ay": 0.7}},
        widths=(21, 15),
        other_config={"rank_pattern": {"layer": 3}},
        follows_from_base=True,
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    # PEFT rounds LoHa's alpha / r to float32, and ignores the padding mode of convolutions.
    Entry(
        "loha",
        "LoHaConfig",
        {"r": 4, "alpha": 6},
        peft=LYCORIS_PEFT_LAYERS,
        other_config={"r": 3, "alpha": 7, "rank_dropout": 0.2},
    ),
    Entry(
        "loha_kernel",
        "LoHaConfig",
        {"r": 4, "alpha": 6, "use_effective_conv2d": True},
        peft=(),  # where PEFT's gradients of hada_w1_a and hada_w2_a are those of other tensors
        other_config={"r": 3, "init_weights": False},
        tested_layers=KERNELS,
    ),
    Entry(
        "lokr",
        "LoKrConfig",
        {"r": 2, "alpha": 5},
        peft=LYCORIS_PEFT_LAYERS,
        other_config={"r": 3, "alpha": 7, "module_dropout": 0.2},
    ),
    Entry(
        "lokr_whole",
        "LoKrConfig",
        {"r": 4, "alpha": 7},
        peft=LYCORIS_PEFT_LAYERS,
        other_config={"r": 9, "init_weights": "lycoris"},
        tested_layers=("linear", "embedding", "conv2d", *KERNELS),
    ),
    Entry(
        "lokr_both",
        "LoKrConfig",
        {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 5},
        peft=LYCORIS_PEFT_LAYERS,
        other_config={"r": 1, "init_weights": False, "rank_dropout": 0.2, "rank_dropout_scale": True},
        tested_layers=("linear", "embedding", "conv2d", "experts"),
    ),
    Entry(
        "lokr_kernel",
        "LoKrConfig",
        {"r": 2, "alpha": 5, "use_effective_conv2d": True, "init_weights": "lycoris"},
        peft=LYCORIS_PEFT_LAYERS,
        other_config={"r": 3, "init_weights": True},
        tested_layers=KERNELS,
    ),
    Entry(
        "ia3", "IA3Config", {"feedforward_modules": []}, peft=IA3_PEFT_LAYERS, other_config={"init_ia3_weights": False}
    ),
    Entry("ia3_inputs", "IA3Config", {"feedforward_modules": "layer.*"}, peft=IA3_PEFT_LAYERS),
    Entry("road", "RoadConfig", {"group_size": 14}, widths=(15, 42), other_config={"init_weights": False}),
    Entry(
        "road_2",
        "RoadConfig",
        {"variant": "road_2", "group_size": 6},
        widths=(15, 42),
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "road_4",
        "RoadConfig",
        {"variant": "road_4", "group_size": 2, "init_weights": False},
        widths=(15, 42),
        tested_layers=MATRIX_VIEW_LAYERS,
        is_identity_at_init=False,
    ),
    # PEFT cannot merge it into a layer without a bias.
    Entry(
        "beft",
        "BeftConfig",
        {},
        peft=("linear",),
        refused_layers=("embedding", "conv_transpose", "functional", "experts"),
        other_config={"init_weights": False},
    ),
    Entry("miss", "MissConfig", {"r": 4}, other_config={"r": 7, "init_weights": False}),
    Entry(
        "miss_mini",
        "MissConfig",
        {"r": 5, "init_weights": "mini", "mini_r": 7},
        other_config={"r": 2},
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry("miss_bat", "MissConfig", {"r": 3, "init_weights": "bat"}, tested_layers=MATRIX_VIEW_LAYERS),
    Entry(
        "gralora",
        "GraloraConfig",
        {"r": 6, "alpha": 5, "gralora_k": 3},
        peft=MATRICES,
        other_config={"r": 9, "alpha": 7, "init_weights": False},
    ),
    Entry(
        "gralora_hybrid",
        "GraloraConfig",
        {"r": 6, "hybrid_r": 4, "alpha": 5, "gralora_k": 3},
        peft=MATRICES,
        other_config={"r": 3, "hybrid_r": 5},
        tested_layers=(*MATRIX_VIEW_LAYERS, "linear_nobias"),
    ),
    Entry(
        "vera",
        "VeraConfig",
        {"r": 6},
        peft=MATRICES,
        other_config={"r": 3, "projection_prng_key": 7, "save_projection": False, "d_initial": 0.3},
    ),
    Entry(
        "vera_drawn",
        "VeraConfig",
        {"r": 4, "save_projection": False},
        peft=MATRICES,
        other_config={"init_weights": False},
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "pvera",
        "PveraConfig",
        {"r": 6},
        peft=MATRICES,
        refused_layers=("conv_transpose", "functional", "experts"),
        other_config={"r": 3, "projection_prng_key": 7, "save_projection": False, "d_initial": 0.3},
    ),
    Entry(
        "pvera_drawn",
        "PveraConfig",
        {"r": 4, "save_projection": False},
        peft=MATRICES,
        refused_layers=("conv_transpose", "functional", "experts"),
        other_config={"init_weights": False},
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "randlora",
        "RandLoraConfig",
        {"r": 4, "randlora_alpha": 5},
        peft=MATRICES,
        other_config={"randlora_alpha": 7, "projection_prng_key": 3, "very_sparse": True},
    ),
    Entry(
        "randlora_drawn",
        "RandLoraConfig",
        {"r": 7, "randlora_alpha": 3, "sparse": True, "save_projection": False},
        peft=MATRICES,
        widths=(21, 15),
        other_config={"save_projection": True, "init_weights": False},
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "unilora",
        "UniLoraConfig",
        {"r": 4, "theta_d_length": 37},
        peft=MATRICES,
        other_config={"r": 3, "proj_seed": 7, "save_indices": True},
        is_identity_at_init=False,
    ),
    Entry(
        "unilora_indices",
        "UniLoraConfig",
        {"r": 3, "theta_d_length": 500, "save_indices": True, "init_weights": False},
        peft=MATRICES,
        other_config={"r": 5, "proj_seed": 7, "save_indices": False},
        is_identity_at_init=False,
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "frod",
        "FrodConfig",
        {"sparse_rate": 0.1, "progressbar": False},
        peft=MATRICES,
        refused_layers=("experts",),
        other_config={"projection_prng_key": 7, "save_projection": False, "regularization_alpha": 0.1},
        random_values=near_first_values,
        follows_from_base=True,
        tolerance=1e-6,  # U and l are rounded to float32
    ),
    Entry(
        "frod_drawn",
        "FrodConfig",
        {"sparse_rate": 0.3, "save_projection": False, "progressbar": False},
        peft=MATRICES,
        refused_layers=("experts",),
        widths=(21, 15),
        other_config={"projection_prng_key": 7, "save_projection": True, "init_weights": False},
        random_values=near_first_values,
        follows_from_base=True,
        tolerance=1e-6,
        tested_layers=("linear", "addmm", "embedding", "functional"),
    ),
    Entry(
        "tinylora",
        "TinyLoraConfig",
        {"r": 3, "u": 11},
        peft=(*MATRICES, "embedding"),
        other_config={"r": 2, "projection_seed": 7, "save_projection": False, "weight_tying": 0.5},
    ),
    Entry(
        "tinylora_drawn",
        "TinyLoraConfig",
        {"r": 17, "u": 5, "save_projection": False, "init_weights": "uniform"},
        peft=MATRICES,  # PEFT says that an embedding's projections are missing, though they need not be in the file
        other_config={"r": 4, "init_weights": False},
        is_identity_at_init=False,
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "vblora",
        "VBLoRAConfig",
        {"r": 4, "num_vectors": 11, "vector_length": 3, "topk": 2},
        peft=MATRICES,
        other_config={"r": 3, "init_logits_std": 0.7, "save_only_topk_weights": True},
        is_identity_at_init=False,
        random_values=distinct_logits,
    ),
    Entry(
        "deft",
        "DeftConfig",
        {"r": 4, "alpha": 6},
        peft=MATRICES,
        other_config={"r": 7, "alpha": None, "init_weights": False},
        tolerance=1e-5,
    ),
    Entry(
        "deft_qr",
        "DeftConfig",
        {"r": 4, "decomposition_method": "qr"},
        peft=MATRICES,
        other_config={"r": 3, "alpha": 5},
        tolerance=1e-5,
        tested_layers=(*MATRIX_VIEW_LAYERS, "linear_nobias"),
    ),
    Entry(
        "deft_para",
        "DeftConfig",
        {"r": 4, "para": True},
        peft=MATRICES,
        other_config={"r": 6},
        is_identity_at_init=False,
        tolerance=1e-5,
        tested_layers=(*MATRIX_VIEW_LAYERS, "linear_nobias"),
    ),
    Entry("glora", "GloraConfig", {"r": 4}, other_config={"r": 7, "init_weights": False}),
    Entry(
        "glora_vector",
        "GloraConfig",
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        other_config={"init_weights": False},
        tested_layers=(*MATRIX_VIEW_LAYERS, "linear_nobias"),
    ),
    Entry(
        "glora_bias",
        "GloraConfig",
        {"r": 3, "config_A_B": "none", "config_D_E": "vector"},
        peft=("linear",),
        other_config={"r": 5},
        tested_layers=("linear", "addmm", "conv2d_odd"),
    ),
    Entry(
        "glora_weight",
        "GloraConfig",
        {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        tested_layers=("linear", "linear_nobias", "embedding"),
    ),
    Entry(
        "fourierft",
        "FourierFTConfig",
        {"n_frequency": 40},
        peft=MATRICES,
        other_config={"n_frequency": 23, "scaling": 7.0, "random_loc_seed": 5, "init_weights": True},
        is_identity_at_init=False,
        tolerance=1e-5,
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "waveft",
        "WaveFTConfig",
        {"n_frequency": 40},
        peft=MATRICES,
        other_config={"n_frequency": 23, "scaling": 7.0, "random_loc_seed": 5, "init_weights": False},
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "waveft_sym4",
        "WaveFTConfig",
        {"n_frequency": 40, "wavelet_family": "sym4"},
        peft=MATRICES,
        other_config={"n_frequency": 50, "wavelet_family": "db4"},
        tested_layers=("linear", "conv2d_odd"),
    ),
    Entry(
        "waveft_sparse",
        "WaveFTConfig",
        {"n_frequency": 40, "use_idwt": False},
        peft=MATRICES,
        other_config={"n_frequency": 50, "wavelet_family": "db4"},
        tested_layers=("linear", "conv2d_odd"),
    ),
    Entry(
        "c3a",
        "C3AConfig",
        {"block_size": 3},
        other_config={"init_weights": True},
        is_identity_at_init=False,
        tolerance=1e-5,
        tested_layers=(*MATRIX_VIEW_LAYERS, "linear_nobias"),
    ),
    Entry(
        "shira",
        "ShiraConfig",
        {"r": 3, "random_seed": 4},
        other_config={"r": 2, "random_seed": 9, "init_weights": False},
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    # PEFT ignores the padding mode of convolutions, and refuses groups.
    Entry(
        "hira",
        "HiraConfig",
        {"r": 4},
        peft=(
            *("linear", "linear_nobias", "addmm", "embedding"),
            *("conv1d", "conv1d_same", "conv2d", "conv2d_1x1", "conv2d_odd", "conv3d"),
        ),
        other_config={"r": 7, "init_weights": "gaussian"},
    ),
    Entry(
        "delora",
        "DeloraConfig",
        {"r": 4, "delora_lambda": 3},
        other_config={"r": 7, "delora_lambda": 2.5, "init_weights": False},
    ),
    Entry(
        "peanut",
        "PeanutConfig",
        {"r": 4, "scaling": 0.7},
        other_config={"r": 7, "scaling": 1.3, "init_weights": False},
    ),
    Entry(
        "peanut_deep",
        "PeanutConfig",
        {"r": 5, "depth": 2, "act_fn": "gelu", "scaling": 1.5},
        other_config={"r": 3, "init_weights": False},
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    Entry(
        "supertuning",
        "SupertuningConfig",
        {"sparsity": 0.9},
        other_config={"sparsity": 0.8, "select_top": False, "save_precomputed_indices": False, "init_weights": False},
        tested_layers=(*MATRIX_VIEW_LAYERS, "linear_nobias"),
    ),
    Entry(
        "supertuning_hybrid",
        "SupertuningConfig",
        {"sparsity": 0.9, "select_top": False, "r": 4},
        other_config={"r": 3, "lora_alpha": 5.0, "sparsity": 0.7},
        tested_layers=MATRIX_VIEW_LAYERS,
    ),
    # PEFT has it only beside scikit-learn, and other slots: test_adamss.py compares with it.
    Entry(
        "adamss",
        "AdamssConfig",
        {"r": 6, "num_subspaces": 3, "subspace_rank": 2},
        peft=(),
        refused_layers=("experts",),
        other_config={"r": 100, "num_subspaces": 4, "subspace_rank": 3, "random_seed": 5, "init_weights": None},
        follows_from_base=True,
    ),
    Entry(
        "lily",
        "LilyConfig",
        {"r": 4, "num_B": 3, "scaling": 0.7},
        refused_layers=tuple(n for n in LAYERS if n not in MATRICES),
        other_config={"r": 7, "stride_A": 2, "scaling": 1.3, "init_weights": False},
        has_weight_form=False,
        rows=False,
    ),
    # PEFT forgets the bias of a linear layer whose rows are trained.
    Entry(
        "trainable_tokens",
        "TrainableTokensConfig",
        {"token_indices": [2, 5, 11]},
        peft=("linear_nobias", "embedding"),
        refused_layers=(*CONVS, "conv_transpose", "experts"),
        other_config={"token_indices": [1, 5], "init_weights": False},
    ),
]

BY_NAME = {e.name: e for e in ENTRIES}
