"""Convert the facts of a step and a tokenizer to the files in its package, and back.

Only data files are taken: a tokenizer with code of its own is refused.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from adaptc.capture.model_files import why_no_tokenizer
from adaptc.errors import CheckpointError, ConfigError
from adaptc.generation.description import NAME, described, facts_of
from adaptc.generation.spec import GenerationSpec
from adaptc.packages.manifest import Contents, can_carry
from adaptc.pt2_files.names import loads
from adaptc.pt2_files.refusal import UnsafeFile, reason

_TOKENIZER = "tokenizer/"


def carried(facts: GenerationSpec, tokenizer: Any = None) -> dict[str, bytes]:
    """Return the files of a package by path. Raises ConfigError for anything but a tokenizer that fits the program."""
    files = {name: text.encode() for name, text in described(facts).items()}
    return files if tokenizer is None else files | _files_of(_tokenizer(tokenizer), facts)


def understood(contents: Contents) -> GenerationSpec | None:
    """Return the facts from the files that :func:`carried` made; None for a package of a program alone.

    Raises UnsafeFile where they cannot be read or do not fit the program.
    """
    files = contents.carried
    if NAME not in files:
        if files:
            raise UnsafeFile(f"it carries {min(files)!r}, which is of no program")
        return None
    tokenizer = {n.removeprefix(_TOKENIZER): data for n, data in files.items() if n.startswith(_TOKENIZER)}
    if strange := sorted(n for n in files if n != NAME and not n.startswith(_TOKENIZER)):
        raise UnsafeFile(f"it carries {strange[0]!r}, which is none of what generates")
    inputs = {i.name for i in contents.manifest.inputs}
    outputs = [name for part in contents.manifest.parts.values() for name in part.outputs]
    try:
        return facts_of(loads(files[NAME], infinite=True), inputs, _reader(tokenizer) if tokenizer else None, outputs)
    except UnsafeFile as error:
        raise error.inside(f"what it says of generation, {NAME!r}: ") from None


def _tokenizer(given: Any) -> Any:
    """Return the tokenizer that ``given`` is, or that its directory holds. Raises ConfigError for anything else."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(
            f"tokenizer must be a tokenizer of transformers or the directory of one, not a {type(given).__name__}"
        )
    path = Path(given)
    if not path.is_dir():
        raise ConfigError(f"tokenizer: there is no directory {path}")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for broken files
        raise ConfigError(f"{path} has no tokenizer that can be read: {why_no_tokenizer(path, error)}") from error


def _files_of(tokenizer: Any, facts: GenerationSpec) -> dict[str, bytes]:
    if len(tokenizer) > facts.vocabulary:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, and the program was compiled for {facts.vocabulary}: give the "
            "model's own, or resize the model's embeddings before it is compiled"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    for name in files:
        if name.endswith(".py"):
            raise ConfigError(f"{type(tokenizer).__name__} has code of its own, {name!r}, which no package carries")
        if not can_carry(_TOKENIZER + name):
            raise ConfigError(f"the tokenizer has a file {name!r}, a name that no package has")
    return {_TOKENIZER + name: data for name, data in files.items()}


def _reader(files: Mapping[str, bytes]) -> Callable[[], Any]:
    """Return a function that reads the tokenizer when it is first needed, because that takes longer than loading a
    package."""

    @cache
    def read() -> Any:
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise CheckpointError(
                    f"the tokenizer in the package cannot be read here: {reason(error)}. Package the program again"
                ) from error

    return read
