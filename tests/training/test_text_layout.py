"""Packed texts keep to their places, take little padding, and are computed as each alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from adaptc.joint_training.program_groups import ProgramGroups
from adaptc.joint_training.sweep_batches import collate, split_rows
from adaptc.joint_training.text_layout import TextLayout, keeps_texts_apart
from adaptc.training import Service, sweep
from tests.support.training import VOCABULARY
from tests.training.test_service import CONFIGS, base, data
from tests.training.test_sweep import rows

lengths = st.lists(st.integers(1, 23), min_size=1, max_size=17)


@given(lengths, st.integers(0, 5), st.booleans())
def test_texts_keep_to_their_places(sizes: list[int], more: int, packs: bool) -> None:
    layout = TextLayout.of_lengths(sizes, max(sizes) + more, packs)
    texts = [torch.full((n,), i + 1) for i, n in enumerate(sizes)]
    found = layout.inputs(texts)
    ids = found["input_ids"]
    assert ids.shape == (layout.rows, layout.length) == (layout.tokens // layout.length, max(sizes) + more)
    assert [t.tolist() for t in layout.take(ids, sizes)] == [t.tolist() for t in texts]
    assert int((ids > 0).sum()) == sum(sizes)
    if not packs:
        assert layout.rows == len(sizes)
        assert torch.equal(found["attention_mask"], (ids > 0).long())
        return
    # Positions begin anew with each text and with each token of padding: so models tell texts apart.
    positions = found["position_ids"]
    assert [t.tolist() for t in layout.take(positions, sizes)] == [list(range(n)) for n in sizes]
    assert not positions[ids == 0].any()
    fill = (ids > 0).sum(1)
    others = [fill[i] + fill[j] for i in range(len(fill)) for j in range(i)]
    assert all(n > layout.length for n in others), "two rows would fit into one"


def test_packing_needs_less_padding_than_rows_of_one_text() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 65, (4, 8), generator=draw).tolist()  # the texts of four clients
    longest, tokens = max(map(max, sizes)), sum(map(sum, sizes))
    padded, packed = (
        sum(TextLayout.of_lengths(own, longest, packs).tokens for own in sizes) - tokens for packs in (False, True)
    )
    assert (tokens, padded, packed) == (912, 1136, 240)


def test_padded_rows_of_a_step_are_divided_by_length() -> None:
    found = rows(16, 0)
    parts = {by_length: split_rows(found, 4, by_length) for by_length in (False, True)}
    tokens = {k: sum(collate(part, False)["input_ids"].numel() for part in p) for k, p in parts.items()}
    assert sum(len(r["input_ids"]) for r in found) == 94
    assert tokens == {False: 124, True: 100}
    assert [r for part in parts[False] for r in part] == found
    assert sorted(id(r) for part in parts[True] for r in part) == sorted(map(id, found))


@pytest.mark.long
def test_calls_of_several_clients_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": [3, 9, 4, 2], "b": [5, 1, 3]}

    def trained(packing: bool) -> tuple[Service, list[Any], dict[str, Tensor]]:
        with Service(base(), max_tokens=200, packing=packing) as service:
            clients = {n: service.create(CONFIGS[n], seed=i) for i, n in enumerate("ab")}
            service.wait = 9.0
            futures = [
                c.forward_backward(data(i, sizes[n]), "cross_entropy") for i, (n, c) in enumerate(clients.items())
            ]
            found = [f.result(60) for f in futures]
            gradients = {f"{n}.{k}": t.grad for n, c in clients.items() for k, t in c.trainer.parameters.items()}
            return service, found, {k: t for k, t in gradients.items() if t is not None}

    service, packed, gradients = trained(True)
    other, padded, expected = trained(False)
    assert (service.batch_count, service.token_count, service.position_count) == (1, 27, 27)
    assert (other.batch_count, other.token_count, other.position_count) == (1, 27, 7 * 9)
    for one, two in zip(packed, padded, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-10)
        for p, q in zip(one.loss_fn_outputs, two.loss_fn_outputs, strict=True):
            torch.testing.assert_close(p["logprobs"], q["logprobs"], rtol=1e-10, atol=1e-10)
    assert gradients
    for name, g in gradients.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-9, atol=1e-12)
    with Service(base(), max_tokens=27) as small:
        client = small.create(CONFIGS["a"])
        with pytest.raises(adaptc.AdaptcError, match=r"make 28 tokens with their padding"):
            client.forward_backward(data(0, [14, 9, 1]), "cross_entropy")


@pytest.mark.long
def test_a_sweep_of_packed_rows_is_that_of_padded_ones() -> None:
    configs = {n: CONFIGS[n] for n in "ac"}
    options: dict[str, Any] = {"steps": 3, "batch_size": 5, "eval_dataset": rows(4, 1), "learning_rate": 1e-2}
    packed, padded = (sweep(base(), configs, rows(11, 0), packing=p, **options) for p in (True, False))
    for name, result in packed.results.items():
        assert result.loss == pytest.approx(padded.results[name].loss, rel=1e-9)
        assert result.eval_loss == pytest.approx(padded.results[name].eval_loss, rel=1e-9)


def test_a_program_that_mixes_texts_is_found_out() -> None:
    draw = torch.Generator().manual_seed(3)
    table, positions = torch.randn(VOCABULARY, 11, generator=draw), torch.randn(99, 11, generator=draw)

    def program(sees: str) -> Any:
        def call(input_ids: Tensor, position_ids: Tensor) -> Any:
            values = table[input_ids]
            if sees == "the row":
                values = values + values.cumsum(1)
            places = torch.arange(input_ids.shape[1]).expand_as(input_ids) if sees == "no positions" else position_ids
            return SimpleNamespace(logits=values + positions[places])

        return call

    found = {
        n: keeps_texts_apart(program(n), VOCABULARY, torch.device("cpu"))
        for n in ("its text", "the row", "no positions")
    }
    assert found == {"its text": True, "the row": False, "no positions": False}


@pytest.mark.long
@pytest.mark.parametrize(("family", "packs"), [("Mamba", False), ("Bloom", False), ("GPT2", True)])
def test_models_that_cannot_pack_are_padded(family: str, packs: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "Mamba": {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 1, "state_size": 5},
        "Bloom": {"vocab_size": 67, "hidden_size": 24, "n_layer": 1, "n_head": 3},
        "GPT2": {"vocab_size": 67, "n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 37},
    }
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(
        getattr(transformers, f"{family}Config")(**sizes[family])
    ).eval()
    target = {"Mamba": "in_proj", "Bloom": "query_key_value", "GPT2": "c_attn"}[family]
    group = ProgramGroups(model).add("a", LoraConfig(r=2, target_modules=[target]), seed=0)
    assert group.packs is packs
