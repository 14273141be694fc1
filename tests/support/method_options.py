"""Methods by their names, each with PEFT's config and the options that benchmarks and comparisons give it.

The options are PEFT's defaults wherever they fit widths of 576, 192 and 1536, those of SmolLM2-135M.
"""

from __future__ import annotations

from typing import Any

#: method -> the name of PEFT's config, which is adaptc's too, and its options
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 16}),
    "DoRA": ("LoraConfig", {"r": 16, "use_dora": True}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 12, "total_step": 10}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "LoHa": ("LoHaConfig", {"r": 8}),
    "LoKr": ("LoKrConfig", {"r": 8}),
    "OFT": ("OFTConfig", {}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 8}),
    "PSOFT": ("PsoftConfig", {}),
    "OSF": ("OSFConfig", {}),
    "VeRA": ("VeraConfig", {"r": 256}),
    "PVeRA": ("PveraConfig", {"r": 256}),
    "RandLoRA": ("RandLoraConfig", {"r": 32}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 4, "vector_length": 64}),
    "FRoD": ("FrodConfig", {"progressbar": False}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "Uni-LoRA": ("UniLoraConfig", {}),
    "FourierFT": ("FourierFTConfig", {}),
    "WaveFT": ("WaveFTConfig", {}),
    "C3A": ("C3AConfig", {"block_size": 64}),
    "MiSS": ("MissConfig", {"r": 64}),
    "GraLoRA": ("GraloraConfig", {"r": 32}),
    "DEFT": ("DeftConfig", {"r": 8}),
    "GLoRA": ("GloraConfig", {"r": 8}),
    "SHiRA": ("ShiraConfig", {"r": 16}),
    "Supertuning": ("SupertuningConfig", {}),
    "AdaMSS": ("AdamssConfig", {}),
    "RoAd": ("RoadConfig", {}),
    "HiRA": ("HiraConfig", {"r": 32}),
    "DeLoRA": ("DeloraConfig", {"r": 16}),
    "PEANuT": ("PeanutConfig", {"r": 16, "depth": 1}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}
