"""Promise 8: whatever an adapter directory holds, a swap gives what its files honestly say, or an AdaptcError at once,
with the program as it was.

Seeded mutations of good directories, some hundred in every run and 10,000 with ``--full``. What is accepted is compared
with safetensors' and json's own reading of the same files.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, LoraConfig

SAFE, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
#: seconds that no call may exceed; of the time of this process, which others cannot delay
LIMIT = 2.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(7, 5), nn.Linear(7, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x))) * self.k(x).sum(-1, keepdim=True)


X = torch.linspace(-2, 3, 21).view(3, 7)


class World:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        torch.manual_seed(7)
        self.model, self.rng = Net().eval(), rng
        self.program = adaptc.compile(self.model, LoraConfig(r=3, target_modules=["q", "k"]), example_inputs=X)
        other = adaptc.compile(
            self.model,
            LoraConfig(r=2, lora_alpha=6, target_modules=["q", "k"], init_lora_weights=False),
            example_inputs=X,
        )
        self.good = adaptc.save_adapter(other, folder / "good")
        self.as_bin = adaptc.save_adapter(other, folder / "bin", safe_serialization=False)
        self.where = folder / "mutant"
        adaptc.swap(self.program, self.good)
        self.binding, self.expected = self.program.binding, self.program(X)

    def mutant(self, kind: str) -> None:
        shutil.rmtree(self.where, ignore_errors=True)
        shutil.copytree(self.as_bin if kind.startswith("bin") else self.good, self.where)
        KINDS[kind](self, self.rng)

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        (self.where / name).write_bytes(change((self.where / name).read_bytes()))


def flips(data: bytes, rng: random.Random, reach: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(min(reach, len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return rng.choice([data[:at], data + data[:at], data[:at] + data[at + rng.randint(1, 9) :]])


def header(w: World, rng: random.Random) -> None:
    """Another header before the same data, as JSON that may say anything."""
    data = (w.where / SAFE).read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    entries, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    names = [k for k in entries if k != "__metadata__"]
    one, two = rng.sample(names, 2)
    match rng.randrange(8):
        case 0:
            entries[one], entries[two] = entries[two], entries[one]
        case 1:
            entries[one]["shape"] = rng.choice(
                [[], [0], [-1, 4], [2**62, 4], [1] * 40, [7, 2], "x", None, [2.5], [True, 14]]
            )
        case 2:
            entries[one]["dtype"] = rng.choice(
                ["F16", "F64", "I32", "BOOL", "C64", "F9", None, "BF16", "U8", "F8_E4M3"]
            )
        case 3:
            entries[one]["data_offsets"] = rng.choice(
                [[0, 0], [0, 2**63], [-4, 4], [8, 0], entries[two]["data_offsets"]]
            )
        case 4:
            del entries[one]
        case 5:
            entries[one.replace("lora_A", "lora_C")] = entries.pop(one)
        case 6:
            entries["__metadata__"] = rng.choice([{"format": "tf"}, {"format": 3}, [], None, {"a": "b" * 9000}])
        case 7:
            entries[one] = rng.choice([None, [], 3, {}, {"dtype": "F32"}])
    text = json.dumps(entries)
    if rng.random() < 0.3:  # a name twice
        text = text[:-1] + "," + json.dumps({one: entries.get(two)})[1:]
    raw = text.encode() + b" " * rng.randrange(9)
    (w.where / SAFE).write_bytes(struct.pack("<Q", len(raw) + rng.choice([0, 0, 0, 1, -1, 2**40])) + raw + body)


def values(w: World, rng: random.Random) -> None:
    """Good files of wrong tensors."""
    tensors = load_file(w.where / SAFE)
    key, other = rng.sample(list(tensors), 2)
    t = tensors[key]
    new: list[Callable[[], Any]] = [
        lambda: t.T.contiguous(),
        lambda: t[:, 1:].contiguous(),
        lambda: torch.cat([t, t]),
        lambda: t.flatten(),
        lambda: t[None].contiguous(),
        lambda: t.to(
            rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool])
        ),
        lambda: t.to(torch.float8_e4m3fn),
        lambda: t * rng.choice([float("nan"), float("inf"), 0.0, 1e-30]),
        lambda: t.double() * 1e39,
        lambda: torch.zeros(0, 7),
        lambda: torch.tensor(1.0),
    ]
    match rng.randrange(4):
        case 0 | 1:
            tensors[key] = rng.choice(new)()
        case 2:
            tensors[key], tensors[other] = tensors[other].clone(), tensors[key].clone()
        case 3:
            del tensors[key]
            if rng.random() < 0.5:
                tensors[rng.choice([key.removeprefix("base_model.model."), key + "x", "é" + key])] = t
    (w.where / SAFE).write_bytes(save(tensors, {"format": "pt"}))


ANY: list[Any] = [
    None,
    0,
    -1,
    1,
    2,
    3,
    8,
    1.5,
    1e39,
    True,
    False,
    "",
    "q",
    "LORA",
    "IA3",
    [],
    ["q"],
    ["q", "k"],
    {},
    {"q": 3},
]
ANY += [
    [None],
    [3],
    {"a": {"b": {}}},
    10**15,
    2**70,
    "(a+)+$",
    "0123",
    [[0, 10**6]],
    {"q": -1},
    {"(": 2},
    {"q": 1e300},
    "é",
]


def config(w: World, rng: random.Random) -> None:
    """Another config: fields with other values, swapped, missing, there twice, unknown; numbers that are none."""
    data = json.loads((w.where / CONFIG).read_text())
    for _ in range(rng.randint(1, 2)):
        one, two = rng.sample(list(data), 2)
        match rng.randrange(5):
            case 0 | 1:
                data[one] = rng.choice(ANY)
            case 2:
                data[one], data[two] = data[two], data[one]
            case 3:
                del data[one]
            case 4:
                data[one + "_"] = data[one]
    text = json.dumps(data)
    if rng.random() < 0.2:
        text = text[:-1] + f', "lora_alpha": {rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])}}}'
    if rng.random() < 0.1:
        text = text[:-1] + ', "x": ' + "[" * 3000 + "]" * 3000 + "}"
    (w.where / CONFIG).write_text(text)


KINDS: dict[str, Callable[[World, random.Random], None]] = {
    "flipped": lambda w, r: w.edit(SAFE, lambda d: flips(d, r, len(d))),
    "flipped header": lambda w, r: w.edit(SAFE, lambda d: flips(d, r, 600)),
    "cut": lambda w, r: w.edit(SAFE, lambda d: cut(d, r)),
    "header": header,
    "values": values,
    "config": config,
    "config, flipped": lambda w, r: w.edit(CONFIG, lambda d: flips(d, r, len(d))),
    "config, cut": lambda w, r: w.edit(CONFIG, lambda d: cut(d, r)),
    "bin, flipped": lambda w, r: w.edit(BIN, lambda d: flips(d, r, len(d))),
    "bin, cut": lambda w, r: w.edit(BIN, lambda d: cut(d, r)),
}


def honest(where: Path, model: Net) -> Tensor | None:
    """What a directory says, read by other means: the output by the formula of LoRA, or None where that is not it."""
    if not (where / SAFE).is_file():
        return None
    data = json.loads((where / CONFIG).read_text(encoding="utf-8-sig"))
    tensors = {k.removeprefix("base_model.model."): t for k, t in load((where / SAFE).read_bytes()).items()}
    fields = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "bias")
    fields += ("init_lora_weights", "layer_replication", "fan_in_fan_out", "trainable_token_indices")
    plain = data.get("peft_type") == "LORA" and all(
        data.get(f) in (None, False, {}, [], "none") or (f, data[f]) == ("init_lora_weights", True) for f in fields
    )
    if not plain:
        return None
    scale = data.get("lora_alpha", 8) / data.get("r", 8)

    def linear(name: str, x: Tensor) -> Tensor:
        layer = getattr(model, name)
        out = layer(x)
        if f"{name}.lora_A.weight" in tensors:
            a, b = (tensors[f"{name}.lora_{s}.weight"].float() for s in "AB")
            out = out + scale * (x @ a.T @ b.T)
        return out

    return linear("out", torch.tanh(linear("q", X))) * linear("k", X).sum(-1, keepdim=True)


def fuzz(folder: Path, seed: int, cases: int, kinds: list[str]) -> None:
    rng = random.Random(seed)
    w = World(folder, rng)
    accepted = compared = 0
    for i in range(cases):
        kind = kinds[i % len(kinds)]
        w.mutant(kind)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adaptc.swap(w.program, w.where)
        except AdaptcError:
            assert w.program.binding is w.binding, (kind, i)
            if i % 10 == rng.randrange(10):
                assert torch.equal(w.program(X), w.expected), (kind, i)
        except BaseException as error:
            raise AssertionError(f"{kind}, case {i} of seed {seed}: {type(error).__name__}: {error}") from error
        else:
            accepted += 1
            said = honest(w.where, w.model)
            # Above, whether a product overflows depends on the order of the factors.
            if said is not None and said.abs().max() < 1e30:
                compared += 1
                torch.testing.assert_close(
                    w.program(X), said, rtol=2e-4, atol=2e-4, msg=f"{kind}, case {i}, seed {seed}"
                )
            adaptc.swap(w.program, w.good)
            w.binding = w.program.binding
        assert time.process_time() - start < LIMIT, (kind, i, seed)
    assert torch.equal(w.program(X), w.expected)
    assert compared > cases // 50  # or else nothing was shown


FILES = [k for k in KINDS if not k.startswith("config")]
CONFIGS = [k for k in KINDS if k.startswith("config")]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_weights(seed: int, tmp_path: Path) -> None:
    fuzz(tmp_path, seed, 150, FILES)


@pytest.mark.parametrize("seed", range(2))
def test_configs(seed: int, tmp_path: Path) -> None:
    fuzz(tmp_path, seed, 100, CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 17))
def test_many_weights(seed: int, tmp_path: Path) -> None:
    fuzz(tmp_path, seed, 1000, FILES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 23))
def test_many_configs(seed: int, tmp_path: Path) -> None:
    fuzz(tmp_path, seed, 1000, CONFIGS)
