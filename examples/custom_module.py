"""Any module will do: adapters on an embedding, a convolution and a linear layer. Takes a few seconds.

The classifier reads bytes. Its weights are random and stay as they are; only the adapter learns to tell the lines of
pirate.txt from those of telegram.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import adaptc

HERE = Path(__file__).parent
FILES = ("pirate.txt", "telegram.txt")


class Classifier(nn.Module):
    """(batch, bytes) -> (batch, 2): embedding, convolution over the bytes, maximum over positions, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 24)
        self.conv = nn.Conv1d(24, 40, kernel_size=5, padding=2)
        self.head = nn.Linear(40, len(FILES))

    def forward(self, text: Tensor) -> Tensor:
        features = self.conv(self.embed(text).transpose(1, 2)).relu()
        return self.head(features.amax(dim=-1))


def read_lines(length: int = 48) -> tuple[Tensor, Tensor]:
    """The answers in FILES as bytes, (lines, length), cut or padded with zeros; and the number of each line's file."""
    rows, labels = [], []
    for label, name in enumerate(FILES):
        for line in (HERE / name).read_text(encoding="utf-8").splitlines():
            answer = line.split(" | ")[1].encode()
            rows.append(list(answer.ljust(length, b"\0")[:length]))
            labels.append(label)
    return torch.tensor(rows), torch.tensor(labels)


def main() -> int:
    """Returns the exit status: 0 when the adapter learned and the merged program says the same."""
    torch.manual_seed(0)
    model = Classifier()
    text, labels = read_lines()

    config = adaptc.LoraConfig(r=4, lora_alpha=8, target_modules=["embed", "conv", "head"])
    program = adaptc.compile(model, config, example_inputs=text)
    print(adaptc.report(program))

    module = program.module()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
    for _ in range(60):
        nn.functional.cross_entropy(module(text), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def right(scores: Tensor) -> int:
        return int((scores.argmax(-1) == labels).sum())

    print(f"lines told apart: {right(model(text))} before, {right(program(text))} after, of {len(labels)}")

    merged = adaptc.merge(program)
    print(merged.merge_report)
    # Both sizes are free: a single line, cut short, runs through the same program.
    same = all(torch.allclose(merged(t), program(t), atol=1e-4) for t in (text, text[:1, :31]))
    print("the merged program says the same:", same)
    return 0 if same and right(merged(text)) == len(labels) else 1


if __name__ == "__main__":
    sys.exit(main())
