"""Which methods are compared, and which option of each sets how many parameters it trains.

Names and options are those of the benchmarks. Where a method has an option for its size, the runs take the value in
``values`` whose number of trained parameters is nearest to the budget of the task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.method_options import METHODS

_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
_COUNTS = tuple(sorted(n << k for n in (2, 3) for k in range(4, 17)))
_SPARSITY = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995)


@dataclass(frozen=True)
class Compared:
    """A method as it is compared.

    ``options``: of its config, but for the targets. ``sized_by``: the option that sets its size, or none, and
    ``values`` of it. ``places``: what it adapts, "layers", "norms", or the whole "program". ``learning_rate``: for
    methods that the search has no task for. ``steps_options``: options that are a share of the training steps.
    ``layers_option``: an option that is the number of the model's layers.
    """

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sized_by: str = ""
    values: tuple[Any, ...] = ()
    places: str = "layers"
    learning_rate: float | None = None
    steps_options: Mapping[str, float] = field(default_factory=dict)
    layers_option: str = ""


def _sized(method: str, sized_by: str = "r", values: tuple[Any, ...] = _RANKS, **more: Any) -> Compared:
    """Return a method of the benchmarks with the option that sets its size; ``more`` replaces some of its options."""
    config, options = METHODS[method]
    kept = {k: v for k, v in {**options, **more}.items() if k not in (sized_by, "target_modules")}
    return Compared(config, kept, sized_by, values)


def _fixed(method: str, places: str = "layers") -> Compared:
    config, options = METHODS[method]
    return Compared(config, {k: v for k, v in options.items() if k != "target_modules"}, places=places)


#: the ranks of AdaLoRA are cut to ``target_r``, so its ranks begin above that
_ADALORA = Compared(
    "AdaLoraConfig",
    {"target_r": 2},
    "init_r",
    _RANKS[2:],
    steps_options={"tinit": 0.1, "tfinal": 0.3, "total_step": 1.0},
)

#: method -> how it is compared; a rank of more than 1,024 would make VeRA's frozen pair slower than the layer
COMPARED: dict[str, Compared] = {
    "LoRA": _sized("LoRA"),
    "DoRA": _sized("DoRA"),
    "AdaLoRA": _ADALORA,
    "IA3": _fixed("IA3"),
    "LoHa": _sized("LoHa"),
    "LoKr": _sized("LoKr", decompose_factor=4),
    "OFT": _sized("OFT", "oft_block_size", (2, 4, 6, 8, 12, 16, 24, 32, 64)),
    "BOFT": _sized("BOFT", "boft_block_size", (2, 4, 6, 8, 12, 16, 32)),
    "HRA": _sized("HRA", values=(2, 4, 6, 8, 12, 16, 32)),
    "PSOFT": _sized("PSOFT", values=(8, 16, 24, 32, 48, 64, 80, 96, 128)),
    "OSF": _sized("OSF", "effective_rank", (0.5, 0.75, 0.875, 0.9375, 0.96875, 0.98, 0.985, 0.99, 0.995)),
    "VeRA": _sized("VeRA", values=(64, 128, 256, 512, 768, 1024)),
    "PVeRA": _sized("PVeRA", values=(64, 128, 256, 512, 768, 1024)),
    "RandLoRA": _sized("RandLoRA", values=(4, 8, 16, 32, 48, 64, 96, 144, 192)),
    "VB-LoRA": _sized("VB-LoRA", "num_vectors", (8, 16, 24, 32, 48, 64, 90, 128, 256)),
    "FRoD": _sized("FRoD", "sparse_rate", (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)),
    "TinyLoRA": _sized("TinyLoRA", "u", (16, 32, 64, 128, 256), r=16),
    "Uni-LoRA": _sized("Uni-LoRA", "theta_d_length", _COUNTS, r=8),
    "FourierFT": _sized("FourierFT", "n_frequency", _COUNTS),
    "WaveFT": _sized("WaveFT", "n_frequency", _COUNTS),
    "C3A": _sized("C3A", "block_size", (4, 8, 16, 32, 64, 96, 192)),
    "MiSS": _sized("MiSS"),
    "GraLoRA": _sized("GraLoRA", values=(2, 4, 6, 8, 12, 16, 32)),
    "DEFT": _sized("DEFT"),
    "GLoRA": _sized("GLoRA"),
    "SHiRA": _sized("SHiRA", random_seed=0),
    "Supertuning": _sized("Supertuning", "sparsity", _SPARSITY),
    "AdaMSS": _sized("AdaMSS", "subspace_rank", (1, 2, 3, 4, 6, 8)),
    "RoAd": _sized("RoAd", "variant", ("road_1", "road_2", "road_4")),
    "HiRA": _sized("HiRA"),
    "DeLoRA": _sized("DeLoRA"),
    "PEANuT": _sized("PEANuT"),
    "LN tuning": _fixed("LN tuning", "norms"),
    "BEFT": Compared("BeftConfig"),
    "Lily": Compared("LilyConfig", {}, "r", _RANKS),
    "Prompt tuning": Compared(
        "PromptTuningConfig", {}, "num_virtual_tokens", (8, 16, 32), "program", learning_rate=0.03
    ),
    "P-tuning": Compared(
        "PromptEncoderConfig",
        {"num_virtual_tokens": 16},
        "encoder_hidden_size",
        (32, 64, 96, 128, 192, 256),
        "program",
        learning_rate=0.003,
    ),
    "Prefix tuning": Compared(
        "PrefixTuningConfig", {}, "num_virtual_tokens", (4, 8, 16, 20, 24, 32), "program", learning_rate=0.03
    ),
    "Adaption prompt": Compared(
        "AdaptionPromptConfig",
        {},
        "adapter_len",
        (4, 8, 10, 12, 13, 14, 16, 24),
        "program",
        learning_rate=0.03,
        layers_option="adapter_layers",
    ),
}

#: ``peft_type`` -> why it is not compared
LEFT_OUT = {
    "POLY": "it mixes skills by the task of each row, and here all rows have one task",
    "XLORA": "it mixes experts that were trained before",
    "MULTITASK_PROMPT_TUNING": "it begins from a prompt that was trained on several tasks",
    "CARTRIDGE": "it is distilled from a text, not trained on questions",
    "CPT": "it begins from the tokens of a context",
    "TRAINABLE_TOKENS": "it trains tokens that are new to the model, and the tasks have none",
    "BONE": "it is MiSS under its older name",
}

#: what LoRA's options make of it -> why it is not compared
VARIANTS_LEFT_OUT = {
    "PiSSA, OLoRA, MiCA, LoftQ and other first values": (
        "they begin LoRA's training elsewhere, and the methods here begin as their configs say by default"
    ),
    "EVA, CorDA and LoRA-GA": "they need data of the task before the training, which other methods do without",
    "rsLoRA": "at one rank it is LoRA with another scale, and so with another learning rate",
    "KaSA, MonteCLoRA, VeLoRA and BD-LoRA": (
        "they add a term to the loss, noise, a smaller backward or zeros to LoRA, which the budget does not show"
    ),
    "QA-LoRA": "it is for quantised weights, and the weights here are plain",
    "aLoRA and Arrow": "aLoRA acts from a marker in the text on, and Arrow mixes adapters that were trained before",
}


def slug(method: str) -> str:
    """Return the method's name as a part of a file's name."""
    return method.lower().replace(" ", "-")
