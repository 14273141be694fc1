"""An adapter trained by transformers' Trainer, stopped half way, and gone on with. `make demo-all` runs it.

SmolLM2-135M-Instruct learns to answer like a pirate from the twelve lines in pirate.txt. Trainer writes checkpoints,
each of which is a PEFT adapter directory; a second run goes on from the first of them, and takes the same steps. It
needs a CPU, about a minute, less than 4 GB of memory, and no network. The exit status is 1 when a check fails.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import quickstart
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

import adaptc

STEPS, SAVED = 10, 5
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


class Lessons(torch.utils.data.Dataset):
    def __init__(self, tokenizer: Any) -> None:
        lessons = quickstart.read_lessons(quickstart.HERE / "pirate.txt")
        self.rows = [quickstart.encode_lesson(tokenizer, *lesson) for lesson in lessons]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def trainer(program: adaptc.AdaptedProgram, lessons: Lessons, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=SAVED,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
    )
    made = Trainer(
        program.module(),
        arguments,
        train_dataset=lessons,
        data_collator=quickstart.make_batch,
        callbacks=[adaptc.training.trainer_callback(program)],
    )
    made.remove_callback(ProgressCallback)
    made.remove_callback(PrinterCallback)
    made.add_callback(ProgressCallback(max_str_len=60))
    return made


def losses(done: Trainer) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def main() -> int:
    torch.manual_seed(0)
    # One thread: several wait for each other at every step where other processes use the same cores.
    torch.set_num_threads(1)
    check = quickstart.Checks()
    model, tokenizer = quickstart.load_model()
    lessons = Lessons(tokenizer)
    config = adaptc.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    program = adaptc.compile(model, config, training=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = trainer(program, lessons, folder)
        first.train()
        whole = losses(first)
        check(f"the loss falls: {whole[0]:.2f} -> {whole[-1]:.2f}", whole[-1] < whole[0] - 0.3)
        checkpoint = folder / f"checkpoint-{SAVED}"
        size = sum(p.stat().st_size for p in checkpoint.iterdir() if p.name != "model.safetensors")
        check(f"a checkpoint is the adapter and its optimizer: {size / 1e6:.0f} MB", size < 40e6)

        torch.manual_seed(1)  # nothing is left to chance but what the checkpoint says
        again = adaptc.compile(model, config, training=True)
        second = trainer(again, lessons, folder / "again")
        second.train(resume_from_checkpoint=str(checkpoint))
        difference = max(abs(a - b) for a, b in zip(whole, losses(second), strict=True))
        check(f"the steps after a checkpoint are the same: {difference:.0e} apart", difference < 1e-3)

        served = adaptc.compile(model, folder / f"checkpoint-{STEPS}")
        ids = quickstart.make_batch([lessons[0]])
        rows = {k: ids[k] for k in ("input_ids", "attention_mask")}
        module = program.module().eval()
        with torch.no_grad():
            close = torch.allclose(served(**rows).logits, module(**rows).logits, rtol=1e-3, atol=1e-3)
        check("a checkpoint is an adapter directory: adaptc.compile and PEFT load it", close)
    return check.conclude()


if __name__ == "__main__":
    sys.exit(main())
