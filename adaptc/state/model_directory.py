"""Write a program without adapters as the directory of a transformers model, which ``from_pretrained`` loads.

The tensors have the names that the captured model gave them. Config, generation config and safetensors are written by
transformers' own ``save_pretrained``, with the keys that files of this model have. Where that fails, the directory
stays as it was.

The model's class is made from the config on the meta device, and takes the tensors. A tensor that the class has no
place for is refused by name: a bias that a merge added, or a weight of another shape. Where tied weights were untied,
``tie_word_embeddings`` is written as False.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptc.adapter_files import atomic_write
from adaptc.adapter_files.format import CONFIG_NAME as ADAPTER_CONFIG
from adaptc.adapter_files.format import MODEL_CONFIG_NAME as CONFIG
from adaptc.capture.capture import PretrainedFacts
from adaptc.capture.model_files import QUANTIZATION_CONFIG
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, listing, short_repr
from adaptc.passes.graph.storage import memory_address
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.progress import stage
from adaptc.state.core import ProgramCore
from adaptc.torch_typing import attributes_of

_TIE_OPTION = "tie_word_embeddings"
#: weight files of any format and sharding, which a reader would prefer to the new ones or mix with them
WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
#: files that a model's directory has beside the model: tokenizers, processors, chat templates, licences
_COMPANION_FILES = re.compile(r".*\.(json|jinja|txt|model|tiktoken|vocab|bpe|spm)|(LICEN[CS]E|NOTICE).*")
_NOT_COMPANION_FILES = re.compile(r"config\.json|generation_config\.json|adapter_.*|.*\.index\.json|\..*")


def write_program_model(
    program: ProgramCore, path: str | os.PathLike[str], *, companions_from: Path | None = None, **options: Any
) -> Path:
    """Write the model of a program that was merged or unloaded; returns the directory.

    ``companions_from`` and ``options`` are those of :func:`write_model`. Raises as that does, and ConfigError for other
    options. Raises AdaptcError where the program has an adapter, or does not know its transformers model, as one read
    from a file.
    """
    source = program.adaptation.source
    if program.current is not None:
        raise AdaptcError(
            "the program has an adapter: merge it first (adaptc.merge), and write what that gives; "
            "adaptc.save_adapter writes the adapter alone"
        )
    if source is None:
        raise AdaptcError(
            "the program does not know which transformers model it was made from, as none does that was read from a "
            "file or made of an exported program: compile the model itself, and merge that"
        )
    state = {k: t for k, t in program.state_dict.items() if isinstance(t, Tensor)}
    return write_model(source, state, path, companions_from=companions_from, **check_save_options(options))


def check_save_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``options``, keywords of transformers' ``save_pretrained``, that :func:`write_model` takes.

    Options that are None or have transformers' default value are dropped. Raises ConfigError for any other option.
    """
    usual = {"safe_serialization": True, "push_to_hub": False, "is_main_process": True, "save_embedding_layers": False}
    asked = {k: v for k, v in options.items() if v is not None and (k not in usual or v != usual[k])}
    if odd := sorted(asked.keys() - {"max_shard_size", "save_original_format"}):
        raise ConfigError(
            f"save_pretrained of a merged program writes a transformers model as safetensors, and takes no "
            f"{', '.join(odd)}: leave it out"
        )
    return asked


def write_model(
    source: PretrainedFacts,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    save_original_format: bool | None = None,
    companions_from: Path | None = None,
) -> Path:
    """Write a model with the class and config of ``source`` and the tensors of ``state``; returns the directory.

    ``state``: tensors by their names in the model's state dict, tied weights under one of their names or all.
    ``max_shard_size`` and ``save_original_format``: options of transformers' ``save_pretrained``, None for its
    defaults. ``companions_from``: a model's directory, from which tokenizer and processor files are copied. Weight
    files of other formats or shardings in the directory are removed.

    Raises CheckpointError where the class has no place for a tensor, or lacks one, or one is quantised. Raises
    CheckpointError, too, where the directory holds an adapter, and for errors of transformers or the disk. The
    directory is then as it was.
    """
    target = Path(path)
    check_target_dir(target)
    if quantized := [k for k, t in state.items() if isinstance(t, QuantizedTensor)]:
        raise CheckpointError(
            f"{quantized[0]!r} and {len(quantized) - 1} more weights of the program are quantised, and a directory of "
            "transformers holds plain weights: merge into the files of the quantised model (adaptc.merge_directory), "
            "write the program with adaptc.save, or compile and merge the model before it is quantised"
        )
    model = _make_filled_model(source, state)
    given = {"max_shard_size": max_shard_size, "save_original_format": save_original_format}
    options = {k: v for k, v in given.items() if v is not None}
    try:
        with stage(f"writing {source.model_class.__name__} to {target.name}"), atomic_write.open_stage(target) as aside:
            model.save_pretrained(aside, **options)
            if companions_from is not None:
                copy_companions(companions_from, aside)
            commit_model_files(aside, target)
        atomic_write.remove_abandoned(target, with_old_files=True)
    except CheckpointError:
        raise
    except Exception as error:  # transformers, safetensors and the OS each have their own types
        raise CheckpointError(
            f"could not write a {source.model_class.__name__} to {target} ({type(error).__name__}: "
            f"{short_repr(str(error))}). What was there before is unchanged."
        ) from error
    return target


def commit_model_files(aside: Path, target: Path) -> None:
    """Move a model's files from the directory ``aside`` to ``target``, as one change; old weight files go."""
    names = [p.name for p in aside.iterdir() if p.name != CONFIG]
    for name in (*names, CONFIG):
        atomic_write.fsync_file(aside / name)
    stale = [p.name for p in target.iterdir() if WEIGHT_FILES.fullmatch(p.name) and p.name not in names]
    atomic_write.commit(aside, target, weights_files=names, config_file=CONFIG, stale_files=stale)


def check_target_dir(target: Path) -> None:
    """Raise CheckpointError where ``target`` is a file, or a directory that holds an adapter."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"cannot write a model to {target}: it is a file. Choose a directory.")
    if os.path.lexists(target / ADAPTER_CONFIG):
        raise CheckpointError(
            f"cannot write a model to {target}: it holds an adapter, which transformers would put on the model when it "
            "loads the directory. Choose another directory."
        )


def _make_filled_model(source: PretrainedFacts, state: Mapping[str, Tensor]) -> Any:
    """Return a model with the class and config of ``source`` that holds the tensors of ``state``."""
    config = copy.deepcopy(source.config)
    if hasattr(config, QUANTIZATION_CONFIG):  # all weights are plain here, and a reader would look for others
        delattr(config, QUANTIZATION_CONFIG)
    model = _make_meta_model(source.model_class, config)
    if torn := _find_untied(model, state):
        if _can_untie(model, config):
            model = _make_meta_model(source.model_class, config)
            torn = _find_untied(model, state)
        if torn:
            raise CheckpointError(
                f"{source.model_class.__name__} always ties {torn[0]!r} to {torn[1]!r}, and the program has two "
                "weights for them: an adapter changed one of the two alone. Keep it as an adapter, or save the program "
                "with adaptc.save"
            )
    tied = _tied_weights(model)
    wanted: dict[str, Tensor] = dict(model.state_dict())
    names = {k: k if k in state else tied.get(k, k) for k in wanted}
    held = {k: state[name] for k, name in names.items() if name in state}
    _check_fits(model, wanted, held, state)
    model.load_state_dict(_separate_memory(held, tied), strict=True, assign=True)
    model.generation_config = copy.deepcopy(source.generation_config)
    if source.weight_conversions is not None:
        vars(model)["_weight_conversions"] = source.weight_conversions  # transformers reads them there when it writes
    return model.train(False)


def _make_meta_model(kind: type, config: Any) -> Any:
    """Return a ``kind`` made of ``config`` on the meta device. Raises CheckpointError where ``kind`` cannot be made of
    a config alone."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # a user's own class may take any arguments and raise any error
        raise CheckpointError(
            f"{kind.__name__} cannot be made of its config alone ({type(error).__name__}: {short_repr(str(error))}), "
            "as it must be to be written. Load the weights into a model of yours: program.state_dict has them by name"
        ) from error


def _tied_weights(model: Any) -> dict[str, str]:
    """Return the weights that the class ties: name -> the name that it is tied to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _find_untied(model: Any, state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return two names that the class ties and that have different tensors in ``state``; None where there are none."""
    return next(
        (
            (a, b)
            for a, b in _tied_weights(model).items()
            if a in state and b in state and _are_different(state[a], state[b])
        ),
        None,
    )


def _are_different(a: Tensor, b: Tensor) -> bool:
    return a is not b and (a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b))


def _can_untie(model: nn.Module, config: Any) -> bool:
    """Set ``config`` to untied weights, and return whether that changes nothing but the ties.

    It is False where the config ties weights again when it is read back, and where a module's ``forward`` reads the
    option. T5's config, for one, takes the option for another scale of the outputs.
    """
    for one in _configs_with_ties(config):
        setattr(one, _TIE_OPTION, False)
    config_class: Any = cast(Any, type(config))  # of any release of transformers
    read = config_class.from_dict(config.to_dict())
    kinds = {type(m) for m in model.modules()}
    return not any(getattr(one, _TIE_OPTION) for one in _configs_with_ties(read)) and not any(
        map(_reads_tie_option, kinds)
    )


def _configs_with_ties(config: Any) -> list[Any]:
    """Return the config and the configs inside it that have the option ``tie_word_embeddings``."""
    return [one for one in (config, *attributes_of(config).values()) if hasattr(one, _TIE_OPTION)]


def _reads_tie_option(kind: type[nn.Module]) -> bool:
    try:
        return _TIE_OPTION in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # no source
        return False


def _check_fits(
    model: nn.Module, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError for tensors that the class has no place for, lacks, or has in another shape."""
    name = type(model).__name__
    buffers = {k for k, _ in model.named_buffers(remove_duplicate=False)}
    odd = [k for k in state if k not in expected and k not in buffers]
    if odd:
        raise CheckpointError(
            f"{name} has no place for {listing(map(repr, odd), 3)} of the program: a merge adds a bias where the "
            "adapter has one and the layer none, and a weight of its own where several modules read one. Keep it as an "
            "adapter, or save the program with adaptc.save"
        )
    if lost := [k for k in expected if k not in found]:
        raise CheckpointError(f"{name} needs {listing(map(repr, lost), 3)}, which the program does not have")
    for key, t in found.items():
        if t.shape != expected[key].shape:
            raise CheckpointError(
                f"{key!r} is {tuple(t.shape)} in the program, and {tuple(expected[key].shape)} in a {name} with this "
                "config: the merge made it dense, or the model was changed without its config. Keep it as an adapter, "
                "or save the program with adaptc.save"
            )


def _separate_memory(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """Return ``tensors`` with each tied weight as one tensor and every other tensor in memory of its own. Files then
    hold each tensor once."""
    out: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for key, t in tensors.items():
        if key in tied:
            continue
        t = t.detach()
        out[key] = t.clone() if memory_address(t) in seen else t
        seen.add(memory_address(t))
    return {k: out[tied[k]] if tied.get(k) in out else out.get(k, t) for k, t in tensors.items()}


def copy_companions(model: Path, stage: Path) -> None:
    """Copy the files that lie beside a model, such as those of its tokenizer, where ``stage`` does not have them."""
    for file in sorted(model.iterdir()):
        usual = _COMPANION_FILES.fullmatch(file.name) and not _NOT_COMPANION_FILES.fullmatch(file.name)
        if usual and file.is_file() and not (stage / file.name).exists():
            (stage / file.name).write_bytes(file.read_bytes())
