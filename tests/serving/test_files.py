"""Serving models as files: programs that are compiled again where they are read, and packages of compiled code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import adaptc
from adaptc.packages.manifest import FILES_PREFIX
from adaptc.serving.serving_spec import SPEC_FILE
from tests.generation.models import case
from tests.serving.models import expected_tokens, prompts, results, running, served, serving
from tests.support.archives import read_records, with_right_hashes, write_records
from tests.support.chats import tokenizer

SPEC_RECORD = FILES_PREFIX + SPEC_FILE

#: what is compiled once serves all tests of the file
pytestmark = pytest.mark.long

MIXED: list[Any] = ["first", "second", None, {"first": 0.5, "second": -0.3}]
READER = """
import sys, json
import adaptc
forbidden = [m for m in sys.modules if m.startswith("transformers.models.llama.modeling")]
assert not forbidden, forbidden
model = adaptc.load_package(sys.argv[1])
texts, adapters = json.loads(sys.argv[2])
config = model.generation_config
config.update(do_sample=False, max_new_tokens=7, eos_token_id=None, pad_token_id=0)
out = model.generate_batch(texts, adapters=adapters, generation_config=config)
assert "transformers.models.llama.modeling_llama" not in sys.modules
print(json.dumps([one.generated_tokens for one in out.values()]))
"""


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3"])
def test_a_saved_model_serves_again(family: str, tmp_path: Path) -> None:
    found, texts = case(family), prompts(23, 5)
    path = adaptc.save(serving(family), tmp_path / "serving.pt2")
    model = adaptc.load(path)
    assert model.spec.layout == serving(family).spec.layout
    assert len(model.bank) == 0
    for name, adapter in found.adapters.items():
        model.bank.add(name, adapter)
    outs = served(model, texts, ["second", "first"])
    assert [o.generated_tokens for o in outs] == [
        expected_tokens(family, text, name) for text, name in zip(texts, ["second", "first"], strict=True)
    ]
    assert adaptc.load(path).generate_batch([texts[1]], max_new_tokens=2)  # its own adapter


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for one adapter more than there are."""
    path = tmp_path_factory.mktemp("package") / "serving.pt2"
    return adaptc.package(serving(), path, capacity=3, max_rank=5, tokenizer=tokenizer())


def test_a_package_serves_without_the_model_s_code(package: Path) -> None:
    texts = prompts(5, 23, 1, 9)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(package), json.dumps([texts, MIXED])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [expected_tokens("llama", text, adapter) for text, adapter in zip(texts, MIXED, strict=True)]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_adapters_of_a_package_change_while_requests_run(package: Path) -> None:
    """A request keeps its index in the code, and the last one frees it."""
    model, found, (text, other) = adaptc.load_package(package), case("llama"), prompts(9, 6)
    assert model.tokenizer.get_vocab() == tokenizer().get_vocab()
    with running(model) as manager:
        with manager.pause():
            before = manager.add_request(text, adapter="first", max_new_tokens=30)
            model.bank.replace("first", found.adapters["second"])
            after = manager.add_request(text, adapter="first", max_new_tokens=5)
            with pytest.raises(adaptc.ConfigError, match="no room for 'third'"):
                model.bank.add("third", found.adapters["first"])
        done = results(manager, [before, after])
        assert done[before].generated_tokens == expected_tokens("llama", text, "first", 30)
        assert done[after].generated_tokens == expected_tokens("llama", text, "second", 5)
        # transformers keeps the requests of a step until the next one.
        results(manager, [manager.add_request(other, adapter=None, max_new_tokens=2)])
        model.bank.add("third", found.adapters["first"])
        last = results(manager, [manager.add_request(other, adapter="third", max_new_tokens=5)])
        assert next(iter(last.values())).generated_tokens == expected_tokens("llama", other, "first", 5)
        with pytest.raises(adaptc.AdaptcError, match="adapter= is missing: a package has"):
            manager.add_request(text)


def test_a_spec_that_does_not_fit_is_refused(package: Path, tmp_path: Path) -> None:
    records = read_records(package)
    stored = json.loads(records[SPEC_RECORD])
    for change, message in (
        ({"format": 9}, "its format is 9"),
        ({"dtype": "float31"}, "'float31' is no dtype"),
        ({"heads": -1}, "heads"),
        ({"latents": [3, 4]}, r"its latents are \[3, 4\]"),
        ({"groups": []}, "no such cache"),
        ({"config": {"model_type": "nothing"}}, "no model_type 'nothing'"),
    ):
        changed = records | {SPEC_RECORD: json.dumps({**stored, **change}).encode()}
        path = write_records(tmp_path / "changed.pt2", with_right_hashes(changed))
        with pytest.raises(adaptc.CheckpointError, match=f"{SPEC_FILE}.*{message}"):
            adaptc.load_package(path)
