"""QLoRA: a model whose weights take four bits each, with an adapter trained, swapped and merged on top of them.

SmolLM2-135M-Instruct is stored as NF4, in the place of its bfloat16 weights, and learns to answer like a pirate. Every
claim is checked. `make demo-all` runs it; by itself: python examples/qlora.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import quickstart
import torch
from quickstart import console, heading

import adaptc

CONFIG = adaptc.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
STYLE, WORD, STEPS = "pirate", quickstart.STYLES["pirate"], 12


def megabytes(program: adaptc.AdaptedProgram) -> float:
    """What the base's tensors take, in MB; a tied weight counts once."""
    tensors = {id(t): getattr(t, "stored_bytes", t.nbytes) for t in program.base_tensors.values()}
    return sum(tensors.values()) / 1e6


def main(out: Path) -> int:
    began = time.perf_counter()
    check = quickstart.Checks()
    torch.manual_seed(0)

    heading("1. Store the model in four bits")
    model, tokenizer = quickstart.load_model()
    model.to(torch.bfloat16)
    plain = megabytes(adaptc.unload(adaptc.compile(model, CONFIG)))
    adaptc.quantize(model, "nf4")
    console.print(model.quantize_report.render(most=3), soft_wrap=True, markup=False)

    heading("2. Train an adapter on it")
    student = adaptc.compile(model, CONFIG, training=True)
    console.print(f"the base takes {megabytes(student):.0f} MB, and took {plain:.0f} MB in bfloat16")
    check("the base takes half of the memory", megabytes(student) < 0.5 * plain)
    lessons = [quickstart.encode_lesson(tokenizer, *p) for p in quickstart.read_lessons(quickstart.HERE / "pirate.txt")]
    loss = quickstart.train(student, lessons, STYLE, STEPS)
    adaptc.save_adapter(student, out / STYLE)
    check(f"the {STYLE} adapter learned", loss < 1.8)

    heading("3. Swap it into a generator on the same weights")
    generator = adaptc.compile_for_generation(model, CONFIG, max_batch=1, max_length=512)
    prompt = quickstart.encode_question(tokenizer, quickstart.QUESTION)
    ask = [generator, prompt, tokenizer.eos_token_id]
    before = tokenizer.decode(quickstart.answer(*ask))
    adaptc.swap(generator, out / STYLE)
    after = tokenizer.decode(quickstart.answer(*ask))
    console.print(f"without: {before}\nwith:    {after}", markup=False)
    check(f"only the {STYLE} says {WORD!r}", WORD in after and WORD not in before)

    heading("4. Merge it, in three ways")
    program = adaptc.compile(model, out / STYLE)
    tokens = torch.tensor([prompt])
    expected = quickstart.logits(program, tokens)
    for way in ({"requantize": True}, {"keep": "residual"}, {"dequantize": True}):
        name = ", ".join(f"{k}={v!r}" for k, v in way.items())
        merged = adaptc.merge(program, **way)
        found = quickstart.logits(merged, tokens)
        change = float((found - expected).norm() / expected.norm())
        console.print(f"{name:18} {megabytes(merged):4.0f} MB, logits differ by {change:.2%}", markup=False)
        if "requantize" not in way:  # four bits are too few for a change that is smaller than their steps
            check(f"{name} keeps the answer", torch.equal(found[0, -1].argmax(), expected[0, -1].argmax()))
        check("and is undone to the bit", torch.equal(quickstart.logits(adaptc.unmerge(merged), tokens), expected))
        if "keep" in way:
            file = adaptc.save(merged, out / "merged.pt2")
            again = quickstart.run_without_adaptc(file, tokens)
            # Its layers dequantise weights to bfloat16, where kernels read the codes here: each is 3 % off float32.
            check("a process without adaptc computes the same", float((again - found).norm() / found.norm()) < 0.05)

    heading("Done")
    console.print(f"{time.perf_counter() - began:.0f} s, and at most {quickstart.peak_memory():.1f} GB of memory")
    return check.conclude()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        status = main(Path(folder))
    sys.exit(status)
