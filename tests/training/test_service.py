"""Clients of one service train as each would alone, share batches, and do not notice each other's failures."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import adaptc
from adaptc import LoraConfig
from adaptc.training import AdamParams, Datum, Service
from tests.support.training import VOCABULARY, model

CONFIGS: dict[str, Any] = {
    "a": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "b": LoraConfig(r=5, lora_alpha=9, target_modules=["v_proj"], init_lora_weights=False),
    "c": adaptc.LoHaConfig(r=3, alpha=4, target_modules=["q_proj", "down_proj"], init_weights=False),
}
ADAM = AdamParams(learning_rate=3e-3, weight_decay=0.1, grad_clip_norm=0.5)


@functools.cache
def base() -> Any:
    return copy.deepcopy(model()).double()


def data(seed: int, lengths: list[int], loss: str = "cross_entropy") -> list[Datum]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for n in lengths:
        ids = torch.randint(0, VOCABULARY, (n + 1,), generator=draw)
        fields: dict[str, Any] = {"target_tokens": ids[1:]}
        if loss == "cross_entropy":
            fields["weights"] = torch.rand(n, generator=draw)
        else:
            fields["logprobs"] = -4.5 + torch.rand(n, generator=draw)
            fields["advantages"] = torch.randn(n, generator=draw)
        found.append(Datum(ids[:-1], fields))
    return found


def logprobs(logits: Tensor, datum: Datum) -> Tensor:
    return logits.log_softmax(-1).gather(-1, datum.loss_fn_inputs["target_tokens"][:, None])[:, 0]


def expected_loss(module: Any, batch: list[Datum], loss: str) -> Tensor:
    """The loss by its formula, text after text."""
    total = torch.zeros((), dtype=torch.float64)
    for datum in batch:
        own = {k: v.double() for k, v in datum.loss_fn_inputs.items()}
        p = logprobs(module(input_ids=datum.model_input[None]).logits[0], datum)
        if loss == "cross_entropy":
            total = total - (p * own["weights"]).sum()
            continue
        ratio = (p - own["logprobs"]).exp()
        gain = ratio * own["advantages"]
        if loss == "ppo":
            gain = torch.minimum(gain, ratio.clamp(0.8, 1.3) * own["advantages"])
        total = total - gain.sum()
    return total


class Alone:
    """The program of one client alone, from its first values."""

    def __init__(self, client: Any, config: Any, folder: Path) -> None:
        client.save_adapter(folder).result()
        self.program = adaptc.compile(base(), folder, training=True)
        self.module = self.program.module()
        self.module.eval()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=ADAM.learning_rate, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1
        )

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.long
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("cross_entropy", None),
        ("importance_sampling", None),
        ("ppo", {"clip_high_threshold": 1.3}),
    ],
)
def test_clients_train_as_alone_and_share_batches(loss: str, options: Any, tmp_path: Path) -> None:
    with Service(base(), capacity=3, max_tokens=200, wait=9) as service:
        clients = {n: service.create(c, seed=i) for i, (n, c) in enumerate(CONFIGS.items())}
        assert clients["a"].group is clients["b"].group is not clients["c"].group
        service.wait = 0.0
        alone = {n: Alone(c, CONFIGS[n], tmp_path / n) for n, c in clients.items()}
        service.wait, before = 9.0, service.batch_count
        for i in range(3):
            batches = {n: data(10 * i + k, [3 + k, 7 - i, 2], loss) for k, n in enumerate(clients)}
            found = {n: c.forward_backward(batches[n], loss, options) for n, c in clients.items()}
            steps = {n: c.optim_step(ADAM) for n, c in clients.items()}
            for name, one in alone.items():
                want = expected_loss(one.module, batches[name], loss)
                want.backward()
                output = found[name].result(60)
                assert output.loss == pytest.approx(float(want.detach()), rel=1e-9)
                assert output.metrics["loss:sum"] == output.loss
                for datum, given in zip(batches[name], output.loss_fn_outputs, strict=True):
                    with torch.no_grad():
                        p = logprobs(one.module(input_ids=datum.model_input[None]).logits[0], datum)
                    torch.testing.assert_close(given["logprobs"], p, rtol=1e-9, atol=1e-9)
                one.step()
                assert steps[name].result(60).steps == i + 1
        assert service.batch_count - before == 6  # of two programs: a and b share theirs
        service.wait = 0.0
        for name, one in alone.items():
            saved = adaptc.compile(base(), clients[name].save_adapter(tmp_path / f"{name}2").result()).binding.values
            for fqn, t in one.program.binding.values.items():
                torch.testing.assert_close(saved[fqn].detach(), t.detach(), rtol=1e-9, atol=1e-9)


def test_a_failed_call_changes_nothing_for_the_others() -> None:
    def broken(_: Any, found: list[Tensor]) -> Tensor:
        raise ZeroDivisionError("mine")

    def custom(texts: Any, found: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        assert texts[0].model_input.shape == found[0].shape
        return torch.cat(found).square().sum(), {"count": len(texts)}

    def trained(with_failures: bool) -> dict[str, Tensor]:
        with Service(base(), max_tokens=200) as service:
            a, b = (service.create(CONFIGS[n], seed=i) for i, n in enumerate("ab"))
            for i in range(2):
                service.wait = 9.0 if with_failures else 0.0
                future = a.forward_backward(data(i, [4, 6]), custom)
                if with_failures:
                    failed = b.forward_backward(data(i, [5]), broken if i else lambda _, p: p[0].sum() * float("nan"))
                    error = failed.exception(60)
                    assert isinstance(error, ZeroDivisionError if i else adaptc.AdaptcError)
                assert future.result(60).metrics["count"] == 2
                service.wait = 0.0
                a.optim_step(ADAM).result(60)
            if with_failures:
                assert service.batch_count == 2
                with pytest.raises(adaptc.AdaptcError, match="no adapter has gradients"):
                    b.optim_step().result(60)
                assert b.trainer.steps == 0
            return {n: t.detach().clone() for n, t in a.trainer.parameters.items()}

    with_failures, without = trained(True), trained(False)
    assert all(torch.equal(t, without[n]) for n, t in with_failures.items())


def test_a_client_that_leaves_in_the_middle_of_a_batch_changes_nothing_for_the_others() -> None:
    with Service(base(), max_tokens=200) as service:
        a, b = (service.create(CONFIGS[n], seed=i) for i, n in enumerate("ab"))
        bank, run = a.group.bank, service._run_batch

        def leave_and_run(calls: Any) -> None:
            b.close()
            run(calls)

        service._run_batch = leave_and_run  # type: ignore[method-assign]
        service.wait = 9.0
        futures = [c.forward_backward(data(3, [4, 5]), "cross_entropy") for c in (a, b)]
        assert all(f.result(60).loss > 0 for f in futures)
        assert service.batch_count == 1
        a.optim_step(ADAM).result(60)
        assert (list(bank), service.clients) == ([a.name], [a])


def test_what_cannot_be_created_leaves_no_program() -> None:
    with Service(base(), max_rank=3) as service:
        for config in (CONFIGS["b"], CONFIGS["a"].replace(lora_dropout=0.5)):
            with pytest.raises(adaptc.ConfigError):
                service.create(config)
            assert repr(service) == "<Service: 0 of 8 clients, 0 programs>"


def test_a_state_goes_on_and_a_forward_changes_nothing(tmp_path: Path) -> None:
    with Service(base(), max_tokens=200) as service:
        a, b = (service.create(CONFIGS["a"], seed=i) for i in range(2))
        for i in range(2):
            a.forward_backward(data(i, [5, 3]), "cross_entropy")
            a.optim_step(ADAM)
        a.save_state(tmp_path / "state").result(60)
        b.load_state(tmp_path / "state").result(60)
        assert b.trainer.steps == 2
        first = a.forward(data(7, [5]), "cross_entropy").result(60)
        for c in (a, b):
            c.forward_backward(data(7, [5]), "cross_entropy")
            c.optim_step(ADAM)
        again = [c.forward(data(7, [5]), "cross_entropy").result(60).loss for c in (a, b)]
        assert again[0] == pytest.approx(again[1], rel=1e-12)
        assert again[0] != first.loss
        for x, y in zip(a.trainer.parameters.values(), b.trainer.parameters.values(), strict=True):
            torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-12, atol=1e-12)
        with pytest.raises(adaptc.CheckpointError):
            b.load_state(tmp_path / "nowhere").result(60)
        assert b.trainer.steps == 3
        assert "3 steps" in repr(b)


@pytest.mark.long
def test_samples_are_of_the_adapter_as_it_is_now(tmp_path: Path) -> None:
    with Service(base(), max_tokens=200) as service:
        a = service.create(CONFIGS["a"], seed=0)
        prompts = [[3, 5, 8], [11, 2, 4, 9, 1]]
        for i in range(2):
            a.forward_backward(data(i, [6, 6]), "cross_entropy")
            a.optim_step({"learning_rate": 5e-2})
            found = a.sample(prompts, max_tokens=4, temperature=0.0, stop=[]).result(60)
            path = a.save_adapter(tmp_path / str(i)).result(60)
            module = adaptc.compile(base(), path)
            for one in found:
                ids = [*prompts[one.prompt], *one.tokens]
                logits = module(input_ids=torch.tensor([ids])).logits[0].detach()
                n = len(prompts[one.prompt])
                assert one.tokens == logits[n - 1 : -1].argmax(-1).tolist()
                p = logits[n - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(one.tokens)[:, None])[:, 0]
                torch.testing.assert_close(one.logprobs.double(), p, rtol=1e-5, atol=1e-5)
                assert one.stop_reason == "length"
        several = [a.sample(prompts, 3, max_tokens=5, seed=4).result(60) for _ in range(2)]
        assert [s.prompt for s in several[0]] == [0, 0, 0, 1, 1, 1]
        assert [s.tokens for s in several[0]] == [s.tokens for s in several[1]]
        assert len({tuple(s.tokens) for s in several[0]}) > 2
        ended = a.sample(prompts[:1], max_tokens=4, temperature=0.0, stop=[found[0].tokens[1]]).result(60)[0]
        assert (ended.stop_reason, ended.tokens) == ("stop", found[0].tokens[: len(ended.tokens)])
        shared = {t.data_ptr() for t in base().parameters()}
        generator = a.group.sampler._generator
        assert {
            t.data_ptr() for n, t in generator.program.base_tensors.items() if n.endswith("down_proj.weight")
        } <= shared


def test_wrong_calls_are_refused_and_removed_clients_named() -> None:
    service = Service(base(), capacity=2, max_rank=6, max_tokens=12)
    a = service.create(CONFIGS["a"])
    good = data(0, [3])[0]
    error = adaptc.AdaptcError
    for wrong, match in (
        ([], "must be a list"),
        ([3], r"data\[0\] is 3"),
        ([good, Datum([1, 2], {})], r"data\[1\].loss_fn_inputs has no 'target_tokens'"),
        ([Datum([1, 200], good.loss_fn_inputs)], "the model has 97"),
        ([Datum([1.5, 2.0, 3.0], good.loss_fn_inputs)], "whole numbers"),
        ([Datum(good.model_input, {**good.loss_fn_inputs, "weights": [1.0]})], r"'weights'\] has shape \(1,\)"),
        ([Datum(good.model_input, {**good.loss_fn_inputs, "weights": [1.0, float("nan"), 0.0]})], "NaN"),
        ([Datum(good.model_input, {**good.loss_fn_inputs, "weights": ["x", "y", "z"]})], "list of numbers"),
        (data(0, [3, 7]), "max_tokens is 12"),
    ):
        with pytest.raises(error, match=match):
            a.forward_backward(wrong, "cross_entropy")
    for loss, options, match in (
        ("cross_entrpy", None, "nearest are 'cross_entropy'"),
        (3, None, "name or a function"),
        ("cross_entropy", {"clip_low_threshold": 1.0}, "has no option"),
        ("ppo", {"clip_low_threshold": -1.0}, "positive number"),
    ):
        with pytest.raises(adaptc.ConfigError, match=match):
            a.forward_backward([good], loss, options)
    for call, match in (
        (lambda: a.optim_step({"learning_rate": -1.0}), "learning_rate=-1"),
        (lambda: a.optim_step(3), "must be AdamParams"),
        (lambda: a.sample([[1]], max_token=3), "max_token"),
        (lambda: a.sample([[1]], max_tokens=0), "max_tokens"),
        (lambda: a.sample([[1]], 0), "num_samples=0"),
        (lambda: service.create(LoraConfig(r=7, target_modules=["q_proj"])), "rank 7"),
        (lambda: Service(torch.nn.Linear(2, 2)), "no causal language model"),
        (lambda: Service(base(), capacity=0), "capacity=0"),
        (lambda: Service(base(), wait=-1), "wait=-1"),
    ):
        with pytest.raises(adaptc.ConfigError, match=match):
            call()
    with pytest.raises(error, match=r"prompts\[0\]"):
        a.sample([[]])
    b = service.create(CONFIGS["b"])
    with pytest.raises(adaptc.ConfigError, match="no room for another"):
        service.create(CONFIGS["b"])
    service.wait = 9.0
    waiting = b.forward_backward([good], "cross_entropy")
    b.close()
    with pytest.raises(CancelledError):
        waiting.result(60)
    with pytest.raises(error, match="was removed"):
        b.optim_step()
    assert "removed" in repr(b)
    assert len(service.clients) == 1
    service.wait = 0.0
    assert a.forward_backward(
        [{"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 3], "weights": [1, 0]}}], "cross_entropy"
    ).result(60).loss == pytest.approx(
        float(
            F.cross_entropy(
                a.group.bank(input_ids=torch.tensor([[1, 2]]), position_ids=torch.tensor([[0, 1]]), adapters=[a.name])
                .logits[0, :1]
                .detach(),
                torch.tensor([2]),
            )
        )
    )
    service.close()
    service.close()
    with pytest.raises(error, match="was closed"):
        a.optim_step()
