"""Methods above the layer next to PEFT's: a forward pass, generation, and an adapter called after a long conversation.

``python -m tests.benchmarks.above_layers`` prints these rows alone. aLoRA's last row is the time to the first token
behind 512 that a conversation with the base has had: PEFT computes them again, and here their cache is gone on from.
X-LoRA has two passes, for each of which PEFT computes the whole text again.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn

import adaptc
from tests.benchmarks.harness import Row, interleave, machine, markdown
from tests.benchmarks.model import RANK, smollm2, tokens
from tests.support.prompts import generate_with_peft
from tests.support.xlora import save_xlora_adapter

PROMPT, NEW, SAID = 16, 32, 512
#: ids of no meaning, which invoke aLoRA
CALL = (11, 23)
CONFIGS: dict[str, dict[str, Any]] = {
    "prompt tuning": {"PromptTuningConfig": {"num_virtual_tokens": 20}},
    "prefix tuning": {"PrefixTuningConfig": {"num_virtual_tokens": 20}},
    "aLoRA": {
        "LoraConfig": {"r": RANK, "target_modules": ["q_proj", "k_proj", "v_proj"], "alora_invocation_tokens": [*CALL]}
    },
}
ENDS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def run(folder: Path, rounds: int = 5) -> list[Row]:
    """Rows of times over PEFT's, and of forward passes over the base's."""
    base = smollm2()
    base.generation_config.use_cache = base.config.use_cache = True
    rows: list[Row] = []
    for name, ((kind, options),) in {n: tuple(c.items()) for n, c in CONFIGS.items()}.items():
        theirs = _peft(base, kind, options)
        path = folder / name.replace(" ", "_")
        theirs.save_pretrained(str(path))
        rows += _forward(name, base, theirs, adaptc.compile(base, path), rounds)
        gen = adaptc.compile_for_generation(base, path, max_batch=1, max_length=1024)
        rows += _conversation(theirs, gen, rounds) if name == "aLoRA" else _tokens(name, base, theirs, gen, rounds)
    return rows + _mixed(base, folder, rounds)


def _mixed(base: Any, folder: Path, rounds: int) -> list[Row]:
    """X-LoRA of two experts."""
    adapters = {str(i): str(folder / f"expert_{i}") for i in range(2)}
    for path in adapters.values():
        _peft(base, "LoraConfig", {"r": RANK, "target_modules": ["q_proj", "v_proj"]}).save_pretrained(path)
    without = copy.deepcopy(base)
    without.config.use_cache = False  # as PEFT wants it
    theirs = _peft(without, "XLoraConfig", {"hidden_size": base.config.hidden_size, "adapters": adapters})
    path = save_xlora_adapter(theirs, folder / "mixed")
    gen = adaptc.compile_for_generation(base, path, max_batch=1, max_length=1024)
    name = "X-LoRA"
    return [
        *_forward(name, base, theirs, adaptc.compile(base, path), rounds),
        *_tokens(name, base, theirs, gen, rounds),
    ]


def _peft(base: nn.Module, kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) * (0.02 if "lora" in n else 0.3))
    return model


def _forward(name: str, base: Any, theirs: Any, ours: Any, rounds: int) -> list[Row]:
    inputs = tokens(1, 128)
    inputs["input_ids"][0, 64:66] = torch.tensor(CALL)
    with torch.no_grad():
        found, expected = (m(**inputs).logits[:, -128:] for m in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    calls = {"transformers base": base, "PEFT": theirs, "adaptc": ours}
    return interleave(
        f"{name}, prefill 1x128", {n: _call(m, inputs) for n, m in calls.items()}, "transformers base", rounds
    )


def _tokens(name: str, base: Any, theirs: Any, gen: Any, rounds: int) -> list[Row]:
    text = tokens(1, PROMPT)["input_ids"]
    _same(theirs, gen, text)
    calls = {n: _generated(m, text, NEW) for n, m in {"transformers base": base, "PEFT": theirs, "adaptc": gen}.items()}
    made = interleave(f"{name}, generate, per new token", calls, "PEFT", rounds, 1)
    return [Row(r.work, r.candidate, r.milliseconds / NEW, r.ratio, r.rounds) for r in made]


def _conversation(theirs: Any, gen: Any, rounds: int) -> list[Row]:
    text = tokens(1, SAID + 8)["input_ids"]
    text[0, SAID : SAID + 2] = torch.tensor(CALL)
    with torch.no_grad():
        said = gen.base.prefill(text[:, :SAID])
    _same(theirs, gen, text)
    assert torch.equal(
        gen.generate(text, past_key_values=said.copy(), max_new_tokens=2, **ENDS),
        gen.generate(text, max_new_tokens=2, **ENDS),
    )
    calls = {
        "PEFT, all computed again": _generated(theirs, text, 1),
        "adaptc, all computed again": _generated(gen, text, 1),
        "adaptc, from the base's cache": lambda: gen.generate(
            text, past_key_values=said.copy(), max_new_tokens=1, **ENDS
        ),
    }
    return interleave(f"aLoRA, first token behind {SAID} of the base", calls, "PEFT, all computed again", rounds, 1)


def _same(theirs: Any, gen: Any, text: torch.Tensor) -> None:
    """Both write the same, or their times mean nothing."""
    ours, peers = (_generated(m, text, 2)() for m in (gen, theirs))
    assert isinstance(ours, torch.Tensor)
    assert isinstance(peers, torch.Tensor)
    assert torch.equal(ours, peers)


def _generated(model: Any, text: torch.Tensor, count: int) -> Callable[[], object]:
    """With a cache, also of PEFT's prompts, which look for it under the name that transformers gave it once."""
    write = (
        partial(generate_with_peft, model)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        else model.generate
    )
    return lambda: write(input_ids=text, max_new_tokens=count, **ENDS)


def _call(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(**inputs)

    return run


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as place:
        load = os.getloadavg()[0]
        table = run(Path(place), int(os.environ.get("ROUNDS", "5")))
    print(f"Measured on {machine()}, load {load:.1f} before and {os.getloadavg()[0]:.1f} after.\n")
    print(markdown(table))
    sys.stdout.flush()
