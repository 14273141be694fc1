"""Expressions of users and files mean what they mean to ``re``, and end."""

from __future__ import annotations

import json
import random
import re
import time
import warnings

import pytest
import torch
from torch import nn

import adaptc
from adaptc import patterns
from adaptc.errors import ConfigError
from adaptc.patterns import MAX_PATTERN_LENGTH, compile_pattern, limit_pattern_time

NAMES = (
    "a",
    "ab",
    "b",
    "a.b",
    "q_proj",
    "layers.0.q_proj",
    "x{e}",
    "a{",
    "[",
    ":",
    "a]",
    "a-b",
    "a&b",
    "é",
    "ba\n",
    "A",
)
#: as in PEFT's tests and documentation, and in adapters that people share
REAL = (
    r".*\.q_proj",
    r".*[qv]_proj",
    r".*\.(q|k|v)_proj$",
    r"model\.(layers|decoder)\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|up_proj)",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.)",
    r"^(?!.*(?:vision|visual)).*(?:q_proj|v_proj)$",
    r"^(?:(?!vision_tower).)*\.(?:q|k)_proj$",
    r"transformer\.h\.([0-9]|1[0-1])\.attn\.c_attn",
    r".*layers\.[02468]\..*",
    r"(model\.)?layers\.0\.q_proj",
    r"(?P<l>layers)\.\d+\.(?:q|v)_proj",
)
#: each takes a backtracking engine longer than anyone waits
SLOW = ("(a|aa)+b", "(a|a)(a|a)" * 15 + "b", "(?:.*?a.*?a){9}x")
LONG_NAME = "a" * 40


@pytest.fixture(autouse=True)
def soon_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.05)


def written(rnd: random.Random, depth: int = 0) -> str:
    atoms = [*"ab.x-_,{}|^$", "q_proj", r"\.", r"\d", r"\w", r"\s", r"\b", r"\1", "(?=a)", "(?!b)", "(?<=a)", "(?i:A)"]
    atoms += ["[ab]", "[^a]", "[]a]", "[^]a]", "[a[]", r"[\]]", "{e}", "{i<=1}", "[a-c]", r"\A", r"\Z", "(?#c)", "é"]
    out = ""
    for _ in range(rnd.randint(1, 3)):
        inner = depth < 2 and rnd.random() < 0.3
        out += rnd.choice(("(", "(?:", "(?>")) + written(rnd, depth + 1) + ")" if inner else rnd.choice(atoms)
        out += rnd.choice(("", "", "", "", "*", "+", "?", "*?", "{2}", "{1,}", "{,2}", "{,}", "{}", "*+"))
    return out


def agree(text: str, names: tuple[str, ...]) -> None:
    theirs, ours = re.compile(text), compile_pattern("an option", text)
    for name in names:
        for how in ("match", "fullmatch", "search"):
            one, other = getattr(theirs, how)(name), getattr(ours, how)(name)
            assert (one and (one.span(), one.groups())) == (other and (other.span(), other.groups())), (text, name, how)
        assert theirs.subn(r"<\g<0>>", name) == ours.subn(r"<\g<0>>", name), (text, name)


@pytest.mark.parametrize("text", REAL)
def test_real_expressions_mean_what_they_mean_to_re(text):
    blocks = [f"{m}.layers.{i}.{p}" for m in ("model", "vision_tower.model", "language") for i in (0, 11) for p in (
        "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]  # fmt: skip
    agree(text, (*NAMES, *blocks, "transformer.h.11.attn.c_attn"))
    for wrapped in (rf"(.*\.)?({text})$", rf".*\.{text}$", rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\."):
        if "^" not in text:
            agree(wrapped, tuple(blocks))


@pytest.mark.parametrize("seed", range(3))
def test_written_at_random_they_mean_what_they_mean_to_re(seed):
    rnd, tried = random.Random(seed), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of re, about brackets in sets
        while tried < 150:
            text = written(rnd)
            try:
                re.compile(text)
            except re.error:
                with pytest.raises(ConfigError, match=r"an option: .* is not a valid regular expression"):
                    compile_pattern("an option", text)
                continue
            agree(text, NAMES)
            tried += 1


@pytest.mark.parametrize("text", SLOW)
def test_a_slow_one_is_stopped_and_named(text):
    with pytest.raises(ConfigError, match=r"(?s)an option: .* takes too long .* name the modules in a list"):
        compile_pattern("an option", text).fullmatch(LONG_NAME)


def test_the_time_is_that_of_all_together(monkeypatch):
    """Also where the thread got little of the processor while the first was tried."""
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    with limit_pattern_time():
        with pytest.raises(ConfigError, match="takes too long"):
            compile_pattern("an option", SLOW[0]).fullmatch(LONG_NAME)
        with pytest.raises(ConfigError, match=r"another: 'b\*' takes too long"):
            compile_pattern("another", "b*").fullmatch("b")
    assert compile_pattern("another", "b*").fullmatch("b")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "not a valid"),
        ("(" * 6000 + ")" * 6000, "not a valid"),
        ("a{99999999999}", "not a valid"),
        ("a{4000000000}", "repeats stand for more"),
        ("((a{100}){100}b){100}", "repeats stand for more"),
        ("a|" * MAX_PATTERN_LENGTH, "characters"),
        ("(?i)[\\x00-\U0010ffff]", "ignores the case"),
    ],
    ids=range(7),
)
def test_what_cannot_be_compiled_is_refused(text, why):
    with pytest.raises(ConfigError, match=why) as caught:
        compile_pattern("an option", text)
    assert len(str(caught.value)) < 1000


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module(LONG_NAME, nn.Linear(5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


X = torch.randn(3, 5)
EVIL = SLOW[0]
TARGET = ["block." + LONG_NAME]
CASES = {
    "target_modules": adaptc.LoraConfig(target_modules=rf"block\.{EVIL}"),
    "exclude_modules": adaptc.LoraConfig(target_modules=TARGET, exclude_modules=rf"block\.{EVIL}"),
    "rank_pattern": adaptc.LoraConfig(target_modules=TARGET, rank_pattern={EVIL: 2}),
    "alpha_pattern": adaptc.LoHaConfig(target_modules=TARGET, alpha_pattern={EVIL: 2}),
    "layers_pattern": adaptc.LoraConfig(
        target_modules=[LONG_NAME], layers_to_transform=[0], layers_pattern=[rf"block\.{EVIL}"]
    ),
    "n_frequency_pattern": adaptc.FourierFTConfig(target_modules=TARGET, n_frequency=9, n_frequency_pattern={EVIL: 2}),
    "block_size_pattern": adaptc.C3AConfig(target_modules=TARGET, block_size=1, block_size_pattern={EVIL: 1}),
    "feedforward_modules": adaptc.IA3Config(target_modules=TARGET, feedforward_modules=rf"block\.{EVIL}"),
}


@pytest.mark.parametrize("option", CASES)
def test_no_option_hangs(option):
    with pytest.raises(ConfigError, match=rf"(?s){option}.*takes too long"):
        adaptc.compile(Net(), CASES[option], example_inputs=(X,))


def test_a_key_mapping_cannot_hang(tmp_path):
    config = adaptc.LoraConfig(target_modules=TARGET, r=3)
    prog = adaptc.compile(Net(), config, example_inputs=(X,))
    adaptc.save_adapter(prog, tmp_path)
    before = {k: v.clone() for k, v in prog.binding.values.items()}
    with pytest.raises(ConfigError, match=r"(?s)key_mapping.*takes too long"):
        adaptc.swap(prog, tmp_path, key_mapping={rf"block\.{EVIL}": "x"})
    with pytest.raises(ConfigError, match=r"(?s)key_mapping.*does not fit"):
        adaptc.swap(prog, tmp_path, key_mapping={r"(block)*": r"\7"})
    for odd in ({5: "x"}, {"a": 5}, {b"a": "x"}, ["a"], "a"):
        with pytest.raises(adaptc.AdaptcError):
            adaptc.swap(prog, tmp_path, key_mapping=odd)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": {EVIL: 2}}))
    with pytest.raises(ConfigError, match=r"(?s)rank_pattern.*takes too long"):
        adaptc.swap(prog, tmp_path)
    assert all(torch.equal(before[k], v) for k, v in prog.binding.values.items())
