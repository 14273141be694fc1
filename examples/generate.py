"""Text from a step with a cache: adapters swapped and bound, a conversation that goes on, a prompt computed once.

`make demo-all` runs it on the adapters that quickstart.py trained: python examples/generate.py PIRATE TELEGRAM
"""

from __future__ import annotations

import sys
from typing import Any

import quickstart
import torch

import adaptc


def main(model: Any, tokenizer: Any, pirate: str, telegram: str) -> None:
    gen = adaptc.compile_for_generation(model, [pirate, telegram], max_batch=4, max_length=512)
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}

    def ids(question: str) -> torch.Tensor:
        return torch.tensor([quickstart.encode_question(tokenizer, question)])

    def show(title: str, asked: torch.Tensor, tokens: torch.Tensor) -> None:
        answers = tokens[:, asked.shape[1] :]  # what is returned begins with what was asked
        print(f"{title:11}", *tokenizer.batch_decode(answers, skip_special_tokens=True), sep="\n  ")

    prompt = ids(quickstart.QUESTION)
    show("pirate", prompt, gen.generate(prompt, **options))  # transformers' own: beams, sampling, streamers, ...
    adaptc.swap(gen, telegram)  # between calls, or while one runs: that one keeps the adapter it began with
    show("telegram", prompt, gen.generate(prompt, **options))
    show("base", prompt, gen.base.generate(prompt, **options))

    bound = gen.bind(pirate)  # keeps its adapter, in any thread
    cache = bound.prefill(prompt)  # the caller's: what is in it is not computed again
    answer = bound.generate(prompt, past_key_values=cache, **options)
    again = torch.cat([answer, ids("And without sugar?")], 1)
    show("goes on", again, bound.generate(again, past_key_values=cache, **options))

    prefix = gen.prefill(prompt)  # one pass, several texts
    for seed in (1, 2):
        torch.manual_seed(seed)
        sampled = {**options, "do_sample": True, "temperature": 0.7}
        show(f"sample {seed}", prompt, gen.generate(prompt, past_key_values=prefix.copy(), **sampled))


if __name__ == "__main__":
    main(*quickstart.load_model(), *sys.argv[1:])
