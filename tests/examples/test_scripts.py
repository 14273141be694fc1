"""The examples: the pieces of examples/quickstart.py on a tiny model, and examples/custom_module.py as it is."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import adaptc
from tests.support import chats, training
from tests.support.families import FAMILIES, VOCAB

EXAMPLES = Path(__file__).parents[2] / "examples"
NEVER = VOCAB  # a token that no model says


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = load("quickstart", monkeypatch)
    # The number of threads belongs to the process, and the tests set it once for all.
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


class Letters:
    """A tokenizer of single characters; a chat is its texts one after the other."""

    eos_token, eos_token_id = "$", 2

    def apply_chat_template(self, chat: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        return " ".join(message["content"] for message in chat) + ">"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 if c == self.eos_token else 3 + ord(c) % (VOCAB - 3) for c in text]}


def config(r: int = 4) -> adaptc.LoraConfig:
    return adaptc.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")


@pytest.mark.parametrize("style", ["pirate", "telegram"])
def test_every_line_of_the_texts_is_a_question_and_an_answer_in_its_style(quickstart: ModuleType, style: str) -> None:
    lessons = quickstart.read_lessons(EXAMPLES / f"{style}.txt")
    word = quickstart.STYLES[style]
    assert len(lessons) >= 8
    assert len({question for question, _ in lessons}) == len(lessons)
    assert quickstart.QUESTION not in {question for question, _ in lessons}
    for question, answer in lessons:
        assert word in answer
        assert word not in question
        assert not any(other in answer for other in quickstart.STYLES.values() if other != word)


def test_only_answers_count_in_the_loss_and_padding_counts_nowhere(quickstart: ModuleType) -> None:
    lessons = [quickstart.encode_lesson(Letters(), "Why?", answer) for answer in ("So.", "No reason.")]
    batch = quickstart.make_batch(lessons)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    asked = len(quickstart.encode_question(Letters(), "Why?"))
    assert ids.shape == mask.shape == labels.shape == (2, asked + len("No reason.$"))
    assert mask.sum(1).tolist() == [asked + len("So.$"), asked + len("No reason.$")]
    assert (labels != -100).sum(1).tolist() == [len("So.$"), len("No reason.$")]
    counted = labels != -100
    assert torch.equal(labels[counted], ids[counted])
    assert not counted[:, :asked].any()
    assert labels[0, asked + len("So.")] == Letters.eos_token_id


@pytest.mark.long
def test_training_from_the_same_start_gives_adapters_that_answer_differently(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["llama"].build()
    monkeypatch.setattr(quickstart, "LEARNING_RATE", 0.006)
    torch.manual_seed(0)
    student = adaptc.compile(model, config(), training=True)
    generator = adaptc.compile_for_generation(model, config(3), max_batch=1)
    adaptc.save_adapter(student, tmp_path / "untrained")
    prompt = quickstart.encode_question(Letters(), "Why?")
    answers = [quickstart.answer(generator, prompt, stop=NEVER, longest=5)]
    for letter in "ab":
        lessons = [quickstart.encode_lesson(Letters(), q, letter * 5) for q in ("Why?", "How?", "Who?", "When?")]
        adaptc.swap(student, tmp_path / "untrained")
        first = quickstart.train(student, lessons, letter, steps=1)
        loss = quickstart.train(student, lessons, letter, steps=40)
        assert loss < 0.6 * first
        adaptc.save_adapter(student, tmp_path / letter)
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(generator, tmp_path / letter)
            answers.append(quickstart.answer(generator, prompt, stop=NEVER, longest=5))
        assert answers[-1] == Letters()(letter * 5)["input_ids"]
    assert answers[0] not in answers[1:]


@pytest.mark.long
def test_an_answer_ends_at_the_stop_token_or_at_its_longest(quickstart: ModuleType) -> None:
    generator = adaptc.compile_for_generation(FAMILIES["llama"].build(), config(), max_batch=1)
    whole = quickstart.answer(generator, [5, 9, 7], stop=NEVER, longest=4)
    assert len(whole) == 4
    stop = whole[-1]
    assert quickstart.answer(generator, [5, 9, 7], stop=stop, longest=4) == whole[: whole.index(stop)]


@pytest.mark.long
def test_a_merged_program_runs_where_adaptc_cannot_be_imported(
    quickstart: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = adaptc.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    program = adaptc.compile(FAMILIES["llama"].build(), config)
    merged = adaptc.merge(program)
    tokens = torch.tensor([[5, 9, 7, 11]])
    found = quickstart.run_without_adaptc(adaptc.save(merged, tmp_path / "merged.pt2"), tokens)
    torch.testing.assert_close(found, quickstart.logits(merged, tokens), rtol=1e-5, atol=1e-5)
    assert "import of adaptc halted" in capfd.readouterr().out


def test_same_bits_sees_what_equality_does_not(quickstart: ModuleType) -> None:
    zero, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert quickstart.same_bits(nan, nan.clone())
    assert not quickstart.same_bits(zero, -zero)
    assert not quickstart.same_bits(zero, zero.double())
    assert not quickstart.same_bits(zero, torch.zeros(3, 1))
    assert quickstart.same_bits(torch.tensor(1.5), torch.tensor(1.5))


def test_a_failed_check_makes_the_exit_status_1_and_is_named(
    quickstart: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    check = quickstart.Checks()
    check("grass is green", True)
    assert check.conclude() == 0
    check("the moon is a cheese", False)
    assert check.conclude() == 1
    assert "1 of 2 checks FAILED: the moon is a cheese" in " ".join(capsys.readouterr().out.split())


@pytest.mark.long
def test_text_is_generated_in_every_way_that_is_shown(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)
    generate = load("generate", monkeypatch)
    model: Any = chats.model_that_answers()
    model.config.max_position_embeddings = 512
    for name in ("pirate", "telegram"):
        made = adaptc.LoraConfig(r=3, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
        adaptc.save_adapter(adaptc.compile(model, made), tmp_path / name)
    monkeypatch.setattr(quickstart, "QUESTION", "w9 w12")
    adapters = [str(tmp_path / name) for name in ("pirate", "telegram")]
    generate.main(model, chats.tokenizer(), *adapters)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    titles = ["pirate", "telegram", "base", "goes on", "sample 1", "sample 2"]
    assert lines[::2] == titles
    assert len(set(lines[1::2])) == len(titles)
    assert all(len(line.split()) == 32 for line in lines[1:8:2])  # sampled ones may end
    # An answer that ends early is printed without the question before it.
    third = lines[1].split()[2]
    model.generation_config.eos_token_id = chats.tokenizer().convert_tokens_to_ids(third)
    generate.main(model, chats.tokenizer(), *adapters)
    ended = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert ended[:2] == ["pirate", lines[1].partition(third)[0] + third]


@pytest.mark.long
def test_one_batch_is_answered_by_many_adapters(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)
    script = load("many_adapters", monkeypatch)
    monkeypatch.setattr(script, "QUESTIONS", ("w9 w12", "w9", "w12 w9 w12", "w11 w5"))
    model: Any = chats.model_that_answers()
    model.config.max_position_embeddings = 512
    for name in ("pirate", "telegram"):
        made = adaptc.LoraConfig(r=3, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
        adaptc.save_adapter(adaptc.compile(model, made), tmp_path / name)
    script.main(model, chats.tokenizer(), str(tmp_path / "pirate"), str(tmp_path / "telegram"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bank of 3 adapters, ")
    first, packaged = lines[-16:-8], lines[-8:]
    names = ["pirate", "None", "{'telegram'"]
    assert [line.partition(":")[0] for line in first[::2]] == [*names, "telegram"]
    assert [line.partition(":")[0] for line in packaged[::2]] == [*names, "terse"]
    assert all(line.startswith("  ") and line.strip() for line in first[1::2])
    assert first[1:7:2] == packaged[1:7:2]


def test_the_custom_module_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    custom_module = load("custom_module", monkeypatch)
    assert custom_module.main() == 0
    assert "24 after, of 24" in capsys.readouterr().out


def test_pictures_are_described_in_the_words_of_their_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = load("captions", monkeypatch)
    assert captions.caption(("blue", "cross")) == ["a", "blue", "cross", "<end>"]
    assert captions.caption(("blue", "cross"), french=True) == ["un", "croix", "bleu", "<end>"]
    pixels = {p: captions.draw(p, random.Random(0)) for p in captions.all_pictures([*captions.SHAPES, "frame"])}
    assert len(pixels) == 12
    for (colour, _), drawn in pixels.items():
        channel = list(captions.COLOURS).index(colour)
        assert int(drawn.amax((1, 2)).argmax()) == channel
    shapes = torch.stack([pixels["red", s][0] > 0.5 for s in [*captions.SHAPES, "frame"]]).flatten(1).double()
    assert len({tuple(row.tolist()) for row in shapes}) == 4


@pytest.mark.long
def test_captions_run_with_few_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is learned in two steps, so its checks of captions fail; swaps there and back are as they were."""
    captions = load("captions", monkeypatch)
    with pytest.raises(SystemExit) as ended:
        captions.main(steps=2, adapter_steps=2)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "FAILED: captions of the model are right" in said
    assert "ok: after swaps there and back the first adapter says the same" in said


@pytest.mark.long
def test_pictures_of_a_batch_are_drawn_with_their_own_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    pictures = load("draw_pictures", monkeypatch)
    try:
        pictures.main(tmp_path, base_steps=2, steps=3)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert said.count("ok   ") >= 5
    for name in ("red", "striped", "red and striped"):
        assert f"ok   {name}: the pictures of a batch are those drawn alone" in said
    assert "ok   striped: diffusers draws it from the file" in said
    grid = Image.open(tmp_path / "pictures.png")
    assert grid.size == (4 * 16 * 6, 4 * 16 * 6)
    columns = [grid.crop((96 * i, 0, 96 * (i + 1), 384)).tobytes() for i in range(4)]
    assert len({*columns}) == 4


@pytest.mark.long
def test_six_styles_are_learned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    example = load("train_many", monkeypatch)
    torch.set_num_threads(threads)
    styles = example.read_styles()
    assert list(styles) == [*("pirate", "telegram"), *example.SAYINGS]
    assert set(styles) == set(example.CONFIGS)
    assert {len(lessons) for lessons in styles.values()} == {12}
    assert len({lessons[0][1] for lessons in styles.values()}) == 6
    monkeypatch.setattr(Letters, "__call__", lambda _, text: {"input_ids": [3 + ord(c) % 61 for c in text[:9]]})
    data = {name: example.make_data(Letters(), lessons) for name, lessons in styles.items()}
    assert sum(map(float, data["robot"][0].loss_fn_inputs["weights"])) == pytest.approx(1.0)
    with adaptc.training.Service(training.model(), capacity=12) as service:
        alone, _ = example.train(service, data, 1, together=False)
        together, _ = example.train(service, data, 2, together=True)
        assert service.batch_count < 6 + 6 + 12 + 6
        assert len(service.clients) == 6
    for name, losses in together.items():
        assert losses[0] == pytest.approx(alone[name][0], rel=1e-4)
        assert len(losses) == 3
