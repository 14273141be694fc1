"""Lists what is examined: each class of transformers' auto mappings once, as a family and a task."""

from __future__ import annotations

from dataclasses import dataclass, field

#: the tasks, the most important first
TASKS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "TEXT_ENCODING",
    "IMAGE_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "VIDEO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION",
)
#: the tasks whose classes are examined with more than text, also where they are among the causal ones, too
_RICHER = ("IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ")
# fmt: off
#: the families that are used most
SHORT = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "gemma",
    "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3", "phimoe", "gpt2", "gpt_neox", "gpt_oss", "gptj", "opt",
    "bloom", "falcon", "mamba", "mamba2", "bamba", "jamba", "deepseek_v2", "deepseek_v3", "cohere2", "granite",
    "olmo2", "glm4", "smollm3", "stablelm", "starcoder2", "bert", "roberta", "distilbert", "deberta-v2", "electra",
    "modernbert", "albert", "xlm-roberta", "t5", "bart", "mbart", "marian", "whisper", "wav2vec2", "vit", "swin",
    "resnet", "convnext", "dinov2", "clip", "siglip", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "gemma3", "mllama", "idefics3", "blip-2", "detr", "segformer",
)
# fmt: on


@dataclass(frozen=True)
class Row:
    """A class of models that is examined: ``family`` is its name in the mapping of ``task``."""

    family: str
    task: str
    model_class: str


@dataclass
class Result:
    """The record of a row. ``status`` and ``generation`` are words of :data:`tests.coverage.table.STATUSES`."""

    family: str
    task: str
    model_class: str
    status: str = "does not run"
    reason: str = ""
    eager: bool = False
    peft: str = ""
    generation: str = ""
    generation_reason: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def all_rows() -> list[Row]:
    """Return all rows. Of several families with one class, the class's own family is taken."""
    import transformers
    from transformers.models.auto import modeling_auto

    rows: list[Row] = []
    seen: set[str] = set()
    for task in (*_RICHER, *(t for t in TASKS if t not in _RICHER)):
        families: dict[str, list[str]] = {}
        for family, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in (names,) if isinstance(names, str) else names:
                families.setdefault(name, []).append(family)
        for name, found in families.items():
            if name in seen:
                continue
            seen.add(name)
            # The import of a class takes time, and so do the classes of all models in whatever traces a graph later.
            own = getattr(getattr(transformers, name, None), "config_class", None) if len(found) > 1 else None
            family = own.model_type if own is not None and own.model_type in found else found[0]
            rows.append(Row(family, task, name))
    return sorted(rows, key=lambda row: TASKS.index(row.task))
