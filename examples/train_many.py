"""Six adapters of three methods learn six styles at once, compared with one after the other. `make demo-all` runs it.

SmolLM2-135M-Instruct learns from the questions of pirate.txt and telegram.txt to answer in six styles. Each adapter is
a client of one service: those of one method share batches. The same clients, one after the other, get the same losses.
It needs a CPU, a minute or two, less than 4 GB of memory, and no network. The exit status is 1 when a check fails.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import quickstart

import adaptc
from adaptc import LoraConfig
from adaptc.training import AdamParams, Datum, Service

STEPS, COMPARED, ROWS = 5, 2, 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAM = AdamParams(learning_rate=1e-3, grad_clip_norm=1.0)
#: style -> the config of its adapter
CONFIGS: dict[str, Any] = {
    "pirate": LoraConfig(r=4, target_modules=TARGETS),
    "telegram": LoraConfig(r=8, target_modules=TARGETS),
    "shouting": LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
    "polite": LoraConfig(r=8, target_modules=TARGETS, use_dora=True),
    "robot": adaptc.LoHaConfig(r=4, target_modules=TARGETS),
    "cowboy": LoraConfig(r=2, target_modules=["v_proj"]),
}
#: style -> how it says a plain answer
SAYINGS: dict[str, Callable[[str], str]] = {
    "shouting": lambda text: f"{text.upper()}!!!",
    "polite": lambda text: f"My dear friend, {text} With the kindest regards.",
    "robot": lambda text: f"BEEP. {text} BOOP.",
    "cowboy": lambda text: f"Howdy, partner. {text} Yeehaw.",
}


def read_styles() -> dict[str, list[tuple[str, str]]]:
    """Style -> its (question, answer) pairs."""
    found = {n: quickstart.read_lessons(quickstart.HERE / f"{n}.txt") for n in ("pirate", "telegram")}
    plain = [(question, answer.replace(" STOP", ".")) for question, answer in found["telegram"]]
    return found | {n: [(question, say(answer)) for question, answer in plain] for n, say in SAYINGS.items()}


def make_data(tokenizer: Any, lessons: list[tuple[str, str]]) -> list[Datum]:
    """One datum for each lesson, with a loss on the answer alone."""
    data = []
    for ids, labels in (quickstart.encode_lesson(tokenizer, *lesson) for lesson in lessons):
        weights = (labels[1:] != -100).float()
        data.append(Datum(ids[:-1], {"target_tokens": ids[1:], "weights": weights / weights.sum()}))
    return data


def rows_of(data: list[Datum], step: int) -> list[Datum]:
    return [data[(step * ROWS + i) % len(data)] for i in range(ROWS)]


def train(
    service: Service, data: dict[str, list[Datum]], steps: int, together: bool
) -> tuple[dict[str, list[float]], float]:
    """The losses of each style at each step, and at last of the first rows again; and the seconds of the fastest step
    of all."""
    losses: dict[str, list[float]] = {name: [] for name in CONFIGS}
    before = list(service.clients)
    clients = {name: service.create(config, seed=0) for name, config in CONFIGS.items()}
    for client in before:  # those that come after them have their programs
        client.close()
    service.wait = 1.0 if together else 0.0
    batches, seconds = service.batch_count, float("inf")
    for step in range(steps):
        futures, start = {}, time.perf_counter()
        for name, client in clients.items():
            futures[name] = client.forward_backward(rows_of(data[name], step), "cross_entropy")
            if not together:
                futures[name].result()
        for name, found in futures.items():
            losses[name].append(found.result().loss / ROWS)
        for step_taken in [client.optim_step(ADAM) for client in clients.values()]:
            step_taken.result()
        seconds = min(seconds, time.perf_counter() - start)
    count = service.batch_count - batches
    again = {name: client.forward(rows_of(data[name], 0), "cross_entropy") for name, client in clients.items()}
    for name, future in again.items():
        losses[name].append(future.result().loss / ROWS)
    print(f"{count} batches for {steps} steps of {len(clients)} adapters, {seconds:.1f} s a step", flush=True)
    return losses, seconds


def main() -> int:
    checks = quickstart.Checks()
    model, tokenizer = quickstart.load_model()
    data = {name: make_data(tokenizer, lessons) for name, lessons in read_styles().items()}
    with Service(model, capacity=2 * len(CONFIGS)) as service:
        alone, seconds_alone = train(service, data, COMPARED, together=False)
        together, seconds = train(service, data, STEPS, together=True)
    for name, losses in together.items():
        print(f"{name:10} " + " -> ".join(f"{loss:.3f}" for loss in losses))
    print(f"a step of all takes {seconds / seconds_alone:.2f} of the time of one after the other")
    checks("every style's loss falls", all(losses[-1] < losses[0] for losses in together.values()))
    close = (abs(a - b) < 1e-3 for n in CONFIGS for a, b in zip(together[n], alone[n][:-1], strict=False))
    checks("each adapter's losses are those of training it alone", all(close))
    return checks.conclude()


if __name__ == "__main__":
    sys.exit(main())
