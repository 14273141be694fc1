"""Text from a model whose adapter changes: one program, and transformers' own generate. Takes a few seconds."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaptc


def main() -> int:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()  # any causal model of transformers
    folder = Path(tempfile.mkdtemp())
    for name, rank in (("pirate", 3), ("telegram", 5)):  # adapters of different rank, as PEFT would write them
        config = adaptc.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        adaptc.save_adapter(adaptc.compile(model, config), folder / name)

    gen = adaptc.compile_for_generation(model, folder / "pirate", max_batch=4, max_length=128)
    asked = torch.randint(4, 97, (1, 12))
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    pirate = gen.generate(asked, **how)
    telegram = gen.bind(folder / "telegram").generate(asked, **how)  # keeps its adapter, for any thread
    print(adaptc.swap(gen, folder / "telegram"))  # nothing is compiled again
    swapped = gen.generate(asked, **how)

    prefix = gen.prefill(asked)  # computed once, and continued in two ways
    ends = [torch.cat([asked, torch.tensor([[n]])], 1) for n in (7, 9)]
    forks = [gen.generate(ids, past_key_values=prefix.copy(), **how) for ids in ends]
    alike = [torch.equal(fork, gen.generate(ids, **how)) for fork, ids in zip(forks, ends, strict=True)]
    held = torch.equal(swapped, telegram) and not torch.equal(swapped, pirate) and all(alike)
    print("every answer is as it should be" if held else "an answer is WRONG")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
