"""The packages that tests of generation share, one for each family: compiling one takes a minute."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import adaptc
from tests.generation.models import generator
from tests.support.families import VOCAB

#: the largest rank of their slots; adapters in tests have up to five
ROOM = 5


@cache
def tokenizer(words: int = VOCAB) -> Any:
    """One whose word "w7" is the token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # transformers puts "abcdef" before each token that it looks at for stop strings.
    vocabulary = {"abcdef" if i == words - 1 else f"w{i}": i for i in range(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w3")


@cache
def written(family: str) -> Path:
    return adaptc.package(generator(family), Path(mkdtemp()) / f"{family}.pt2", max_rank=ROOM, tokenizer=tokenizer())


@cache
def packaged(family: str) -> Any:
    """Loaded; tests that swap it give its adapter back."""
    return adaptc.load_package(written(family))
