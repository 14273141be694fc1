"""A tiny model that answers, its tokenizer, and adapters that change what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import adaptc
from tests.support.families import FAMILIES, VOCAB

#: words of a vocabulary, after those with a meaning; "w17" is token 17
SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<system>", "<assistant>", "<unk>")
TEMPLATE = (
    "<bos>{% for m in messages %}{% if m['content'] == 'w13' %}{{ raise_exception('thirteen is not said') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, end: str = "<eos>") -> Any:
    """Of words between spaces; texts end with ``end``."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    more = {"additional_special_tokens": ["<user>", "<system>", "<assistant>"]}
    special: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": end, "unk_token": "<unk>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special, **more)
    made.chat_template = template
    return made


@dataclass(frozen=True)
class ChatModel:
    """``uncached_program``: captured for LoRA on all linear layers; it computes whole texts. ``folder`` holds ``model``
    and its tokenizer, and the adapters ``one`` and ``two`` (other ranks and layers), ``head`` (LoRA on a layer that the
    program lacks) and ``ia3``."""

    folder: Path
    model: Any
    uncached_program: adaptc.AdaptedProgram

    @property
    def adapters(self) -> dict[str, Path]:
        return {name: self.folder / name for name in ("one", "two")}

    def uncached_answer(self, adapter: str | None, ids: list[int], new: int = 6) -> list[int]:
        """The greedy answer, the whole text computed for each token."""
        bound = self.uncached_program.bind(None if adapter is None else self.folder / adapter)
        tokens = list(ids)
        while len(tokens) < len(ids) + new:
            tokens.append(int(bound(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(ids) :]


def model_that_answers() -> Any:
    """A model whose answers are words, and end where they are cut."""
    model: Any = FAMILIES["llama"].build()
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0
    return model


def make_chat_model(folder: Path) -> ChatModel:
    model = model_that_answers()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    usual = adaptc.LoraConfig(r=3, target_modules="all-linear")
    lora = {"init_lora_weights": False}
    for name, config in {
        "one": adaptc.LoraConfig(r=5, lora_alpha=9, target_modules=["q_proj", "down_proj"], **lora),
        "two": adaptc.LoraConfig(r=2, lora_alpha=7, target_modules=["v_proj"], **lora),
        "head": adaptc.LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], **lora),
        "ia3": adaptc.IA3Config(target_modules=["v_proj", "o_proj"], feedforward_modules=[], init_ia3_weights=False),
    }.items():
        adaptc.save_adapter(adaptc.compile(model, config), folder / name)
    return ChatModel(folder, model, adaptc.compile(model, usual))
