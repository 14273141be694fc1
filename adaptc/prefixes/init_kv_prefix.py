"""Initialize the KV prefix of prefix tuning and cartridges from a text.

The keys and values are those that the base model computes for the text's first tokens. Where something is wrong, an
error is raised and nothing has changed. Other tensors of the adapter, such as modules that are trained as a whole,
stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.past_key_values import check_count, first_of_cache
from adaptc.binding.bind import file_tensors
from adaptc.binding.binding import Binding
from adaptc.binding.combine_bindings import part_of
from adaptc.errors import AdaptcError, ConfigError, listing
from adaptc.generation import validate
from adaptc.generation.generator import Generator
from adaptc.generation.prefix.prefix_for import check_room
from adaptc.methods import PROMPT, KeyValueConfig, as_rows
from adaptc.passes.analysis.cache_inputs import first_of_cache as first_of_step
from adaptc.passes.analysis.tokens.decoder_inputs import decoder_lookup
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.prefixes.text_ids import ids_of
from adaptc.prefixes.text_key_values import keys_of_text
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.swap import swapped
from adaptc.program.wrapper import ProgramWrapper, check_program
from adaptc.value_types import checked


@checked("adapter_name", "num_virtual_tokens")
def initialize_kv_prefix_from_past_key_values(
    program: AdaptedProgram | Generator,
    *,
    past_key_values: Any,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Set the KV prefix of the adapter of ``program`` to the first tokens of a cache, as PEFT's function of this name.

    ``program`` is an :class:`AdaptedProgram` or a :class:`Generator` with a cartridge, or with prefix tuning without
    ``prefix_projection``. The adapter is swapped, so nothing is compiled, and it is saved as all adapters are. To train
    it further, call ``program.module()`` afterwards. ``past_key_values`` is as for
    :func:`prompt_embeddings_from_past_key_values`, from the same model. ``adapter_name`` says which adapter, where
    several act. ``num_virtual_tokens`` may be any number; None keeps the adapter's own.

    Returns ``prompt_embeddings`` (num_virtual_tokens, 2 * layers * heads * width), with the values in the cache. The
    first ``num_frozen_tokens`` of a cartridge do not train, whatever they were made from. Raises ConfigError for
    another kind of adapter, and the errors of :func:`prompt_embeddings_from_past_key_values` and ``swap``. Nothing is
    changed then.
    """
    target = _Target.of(program, adapter_name, num_virtual_tokens, "initialize_kv_prefix_from_past_key_values")
    return target.begin_with(past_key_values)


@checked("adapter_name", "num_virtual_tokens", "use_chat_template", "max_length")
def initialize_kv_prefix_from_text(
    program: AdaptedProgram | Generator,
    tokenizer: Any = None,
    *,
    text: str | Tensor | Sequence[int],
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Set the KV prefix of the adapter of ``program`` from a text, as PEFT's function of this name.

    The keys and values are those that the base, without any adapter, computes for the text's first tokens (arXiv
    2506.06266). ``text`` is a string for ``tokenizer``, or token ids (length,) or (1, length). ``tokenizer`` None means
    the one that a generator came with. With ``use_chat_template``, a string becomes the system turn of a conversation
    if the tokenizer has a chat template. ``max_length`` is the most tokens of the text that are read; None for all.
    ``program``, ``adapter_name``, ``num_virtual_tokens`` and the result are as for
    :func:`initialize_kv_prefix_from_past_key_values`.

    A program reads the whole text, because an encoder's keys depend on all of it. A generator reads only the first
    ``num_virtual_tokens`` tokens, because later ones have no influence. Raises ConfigError for a text of fewer tokens,
    and for a missing or unneeded tokenizer. Raises AdaptcError for a text that is too long, and for invalid token ids.
    Nothing is changed then.
    """
    target = _Target.of(program, adapter_name, num_virtual_tokens, "initialize_kv_prefix_from_text")
    if decoder_lookup(Lifted(target.program, edit=False))[0] is not None:
        raise ConfigError(
            "initialize_kv_prefix_from_text reads a text as a model of one stack does, and this one has an encoder, "
            "which would have to read something, too: run the model, and give what its decoder's cache holds to "
            "initialize_kv_prefix_from_past_key_values"
        )
    if tokenizer is None and isinstance(program, Generator):
        tokenizer = program.tokenizer if isinstance(text, str) else None
    ids = ids_of(text, tokenizer, use_chat_template, max_length)
    if ids.shape[1] < target.count:
        raise ConfigError(
            f"the text has {ids.shape[1]} tokens, and {target.count} are put in front: give a longer one, or "
            f"num_virtual_tokens={ids.shape[1]}"
        )
    if isinstance(program, Generator):
        return target.begin_with(_read(program, ids[:, : target.count]))
    found = keys_of_text(target.program, target.attachment(), ids)
    return target.begin_with(list(zip(found[::2], found[1::2], strict=True)))


def _read(generator: Generator, ids: Tensor) -> Any:
    """Return the base's cache after the tokens ``ids``, which keeps all positions in sliding-window layers, too."""
    validate.tokens(generator.facts, ids)
    base = generator.base
    past = base.new_cache()
    past.expected = ids.shape[1]
    past.activate_past_recording()
    with torch.no_grad():
        base.forward(ids, past_key_values=past, logits_to_keep=1)
    return past


@dataclass(frozen=True)
class _Target:
    """The adapter of a program whose KV prefix is replaced by one of ``count`` virtual tokens."""

    program: AdaptedProgram
    name: str
    binding: Binding
    config: KeyValueConfig
    count: int

    @classmethod
    def of(cls, program: Any, name: str | None, count: int | None, what: str) -> _Target:
        inside = program.program if isinstance(program, ProgramWrapper) else program
        check_program(inside, what)
        named = {n: b.idle or b for n, b in inside.binding.named.items()}  # as they are when enabled
        if name is not None and name not in named:
            raise ConfigError(f"the program has no adapter called {name!r}; it has {listing(map(repr, named))}")
        mine = [n for n, b in named.items() if isinstance(b.config, KeyValueConfig)]  # at most one of them is active
        chosen: str = (mine or list(named))[0] if name is None else name
        config = named[chosen].config
        if not isinstance(config, KeyValueConfig):
            raise ConfigError(
                f"{what} is for cartridges and prefix tuning, and {chosen!r} is a {config.peft_type} adapter"
            )
        if getattr(config, "prefix_projection", False):
            raise ConfigError(
                f"{chosen!r} makes its keys and values by a network (prefix_projection=True), which no text gives: "
                "compile with a PrefixTuningConfig without prefix_projection"
            )
        if config.sides > 1:
            raise ConfigError(
                f"several layers have one pair of keys and values in {chosen!r}, whose num_transformer_submodules is "
                f"{config.sides}, and a cache has a pair for each: compile with num_transformer_submodules=1"
            )
        count = config.num_virtual_tokens if count is None else count
        check_count(count)
        assert count is not None
        if isinstance(program, Generator):
            check_room(count, program.facts)
        elif first_of_step(Lifted(inside, edit=False)) is not None:
            raise AdaptcError(f"{what} takes what generates, and not the program inside, whose cache is its caller's")
        return cls(inside, chosen, named[chosen], config, count)

    def attachment(self) -> Attachment:
        mine = [a for a in self.program.adaptation.attachments if isinstance(a.method, ProgramMethod)]
        return next(a for a in mine if a.id in self.binding.methods)

    def begin_with(self, past: Any) -> Tensor:
        """Swap the adapter to the KV prefix of the cache ``past`` and return its rows.

        Raises ConfigError for a cache of another model: rows of the same width may come from other layers and heads.
        """
        cached = first_of_cache(past, self.count)
        _, heads, _, width = cached[0].shape
        found = {"num_layers": len(cached) // 2, "num_attention_heads": heads, "token_dim": heads * width}
        for name, value in found.items():
            if value != getattr(self.config, name):
                raise ConfigError(
                    f"the cache has {name}={value}, and the program {getattr(self.config, name)}: it is of another "
                    "model"
                )
        rows = as_rows([t[0] for t in cached])
        several, spec = bool(self.program.binding.parts), self.program.spec()
        own = file_tensors(part_of(spec, self.name) if several else spec, self.binding)
        config = self.config.replace(num_virtual_tokens=self.count)
        new = Adapter(config, {**own, PROMPT: rows}, f"a cache of {self.count} tokens")
        swapped(self.program, {self.name: new} if several else new)
        return rows
