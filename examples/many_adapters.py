"""Three adapters and the base answer one batch: each prompt is written on by an adapter of its own, or a mix. Then the
same in compiled code, into which a fourth adapter is put.

`make demo-all` runs it on the adapters that quickstart.py trained: python examples/many_adapters.py PIRATE TELEGRAM
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import quickstart
import torch

import adaptc

QUESTIONS = ("How do I make a cup of tea?", "Where is the library?", "Who are you?", "What is the sea?")
TOKENS = 24


def main(model: Any, tokenizer: Any, pirate: str, telegram: str) -> None:
    gen = adaptc.compile_for_generation(model, [pirate, telegram], max_batch=4, max_length=256)
    bank = gen.bank({"pirate": pirate, "telegram": telegram, "shy": 0.4 * adaptc.load_adapter(pirate)})
    print(bank.report())
    answer(bank, tokenizer, ["pirate", None, {"telegram": 0.7, "shy": 0.3}, "telegram"])

    try:
        path = adaptc.package(bank, Path(pirate).parent / "writers.pt2", capacity=4)
    except adaptc.BackendError as error:
        print(f"not packaged: {error}")  # there is no C++ compiler
        return
    packaged = adaptc.load_package(path)  # in another process as well, which needs neither the model nor its code
    packaged.add("terse", 1.5 * adaptc.load_adapter(telegram))
    answer(packaged, tokenizer, ["pirate", None, {"telegram": 0.7, "shy": 0.3}, "terse"])


def answer(bank: Any, tokenizer: Any, adapters: list[Any]) -> None:
    prompts = [quickstart.encode_question(tokenizer, q) for q in QUESTIONS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(p)) + p for p in prompts])  # padded on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    answers = bank.generate(
        ids,
        attention_mask=mask,
        adapters=adapters,  # one for each prompt
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    for question, adapter, row in zip(QUESTIONS, adapters, answers, strict=True):
        print(f"{adapter}: {question}\n  {tokenizer.decode(row[longest:], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*quickstart.load_model(), *sys.argv[1:])
