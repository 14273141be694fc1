"""A YAML file describes a sweep: fields as PEFT has them, datasets in several forms, and no key that means nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import adaptc
from adaptc.joint_training.sweep_file import read_sweep_file
from adaptc.joint_training.text_rows import DatasetSource, read_dataset
from tests.support.words import tokenizer

GOOD = """
configs:
  small: {r: 4}
  dora: {r: 8, use_dora: true, learning_rate: 2e-4}
  'no': {peft_type: loha, r: 3}
defaults:
  target_modules: [q_proj, v_proj]
dataset: train.jsonl
steps: 20
"""


def described(folder: Path, text: str) -> Any:
    (folder / "sweep.yaml").write_text(text)
    return read_sweep_file(folder / "sweep.yaml")


def test_a_description(tmp_path: Path) -> None:
    plan = described(tmp_path, GOOD + "learning_rate: 1e-3\neval_dataset: {name: wikitext, config: a, split: test}\n")
    assert plan.configs == {
        "small": adaptc.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "dora": adaptc.LoraConfig(r=8, use_dora=True, target_modules=["q_proj", "v_proj"]),
        "no": adaptc.LoHaConfig(r=3, target_modules=["q_proj", "v_proj"]),
    }
    assert plan.options == {"steps": 20, "learning_rate": {"small": 1e-3, "dora": 2e-4, "no": 1e-3}}
    assert (plan.folder, plan.dataset, plan.max_length) == (tmp_path, DatasetSource("train.jsonl"), None)
    assert plan.eval_dataset == DatasetSource("wikitext", "a", "test")
    assert described(tmp_path, GOOD.replace(", learning_rate: 2e-4", "")).options == {"steps": 20}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "batchsize: 3", "no key 'batchsize'; nearest are 'batch_size'"),
        (GOOD.replace("r: 4", "rank: 4"), "configs.small.*LoraConfig has no field 'rank'"),
        (GOOD.replace("use_dora", "use_dorra"), "no field 'use_dorra'; nearest are 'use_dora'"),
        (GOOD.replace("r: 3", "lora_alpha: 3"), "configs.no.*LoHaConfig has no field 'lora_alpha'"),
        (GOOD.replace("loha", "lohaa"), "configs.no.*'lohaa' is not supported"),
        (GOOD.replace("r: 4", "r: four"), "configs.small.*got 'four'"),
        (GOOD.replace("'no'", "no"), "False, which YAML takes for no text"),
        (GOOD.replace("{r: 4}", "[4]"), r"configs.small is \[4\]"),
        (GOOD.replace("train.jsonl", "{nam: x}"), "no key 'nam' in dataset; nearest are 'name'"),
        (GOOD.replace("train.jsonl", "{split: x}"), "expected a name"),
        (GOOD.replace("train.jsonl", ""), "'dataset' is empty"),
        (GOOD.replace("steps: 20", ""), "'steps' is missing"),
        (GOOD.replace("steps: 20", "steps: 2.5"), "steps must be an integer, got 2.5"),
        (GOOD + "max_length: 1", "max_length=1"),
        (GOOD + "learning_rate: fast", "learning_rate"),
        (GOOD + "lr_scheduler_type: cosinus", "lr_scheduler_type must be .*'cosinus'"),
        (GOOD + "gradient_accumulation_steps: 0", "gradient_accumulation_steps=0"),
        (GOOD + "defaults: {}", "'defaults' stands twice"),
        (GOOD.replace("{r: 4}", "{r: 4, r: 5}"), "'r' stands twice"),
        (GOOD + "x: !!python/object/apply:os.system [ls]", "is no YAML"),
        (GOOD.replace("{r: 4}", "&a {r: *a}"), "configs.small"),
        (GOOD + "x: [", "is no YAML"),
        ("configs: {}\ndataset: a\nsteps: 1", "expected configs by name"),
        ("- 3", "expected the keys"),
        ("", "expected the keys"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(adaptc.AdaptcError, match=said) as caught:
        described(tmp_path, text)
    assert "sweep.yaml" in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(adaptc.CheckpointError, match="no description of a sweep"):
        read_sweep_file(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01configs: 3")
    with pytest.raises(adaptc.AdaptcError):
        read_sweep_file(tmp_path / "x.yaml")


# -- datasets ----------------------------------------------------------------------------------------------------------


def read(folder: Path, name: str, content: str, **options: Any) -> list[dict[str, Any]]:
    (folder / name).write_text(content)
    return read_dataset(DatasetSource(name), folder, tokenizer(), **{"max_length": None, **options})


def test_forms_of_rows(tmp_path: Path) -> None:
    end = tokenizer().eos_token_id
    rows = [
        {"text": "w3 w5"},
        {"prompt": "w1 w2", "completion": " w9"},
        {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]},
        {"input_ids": [7, 8]},
        {"input_ids": [7]},
    ]
    expected = [
        {"input_ids": [3, 5, end], "labels": [3, 5, end]},
        {"input_ids": [1, 2, 9, end], "labels": [-100, -100, 9, end]},
        {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]},
        {"input_ids": [7, 8], "labels": [7, 8]},
    ]
    lines = "\n\n".join(json.dumps(r) for r in rows)
    assert read(tmp_path, "a.jsonl", lines) == expected
    assert read(tmp_path, "a.json", json.dumps(rows)) == expected
    assert read(tmp_path, "a.jsonl", lines, max_length=2)[1] == {"input_ids": [1, 2], "labels": [-100, -100]}
    assert read(tmp_path, "a.txt", "w3 w5\r\n\nw1\n") == [
        expected[0],
        {"input_ids": [1, end], "labels": [1, end]},
    ]


def test_conversations_take_the_template_of_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer(), "chat_template", "{% for m in messages %}{{ m.content + ' w0 ' }}{% endfor %}")
    rows = read(tmp_path, "a.jsonl", json.dumps({"messages": [{"role": "user", "content": "w7 w8"}]}))
    assert rows == [{"input_ids": [7, 8, 0], "labels": [7, 8, 0]}]
    with pytest.raises(adaptc.ConfigError, match=r"a.jsonl:1 cannot be made tokens"):
        read(tmp_path, "a.jsonl", json.dumps({"messages": 3}))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "w1"}\n{"text": ', "a.jsonl:2 is no JSON"),
        ("a.jsonl", '{"txt": "w1"}', r"a.jsonl:1 is \{'txt': 'w1'\}: expected an object with input_ids or prompt and"),
        ("a.jsonl", "3", "a.jsonl:1 is 3"),
        ("a.jsonl", '{"text": 3}', "must be texts"),
        ("a.jsonl", '{"input_ids": [1, 2.5]}', "expected whole numbers"),
        ("a.jsonl", '{"input_ids": [1, 2], "labels": [1]}', r"labels \[1\]"),
        ("a.json", '{"text": "w1"}', "no list of objects"),
        ("a.txt", "\n \n", "no row of two tokens"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(adaptc.AdaptcError, match=said):
        read(tmp_path, name, content)


def test_datasets_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    made = datasets.Dataset.from_list([{"text": "w3 w5"}, {"text": "w4"}])
    made.to_json(tmp_path / "train.jsonl")
    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = DatasetSource("some/name", "a", "test")
    assert [len(r["input_ids"]) for r in read_dataset(source, tmp_path, tokenizer(), None)] == [3, 2]
    assert asked == [(("some/name", "a"), {"split": "test"})]

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(adaptc.CheckpointError, match="no file 'some/name', and the package datasets cannot load it"):
        read_dataset(source, tmp_path, tokenizer(), None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(adaptc.ConfigError, match="which is not installed"):
        read_dataset(source, tmp_path, tokenizer(), None)
