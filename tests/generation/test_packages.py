"""What generates as a package: the tokens that the program gives, with adapters swapped and bound beside it."""

from __future__ import annotations

import subprocess
import sys
import threading
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptc
from adaptc.generation.modes import chunked_prefill
from tests.generation.models import case, generated, generator, prompt
from tests.generation.packaged import ROOM, packaged, tokenizer, written

pytestmark = pytest.mark.usefixtures("given_back")


@pytest.fixture
def given_back() -> Any:
    """Whatever a test swapped in."""
    yield
    for family in ("llama", "gpt2"):
        if family in _USED:
            adaptc.swap(packaged(family), case(family).adapters["first"])


_USED: set[str] = set()


def loaded(family: str = "llama") -> Any:
    _USED.add(family)
    return packaged(family)


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_those_of_the_program(family: str) -> None:
    found, gen, package = case(family), generator(family), loaded(family)
    assert isinstance(package, adaptc.Generator)
    assert package.generation_config.to_dict() == gen.generation_config.to_dict()
    for name in ("first", "second", "first"):
        adaptc.swap(package, found.adapters[name])
        for rows, length, padding in ((3, 7, (2, 0, 4)), (1, 1, ()), (2, 16, ())):
            text = prompt(rows, length, padding, seed=length)
            assert torch.equal(generated(package, text), found.expected(name, text))
            assert torch.equal(generated(package, text, num_beams=3), found.expected(name, text, num_beams=3))
    text = prompt(2, 5)
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 1.5}
    assert torch.equal(generated(package, text, **sampled), generated(gen, text, **sampled))
    assert torch.equal(generated(package.base, text), found.expected(None, text))


@pytest.mark.long
@settings(max_examples=4)
@given(rows=st.integers(1, 5), length=st.integers(1, 19), cut=st.integers(1, 18), fork=st.booleans())
def test_caches_go_on(rows: int, length: int, cut: int, fork: bool) -> None:
    """A prompt in two pieces, the second on a copy of the cache or on the cache itself."""
    package, text = loaded(), prompt(rows, length)
    cache = package.prefill(text["input_ids"][:, : min(cut, length)])
    before = [t.clone() for t in cache.tensors]
    out = generated(package, text, past_key_values=cache.copy() if fork else cache)
    assert torch.equal(out, case("llama").expected("first", text))
    if fork:
        assert all(map(torch.equal, before, cache.tensors))


@pytest.mark.long
@pytest.mark.parametrize("piece", [2, 3])
def test_prompts_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees a part of the cache, which is copied for compiled code: what it writes comes back."""
    monkeypatch.setattr(chunked_prefill, "CHUNK_SIZE", piece)
    package, text = loaded(), prompt(2, 9, (3, 0))
    assert torch.equal(generated(package, text), case("llama").expected("first", text))


@pytest.mark.long
def test_functions_of_packages_take_it(tmp_path: Path) -> None:
    found, gen, package = case("llama"), generator(), loaded()
    report = adaptc.report(package)
    assert (report.path, {s.room for s in report.sites}) == (written("llama"), {ROOM})
    for model in (None, gen, found.model):
        result = adaptc.verify(package, model, shapes=4)
        assert result.ok
        assert len(result.runs) == 4
    with pytest.raises(adaptc.AdaptcError, match="shapes: of what generates they are drawn"):
        adaptc.verify(package, gen, shapes=[{"input_ids": (2, 3)}])
    with pytest.raises(adaptc.SwapError, match=r"rank 7.*room for 5; package again with max_rank=7"):
        adaptc.swap(package, _larger(tmp_path, 7))
    text = prompt(2, 5)
    bound = adaptc.bind(package, found.adapters["second"])
    assert torch.equal(generated(bound, text), found.expected("second", text))
    with pytest.raises(adaptc.AdaptcError, match=r"keeps .*second.*: swap, merge and save"):
        adaptc.swap(bound, found.adapters["first"])
    assert torch.equal(generated(package, text), found.expected("first", text))


def _larger(folder: Path, rank: int) -> Path:
    config = adaptc.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    made = adaptc.compile(case("llama").model, config, example_inputs={"input_ids": prompt(2, 5)["input_ids"]})
    return adaptc.save_adapter(made, folder / "larger")


@pytest.mark.parametrize("name", ["merge", "unload", "debug.lower", "save", "save_adapter", "package", "unmerge"])
def test_what_needs_the_graph_is_refused(name: str, tmp_path: Path) -> None:
    where = [tmp_path / "out.pt2"] if name in ("save", "save_adapter", "package") else []
    for one in (loaded(), loaded().program):
        with pytest.raises(adaptc.AdaptcError, match="a PackagedProgram"):
            attrgetter(name)(adaptc)(one, *where)
    assert not list(tmp_path.iterdir())


def test_refusals_are_those_of_the_program() -> None:
    package, gen = loaded(), generator()
    for bad in (
        {"max_new_tokens": 60},
        {"use_cache": False},
        {"output_attentions": True},
        {"num_beams": 20},
        {"past_key_values": "of the other"},
    ):
        said = []
        for one, other in ((package, gen), (gen, package)):
            own = {"past_key_values": other.prefill(**prompt(2, 3))} if "past_key_values" in bad else bad
            with pytest.raises(adaptc.AdaptcError) as info:
                generated(one, prompt(2, 3), **own)
            said.append(str(info.value))
        assert said[0] == said[1]


def test_a_generation_keeps_its_adapter() -> None:
    """Whatever is swapped between its tokens."""
    found, package, text = case("llama"), loaded(), prompt(2, 5)

    class Swaps:
        def put(self, value: Any) -> None:
            adaptc.swap(package, found.adapters["second"])

        def end(self) -> None:
            pass

    assert torch.equal(generated(package, prompt(1, 5), streamer=Swaps()), found.expected("first", prompt(1, 5)))
    assert torch.equal(generated(package, text), found.expected("second", text))


def test_threads() -> None:
    """Two bound callables, each with what it gives alone."""
    found, package = case("llama"), loaded()
    names = ["first", "second"]
    wrong: list[Any] = []
    bound = [package.bind(found.adapters[n]) for n in names]
    texts = [prompt(2, 9, seed=1), prompt(3, 4, seed=2)]
    expected = [found.expected(n, text) for n, text in zip(names, texts, strict=True)]

    def run(i: int) -> None:
        try:
            same = [torch.equal(generated(bound[i], texts[i]), expected[i]) for _ in range(5)]
            wrong.extend(names[i] for ok in same if not ok)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


FRESH = """
import sys, torch, adaptc
path, second, out = sys.argv[1:]
gen = adaptc.load_package(path)
text = gen.tokenizer("w5 w17 w9", return_tensors="pt")
how = dict(do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
found = {"first": gen.generate(**text, **how), "beams": gen.generate(**text, **how, num_beams=3)}
adaptc.swap(gen, second)
found["second"] = gen.generate(**text, **how)
torch.save(found, out)
strange = [n for n in sys.modules if ".modeling_llama" in n]
assert not strange, strange
"""


@pytest.mark.long
def test_in_a_fresh_process(tmp_path: Path) -> None:
    """It needs torch and transformers, and none of the model's code."""
    found, out = case("llama"), tmp_path / "out.pt"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        FRESH,
        str(written("llama")),
        str(found.adapters["second"]),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    text = dict(tokenizer()("w5 w17 w9", return_tensors="pt"))
    assert text["input_ids"].tolist() == [[5, 17, 9]]
    text = {n: text[n] for n in ("input_ids", "attention_mask")}
    expected = {
        "first": found.expected("first", text),
        "beams": found.expected("first", text, num_beams=3),
        "second": found.expected("second", text),
    }
    assert {n: t.tolist() for n, t in torch.load(out).items()} == {n: t.tolist() for n, t in expected.items()}


def test_stop_strings_need_no_tokenizer() -> None:
    package, text = loaded(), prompt(1, 5)
    full = generated(package, text)
    stop = f"w{full[0, 8]}"
    assert generated(package, text, stop_strings=[stop]).shape[1] <= 9
    assert torch.equal(
        generated(package, text, stop_strings=[stop]),
        generated(package, text, stop_strings=[stop], tokenizer=tokenizer()),
    )


@pytest.mark.slow
def test_a_merged_program(tmp_path: Path) -> None:
    """It has no sites, and no tokenizer was given."""
    found, text = case("llama"), prompt(2, 5)
    package = adaptc.load_package(adaptc.package(adaptc.merge(generator()), tmp_path / "merged.pt2"))
    assert torch.equal(generated(package, text), found.expected("first", text))
    assert package.tokenizer is None
    with pytest.raises(adaptc.SwapError, match="no adapter sites"):
        adaptc.swap(package, found.adapters["first"])
    with pytest.raises(adaptc.ConfigError, match="could not locate a tokenizer"):
        generated(package, text, stop_strings=["w7"])
