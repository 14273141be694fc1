"""A program without adapters as a directory of a transformers model, which ``from_pretrained`` loads.

Before: tensors under the names that the captured model had, and what is remembered of that model. After: config,
generation config and safetensors, written by transformers' own ``save_pretrained``, with the keys that files of this
model have; or an error, and the directory as it was.

The model's class is made anew from the config, without memory, and takes the tensors. What a class has no place for is
refused by name: a bias that a merge has added, a weight of another shape. Weights that were tied, and are no longer,
are written with ``tie_word_embeddings`` off.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.capture import Source
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, listing, shown
from adaptc.passes.ir.storage import memory_of
from adaptc.peft_files import staging
from adaptc.peft_files.format import CONFIG_NAME as ADAPTER_CONFIG
from adaptc.peft_files.format import MODEL_CONFIG as CONFIG
from adaptc.program.core import ProgramCore
from adaptc.progress import stage

_TIE = "tie_word_embeddings"
#: files of weights, also of other formats and divisions, which a reader would prefer or mix with the new ones
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
#: what a directory of a model has beside the model: tokenizers, processors, templates of chats, licences
_BESIDE = re.compile(r".*\.(json|jinja|txt|model|tiktoken|vocab|bpe|spm)|(LICEN[CS]E|NOTICE).*")
_NOT_BESIDE = re.compile(r"config\.json|generation_config\.json|adapter_.*|.*\.index\.json|\..*")


def write_model_of(
    program: ProgramCore, path: str | os.PathLike[str], *, beside: Path | None = None, **options: Any
) -> Path:
    """Write a program that was merged or unloaded. ``beside`` and ``options`` as for :func:`write_model`.

    Raises as that does, ConfigError for other options, and AdaptcError where the program has an adapter, or does not
    know its transformers model, as one from a file."""
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
    return write_model(source, state, path, beside=beside, **taken(options))


def taken(options: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`write_model` takes of the options of transformers' ``save_pretrained``; None and defaults are
    nothing. Raises ConfigError for others."""
    usual = {"safe_serialization": True, "push_to_hub": False, "is_main_process": True, "save_embedding_layers": False}
    asked = {k: v for k, v in options.items() if v is not None and (k not in usual or v != usual[k])}
    if odd := sorted(asked.keys() - {"max_shard_size", "save_original_format"}):
        raise ConfigError(
            f"save_pretrained of a merged program writes a transformers model as safetensors, and takes no "
            f"{', '.join(odd)}: leave it out"
        )
    return asked


def write_model(
    source: Source,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    save_original_format: bool | None = None,
    beside: Path | None = None,
) -> Path:
    """Write the model that ``source`` remembers with the tensors of ``state``; returns the directory.

    ``state``: by the names of the model's own state dict, tied weights under one name or all. ``max_shard_size`` and
    ``save_original_format``: transformers' own, None for its defaults. ``beside``: a model's directory, whose tokenizer
    and processor are copied. Weights of other formats in the directory are removed.

    Raises CheckpointError, with the directory as it was, where the class has no place for a tensor or lacks one, where
    the directory is an adapter's, and for what transformers or the disk refuse.
    """
    target = Path(path)
    check_place(target)
    model = _filled(source, state)
    given = {"max_shard_size": max_shard_size, "save_original_format": save_original_format}
    options = {k: v for k, v in given.items() if v is not None}
    try:
        with stage(f"writing {source.kind.__name__} to {target.name}"), staging.staging(target) as aside:
            model.save_pretrained(aside, **options)
            if beside is not None:
                _copy_beside(beside, aside)
            names = [p.name for p in aside.iterdir() if p.name != CONFIG]
            for name in (*names, CONFIG):
                staging.sync(aside / name)
            stale = [p.name for p in target.iterdir() if _WEIGHTS.fullmatch(p.name) and p.name not in names]
            staging.commit(aside, target, bodies=names, head=CONFIG, stale=stale)
        staging.remove_abandoned(target, with_old_files=True)
    except CheckpointError:
        raise
    except Exception as error:  # transformers, safetensors and the OS each have their own types
        raise CheckpointError(
            f"could not write a {source.kind.__name__} to {target} ({type(error).__name__}: {shown(str(error))}). What "
            "was there before is unchanged."
        ) from error
    return target


def check_place(target: Path) -> None:
    """Raise CheckpointError where no model may be written."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"cannot write a model to {target}: it is a file. Choose a directory.")
    if os.path.lexists(target / ADAPTER_CONFIG):
        raise CheckpointError(
            f"cannot write a model to {target}: it holds an adapter, which transformers would put on the model when it "
            "loads the directory. Choose another directory."
        )


def _filled(source: Source, state: Mapping[str, Tensor]) -> Any:
    """A model of the class that has these tensors."""
    config = copy.deepcopy(source.config)
    model = _made(source.kind, config)
    if torn := _torn(model, state):
        if _can_untie(model, config):
            model = _made(source.kind, config)
            torn = _torn(model, state)
        if torn:
            raise CheckpointError(
                f"{source.kind.__name__} always ties {torn[0]!r} to {torn[1]!r}, and the program has two weights for "
                "them: an adapter changed one of the two alone. Keep it as an adapter, or save the program with "
                "adaptc.save"
            )
    tied = _ties(model)
    wanted: dict[str, Tensor] = dict(model.state_dict())
    names = {k: k if k in state else tied.get(k, k) for k in wanted}
    held = {k: state[name] for k, name in names.items() if name in state}
    _check_fits(model, wanted, held, state)
    model.load_state_dict(_apart(held, tied), strict=True, assign=True)
    model.generation_config = copy.deepcopy(source.generation_config)
    if source.conversions is not None:
        vars(model)["_weight_conversions"] = source.conversions  # where transformers keeps them
    return model.train(False)


def _made(kind: type, config: Any) -> Any:
    """A model without memory."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # a class of a user's own may want anything
        raise CheckpointError(
            f"{kind.__name__} cannot be made of its config alone ({type(error).__name__}: {shown(str(error))}), as it "
            "must be to be written. Load the weights into a model of yours: program.state_dict has them by name"
        ) from error


def _ties(model: Any) -> dict[str, str]:
    """Name -> the name that it is tied to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _torn(model: Any, state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two names that the class ties and that have different tensors."""
    return next(
        ((a, b) for a, b in _ties(model).items() if a in state and b in state and _differ(state[a], state[b])), None
    )


def _differ(a: Tensor, b: Tensor) -> bool:
    return a is not b and (a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b))


def _can_untie(model: nn.Module, config: Any) -> bool:
    """Set a config to untied weights; whether that is all it does. T5's config takes it for another scale of outputs
    when it is read, and other models compute something else where it is set."""
    for one in _with_ties(config):
        setattr(one, _TIE, False)
    read = type(config).from_dict(config.to_dict())
    kinds = {type(m) for m in model.modules()}
    return not any(getattr(one, _TIE) for one in _with_ties(read)) and not any(map(_asks_for_ties, kinds))


def _with_ties(config: Any) -> list[Any]:
    """A config and those inside it that say whether weights are tied."""
    return [one for one in (config, *vars(config).values()) if hasattr(one, _TIE)]


def _asks_for_ties(kind: type[nn.Module]) -> bool:
    try:
        return _TIE in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # no source
        return False


def _check_fits(
    model: nn.Module, wanted: Mapping[str, Tensor], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Raises CheckpointError for tensors that the class has no place for, lacks, or has of another shape."""
    name = type(model).__name__
    buffers = {k for k, _ in model.named_buffers(remove_duplicate=False)}
    odd = [k for k in state if k not in wanted and k not in buffers]
    if odd:
        raise CheckpointError(
            f"{name} has no place for {listing(map(repr, odd), 3)} of the program: a merge adds a bias where the "
            "adapter has one and the layer none, and a weight of its own where several modules read one. Keep it as an "
            "adapter, or save the program with adaptc.save"
        )
    if lost := [k for k in wanted if k not in held]:
        raise CheckpointError(f"{name} needs {listing(map(repr, lost), 3)}, which the program does not have")
    for key, t in held.items():
        if t.shape != wanted[key].shape:
            raise CheckpointError(
                f"{key!r} is {tuple(t.shape)} in the program, and {tuple(wanted[key].shape)} in a {name} with this "
                "config: the merge made it dense, or the model was changed without its config. Keep it as an adapter, "
                "or save the program with adaptc.save"
            )


def _apart(held: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The same, with tied weights one tensor, and others in memory of their own: files have each once."""
    out: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for key, t in held.items():
        if key in tied:
            continue
        t = t.detach()
        out[key] = t.clone() if memory_of(t) in seen else t
        seen.add(memory_of(t))
    return {k: out[tied[k]] if tied.get(k) in out else out.get(k, t) for k, t in held.items()}


def _copy_beside(model: Path, stage: Path) -> None:
    for file in sorted(model.iterdir()):
        usual = _BESIDE.fullmatch(file.name) and not _NOT_BESIDE.fullmatch(file.name)
        if usual and file.is_file() and not (stage / file.name).exists():
            (stage / file.name).write_bytes(file.read_bytes())
