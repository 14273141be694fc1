"""Run a merged program in a process that has no adaptc: `python -I run_merged.py PROGRAM TOKENS LOGITS`.

Before: PROGRAM was written by `adaptc.save(adaptc.merge(program), PROGRAM)`, TOKENS by `torch.save`. After: LOGITS
holds the program's logits for these tokens. quickstart.py starts this file; copy it to serve a program of your own.
"""

from __future__ import annotations

import sys


def main(program_file: str, tokens_file: str, logits_file: str) -> None:
    # As if adaptc were not installed: Python refuses every import of a name that is None here.
    sys.modules["adaptc"] = None  # type: ignore[assignment]
    try:
        import adaptc  # noqa: F401
    except ImportError as error:
        print(f"in another process: {error}")
    else:
        sys.exit("adaptc can be imported, so this shows nothing")

    import torch

    # The program returns what the model returned, and torch.export has to know that class before it reads the file.
    from transformers.modeling_outputs import CausalLMOutputWithPast

    torch.set_num_threads(1)
    model = torch.export.load(program_file).module()
    tokens = torch.load(tokens_file)
    with torch.no_grad():
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert isinstance(output, CausalLMOutputWithPast)
    torch.save(output.logits, logits_file)
    print(f"in another process: {type(output).__name__} with logits of shape {tuple(output.logits.shape)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
