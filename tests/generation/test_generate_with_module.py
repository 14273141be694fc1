"""``module.generate``: a module that trains generates what PEFT's model does, with the parameters of that moment."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import adaptc
from tests.support.training import CONFIG, Data, arguments, batch, losses, model, trainable

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 94}


@pytest.fixture(scope="module")
def plain() -> Any:
    return adaptc.compile(model(), adaptc.LoraConfig(**CONFIG), training=True).module()


def prompts() -> dict[str, Tensor]:
    """Padded on the left."""
    ids = torch.randint(0, 90, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def values(trained: nn.Module, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: 0.5 * torch.randn(t.shape, generator=g) for k, t in trained.state_dict().items()}


@pytest.mark.long
@pytest.mark.parametrize("more", [{"lora_dropout": 0.3}, {"use_dora": True, "modules_to_save": ["lm_head"]}])
def test_tokens_are_pefts_before_and_after_a_step(more: dict[str, Any]) -> None:
    """Nothing that was computed once of older values is used again, and no random number is drawn but those of
    sampling. The module is in train mode, and trains on."""
    config = {**CONFIG, **more}
    trained = adaptc.compile(model(), adaptc.LoraConfig(**config), training=True).module()
    trained.load_state_dict(values(trained, 1))
    theirs = peft.get_peft_model(copy.deepcopy(model()), peft.LoraConfig(**config)).eval()
    optimizer = torch.optim.SGD(trainable(trained), lr=20.0)
    seen = []
    for _ in range(2):
        peft.set_peft_model_state_dict(theirs, {k: t.clone() for k, t in trained.state_dict().items()})
        before = torch.get_rng_state()
        seen.append(trained.generate(**prompts(), do_sample=False, **OPTIONS))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(seen[-1], theirs.generate(**prompts(), do_sample=False, **OPTIONS))
        drawn = []
        for one in (trained, theirs):
            torch.manual_seed(5)
            drawn.append(one.generate(**prompts(), do_sample=True, **OPTIONS))
        assert torch.equal(*drawn)
        trained.train()
        trained(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert trained.training
    assert not torch.equal(*seen), "the step changed nothing"


@pytest.mark.long
def test_an_initialisation_that_changed_the_base() -> None:
    """PiSSA's base is what the adapter leaves of it, in the module, and the model itself, in what generates."""
    config = adaptc.LoraConfig(**{**CONFIG, "init_lora_weights": "pissa"})
    trained = adaptc.compile(model(), config, training=True).module()
    with torch.no_grad():
        for p in trainable(trained):
            p.mul_(1.5)
    found = trained.generate(**prompts(), do_sample=False, **OPTIONS)
    ids = prompts()["input_ids"][2:]
    for _ in range(5):
        ids = torch.cat([ids, trained(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found[2:], ids)


@pytest.mark.long
def test_modules_that_were_made_of_others_generate(tmp_path: Path) -> None:
    """Copies, pickles in a process that has not imported more of adaptc, and programs that got an adapter."""
    program = adaptc.compile(model(), adaptc.LoraConfig(**CONFIG), training=True)
    trained = program.module()
    trained.load_state_dict(values(trained, 1))
    wanted = trained.generate(**prompts(), do_sample=False, **OPTIONS)
    others = {
        "copy": copy.deepcopy(trained),
        "options": program.with_options(fuse=False).module(),
        "added": program.add_adapter("other", adaptc.LoraConfig(**CONFIG), recompile=True).module(),
    }
    for name, other in others.items():
        assert torch.equal(other.generate(**prompts(), do_sample=False, **OPTIONS), wanted), name
    torch.save({"module": trained, "inputs": {**prompts(), **OPTIONS}}, tmp_path / "module.pt")
    code = (
        "import sys, torch\n"
        "given = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save(given['module'].generate(**given['inputs'], do_sample=False), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "module.pt", tmp_path / "ids.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "ids.pt"), wanted)


@pytest.mark.long
def test_whoever_replaces_a_weight_generates_with_it(plain: Any) -> None:
    first = plain.generate(**prompts(), do_sample=False, **OPTIONS)
    norm = plain.get_submodule("model.norm")
    before = norm.weight
    norm.weight = nn.Parameter(-before.detach(), requires_grad=False)
    found = plain.generate(**prompts(), do_sample=False, **OPTIONS)
    assert not torch.equal(first, found)
    assert torch.equal(found[2, 7], plain(input_ids=prompts()["input_ids"][2:]).logits[0, -1].argmax(-1))
    norm.weight = before


@pytest.mark.long
def test_the_model_may_change_or_be_gone_meanwhile() -> None:
    own = copy.deepcopy(model())
    program = adaptc.compile(own, adaptc.LoraConfig(**CONFIG), training=True)
    wanted = own.generate(**prompts(), do_sample=False, **OPTIONS)
    del own.model.layers[1], own.model.rotary_emb
    assert torch.equal(program.module().generate(**prompts(), do_sample=False, **OPTIONS), wanted)


@pytest.mark.long
def test_an_encoder_is_generated_with_while_trainer_evaluates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    ids: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ids)).eval()
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    program = adaptc.compile(base, adaptc.LoraConfig(**config), training=True)
    trained, theirs = program.module(), peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    trained.load_state_dict(values(trained, 1))
    peft.set_peft_model_state_dict(theirs, values(trained, 1))

    def run(one: Any, callbacks: Any) -> tuple[list[float], list[Tensor]]:
        found: list[Tensor] = []
        options = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
        more: dict[str, Any] = {"predict_with_generate": True, "generation_max_length": 8}
        trainer = transformers.Seq2SeqTrainer(
            model=one,
            args=transformers.Seq2SeqTrainingArguments(**options, **more),
            train_dataset=Data(),
            eval_dataset=Data(5),
            compute_metrics=lambda p: found.append(torch.tensor(p.predictions)) or {},
            callbacks=callbacks,
        )
        trainer.train()
        return losses(trainer), found

    (ours, tokens), (wanted, by_peft) = run(trained, [adaptc.training.trainer_callback(program)]), run(theirs, None)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), rtol=1e-5, atol=0)
    assert len(tokens) == 2
    assert all(map(torch.equal, tokens, by_peft))
    assert not torch.equal(*tokens), "the step changed nothing"


@pytest.mark.long
def test_modules_that_do_not_generate_say_which_do(plain: Any) -> None:
    for trained in (adaptc.compile(model(), adaptc.LoraConfig(**CONFIG)).module(), plain.owner.base.module()):
        with pytest.raises(adaptc.AdaptcError, match=r"adaptc.compile\(model, config, training=True\) can"):
            trained.generate(**prompts(), **OPTIONS)


@pytest.mark.long
def test_what_a_generator_refuses_is_refused_by_name(plain: Any) -> None:
    with pytest.raises(adaptc.AdaptcError, match="output_attentions is not taken"):
        plain.generate(**prompts(), output_attentions=True, **OPTIONS)
