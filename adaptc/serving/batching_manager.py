"""Let the requests of transformers' continuous batching have adapters of their own.

The scheduler, the cache and the sampling are transformers'. A request carries its adapters among its arguments for
logits processors, which transformers keeps with the request when it drops its cache or forks it. Before each step the
list of logits processors is asked for the arguments of the batch, and notes there which requests the step is of.

A shared prefix is found by the hashes of its tokens. The tokens of a request with adapters are hashed together with
them, so it shares only what requests with the same adapters computed.

Private transformers use, with the public route that was tried: ``ContinuousBatchingManager._create_batch_processor``.
The cache is made there, and nowhere else is it known before the first request is scheduled.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from adaptc.serving.request_adapter import RequestAdapter, salted_tokens
from adaptc.serving.step_adapters import TextAdapter

#: the name under which a request carries its adapters
ADAPTER = "adapter"


class BatchRecorder:
    """transformers' list of logits processors, which notes the adapters of the requests of each batch."""

    def __init__(self, original: Any, base: RequestAdapter) -> None:
        vars(self).update(vars(original))
        self._base = base
        #: the adapters and the token counts of the requests of the next step
        self.texts: list[TextAdapter] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        super().check_kwargs({n: v for n, v in kwargs.items() if n != ADAPTER})  # type: ignore[misc]

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Any) -> Any:
        self.texts = [(adapter_of(r.state) or self._base, r.query_length) for r in requests_in_batch]
        return super().prepare_tensor_args(requests_in_batch, arg_storage)  # type: ignore[misc]


class AdapterPrompt(list[int]):
    """A prompt's token ids, with what its request asks for as ``adapter``: calls with many prompts carry it so."""

    def __init__(self, tokens: Any, adapter: RequestAdapter) -> None:
        super().__init__(tokens)
        self.adapter = adapter


def pool_positions(batching: Any) -> int | None:
    """Return how many positions the pool of these options of continuous batching has; None where memory decides."""
    return None if batching.num_blocks is None else batching.num_blocks * batching.page_size


def adapter_of(state: Any) -> RequestAdapter | None:
    """Return the adapters that the state of a request carries; None where it was added without any."""
    return state.logit_processor_kwargs.get(ADAPTER)


class AdapterBatchingManager:
    """transformers' manager of continuous batching, whose requests have adapters of their own.

    It is made by ``init_continuous_batching`` of what ``adaptc.compile_for_serving`` gives.
    """

    model: Any
    generation_config: Any
    batch_processor: Any
    continuous_batching_config: Any
    logit_processor: Any

    def __init__(self, model: Any, generation_config: Any, continuous_batching_config: Any, hints: Any = None) -> None:
        super().__init__(model, generation_config, continuous_batching_config, hints)  # type: ignore[call-arg]
        self.recorder = _recorder_class()(self.logit_processor, model.request_adapter(None))
        self.logit_processor = self.recorder

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        adapter: Any = ...,
        **kwargs: Any,
    ) -> str | None:
        """Add a request, as transformers' manager does.

        Args:
            input_ids: the token ids of the prompt.
            request_id: the id of the request; None for one that is made up.
            max_new_tokens: the most new tokens; None for as many as the generation config says.
            *args: further arguments of transformers' ``add_request``.
            adapter: a name of the bank, None for the base, or a dict of names and weights. Where it is left out, the
                adapter that the program has now. The request keeps it to its end.
            **kwargs: further arguments of transformers' ``add_request``.

        Returns:
            the id of the request.

        Raises:
            AdaptcError: the bank does not have a name, or the text would exceed the cache or the model's positions.
        """
        if adapter is ...:
            adapter = getattr(input_ids, "adapter", ...)
        chosen = adapter if isinstance(adapter, RequestAdapter) else self.model.request_adapter(adapter)
        tokens = [*input_ids]
        limit = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        limit = self.model.check_request(tokens, limit, pool_positions(self.continuous_batching_config))
        return super().add_request(tokens, request_id, limit, *args, **kwargs, **{ADAPTER: chosen})  # type: ignore[misc]

    def _create_batch_processor(self) -> Any:
        known = self.batch_processor
        processor = super()._create_batch_processor()  # type: ignore[misc]
        if processor is not known:
            self.model.recorders[processor.cache] = self.recorder
            _share_prefixes_by_adapter(processor, self.model.vocab_size)
        return processor


@cache
def batching_manager_class() -> Any:
    """Return :class:`AdapterBatchingManager` as a subclass of transformers' manager."""
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    name = AdapterBatchingManager.__name__
    return type(name, (AdapterBatchingManager, ContinuousBatchingManager), {"__module__": __name__})


@cache
def _recorder_class() -> Any:
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

    return type(BatchRecorder.__name__, (BatchRecorder, ContinuousBatchingLogitsProcessorList), {})


def _share_prefixes_by_adapter(processor: Any, vocabulary: int) -> None:
    """Let the cache of ``processor`` hash tokens together with the adapters of their request."""
    cache, scheduler = processor.cache, processor.scheduler
    page = min(allocator.tokens_per_page for allocator in cache.cache_allocators.values())
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks

    def salted(state: Any, tokens: list[int]) -> list[int]:
        adapter = None if state is None else adapter_of(state)
        return tokens if adapter is None else salted_tokens(tokens, adapter.salt, vocabulary, page)

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        state = scheduler.waiting_requests.get(request_id) or scheduler.active_requests.get(request_id)
        return search(request_id, salted(state, prompt_ids))

    def mark_complete_blocks(state: Any, complete_blocks: dict[str, int]) -> None:
        tokens = salted(state, state.initial_tokens + state.generated_tokens)
        seen = SimpleNamespace(
            request_id=state.request_id, status=state.status, initial_tokens=tokens, generated_tokens=[]
        )
        mark(seen, complete_blocks)

    cache.search_prefix_match, cache.mark_complete_blocks = search_prefix_match, mark_complete_blocks
