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
from adaptc.adapters.past_key_values import check_token_count, first_cached_tokens
from adaptc.binding.bind import file_tensors
from adaptc.binding.binding import Binding
from adaptc.binding.combine_bindings import spec_of_adapter
from adaptc.errors import AdaptcError, ConfigError, listing
from adaptc.generation.arguments import validate
from adaptc.generation.generator import Generator
from adaptc.generation.prefix.prefix_for import check_virtual_tokens_fit
from adaptc.methods import PROMPT_EMBEDDINGS, KVPrefixConfig, rows_from_kv_prefix
from adaptc.passes.analysis.cache_inputs import first_cache_input as first_cache_input
from adaptc.passes.analysis.tokens.decoder_inputs import find_decoder_lookup
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.prefixes.text_ids import text_to_ids
from adaptc.prefixes.text_key_values import compute_text_kv
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import ProgramWrapper, check_program
from adaptc.value_types import validates_options


@validates_options("adapter_name", "num_virtual_tokens")
def initialize_kv_prefix_from_past_key_values(
    program: AdaptedProgram | Generator,
    *,
    past_key_values: Any,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Set the KV prefix of the adapter of ``program`` to the first tokens of a cache, as PEFT's function of this name.

    The adapter is swapped, so nothing is compiled, and it is saved as all adapters are. To train it further, call
    ``program.module()`` afterwards. The first ``num_frozen_tokens`` of a cartridge do not train, whatever they were
    made from.

    Args:
        program: an :class:`adaptc.AdaptedProgram` or a :class:`adaptc.Generator` with a cartridge, or with prefix
            tuning without ``prefix_projection``.
        past_key_values: a cache from the same model, as :func:`prompt_embeddings_from_past_key_values` takes it.
        adapter_name: which adapter, where several act.
        num_virtual_tokens: the number of tokens to take; None for the adapter's own.

    Returns:
        ``prompt_embeddings`` (num_virtual_tokens, 2 * layers * heads * width), with the values in the cache.

    Raises:
        ConfigError: the adapter is of another kind, or ``num_virtual_tokens`` is no positive integer.
        AdaptcError: the cache does not fit. Nothing is changed.

    Example:
        >>> cartridge = adaptc.compile(lm, adaptc.CartridgeConfig(num_virtual_tokens=3))
        >>> cache = lm(ids[:1], use_cache=True).past_key_values
        >>> adaptc.prefixes.initialize_kv_prefix_from_past_key_values(cartridge, past_key_values=cache).shape
        torch.Size([3, 64])
    """
    target = _Target.resolve(program, adapter_name, num_virtual_tokens, "initialize_kv_prefix_from_past_key_values")
    return target.swap_prefix(past_key_values)


@validates_options("adapter_name", "num_virtual_tokens", "use_chat_template", "max_length")
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
    2506.06266). A program reads the whole text, because an encoder's keys depend on all of it. A generator reads only
    the first ``num_virtual_tokens`` tokens, because later ones have no influence.

    Args:
        program: a program or generator, as for :func:`initialize_kv_prefix_from_past_key_values`.
        tokenizer: a transformers tokenizer; None for the one that a generator came with.
        text: a string for ``tokenizer``, or token ids (length,) or (1, length).
        adapter_name: which adapter, where several act.
        num_virtual_tokens: the number of tokens to take; None for the adapter's own.
        use_chat_template: whether a string becomes the system turn of a conversation, if the tokenizer has a chat
            template.
        max_length: the most tokens of the text that are read; None for all.

    Returns:
        ``prompt_embeddings`` (num_virtual_tokens, 2 * layers * heads * width).

    Raises:
        ConfigError: the text has fewer tokens, or a tokenizer is missing or not needed. Nothing is changed.
        AdaptcError: the text is too long, or has invalid token ids. Nothing is changed.

    Example:
        >>> cartridge = adaptc.compile(lm, adaptc.CartridgeConfig(num_virtual_tokens=3))
        >>> adaptc.prefixes.initialize_kv_prefix_from_text(cartridge, text=[5, 6, 7, 8]).shape
        torch.Size([3, 64])
    """
    target = _Target.resolve(program, adapter_name, num_virtual_tokens, "initialize_kv_prefix_from_text")
    if find_decoder_lookup(LiftedProgram(target.program, edit=False))[0] is not None:
        raise ConfigError(
            "initialize_kv_prefix_from_text reads a text as a model of one stack does, and this one has an encoder, "
            "which would have to read something, too: run the model, and give what its decoder's cache holds to "
            "initialize_kv_prefix_from_past_key_values"
        )
    if tokenizer is None and isinstance(program, Generator):
        tokenizer = program.tokenizer if isinstance(text, str) else None
    ids = text_to_ids(text, tokenizer, use_chat_template, max_length)
    if ids.shape[1] < target.count:
        raise ConfigError(
            f"the text has {ids.shape[1]} tokens, and {target.count} are put in front: give a longer one, or "
            f"num_virtual_tokens={ids.shape[1]}"
        )
    if isinstance(program, Generator):
        return target.swap_prefix(_read_base_cache(program, ids[:, : target.count]))
    found = compute_text_kv(target.program, target.attachment(), ids)
    return target.swap_prefix(list(zip(found[::2], found[1::2], strict=True)))


def _read_base_cache(generator: Generator, ids: Tensor) -> Any:
    """Return the base's cache after the tokens ``ids``, which keeps all positions in sliding-window layers, too."""
    validate.check_input_ids(generator.spec, ids)
    base = generator.base
    past = base.new_cache()
    past.expected_length = ids.shape[1]
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
    config: KVPrefixConfig
    count: int

    @classmethod
    def resolve(cls, program: Any, name: str | None, count: int | None, function_name: str) -> _Target:
        inner = program.program if isinstance(program, ProgramWrapper) else program
        check_program(inner, function_name)
        # As they are when enabled.
        bindings = {n: b.active_form or b for n, b in inner.binding.adapters_by_name.items()}
        if name is not None and name not in bindings:
            raise ConfigError(f"the program has no adapter called {name!r}; it has {listing(map(repr, bindings))}")
        mine = [n for n, b in bindings.items() if isinstance(b.config, KVPrefixConfig)]  # at most one of them is active
        chosen: str = (mine or list(bindings))[0] if name is None else name
        config = bindings[chosen].config
        if not isinstance(config, KVPrefixConfig):
            raise ConfigError(
                f"{function_name} is for cartridges and prefix tuning, and {chosen!r} is a {config.peft_type} adapter"
            )
        if getattr(config, "prefix_projection", False):
            raise ConfigError(
                f"{chosen!r} makes its keys and values by a network (prefix_projection=True), which no text gives: "
                "compile with a PrefixTuningConfig without prefix_projection"
            )
        if config.num_stacks > 1:
            raise ConfigError(
                f"several layers have one pair of keys and values in {chosen!r}, whose num_transformer_submodules is "
                f"{config.num_stacks}, and a cache has a pair for each: compile with num_transformer_submodules=1"
            )
        count = config.num_virtual_tokens if count is None else count
        check_token_count(count)
        assert count is not None
        if isinstance(program, Generator):
            check_virtual_tokens_fit(count, program.spec)
        elif first_cache_input(LiftedProgram(inner, edit=False)) is not None:
            raise AdaptcError(
                f"{function_name} takes what generates, and not the program inside, whose cache is its caller's"
            )
        return cls(inner, chosen, bindings[chosen], config, count)

    def attachment(self) -> Attachment:
        mine = [a for a in self.program.adaptation.attachments if isinstance(a.method, ProgramMethod)]
        return next(a for a in mine if a.id in self.binding.methods)

    def swap_prefix(self, past: Any) -> Tensor:
        """Swap the adapter to the KV prefix of the cache ``past`` and return its rows.

        Raises ConfigError for a cache of another model: rows of the same width may come from other layers and heads.
        """
        key_values = first_cached_tokens(past, self.count)
        _, heads, _, width = key_values[0].shape
        found = {"num_layers": len(key_values) // 2, "num_attention_heads": heads, "token_dim": heads * width}
        for name, value in found.items():
            if value != getattr(self.config, name):
                raise ConfigError(
                    f"the cache has {name}={value}, and the program {getattr(self.config, name)}: it is of another "
                    "model"
                )
        rows = rows_from_kv_prefix([t[0] for t in key_values])
        several, spec = bool(self.program.binding.joint_adapters), self.program.spec()
        own = file_tensors(spec_of_adapter(spec, self.name) if several else spec, self.binding)
        config = self.config.replace(num_virtual_tokens=self.count)
        new = Adapter(config, {**own, PROMPT_EMBEDDINGS: rows}, f"a cache of {self.count} tokens")
        self.program.swap_adapter({self.name: new} if several else new)
        return rows
