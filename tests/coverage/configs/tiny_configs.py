"""Makes the config of any transformers model so small that the model is built and captured in seconds.

A config is made from its class's defaults: a table says which size a field of a certain name gets. What a family needs
beyond that is in :mod:`tests.coverage.configs.overrides`. Of layers of several kinds, one of each kind stays.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from tests.coverage.configs.image_overrides import IMAGE_OVERRIDES, MADE, PARTS
from tests.coverage.configs.overrides import COMPOSED, OVERRIDES
from tests.coverage.configs.sizes import HEAD_DIM, HEADS, IMAGE, KV_HEADS, LAYERS, SIZES, TEXT_IDS, VOCAB, WIDTH

_TOKEN = re.compile(r"\w*(token_id|token_index|token_ids?|_token|token_idx)(_\w+)?")
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_LAYER_INDICES = re.compile(r"\w*(indexes|indices|index|layer_idx|layer_ids|out_layers|global_attn\w*)")


def tiny_config(family: str, model_class: Any) -> Any:
    """Return a small config for ``model_class``, whose name among the auto classes is ``family``."""
    from transformers import CONFIG_MAPPING

    make = model_class.config_class
    if family in CONFIG_MAPPING and issubclass(CONFIG_MAPPING[family], make):
        make = CONFIG_MAPPING[family]
    if family in COMPOSED:
        return _composed(make, COMPOSED[family])
    if family in MADE:
        return make(**MADE[family])
    values = shrink(make().to_dict())
    for part, model_type in PARTS.get(family, {}).items():
        values[part] = {**_shrink(CONFIG_MAPPING[model_type]().to_dict(), {}), "model_type": model_type}
    for name in (make.model_type, family, model_class.__name__):
        merge(values, _override(name))
    return make.from_dict(values)


def _override(name: str) -> dict[str, Any]:
    return OVERRIDES.get(name) or IMAGE_OVERRIDES.get(name, {})


def _composed(make: Any, parts: dict[str, str]) -> Any:
    """Return a config of an encoder and a decoder that are models of families of their own."""
    from transformers import CONFIG_MAPPING

    made = {}
    for part, family in parts.items():
        values = shrink(CONFIG_MAPPING[family]().to_dict())
        merge(values, _override(family))
        if part == "decoder":
            values |= {"is_decoder": True, "add_cross_attention": True}
        made[part] = {**values, "model_type": family}
    return make(**made, decoder_start_token_id=1, pad_token_id=0)


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """Return what of a config's values changes when it is made small. Parts are whole."""
    small = _shrink(values, {})
    return {k: v for k, v in small.items() if v != values[k] or isinstance(v, dict)}


def _shrink(values: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    before = _layer_count(values)
    keep = _kept_layers(values, before)
    for name, value in values.items():
        if name == "per_layer_config":
            continue
        out[name] = value
        if value is None or isinstance(value, (bool, str, float)):
            if value is None and name == "vocab_size":
                out[name] = VOCAB
        elif isinstance(value, dict):
            if "model_type" in value:
                out[name] = _shrink(value, ids)
                merge(out[name], _override(value["model_type"]))
        elif _TOKEN.fullmatch(name) and "num" not in name:
            out[name] = _small_ids(value, ids)
        elif isinstance(value, int):
            size = next((size for names, size in SIZES if names.fullmatch(name)), value)
            out[name] = min(value, size)
            if name in _COUNTS and before:
                out[name] = len(keep)
        elif isinstance(value, list) and value:
            out[name] = _small_list(name, value, before, keep)
    _fit(values, out)
    return out


def _layer_count(values: dict[str, Any]) -> int:
    """Return the number of layers; 0 for a model of stages with layers each."""
    if isinstance(values.get("depths"), list):
        return 0
    return next((values[n] for n in (*_COUNTS, "depth", "encoder_layers") if isinstance(values.get(n), int)), 0)


def _kept_layers(values: dict[str, Any], count: int) -> list[int]:
    """Return which layers stay: the first of each kind, by all lists that have an entry for each layer."""
    lists = [v for k, v in values.items() if isinstance(v, list) and len(v) == count and count > 2]
    lists = [v for v in lists if all(isinstance(x, (str, int)) for x in v) and len(set(v)) <= 4]
    first: dict[tuple[Any, ...], int] = {}
    for i in range(count):
        first.setdefault(tuple(v[i] for v in lists), i)
    kept = sorted(first.values())[:4]
    return kept if len(kept) > 1 else list(range(min(count, LAYERS)))


def _small_list(name: str, value: list[Any], layers: int, keep: list[int]) -> list[Any]:
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return [value[i] for i in keep] if len(value) == layers > 2 else value
    if re.fullmatch(r"(\w+_)?depths?|(num_)?layers|num_blocks|\w*layer_counts|stage_blocks|(\w+_)?num_layers", name):
        return [1] * len(value)
    if re.fullmatch(r"(\w+_)?hidden_sizes|embed_dims?|dims|stage_dims|neck_hidden_sizes", name):
        return [min(v, 8 * 2**i) if len(value) > 1 else min(v, WIDTH) for i, v in enumerate(value)]
    if re.fullmatch(r"(num_(attention_)?|\w+_)heads|num_head", name):
        return [min(v, 2) for v in value]
    if re.fullmatch(r"(\w+_)?(image|img)_size|input_size|image_shape", name):
        return [min(v, IMAGE) for v in value]
    if re.fullmatch(r"conv_dim|(\w+_)?tdnn_dim", name):
        return [min(v, WIDTH) for v in value]
    if len(value) == layers > 2:
        return [value[i] for i in keep]
    if _LAYER_INDICES.fullmatch(name) and layers:
        count = len(keep)
        return list(
            dict.fromkeys(v if v < 0 and -v <= count else (-count if v < 0 else min(v, count - 1)) for v in value)
        )
    return value


def _small_ids(value: Any, ids: dict[int, int]) -> Any:
    """Return token ids below the vocabulary: equal ones stay equal, different ones different."""
    if isinstance(value, list):
        return [_small_ids(v, ids) for v in value]
    if not isinstance(value, int) or value < TEXT_IDS[0]:
        return value
    return ids.setdefault(value, VOCAB - 1 - len(ids) % (VOCAB - TEXT_IDS[1]))


def _fit(values: dict[str, Any], out: dict[str, Any]) -> None:
    """Change the values that depend on others: heads of latent attention, rotary sections, sizes of states."""
    heads = out.get("num_attention_heads")
    width = out.get("hidden_size")
    if "qk_rope_head_dim" in values:
        if "num_key_value_heads" in out:
            out["num_key_value_heads"] = heads
        out.pop("head_dim", None)
        if "qk_head_dim" in out:
            out["qk_head_dim"] = out["qk_rope_head_dim"] + out["qk_nope_head_dim"]
    elif "head_dim" in values and values["head_dim"] is None and isinstance(heads, int):
        out["head_dim"] = HEAD_DIM
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None and isinstance(heads, int):
        out["num_key_value_heads"] = heads if "qk_rope_head_dim" in values else KV_HEADS
    count, stages = out.get("num_hidden_layers"), out.get("out_features")
    if isinstance(count, int) and isinstance(stages, list) and stages[-1:] == [f"stage{values['num_hidden_layers']}"]:
        out["num_hidden_layers"] = count = max(count, len(stages))
        out["out_features"] = [f"stage{count - i}" for i in reversed(range(len(stages)))]
        out.pop("out_indices", None)
        out.pop("stage_names", None)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(out.get(name), dict) and isinstance(heads, int) and isinstance(width, int):
            out[name] = _small_sections(out[name], out.get("head_dim") or width // heads)
    for prefix in ("mamba_", ""):
        # heads x head size == expansion x width
        count, size, expand = f"{prefix}n_heads", f"{prefix}d_head", values.get(f"{prefix}expand")
        if count in out and size in values and expand and isinstance(width, int):
            out[count], out[size] = HEADS, expand * width // HEADS


def _small_sections(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    rope = {k: _small_sections(v, head_dim) if isinstance(v, dict) else v for k, v in rope.items()}
    if "mrope_section" in rope:
        half = int(head_dim * rope.get("partial_rotary_factor", 1)) // 2
        parts = len(rope["mrope_section"])
        rope["mrope_section"] = [half - (parts - 1) * (half // parts), *[half // parts] * (parts - 1)]
    return rope


def merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Put ``more`` into ``values``: parts are changed, or replaced where they name another kind of model."""
    for name, value in more.items():
        old = values.get(name)
        if (
            isinstance(value, dict)
            and isinstance(old, dict)
            and value.get("model_type") in (None, old.get("model_type"))
        ):
            merge(old, value)
        else:
            values[name] = copy.deepcopy(value)
