"""Any sequence of calls of a service's clients leaves each as if it had trained alone."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from safetensors.torch import load_file
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from adaptc.training import Datum, Service
from tests.training.test_service import ADAM, base, data, expected_loss, logprobs

CONFIGS: dict[str, Any] = {
    "r2": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "r5": LoraConfig(r=5, lora_alpha=9, target_modules=["v_proj"], init_lora_weights=False),
    "dora": LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=["o_proj"], init_lora_weights=False),
    "loha": adaptc.LoHaConfig(r=3, alpha=4, target_modules=["q_proj", "down_proj"], init_weights=False),
    "ia3": adaptc.IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False),
}

MOST = 3


@functools.cache
def service(packing: bool) -> Service:
    """Not to be closed: a client of each config stays, so that the programs do."""
    made = Service(base(), capacity=MOST + len(CONFIGS), max_tokens=400, packing=packing)
    for config in CONFIGS.values():
        made.create(config, seed=0)
    return made


@functools.cache
def program(name: str) -> adaptc.AdaptedProgram:
    return adaptc.compile(base(), CONFIGS[name], training=True)


class Alone:
    """The adapter of one client, trained alone: its module, optimizer, and number of steps."""

    def __init__(self, name: str, tensors: dict[str, Tensor], state: Any = None, steps: int = 0) -> None:
        self.name, self.steps = name, steps
        self.module: Any = copy.deepcopy(program(name)).module()
        self.module.load_state_dict(tensors)
        self.module.eval()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=ADAM.learning_rate, betas=(0.9, 0.95), eps=1e-12, weight_decay=ADAM.weight_decay
        )
        if state is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state))

    @property
    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    def snapshot(self) -> tuple[str, dict[str, Tensor], Any, int]:
        tensors = {n: t.detach().clone() for n, t in self.module.state_dict().items()}
        return self.name, tensors, copy.deepcopy(self.optimizer.state_dict()), self.steps

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, ADAM.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == base().config.eos_token_id:
                break
        return ids[len(prompt) :]


def tensors_of(client: Any, folder: Path) -> dict[str, Tensor]:
    client.save_adapter(folder).result(60)
    return load_file(folder / "adapter_model.safetensors")


class Clients(RuleBasedStateMachine):
    """Clients of a service that packs texts, each with the adapter that trains alone."""

    packing = True

    def __init__(self) -> None:
        super().__init__()
        self.service = service(self.packing)
        self.folder = Path(tempfile.mkdtemp())
        self.clients: dict[Any, Alone] = {}
        self.states: list[tuple[Path, Any]] = []
        self.count = 0

    def path(self) -> Path:
        self.count += 1
        return self.folder / str(self.count)

    def pick(self, which: int) -> Any:
        return list(self.clients)[which % len(self.clients)]

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Run the block with a service whose calls wait so long for each other."""
        before, self.service.wait = self.service.wait, seconds
        try:
            yield
        finally:
            self.service.wait = before

    def compare_adapter(self, client: Any) -> None:
        found, alone = tensors_of(client, self.path()), self.clients[client]
        for key, t in alone.module.state_dict().items():
            torch.testing.assert_close(found[key], t.detach(), rtol=1e-9, atol=1e-9)
        assert client.trainer.steps == alone.steps

    @rule(name=st.sampled_from(list(CONFIGS)), seed=st.integers(1, 99))
    def create(self, name: str, seed: int) -> None:
        if len(self.clients) == MOST:
            with pytest.raises(adaptc.ConfigError, match="no room for another"):
                self.service.create(CONFIGS[name], seed=seed)
            return
        client = self.service.create(CONFIGS[name], seed=seed)
        self.clients[client] = Alone(name, tensors_of(client, self.path()))

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 5), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=st.integers(0, 99))
    def train_one(self, which: int, lengths: list[int], seed: int) -> None:
        self._train([self.pick(which)], lengths, seed)

    @precondition(lambda self: len(self.clients) > 1)
    @rule(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=st.integers(0, 99))
    def train_all_at_once(self, lengths: list[int], seed: int) -> None:
        self._train(list(self.clients), lengths, seed)

    def _train(self, clients: list[Any], lengths: list[int], seed: int) -> None:
        batches = [data(seed + i, [n + i for n in lengths]) for i in range(len(clients))]
        with self.waiting(0.3 if len(clients) > 1 else self.service.wait):
            futures = [c.forward_backward(b, "cross_entropy") for c, b in zip(clients, batches, strict=True)]
            self._compare(clients, batches, futures)

    def _compare(self, clients: list[Any], batches: list[Any], futures: list[Any]) -> None:
        for client, batch, future in zip(clients, batches, futures, strict=True):
            module, found = self.clients[client].module, future.result(60)
            loss = expected_loss(module, batch, "cross_entropy")
            loss.backward()
            assert found.loss == pytest.approx(float(loss.detach()), rel=1e-9, abs=1e-12)
            with torch.no_grad():
                wanted = [logprobs(module(input_ids=d.model_input[None]).logits[0], d) for d in batch]
            for outputs, one in zip(found.loss_fn_outputs, wanted, strict=True):
                torch.testing.assert_close(outputs["logprobs"].double(), one, rtol=1e-6, atol=1e-6)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 5), is_nan=st.booleans(), seed=st.integers(0, 99))
    def fail(self, which: int, is_nan: bool, seed: int) -> None:
        """A failed call of one client, beside a call of another where there is one."""

        def broken(_: Any, found: list[Tensor]) -> Tensor:
            if is_nan:
                return found[0].sum() * float("nan")
            raise ZeroDivisionError("mine")

        client = self.pick(which)
        others = [c for c in self.clients if c is not client]
        with self.waiting(0.3):
            failed = client.forward_backward(data(seed, [4]), broken)
            if others:
                self._train(others[:1], [3, 5], seed)
            assert isinstance(failed.exception(60), adaptc.AdaptcError if is_nan else ZeroDivisionError)
        broken_weights = [Datum(torch.tensor([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, float("nan")]})]
        with pytest.raises(adaptc.AdaptcError, match="has NaN or infinity"):
            client.forward_backward(broken_weights, "cross_entropy")
        with pytest.raises(adaptc.AdaptcError, match="target_tokens"):
            client.forward_backward([{"model_input": [1, 2], "loss_fn_inputs": {}}], "cross_entropy")

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 5))
    def step(self, which: int) -> None:
        client = self.pick(which)
        alone, future = self.clients[client], client.optim_step(ADAM)
        if not alone.has_gradients:
            assert "no adapter has gradients" in str(future.exception(60))
            return
        alone.step()
        assert future.result(60).steps == alone.steps

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 5), prompt=st.lists(st.integers(1, 90), min_size=1, max_size=4))
    def sample(self, which: int, prompt: list[int]) -> None:
        client = self.pick(which)
        (found,) = client.sample([prompt], max_tokens=3, temperature=0).result(120)
        assert list(found.tokens) == self.clients[client].greedy(prompt, 3)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 5), seed=st.integers(0, 99))
    def save_adapter(self, which: int, seed: int) -> None:
        """Between a client's gradients and its step, and in one batch of calls with another client's training."""
        client = self.pick(which)
        others = [c for c in self.clients if c is not client]
        with self.waiting(0.3):
            saved = client.save_adapter(self.path())
            if others:
                self._train(others[:1], [3, 2], seed)
            found = load_file(saved.result(60) / "adapter_model.safetensors")
        module = self.clients[client].module
        for key, t in module.state_dict().items():
            torch.testing.assert_close(found[key], t.detach(), rtol=1e-9, atol=1e-9)
        model = adaptc.compile(base(), saved.result(60))
        ids = torch.tensor([[1, 5, 9, 2]])
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, module(input_ids=ids).logits, rtol=1e-6, atol=1e-6)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 5))
    def save_state(self, which: int) -> None:
        client = self.pick(which)
        path = client.save_state(self.path()).result(60)
        self.states.append((path, self.clients[client].snapshot()))

    @precondition(lambda self: self.clients and self.states)
    @rule(which=st.integers(0, 5), state=st.integers(0, 5))
    def load_state(self, which: int, state: int) -> None:
        client, (path, snapshot) = self.pick(which), self.states[state % len(self.states)]
        self.compare_adapter(client)
        future = client.load_state(path)
        names = {snapshot[0], self.clients[client].name}
        if names <= {"r2", "r5"} or len(names) == 1:  # of one program
            future.result(60)
            self.clients[client] = Alone(*snapshot)
        else:
            assert isinstance(future.exception(60), adaptc.AdaptcError)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 5))
    def leave(self, which: int) -> None:
        client = self.pick(which)
        self.compare_adapter(client)
        client.close()
        del self.clients[client]
        with pytest.raises(adaptc.AdaptcError, match="was removed"):
            client.optim_step(ADAM)

    def teardown(self) -> None:
        try:
            for client in self.clients:
                self.compare_adapter(client)
        finally:
            for client in list(self.clients):
                client.close()
            shutil.rmtree(self.folder)


class ClientsWithoutPacking(Clients):
    packing = False


TestClients = Clients.TestCase
TestClients.settings = settings(max_examples=2, stateful_step_count=8, deadline=None)
TestClientsForLong = pytest.mark.long(type("TestClientsForLong", (Clients.TestCase,), {}))
TestClientsForLong.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
TestClientsWithoutPacking = pytest.mark.long(ClientsWithoutPacking.TestCase)
TestClientsWithoutPacking.settings = settings(max_examples=6, stateful_step_count=15, deadline=None)
