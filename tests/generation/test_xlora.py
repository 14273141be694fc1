"""X-LoRA in what generates: PEFT's answers, which computes the whole text twice for each token, from two caches."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adaptc
from adaptc.archives.refusal import UnsafeFile
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.modes import chunked_prefill
from adaptc.generation.modes.all_modes import RECURRENT, SLIDING_WINDOW, STATIC
from adaptc.generation.modes.static_mode import StaticMode
from adaptc.passes.graph.lifted import copy_graph
from adaptc.passes.protocol.regions import node_tag
from adaptc.state.adaptation import check_tags
from tests.generation.models import generated, prompt
from tests.generation.test_uncached_models import Forgetful
from tests.support import invoked
from tests.support.cover import examples
from tests.support.families import FAMILIES
from tests.support.invoked import alora_oracle, inputs_with_invocations
from tests.support.xlora import OTHERS, config_of, experts, peft_model, save_xlora_adapter, scalings_of

#: rotary and learned positions, and layers that look back on a window: all of them, or every other one
FAMILY = ["llama", "gpt2", "mistral", "gemma3_text"]
LAYERWISE: dict[str, Any] = {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 11}
ACTING: dict[str, Any] = {"scaling_pass_value": 0.6, "top_k_lora": 2}
PADDED = (4, 0, 1)


class Oracle:
    """PEFT's model, and its adapter as a file."""

    def __init__(self, family: str, others: bool, **options: Any) -> None:
        folder = Path(mkdtemp())
        self.experts = experts(family, folder / "experts", OTHERS[family] if others else ())
        self.model = peft_model(family, self.experts, seed=int(others), **options)
        self.path = save_xlora_adapter(self.model, folder / "adapter")


@cache
def oracle(family: str, others: bool = False, acting: bool = False) -> Oracle:
    return Oracle(family, others, **(ACTING if acting else LAYERWISE))


def made(family: str, adapter: Any, backend: str = "eager", **more: Any) -> Any:
    model = FAMILIES[family].build()
    return adaptc.compile_for_generation(model, adapter, max_batch=12, max_length=48, backend=backend, **more)


@cache
def generator(family: str = "llama", acting: bool = False) -> Any:
    """One that the tests of a process share: those that swap it give its adapter back."""
    return made(family, oracle(family, acting=acting).path)


def in_steps(gen: Any, text: dict[str, Tensor], cuts: list[int], past: Any = None) -> tuple[Tensor, Any]:
    """The logits of a text in several steps, and the cache of it."""
    ids, mask, out = text["input_ids"], text["attention_mask"], []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    start = 0 if past is None else past.length
    for end in cuts:
        found = gen(ids[:, start:end], mask[:, :end], positions[:, start:end], past)
        out.append(found.logits)
        start, past = end, found.past_key_values
    return torch.cat(out, 1), past


def close(got: Tensor, text: dict[str, Tensor], model: Any) -> None:
    """Logits as a PEFT model has them of the whole text, but for padding."""
    mask = text["attention_mask"]
    with torch.no_grad():
        want = model(**text, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    seen = mask.bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("acting", [False, True])
@pytest.mark.parametrize("family", FAMILY)
def test_what_peft_generates(family: str, acting: bool) -> None:
    """Greedy, drawn and in beams, of rows that differ in length, longer than windows; and the base's own answers."""
    peft, gen = oracle(family, acting=acting).model, generator(family, acting)
    assert gen.spec.cache_mode == (SLIDING_WINDOW if family in ("mistral", "gemma3_text") else STATIC)
    for text in (prompt(3, 9, PADDED), prompt(1, 1)):
        for how in ({}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}):
            expected = generated(peft, text, **how)
            assert torch.equal(generated(gen, text, **how), expected)
    plain = FAMILIES[family].build()
    assert torch.equal(generated(gen.base, text), generated(plain, text))
    assert not torch.equal(generated(gen.base, text), generated(gen, text))


@pytest.mark.long
@given(
    rows=st.integers(1, 4),
    cuts=st.lists(st.integers(1, 17), min_size=1, max_size=4, unique=True).map(sorted),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    family=st.sampled_from(FAMILY),
)
@settings(max_examples=examples(12), deadline=None)
def test_steps_are_the_whole_text(rows: int, cuts: list[int], padding: tuple[int, int], family: str) -> None:
    """Whatever the steps are, longer or shorter than windows, every logit is that of the text computed at once."""
    text = prompt(rows, 17, padding[:rows], seed=rows)
    got, _ = in_steps(generator(family), text, [*[c for c in cuts if c < 17], 17])
    close(got, text, oracle(family).model)


@pytest.mark.long
def test_a_step_computes_its_own_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    original = StaticMode.run
    monkeypatch.setattr(StaticMode, "run", lambda *a: (counted.append(a[4]), original(*a))[1])
    generated(generator(), prompt(2, 7), new=5)
    assert counted == [7, 1, 1, 1, 1]


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_both_caches_go_along(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked, cut, reordered, repeated, in pieces and recorded: what is done to one is done to the other."""
    gen, peft, text = generator(family), oracle(family).model, prompt(3, 15, PADDED)
    half = {n: t[:, :9] for n, t in text.items()}
    past = gen.prefill(**half)
    layers, bare = len(gen.spec.layout.layers), gen.base.prefill(**half)
    assert (len(past), past.nbytes) == (layers, 2 * bare.nbytes)
    assert past.nbytes == gen.spec.layout.nbytes(3, past.allocated_length, past.ring_length)
    held = [t.clone() for t in past.tensors]
    for fork in (past.copy(), copy.deepcopy(past)):
        assert torch.equal(generated(gen, text, past_key_values=fork), generated(peft, text))
    assert all(map(torch.equal, held, past.tensors))
    fork, order = past.copy(), torch.tensor([2, 0])
    fork.reorder_cache(torch.tensor([2, 0, 1]))
    fork.batch_select_indices(torch.tensor([0, 1]))
    fork.batch_repeat_interleave(2)
    rows = {n: t[order].repeat_interleave(2, 0) for n, t in text.items()}
    close(torch.cat([in_steps(gen, rows, [9])[0], in_steps(gen, rows, [12, 15], fork)[0]], 1), rows, peft)
    monkeypatch.setattr(chunked_prefill, "CHUNK_SIZE", 4)
    assert torch.equal(generated(gen, text), generated(peft, text))
    fork = gen.new_cache()
    fork.activate_past_recording()
    _, fork = in_steps(gen, text, [11, 15], fork)
    fork.crop(-8)
    other = {n: torch.cat([t[:, :7], prompt(3, 6, seed=4)[n]], 1) for n, t in text.items()}
    got, _ = in_steps(gen, other, [8, 13], fork)
    close(torch.cat([in_steps(gen, other, [7])[0], got], 1), other, peft)


@pytest.mark.long
def test_a_conversation_goes_on() -> None:
    """New tokens alone behind what was said, and a lookup that guesses wrong."""
    gen, peft, text = generator(), oracle("llama").model, prompt(2, 6, (2, 0))
    past = gen.new_cache()
    first = generated(gen, text, past_key_values=past)
    more = prompt(2, 3, seed=2)["input_ids"]
    mask = torch.cat([text["attention_mask"], torch.ones(2, 12, dtype=torch.int64)], 1)
    whole = {"input_ids": torch.cat([first, more], 1), "attention_mask": mask}
    new = {"input_ids": whole["input_ids"][:, past.length :], "attention_mask": mask}
    assert torch.equal(generated(gen, new, past_key_values=past)[:, -9:], generated(peft, whole)[:, -9:])
    single = prompt(1, 9)
    assert torch.equal(generated(gen, single, prompt_lookup_num_tokens=3), generated(peft, single))


@pytest.mark.long
def test_embeddings_instead_of_tokens() -> None:
    """No expert of these is of the embedding, so a text may come as what it gives."""
    gen, peft, text = generator("mistral"), oracle("mistral").model, prompt(2, 8, (3, 0))
    table = FAMILIES["mistral"].build().get_input_embeddings().weight
    embedded = {"inputs_embeds": table[text["input_ids"]].detach(), "attention_mask": text["attention_mask"]}
    assert torch.equal(generated(gen, embedded), generated(peft, text)[:, 8:])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_swaps_to_other_experts(backend: str) -> None:
    """Another number of experts, other ranks and layers: no code is made again; what is bound keeps its own."""
    one, other, text = oracle("llama"), oracle("llama", True), prompt(3, 9, PADDED)
    gen = generator() if backend == "eager" else made("llama", one.path, backend)
    generated(gen, text)
    with adaptc.debug.assert_no_recompiles():
        try:
            adaptc.swap(gen, other.path)
            bound = gen.bind(one.path)
            assert torch.equal(generated(gen, text), generated(other.model, text))
            assert torch.equal(generated(bound, text), generated(one.model, text))
            said = bound.prefill(**{n: t[:, :5] for n, t in text.items()})
            assert torch.equal(generated(bound, text, past_key_values=said), generated(one.model, text))
        finally:
            adaptc.swap(gen, one.path)
    with gen.scaled(0.0):
        scaled = generated(gen, text)
    assert torch.equal(scaled, generated(gen.base, text))
    assert torch.equal(generated(gen.bind(None), text), generated(gen.base, text))


@pytest.mark.long
def test_files_reports_and_verification(tmp_path: Path) -> None:
    gen, text = generator("mistral"), prompt(3, 9, PADDED)
    loaded = adaptc.load(adaptc.save(gen, tmp_path / "gen.pt2"))
    expected = generated(oracle("mistral").model, text)
    assert torch.equal(generated(loaded, text), expected)
    assert loaded.spec.layout == gen.spec.layout
    assert "layers in 2 passes, " in str(adaptc.report(gen))
    assert adaptc.report(gen).notes == adaptc.report(loaded).notes
    checks = {c.name: c.passed for c in adaptc.verify(gen, FAMILIES["mistral"].build()).checks}
    assert checks["base equals model"]
    assert checks["identity equals base"]
    bare = adaptc.unload(loaded)
    assert "layers in 2 passes, " not in str(adaptc.report(bare))
    plain = adaptc.unload(made("mistral", adaptc.LoraConfig(target_modules=["q_proj"])))
    assert {n.name for n in bare.program.graph.find_nodes(op="placeholder")} == {
        n.name for n in plain.program.graph.find_nodes(op="placeholder")
    }
    assert torch.equal(generated(bare, text), generated(plain, text))
    again = adaptc.load(adaptc.save(bare, tmp_path / "bare.pt2"))
    assert torch.equal(generated(again, text), generated(plain, text))


@pytest.mark.parametrize("given", [["nowhere"], ["embedding"], "keys_0", [3], None])
def test_tags_that_name_no_inputs_are_refused(given: Any) -> None:
    """As files of strangers may have them."""
    graph = copy_graph(generator().program.graph)
    check_tags(graph)
    node = next(n for n in graph.nodes if (t := node_tag(n)) and "given" in t)
    node.meta["custom"] = {"adaptc": {**node.meta["custom"]["adaptc"], "given": given}}
    with pytest.raises(
        UnsafeFile, match=r"was given the input '(nowhere|embedding)', which the program has not|expected"
    ):
        check_tags(graph)


def test_caches_of_other_passes_are_refused() -> None:
    """The base's has nothing of the first pass, so that an answer behind it would be wrong."""
    gen, text = generator(), prompt(2, 5)
    base = gen.base
    with pytest.raises(AdaptcError, match=r"of another program: compute the prompt again with gen.prefill"):
        generated(gen, text, past_key_values=base.prefill(**text))
    with pytest.raises(AdaptcError, match="of another program"):
        generated(base, text, past_key_values=gen.prefill(**text))
    assert torch.equal(generated(gen.base, text, past_key_values=base.prefill(**text)), generated(base, text))
    assert torch.equal(
        generated(gen, text, past_key_values=gen.bind(oracle("llama").path).prefill(**text)), generated(gen, text)
    )


def test_scalings_of_tokens_behind_a_cache() -> None:
    gen, text = generator(), prompt(2, 9)
    wrapped = oracle("llama").model
    with torch.no_grad():
        wrapped(**text)
    want = scalings_of(wrapped)
    past = gen.prefill(text["input_ids"][:, :5])
    held = [t.clone() for t in past.tensors]
    got = adaptc.debug.xlora_scalings(gen, text["input_ids"][:, 5:], past_key_values=past)
    torch.testing.assert_close(got, want[:, 5:], rtol=1e-4, atol=1e-5)
    assert past.length == 5
    assert all(map(torch.equal, held, past.tensors))
    bound = gen.bind(oracle("llama").path)
    torch.testing.assert_close(adaptc.debug.xlora_scalings(bound, **text), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="of such this one has none"):
        adaptc.debug.xlora_scalings(gen.base, **text)


@pytest.mark.long
def test_an_adapter_that_comes_later() -> None:
    """A generator of LoRA gets a first pass, and one of X-LoRA another that differs."""
    first, acting, text = oracle("llama"), oracle("llama", acting=True), prompt(2, 7, (2, 0))
    gen = made("llama", adaptc.LoraConfig(r=2, target_modules=["q_proj"]))
    assert gen.spec.layout.passes == 1
    gen = gen.add_adapter("x", first.path, recompile=True)
    assert gen.spec.layout.passes == 2
    gen.set_active("x")
    assert torch.equal(generated(gen, text), generated(first.model, text))
    gen = gen.add_adapter("y", acting.path, recompile=True)
    assert gen.spec.layout.passes == 3
    for name, found in (("y", acting), ("x", first)):
        gen.set_active(name)
        assert torch.equal(generated(gen, text, num_beams=2), generated(found.model, text, num_beams=2))
    gen.set_active("default")
    assert torch.equal(generated(gen, text), generated(gen.base, text))


@pytest.mark.long
def test_beside_an_adapter_that_acts_from_a_token_on() -> None:
    config = adaptc.LoraConfig(**invoked.config_of("llama", (5, 7)))
    other, found = alora_oracle("llama", Path(mkdtemp()), (5, 7), seed=2), oracle("llama")
    gen = made("llama", {"x": config_of("llama", found.experts, **LAYERWISE), "a": config})
    adaptc.swap(gen, {"x": found.path, "a": other.path})
    text = inputs_with_invocations((5, 7), 3, 9, "left")
    for name, model in (("x", found.model), ("a", other.model)):
        gen.set_active(name)
        assert torch.equal(generated(gen, text), generated(model, text))


@pytest.mark.long
def test_rows_with_experts_of_their_own() -> None:
    one, text = oracle("llama"), prompt(3, 6, (2, 0, 0))
    gen = generator()
    bank = gen.bank({"a": one.path, "b": gen.program.current})
    got = generated(bank, text, adapters=["a", None, "b"])
    assert torch.equal(got[[0, 2]], generated(one.model, text)[[0, 2]])
    assert torch.equal(got[1], generated(gen.base, text)[1])
    assert torch.equal(generated(bank, text, adapters=[None] * 3), generated(gen.base, text))
    assert torch.equal(generated(bank, text, adapters=["a"] * 3), generated(one.model, text))


@pytest.mark.long
def test_half_precision() -> None:
    """As near to float32 in steps as at once: rounding decides which expert counts."""
    found, text = oracle("llama"), prompt(2, 9)
    gen = adaptc.compile_for_generation(FAMILIES["llama"].build().bfloat16(), found.path, max_length=48)
    got, past = in_steps(gen, text, [5, 9])
    assert {t.dtype for t in past.tensors} == {torch.bfloat16}
    with torch.no_grad():
        want = found.model(**text).logits
        whole = adaptc.compile(FAMILIES["llama"].build().bfloat16(), found.path)(**text).logits
    assert (got.float() - want).abs().max() < 2 * (whole.float() - want).abs().max()


@pytest.mark.long
def test_states() -> None:
    """Two of them, of which PEFT has none: the whole text for each token."""
    gen, peft, text = generator("mamba"), oracle("mamba").model, prompt(2, 7)
    assert gen.spec.cache_mode == RECURRENT
    assert torch.equal(generated(gen, text), generated(peft, text))
    assert torch.equal(generated(gen, text, num_beams=2), generated(peft, text, num_beams=2))
    past = gen.prefill(text["input_ids"][:, :4])
    assert past.nbytes == 2 * gen.base.prefill(text["input_ids"]).nbytes
    assert torch.equal(generated(gen, text, past_key_values=past.copy()), generated(peft, text))
    with torch.no_grad():
        peft(input_ids=text["input_ids"])
    got = adaptc.debug.xlora_scalings(gen, text["input_ids"][:, 4:], past_key_values=past)
    torch.testing.assert_close(got, scalings_of(peft)[:, 4:], rtol=1e-4, atol=1e-5)
    assert past.length == 4
    assert "state in 2 passes: " in str(adaptc.report(gen))
    assert torch.equal(generated(gen.base, text), generated(FAMILIES["mamba"].build(), text))


@pytest.mark.long
def test_models_that_have_no_cache() -> None:
    """Those without one are given whole texts, and those with an encoder are refused."""
    found, text = oracle("llama"), prompt(2, 5)
    model = Forgetful(FAMILIES["llama"].build().config).eval()
    model.load_state_dict(FAMILIES["llama"].build().state_dict())
    with pytest.warns(adaptc.AdaptcWarning, match=r"without a cache.*as a step with its cache: xlora is weighed by"):
        gen = adaptc.compile_for_generation(model, found.path, max_length=20)
    assert torch.equal(generated(gen, text), generated(found.model, text))
    past = gen.prefill(text["input_ids"][:, :3])
    with torch.no_grad():
        found.model(**text)
    got = adaptc.debug.xlora_scalings(gen, text["input_ids"][:, 3:], past_key_values=past)
    torch.testing.assert_close(got, scalings_of(found.model)[:, 3:], rtol=1e-4, atol=1e-5)
    config = config_of("llama", found.experts)
    with pytest.raises(
        ConfigError, match="T5ForConditionalGeneration has an encoder, and its answers have no first pa"
    ):
        adaptc.compile_for_generation(FAMILIES["t5"].build(), config)


@pytest.mark.slow
def test_as_a_package(tmp_path: Path) -> None:
    gen, peft, text = generator("mistral"), oracle("mistral").model, prompt(3, 9, PADDED)
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "gen.pt2"))
    assert "layers in 2 passes, " in str(adaptc.report(package))
    assert torch.equal(generated(package, text), generated(peft, text))
    assert torch.equal(generated(package, text, num_beams=2), generated(peft, text, num_beams=2))
    assert {c.name: c.passed for c in adaptc.verify(package, gen).checks}["package equals program"]
