"""State the conventions of PEFT adapter directories: file names, key prefixes, stored configs and the model card.

Keys are *bare* everywhere in adaptc. In a file they carry a prefix that depends on the method:

- ``base_model.model.<module path>.<slot>``: of one module, bare ``<module path>.<slot>``;
- ``base_model.<name>``: of the whole model (``base_model.vera_A``), bare ``<name>``; the names are
  :data:`MODEL_LEVEL_KEYS`;
- prompt methods: ``prompt_embeddings`` and its like have no prefix, modules saved beside them have ``base_model.``.

``bare_key(file_key(k, t), t) == k`` holds for every key and method, so reading never guesses.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
MODEL_CARD_NAME = "README.md"
MODEL_CONFIG_NAME = "config.json"
_MODEL_WEIGHTS = re.compile(r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?")
#: the PEFT release whose file format is written; recorded as ``peft_version`` in configs that name none
PEFT_VERSION = "0.21.2"

#: first key component of the tensors that belong to a whole model, by ``peft_type``
MODEL_LEVEL_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "VERA": frozenset({"vera_A", "vera_B"}),
        "PVERA": frozenset({"pvera_A", "pvera_B"}),
        "RANDLORA": frozenset({"randlora_A", "randlora_B"}),
        "FROD": frozenset({"frod_V", "frod_s_indices", "frod_s_size"}),
        "TINYLORA": frozenset({"tinylora_v"}),
        "UNILORA": frozenset({"unilora_theta_d"}),
        "VBLORA": frozenset({"vblora_vector_bank"}),
        "XLORA": frozenset({"internal_xlora_classifier"}),
        "SHADOW": frozenset({"shadow_backbone", "shadow_projection", "shadow_head"}),
    }
)

_PROMPT_TYPES = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT"})
#: first components of keys without a prefix; adaptc adds ``prompt_encoder`` to PEFT's tensors
_PROMPT_KEYS = frozenset({"prompt_embeddings", "prefix_task_cols", "prefix_task_rows", "prompt_encoder"})
MODULE_PREFIX, MODEL_PREFIX = "base_model.model.", "base_model."


def file_key(key: str, peft_type: str) -> str:
    """Return the key that the bare ``key`` has in a file of method ``peft_type``. Inverse of :func:`bare_key`."""
    if peft_type in _PROMPT_TYPES:
        return key if key.split(".", 1)[0] in _PROMPT_KEYS else MODEL_PREFIX + key
    return (MODEL_PREFIX if key.split(".", 1)[0] in MODEL_LEVEL_KEYS.get(peft_type, ()) else MODULE_PREFIX) + key


def bare_key(key: str, peft_type: str) -> str | None:
    """Return a file's ``key`` without its prefix, or None when it has none that ``peft_type`` knows."""
    if peft_type in _PROMPT_TYPES:
        if key.split(".", 1)[0] in _PROMPT_KEYS:
            return key
        return key[len(MODEL_PREFIX) :] if key.startswith(MODEL_PREFIX) else None
    if key.startswith(MODULE_PREFIX):
        return key[len(MODULE_PREFIX) :]
    rest = key.removeprefix(MODEL_PREFIX)
    return rest if rest != key and rest.split(".", 1)[0] in MODEL_LEVEL_KEYS.get(peft_type, ()) else None


def routed_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the adapters beside an Arrow router of this config between which it routes."""
    found = config.get("arrow_config")
    if not isinstance(found, Mapping):
        return []
    arrow = cast("Mapping[str, Any]", found)
    groups: list[Any] = [
        arrow.get("task_adapter_names"),
        arrow.get("gks_adapter_names") if arrow.get("use_gks") else None,
    ]
    return [
        n for group in groups if isinstance(group, Sequence) for n in cast("Sequence[Any]", group) if isinstance(n, str)
    ]


def peft_component_error(component: str, source: str) -> ConfigError:
    """Return the error for a component that a caller asks for of an adapter with PEFT's keys."""
    return ConfigError(
        f"component={component!r}: {source} has PEFT's keys, which are of one model and name no component; leave it out"
    )


def stored_config(config: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """Return ``config`` as PEFT stores it. Raises CheckpointError when it names no method."""
    stored = {k: v for k, v in config.items() if k != "runtime_config"}
    kind = stored.get("peft_type")
    kind = kind.value if isinstance(kind, Enum) else kind
    if not isinstance(kind, str) or not kind:
        raise CheckpointError(f"cannot write {CONFIG_NAME}: 'peft_type' must name the method, found {kind!r}.")
    stored |= {"peft_type": kind, "inference_mode": True}
    stored["peft_version"] = stored.get("peft_version") or PEFT_VERSION
    if base_model is not None:
        stored["base_model_name_or_path"] = base_model
    return stored


def to_json_value(value: Any) -> Any:
    """Convert a value for ``json.dumps``: sets become sorted lists (PEFT's order follows the hash seed), enums their
    value."""
    if isinstance(value, (set, frozenset)):
        return sorted(cast("set[Any]", value), key=lambda v: (f"{type(v)}", v))
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def write_model_card(existing: Path, new: Path, config: Mapping[str, Any], extra_tags: Sequence[str] = ()) -> bool:
    """Write the model card ``new``, based on ``existing`` if that file is there.

    Returns False, with a warning, when the metadata of ``existing`` cannot be read.
    """
    import huggingface_hub

    hub: Any = huggingface_hub  # it has no type for what these functions read and write
    base = config.get("base_model_name_or_path")
    try:
        text = existing.read_text(encoding="utf-8") if existing.is_file() else ""
        meta: dict[str, Any] = dict(hub.metadata_load(existing) or {}) if text else {}
        tags: set[Any] = {*(meta.get("tags") or []), *extra_tags}
    except Exception as exc:  # people edit the YAML, and any parser error means that it cannot be read
        warnings.warn(f"{existing} left as it is: its metadata cannot be read ({exc})", AdaptcWarning, stacklevel=3)
        return False
    if base:
        meta.setdefault("base_model", base)
        tags.add(f"base_model:adapter:{base}")
    meta["library_name"] = "peft"
    if config["peft_type"] == "LORA":
        tags.add("lora")
    if config.get("task_type") == "CAUSAL_LM":
        meta.setdefault("pipeline_tag", "text-generation")
    meta["tags"] = sorted(tags)
    of = f" for {base}" if base else ""
    new.write_text(
        text or f"\n# {config['peft_type']} adapter{of}\n\n### Framework versions\n\n- PEFT {config['peft_version']}\n",
        encoding="utf-8",
    )
    hub.metadata_save(new, meta)
    return True


def check_no_model(directory: Path) -> None:
    """Raise CheckpointError for the directory of a model.

    With an adapter config in it, transformers would take it for an adapter, and no longer load the model.
    """
    if (directory / CONFIG_NAME).exists() or not (directory / MODEL_CONFIG_NAME).is_file():
        return
    if weights := sorted(p.name for p in directory.iterdir() if _MODEL_WEIGHTS.fullmatch(p.name)):
        raise CheckpointError(
            f"cannot write an adapter to {directory}: it holds a model ({MODEL_CONFIG_NAME}, {weights[0]}), which "
            f"could not be loaded with {CONFIG_NAME} beside it. Choose another directory."
        )
