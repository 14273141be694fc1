"""Hold a conversation: its messages, and the cache of its tokens.

An answer reuses the cache as far as the text begins with the same tokens and the same adapter answers. A call that
fails leaves the messages as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.chat.active_adapter import ActiveAdapter
from adaptc.errors import AdaptcError, ConfigError, short_repr


@dataclass(frozen=True)
class TokenChoice:
    """The way tokens are chosen: greedily, or by sampling at a ``temperature``.

    Without either, the model's own generation config decides. ``seed`` is for the sampling of a whole chat.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    greedy: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.greedy and self.temperature is not None:
            raise ConfigError("greedy and temperature exclude each other: give one of them")

    def generation_config(self, model_config: Any, tokenizer: Any, max_tokens: int) -> Any:
        """Return the model's generation config ``model_config`` with this choice, for at most ``max_tokens`` new
        tokens."""
        ends = model_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        ends += [e for e in [tokenizer.eos_token_id] if e is not None and e not in ends]
        changes: dict[str, Any] = {
            "max_new_tokens": min(self.max_new_tokens, max_tokens),
            "max_length": None,
            "eos_token_id": ends or None,
            "pad_token_id": ends[0] if ends and model_config.pad_token_id is None else model_config.pad_token_id,
        }
        if self.greedy:
            changes |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif self.temperature is not None:
            changes |= {"do_sample": True, "temperature": self.temperature}
        return type(model_config).from_dict({**model_config.to_dict(), **changes})


@dataclass(frozen=True)
class Reply:
    """An answer of the model. ``is_cut`` says that it reached its maximum length; ``computed_tokens`` counts tokens not
    cached before."""

    text: str
    is_cut: bool
    computed_tokens: int


class Conversation:
    """The messages of a chat and their cache. ``system`` is the message before all others, or None."""

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer, self._system = tokenizer, system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system message, and the cache."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._forget()

    def _forget(self) -> None:
        self._adapter: ActiveAdapter | None = None
        self._cache: Any = None
        #: the tokens that are in the cache
        self._cached_tokens: list[int] = []

    def ask(
        self,
        adapter: ActiveAdapter,
        text: str,
        choice: TokenChoice,
        *,
        streamer: Any = None,
        is_stopped: Callable[[], bool] = bool,
    ) -> Reply:
        """Return the answer of ``adapter`` to ``text``; its tokens go to ``streamer`` until ``is_stopped`` returns
        True.

        Raises AdaptcError where the conversation is too long, or where the chat template does not take it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode_messages(messages)
        generator = adapter.generator
        self._reuse_cache(adapter, ids)
        most = self._cache.max_length - self._cache.prefix_length
        room = most - len(ids)
        if room < 1:
            raise AdaptcError(
                f"the conversation has {len(ids)} tokens with this, and the program takes {most}: "
                "/reset begins a new one, and --max-length says how long one may be"
            )
        config = choice.generation_config(generator.generation_config, self.tokenizer, room)
        cached_length = self._cache.length
        try:
            out = generator.generate(
                torch.tensor([ids], device=generator.device),
                config,
                past_key_values=self._cache,
                streamer=streamer,
                stopping_criteria=[_stopping_criterion(is_stopped)],
            )
        except BaseException:
            self._forget()  # the cache may hold part of the answer
            raise
        said = out[0].tolist()
        self._cached_tokens = said[: self._cache.length - self._cache.prefix_length]
        new = said[len(ids) :]
        answer = self.tokenizer.decode(new, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        ended = bool(new) and new[-1] in (config.eos_token_id or [])
        return Reply(answer, len(new) == config.max_new_tokens and not ended, self._cache.length - cached_length)

    def _reuse_cache(self, adapter: ActiveAdapter, ids: Sequence[int]) -> None:
        """Keep in the cache what ``adapter`` has already computed for ``ids``, and drop everything else."""
        if adapter is not self._adapter:
            # The cache holds the keys and values of another adapter.
            self._forget()
            self._adapter, self._cache = adapter, adapter.generator.new_cache()
        common = 0
        for known, wanted in zip(self._cached_tokens, ids, strict=False):
            if known != wanted:
                break
            common += 1
        if not self._cache.can_crop(self._cache.prefix_length + common):
            self._cache, common = adapter.generator.new_cache(), 0
        kept = self._cache.prefix_length + common
        if kept < self._cache.length:
            self._cache.crop(kept - self._cache.length)
        self._cached_tokens = self._cached_tokens[:common]

    def _encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of ``messages`` by the tokenizer's chat template; without one, each message is a line of
        text."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return self._tokenize("".join(m["content"] + "\n" for m in messages), add_special_tokens=True)
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the template is a program of the model's author
            raise AdaptcError(f"the tokenizer's chat template does not take this: {short_repr(str(error))}") from error
        return self._tokenize(text, add_special_tokens=False)

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        if not ids:
            raise AdaptcError(f"the tokenizer makes no tokens of {short_repr(text)}: nothing to answer")
        return ids


def _stopping_criterion(is_stopped: Callable[[], bool]) -> Callable[..., Tensor]:
    def stop_when_asked(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), is_stopped(), device=input_ids.device)

    return stop_when_asked
