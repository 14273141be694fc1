"""A training service over HTTP does what it does in one process, and refuses what is wrong with a status."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import adaptc
from adaptc import LoraConfig
from adaptc.server.run import HostedApp, app_in_thread
from adaptc.server.training_app import TrainingServerOptions, build_training_app
from adaptc.training import Service, connect
from tests.support.training import model
from tests.training.test_service import ADAM, CONFIGS, base, data

KEY = "a key"
CONFIG = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
DATUM = {"model_input": [1, 2, 3], "loss_fn_inputs": {"target_tokens": [2, 3, 4], "weights": [1.0, 0.5, 1.0]}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service(base(), capacity=4, max_rank=6, max_tokens=60) as made:
        yield made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("below")


@pytest.fixture(scope="module")
def address(service: Service, root: Path) -> Iterator[str]:
    options = TrainingServerOptions(root, KEY, max_body_bytes=20_000, max_results=5, max_sequences=3)
    with app_in_thread(HostedApp(build_training_app(service, options), "", lambda: None)) as found:
        yield found


class Caller:
    """An HTTP client of the routes."""

    def __init__(self, address: str) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(base_url=f"{address}/v1/training", headers=headers, timeout=60)

    def post(self, name: str, content: Any = None, **body: Any) -> httpx.Response:
        return (
            self.http.post(f"/{name}", content=content)
            if content is not None
            else self.http.post(f"/{name}", json=body)
        )

    def call(self, name: str, **body: Any) -> Any:
        answer = self.post(name, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, name: str, **body: Any) -> Any:
        number = self.call(name, **body)["request_id"]
        answer = self.call("result", client=body["client"], request_id=number)
        assert answer["status"] == "done"
        return answer["result"]

    def refused(self, status: int, said: str, name: str, content: Any = None, **body: Any) -> None:
        answer = self.post(name, content, **body)
        assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), answer.text


@pytest.fixture
def caller(address: str) -> Iterator[Caller]:
    made = Caller(address)
    yield made
    for one in made.http.get("/clients").json()["clients"]:
        made.call("close", client=one["client"])
    made.http.close()


@pytest.mark.long
def test_clients_over_http_train_as_in_one_process(address: str, caller: Caller, root: Path) -> None:
    prompts = [[3, 5, 8], [11, 2]]

    def trained(made: Any, state: Any, adapter: Any) -> list[Any]:
        one, other = (made.create(CONFIGS[n], seed=i) for i, n in enumerate("ac"))
        found: list[Any] = []
        for i in range(2):
            calls = [
                c.forward_backward(data(3 * i + k, [4, 6, 2]), "cross_entropy") for k, c in enumerate((one, other))
            ]
            steps = [c.optim_step(ADAM) for c in (one, other)]
            found += [
                (f.result(60).loss, [o["logprobs"].tolist() for o in f.result(60).loss_fn_outputs]) for f in calls
            ]
            found += [(s.result(60).steps, s.result(60).grad_norm, s.result(60).learning_rates) for s in steps]
        ppo = one.forward(data(9, [5], "ppo"), "ppo", {"clip_high_threshold": 1.3}).result(60)
        found.append((ppo.loss, ppo.metrics))
        samples = one.sample(prompts, max_tokens=3, temperature=0.0, stop=[]).result(60)
        found += [(s.prompt, s.tokens, s.stop_reason) for s in samples]
        assert samples[0].logprobs.shape == (3,)
        one.save_state(state).result(60)
        one.save_adapter(adapter).result(60)
        one.forward_backward(data(20, [4]), "cross_entropy").result(60)
        one.optim_step(ADAM).result(60)
        one.load_state(state).result(60)
        found.append(one.forward_backward(data(20, [4]), "cross_entropy").result(60).loss)
        for c in (one, other):
            c.close()
        return found

    def flat(values: Any) -> list[Any]:
        return [v for one in values for v in flat(one)] if isinstance(values, (list, tuple)) else [values]

    remote = connect(address, KEY)
    over_http = trained(remote, "runs/one", "adapters/one")
    with Service(base(), capacity=4, max_rank=6, max_tokens=60) as local:
        in_process = trained(local, root / "local", root / "local_adapter")
    for ours, theirs in zip(flat(over_http), flat(in_process), strict=True):
        assert ours == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs)
    values, expected = (adaptc.compile(base(), root / p).binding.values for p in ("adapters/one", "local_adapter"))
    assert all(torch.equal(t, expected[n]) for n, t in values.items())
    assert not remote.list_clients()
    assert (repr(remote), address in repr(remote.create(CONFIG, seed=1))) == (f"<RemoteService at {address}>", True)


@pytest.mark.long
def test_a_client_does_not_notice_what_others_send(caller: Caller, service: Service) -> None:
    """The loss and the gradients of one client are those without others whose calls fail or are cut off."""

    def trained(disturbed: bool) -> dict[str, torch.Tensor]:
        own = caller.call("create", config=CONFIG, seed=3)["client"]
        other = caller.call("create", config=CONFIG, seed=4)["client"]
        for _ in range(2):
            if disturbed:
                fields = {"target_tokens": [2, 3, 4], "logprobs": [-1e4, 0.0, 0.0], "advantages": [1.0, 1.0, 1.0]}
                infinite = {"model_input": [1, 2, 3], "loss_fn_inputs": fields}
                broken = caller.call("forward_backward", client=other, data=[infinite], loss="importance_sampling")
                caller.refused(422, "no number of JSON", "forward_backward", b'{"data": [NaN]}')
                caller.refused(422, "the body is no JSON", "optim_step", b'{"client": ')
                caller.refused(413, "more than 20000 bytes", "create", b" " * 20_001)
                caller.refused(404, f"there is no client {own + 'x'!r}", "optim_step", client=own + "x")
                caller.refused(400, "is -inf", "result", client=other, **broken)
                step = caller.call("optim_step", client=other)
                caller.refused(400, "no adapter has gradients", "result", client=other, **step)
            assert caller.result("forward_backward", client=own, data=[DATUM], loss="cross_entropy")["loss"] > 0
            assert caller.result("optim_step", client=own, adam={"learning_rate": 1e-2})["skipped"] is None
        trainer = service.clients[-2].trainer
        assert trainer.steps == 2
        found = {n: t.detach().clone() for n, t in trainer.parameters.items()}
        for name in (own, other):
            caller.call("close", client=name)
        return found

    disturbed, alone = trained(True), trained(False)
    assert all(torch.equal(t, alone[n]) for n, t in disturbed.items())


def test_what_is_wrong_is_refused_with_its_status(caller: Caller, root: Path, service: Service) -> None:
    client = caller.call("create", config=CONFIG, seed=3)["client"]
    clients, loss = len(service.clients), {"client": client, "loss": "cross_entropy"}
    with httpx.Client(base_url=caller.http.base_url) as stranger:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert stranger.post("/create", json={"config": CONFIG}, headers=headers).status_code == 401
            assert stranger.get("/clients", headers=headers).status_code == 401
        assert stranger.get(str(caller.http.base_url).replace("/v1/training/", "/health")).status_code == 200
    chunks = caller.http.post("/create", content=iter([b"{}"]))  # no Content-Length
    assert chunks.status_code == 411
    deep = b"[" * 9_000 + b"]" * 9_000
    for status, said, name, body in (
        (422, "expected an object", "create", b"[3]"),
        (422, "is no JSON", "create", b"\xff\xfe"),
        (422, "the body", "create", deep),
        (422, "lacks 'config'", "create", {}),
        (422, "no key 'sed'; nearest are 'seed'", "create", {"config": CONFIG, "sed": 1}),
        (400, "LoraConfig has no field 'rank'", "create", {"config": {"rank": 3}}),
        (400, "3 is no config", "create", {"config": 3}),
        (400, "'lohaa' is not supported", "create", {"config": {"peft_type": "lohaa"}}),
        (400, "rank 7", "create", {"config": {**CONFIG, "r": 7}}),
        (400, "seed='x'", "create", {"config": CONFIG, "seed": "x"}),
        (400, "nope", "create", {"config": {**CONFIG, "target_modules": ["nope"]}}),
        (404, "there is no client 3", "optim_step", {"client": 3}),
        (404, "there is no client ['a']", "optim_step", {"client": ["a"]}),
        (400, "data[0] is 3", "forward_backward", {**loss, "data": [3]}),
        (400, "the model has 97", "forward_backward", {**loss, "data": [{**DATUM, "model_input": [1, 2, 97]}]}),
        (400, "expected a list of numbers", "forward", {**loss, "data": [{**DATUM, "model_input": "abc"}]}),
        (400, "expected a list of numbers", "forward", {**loss, "data": [{**DATUM, "model_input": [1, 2, 10**30]}]}),
        (400, "max_tokens is 60", "forward", {**loss, "data": [DATUM] * 21}),
        (400, "nearest are 'cross_entropy'", "forward", {**loss, "data": [DATUM], "loss": "cross_entropi"}),
        (422, "code is not sent", "forward", {**loss, "data": [DATUM], "loss": {"a": 1}}),
        (400, "loss_config=3", "forward", {**loss, "data": [DATUM], "loss_config": 3}),
        (400, "no such option", "optim_step", {"client": client, "adam": {"lr": 3}}),
        (422, "adam is 3", "optim_step", {"client": client, "adam": 3}),
        (400, "learning_rate='x'", "optim_step", {"client": client, "adam": {"learning_rate": "x"}}),
        (400, "prompts[0]", "sample", {"client": client, "prompts": [[97]]}),
        (413, "more than 3 texts", "sample", {"client": client, "prompts": [[1]], "num_samples": 4}),
        (400, "num_samples=1.5", "sample", {"client": client, "prompts": [[1]], "num_samples": 1.5}),
        (
            400,
            "max_tokens must be an integer",
            "sample",
            {"client": client, "prompts": [[1]], "params": {"max_tokens": "x"}},
        ),
        (400, "stop", "sample", {"client": client, "prompts": [[1]], "params": {"stop": ["x"]}}),
        (422, "path is 3", "save_state", {"client": client, "path": 3}),
        (403, "not below", "save_state", {"client": client, "path": "../out"}),
        (403, "not below", "save_adapter", {"client": client, "path": "/etc/adapter"}),
        (403, "not below", "load_state", {"client": client, "path": "."}),
        (422, "is no path", "save_state", {"client": client, "path": "a\0b"}),
        (404, "nothing at 'nowhere'", "load_state", {"client": client, "path": "nowhere"}),
        (404, "no call '77'", "result", {"client": client, "request_id": "77"}),
        (
            422,
            "wait is -1",
            "result",
            {"client": client, "request_id": caller.call("optim_step", client=client)["request_id"], "wait": -1},
        ),
    ):
        if isinstance(body, bytes):
            caller.refused(status, said, name, body)
        else:
            caller.refused(status, said, name, **body)
    assert len(service.clients) == clients
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").touch()
    os.symlink("/tmp", root / "out")
    caller.refused(409, "something else", "save_state", client=client, path="mine")
    caller.refused(403, "not below", "save_state", client=client, path="out/x")
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{")
    number = caller.call("load_state", client=client, path="broken")["request_id"]
    answer = caller.post("result", client=client, request_id=number)
    assert answer.status_code == 400
    assert str(root) not in answer.text
    assert caller.result("forward", data=[DATUM], **loss)["loss"] > 0  # and the client goes on


def test_a_full_server_says_so_and_takes_a_client_once_another_is_gone(caller: Caller) -> None:
    names = [caller.call("create", config=CONFIG, seed=s)["client"] for s in range(4)]
    caller.refused(429, "has 4 clients", "create", config=CONFIG)
    caller.call("close", client=names[1])
    caller.refused(404, "there is no client", "close", client=names[1])
    assert caller.call("create", config=CONFIG)["client"] not in names


def test_results_make_room_once_they_were_asked_for(caller: Caller) -> None:
    client = caller.call("create", config=CONFIG, seed=3)["client"]
    numbers = [
        caller.call("forward", client=client, data=[DATUM], loss="cross_entropy")["request_id"] for _ in range(5)
    ]
    caller.refused(429, "5 calls of the client", "forward", client=client, data=[DATUM], loss="cross_entropy")
    losses = [caller.call("result", client=client, request_id=n)["result"]["loss"] for n in (numbers[0], numbers[0])]
    assert losses[0] == losses[1]  # a connection that broke may ask again
    new = caller.call("forward", client=client, data=[DATUM], loss="cross_entropy")["request_id"]
    caller.refused(404, "has made room", "result", client=client, request_id=numbers[0])
    assert caller.call("result", client=client, request_id=new)["result"]["loss"] == losses[0]


def test_a_result_that_is_not_there_yet_is_pending_and_one_of_a_closed_client_is_refused(
    caller: Caller, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, begun, run = threading.Event(), threading.Event(), service._run

    def slow(calls: Any) -> None:
        begun.set()
        assert go_on.wait(30)
        run(calls)

    client, other = (caller.call("create", config=CONFIG, seed=s)["client"] for s in (3, 4))
    monkeypatch.setattr(service, "_run", slow)
    number = caller.call("forward", client=client, data=[DATUM], loss="cross_entropy")["request_id"]
    assert begun.wait(30)
    waiting = caller.call("optim_step", client=other)["request_id"]
    assert caller.call("result", client=client, request_id=number, wait=0.05) == {"status": "pending"}
    outcome: list[int] = []
    asking = threading.Thread(
        target=lambda: outcome.append(caller.post("result", client=other, request_id=waiting).status_code)
    )
    asking.start()
    time.sleep(0.2)
    caller.call("close", client=other)
    asking.join(30)
    assert outcome == [409]
    go_on.set()
    assert caller.call("result", client=client, request_id=number)["result"]["loss"] > 0


def test_a_server_without_a_root_and_one_that_is_gone(service: Service) -> None:
    with app_in_thread(HostedApp(build_training_app(service), "", lambda: None)) as address:
        remote = connect(address)
        client = remote.create(CONFIG, seed=0)
        with pytest.raises(adaptc.AdaptcError, match=r"\(403\): this server .* no adapters"):
            client.save_state("x")
        with pytest.raises(adaptc.AdaptcError, match="not finite"):
            client.optim_step({"learning_rate": float("nan")})
        with pytest.raises(adaptc.AdaptcError, match="cannot be sent"):
            client.forward([DATUM], lambda _: 3)  # type: ignore[arg-type]
        client.close()
    with pytest.raises(adaptc.AdaptcError, match="does not answer"):
        connect(address)
    with pytest.raises(adaptc.ConfigError, match="is no directory"):
        TrainingServerOptions(Path("nowhere at all"))


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    words = [sys.executable, "-m", "adaptc.cli", "train-server", str(tmp_path / "model"), "--port", "0"]
    options = ["--adapter-root", str(tmp_path), "--api-key", KEY]
    with subprocess.Popen([*words, *options], stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            assert line.startswith("adaptc trains adapters of model at http://127.0.0.1:")
            address = line.split()[-1]
            with pytest.raises(adaptc.AdaptcError, match="401"):
                connect(address)
            client = connect(address, KEY).create(LoraConfig(r=2, target_modules=["q_proj"]), seed=1)
            assert client.forward_backward(data(0, [4]), "cross_entropy").result(60).loss > 0
            assert client.optim_step(ADAM).result(60).steps == 1
            assert client.save_adapter("made").result(60) == "made"
            assert adaptc.compile(model(), tmp_path / "made").binding.methods
        finally:
            started.terminate()
            started.wait(30)
