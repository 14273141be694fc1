"""Load an adapter together with the base model that its config names, head included, and compile both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.adapter_files.format import CONFIG_NAME
from adaptc.adapters.adapter import Adapter, load_adapter
from adaptc.api.adapt_model import compile
from adaptc.capture.model_files import find_model_class, is_gguf, read_gguf
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError, listing, short_repr
from adaptc.targets.name_rules import TASK_HEADS

#: PEFT's name of a task -> transformers' class that loads a model with its head
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_LABELED_TASKS = ("SEQ_CLS", "TOKEN_CLS")


def from_pretrained(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    compiler: Callable[..., Any] = compile,
    **options: Any,
) -> Any:
    """Load an adapter and the base model that its config names, and return the adapted program.

    The base is a directory, or a name in the local cache of Hugging Face; nothing is downloaded, and no code of the
    model's files runs. The adapter's task says the class of the base, as PEFT's ``AutoPeftModelFor...`` classes do. The
    number of labels follows from the adapter's head, and that of embeddings from the adapter or its tokenizer.

    Args:
        adapter: a PEFT directory.
        base: the directory, name or GGUF file of the base, in place of the one in the adapter's config.
        dtype: the dtype of the base's weights; None for that of its files.
        compiler: ``adaptc.compile``, ``adaptc.compile_for_generation`` or ``adaptc.compile_for_serving``.
        **options: options of ``compiler``, such as ``training=True``.

    Returns:
        what ``compiler`` returns: a program, a generator or a serving model.

    Raises:
        CheckpointError: the adapter or its base cannot be read.
        ConfigError: neither the config nor ``base`` says what the base is, or its class or ``dtype`` is not known.

    Example:
        >>> lm.save_pretrained("my-model")
        >>> trained = adaptc.compile(lm, LoraConfig(r=2, task_type="CAUSAL_LM"))
        >>> path = adaptc.save_adapter(trained, "my-adapter")
        >>> prog = adaptc.from_pretrained("my-adapter", base="my-model", training=True)
        >>> prog(input_ids=ids, labels=ids).loss.ndim
        0
    """
    if not isinstance(dtype, torch.dtype | None) and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ConfigError(f"dtype={short_repr(dtype)} is no dtype of torch: give float32, bfloat16 or float16")
    found = load_adapter(adapter)
    where = base or found.config.base_model_name_or_path
    if where is None:
        raise ConfigError(f"the config of {adapter} has no base_model_name_or_path: give base=, the model's directory")
    path = Path(where)
    if is_gguf(path):
        model = read_gguf(path, None if dtype is None else str(dtype).removeprefix("torch."))
    else:
        model = _load_base(str(where), found, None if base is None else "main", dtype)
    _resize_embeddings(model, found, Path(adapter))
    return compiler(model.eval(), adapter, **options)


def _load_base(where: str, adapter: Adapter, revision: str | None, dtype: Any) -> Any:
    """Return the base at ``where``, with the adapter's head. Raises CheckpointError where transformers cannot."""
    import transformers

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options["revision"] = revision or adapter.config.revision or "main"
    task = adapter.config.task_type
    if (Path(where) / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"the base {short_repr(where)} has an adapter in its own directory, which transformers would load into it: "
            "move the adapter to a directory of its own, or give base="
        )
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
        kind = getattr(transformers, AUTO_CLASSES[task]) if task is not None else _named_class(adapter, config)
        if task in _LABELED_TASKS and (labels := _labels_of_head(adapter)) not in (None, config.num_labels):
            config.num_labels, options["ignore_mismatched_sizes"] = labels, True
        model, loaded = kind.from_pretrained(
            where, config=config, dtype=dtype or "auto", output_loading_info=True, **options
        )
    except ConfigError:
        raise
    except Exception as error:  # transformers, huggingface_hub and safetensors each raise types of their own
        raise CheckpointError(
            f"transformers cannot load the base {short_repr(where)} from this machine ({short_repr(str(error))}): "
            "download it first, or give base=, the model's directory"
        ) from error
    unread = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
    _warn_of_random_values(model, unread, adapter)
    return model


def _named_class(adapter: Adapter, config: Any) -> Any:
    """Return the class of transformers that the adapter's auto_mapping names, or else the base's own config."""
    mapping = adapter.config.auto_mapping or {}
    name = mapping.get("base_model_class") or next(iter(config.architectures or []), None)
    kind = find_model_class(name)
    if kind is None:
        raise ConfigError(
            f"the adapter is for a {short_repr(name)} of {short_repr(mapping.get('parent_library'))}, which is no "
            f"class of transformers: load the model in Python, and give it to adaptc.compile with {adapter.source}"
        )
    return kind


def _heads_of(adapter: Adapter) -> tuple[str, ...]:
    """Return the last parts of the names of modules that the adapter holds whole."""
    names = (*(adapter.config.modules_to_save or ()), *TASK_HEADS.get(adapter.config.task_type or "", ()))
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _tensors_in(adapter: Adapter, module: str) -> Mapping[str, Tensor]:
    """Return those of the adapter's tensors that lie in modules called ``module``, by their names in it."""
    inside = {}
    for key, value in adapter.tensors.items():
        _, found, rest = f".{key}".rpartition(f".{module}.")
        if found:
            inside[rest] = value
    return inside


def _labels_of_head(adapter: Adapter) -> int | None:
    """Return how many labels the adapter's head tells apart; None where it holds no head."""
    for head in TASK_HEADS[adapter.config.task_type or ""]:
        weights = {n: t for n, t in _tensors_in(adapter, head).items() if n.endswith("weight") and t.ndim == 2}
        if weights:
            # A head of several layers ends with its projection to the labels.
            return (weights.get("weight", weights.get("out_proj.weight", [*weights.values()][-1]))).shape[0]
    return None


def _warn_of_random_values(model: nn.Module, missing: set[str], adapter: Adapter) -> None:
    """Warn of parameters that neither the base's files nor the adapter hold."""
    heads = _heads_of(adapter)
    left = sorted(name for name in missing if not any(f".{head}." in f".{name}" for head in heads))
    if left:
        warnings.warn(
            f"neither the base's files nor {adapter.source} hold {listing(left, 3)} of {type(model).__name__}: these "
            "have random values",
            AdaptcWarning,
            stacklevel=4,
        )


def _resize_embeddings(model: Any, adapter: Adapter, folder: Path) -> None:
    """Give the base as many embeddings as the adapter holds, or as the tokenizer in its directory has."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(table, nn.Embedding):
        return
    name = next((n.rpartition(".")[2] for n, m in model.named_modules() if m is table), "")
    tensors = _tensors_in(adapter, name)
    saved = tensors.get("weight", tensors.get("base_layer.weight"))
    wanted = table.num_embeddings
    if saved is not None:
        wanted = saved.shape[0]
    elif (folder / "tokenizer_config.json").is_file():
        wanted = _tokenizer_size(folder)
        if wanted > table.num_embeddings:
            warnings.warn(
                f"the tokenizer in {folder} has {wanted - table.num_embeddings} tokens more than the base, whose "
                f"embeddings {adapter.source} does not hold: these have random values",
                AdaptcWarning,
                stacklevel=3,
            )
    if wanted != table.num_embeddings:
        model.resize_token_embeddings(wanted, mean_resizing=False)


def _tokenizer_size(folder: Path) -> int:
    from transformers import AutoTokenizer

    try:
        return len(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # tokenizers, sentencepiece and json raise types of their own
        raise CheckpointError(
            f"transformers cannot load the tokenizer in {folder} ({short_repr(str(error))}): its size is that of the "
            "base's embeddings. Mend it, or take its files out of the adapter's directory"
        ) from error
