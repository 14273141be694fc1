"""A tokenizer of a word each for the language model of ``tests.support.training``, and texts of such words."""

from __future__ import annotations

import functools
import random
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.training import VOCABULARY


@functools.cache
def tokenizer() -> Any:
    """Not to be changed."""
    words = {**{f"w{i}": i for i in range(VOCABULARY - 3)}, "<pad>": VOCABULARY - 3, "<eos>": VOCABULARY - 2}
    inner = Tokenizer(models.WordLevel({**words, "<unk>": VOCABULARY - 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def text(rng: random.Random, words: int) -> str:
    return " " + " ".join(f"w{rng.randrange(VOCABULARY - 3)}" for _ in range(words))
