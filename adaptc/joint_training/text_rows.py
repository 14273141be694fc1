"""Make rows of tokens of datasets: files of texts or of JSON, and what the package ``datasets`` loads.

A file ``.txt`` has a text in each line. ``.jsonl`` has a JSON object in each line, and ``.json`` a list of them. The
keys of an object, which are TRL's, say what it is:

    text                    a text, with a loss on all of it
    prompt, completion      two texts, with a loss on the second
    messages                a conversation in the form of the tokenizer's chat template, with a loss on all of it
    input_ids, labels       tokens; labels may be left out

Texts and completions end with the tokenizer's end of a text.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptc.errors import CheckpointError, ConfigError, listing, short_repr
from adaptc.joint_training.datum import IGNORED
from adaptc.torch_typing import is_list_or_tuple, is_mapping

#: what files end in
_SUFFIXES = (".txt", ".jsonl", ".json")
#: the keys of each form of a row; the first form whose keys a row has is meant
_FORMS = (("input_ids",), ("prompt", "completion"), ("messages",), ("text",))


@dataclass(frozen=True)
class DatasetSource:
    """The place of a dataset: a file, or a name with its config and split as ``datasets.load_dataset`` takes them."""

    name: str
    config: str | None = None
    split: str = "train"


def read_dataset(source: DatasetSource, folder: Path, tokenizer: Any, max_length: int | None) -> list[dict[str, Any]]:
    """Return the rows of a dataset, with ``input_ids`` and ``labels``, lists of as many numbers.

    ``folder``: the directory that a path is relative to. ``max_length``: rows are cut to so many tokens; None for
    whole ones. Rows of one token are left out.

    Raises CheckpointError for a file that cannot be read, ConfigError for a row that is none.
    """
    path = folder / source.name
    is_file = path.is_file() or source.name.endswith(_SUFFIXES)
    entries = _entries_of_file(path) if is_file else _entries_of_library(source)
    found: list[dict[str, Any]] = []
    for where, entry in entries:
        ids, labels = _tokens_of(where, entry, tokenizer)
        if len(ids[:max_length]) > 1:
            found.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    if not found:
        raise ConfigError(f"{source.name} has no row of two tokens or more, so there is nothing to train on")
    return found


def check_lengths(source: DatasetSource, rows: Sequence[Mapping[str, Any]], position_count: int | None) -> None:
    """Raise ConfigError for a row of more tokens than the model takes; None stands for any number."""
    longest = max(len(row["input_ids"]) for row in rows)
    if position_count is not None and longest > position_count:
        raise ConfigError(
            f"{source.name} has a row of {longest} tokens, and the model takes {position_count}: cut rows with "
            "max_length"
        )


def _entries_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a file, each with where it is."""
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path} is no dataset: its name must end in {listing(_SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the dataset {path} cannot be read: {error}") from error
    if path.suffix == ".json":
        whole = _parse(f"{path}", text)
        if not is_list_or_tuple(whole):
            raise CheckpointError(f"{path} is no list of objects: write one object in each line, as {path.stem}.jsonl")
        yield from ((f"{path.name}[{i}]", entry) for i, entry in enumerate(whole))
        return
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path.name}:{number}"
        if line.strip():
            yield where, {"text": line.rstrip("\r")} if path.suffix == ".txt" else _parse(where, line)


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON: {error}") from error


def _entries_of_library(source: DatasetSource) -> Iterable[tuple[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"{source.name!r} is no file, and names are for the package datasets, which is not installed: give a file "
            f"that ends in {listing(_SUFFIXES)}, or pip install datasets"
        )
    import datasets

    try:
        found: Any = datasets.load_dataset(source.name, source.config, split=source.split)
    except Exception as error:  # the library and those below it have errors of many types
        raise CheckpointError(
            f"there is no file {source.name!r}, and the package datasets cannot load it: {short_repr(str(error))}"
        ) from error
    return ((f"{source.name}[{i}]", entry) for i, entry in enumerate(found))


def _tokens_of(where: str, entry: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens and labels of an entry. Raises ConfigError, which names the entry, for one of no known form."""
    keys = next((k for k in _FORMS if is_mapping(entry) and all(n in entry for n in k)), None)
    if keys is None:
        forms = " or ".join(" and ".join(k) for k in _FORMS)
        raise ConfigError(f"{where} is {short_repr(entry)}: expected an object with {forms}")
    if keys == ("input_ids",):
        return _checked_ids(where, entry)
    try:
        if keys == ("messages",):
            ids = [*tokenizer.apply_chat_template(entry["messages"], tokenize=True, return_dict=False)]
            return ids, ids
        texts = [entry[k] for k in keys]
        if not all(isinstance(t, str) for t in texts):
            raise TypeError(f"{listing(keys)} must be texts")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        first, *rest = [[*tokenizer(text, add_special_tokens=not i)["input_ids"]] for i, text in enumerate(texts)]
    except Exception as error:  # templates and tokenizers have errors of many types
        raise ConfigError(f"{where} cannot be made tokens: {short_repr(str(error))}") from error
    last = rest[0] if rest else first
    last += end if last[-1:] != end else []  # some tokenizers write the end themselves
    return (first, first) if not rest else (first + last, [IGNORED] * len(first) + last)


def _checked_ids(where: str, entry: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    ids: Any = entry["input_ids"]
    labels: Any = entry.get("labels", ids)
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not is_list_or_tuple(values) or not all(type(v) is int for v in values) or len(values) != len(ids):
            raise ConfigError(f"{where} has {name} {short_repr(values)}: expected whole numbers, as many as input_ids")
    return [*ids], [*labels]
