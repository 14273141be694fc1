"""Turn a causal model into its paged step: a forward of the new tokens of many requests, packed along one axis.

The cache of all requests is a pool of rows. Indices say which rows each step reads and writes, so requests come, go
and move without a copy. Inside :func:`captured_as_paged_step` the model's ``forward`` takes tensors alone:

    input_ids, position_ids    (1, tokens)            int64: the new tokens of all requests, one after another
    read_GROUP                 (read,)                int64: the rows of the pool that are read (see ``paged_layout``)
    write_GROUP                (tokens,)              int64: the row that each new token's keys and values go to
    reader_GROUP               (read,)                int64: a token of the text that each read row is of, of latent
                                                      attention alone
    mask_GROUP                 (1, 1, tokens, read)   bool: what each token attends to, of what is read
    keep                       (kept,)                int64: the tokens whose logits are wanted
    keys_i, values_i           (rows, heads, dim)     the pool, which the step writes to; of latent attention keys_i
                                                      alone, whose rows hold the latents (see ``paged_layout``)
    -> logits                  (1, kept, vocabulary)

All sizes but heads and dim are free.

Private transformers use, with the public route that was tried: ``config._attn_implementation``, also in
``compile_for_serving``. Public: ``model.set_attn_implementation`` writes it, and nothing reads it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaptc.bank.find_batch_axis import TokenInputs
from adaptc.capture.model_state import patch_forward
from adaptc.errors import CaptureError
from adaptc.generation.modes.static_attention import packed_attention
from adaptc.generation.modes.static_step import StepExample, equate_sizes, find_cache_argument
from adaptc.serving.paged_layout import SENTINEL, LayerGroup, PagedLayout

#: sizes of the example inputs: all different and none of them one, because torch would specialize on these
_TOKENS, _ROWS, _KEPT, _READ = 5, 23, 2, (11, 13)


class PagedLayers:
    """The cache of one step, as a model's attention layers call it."""

    def __init__(self, layout: PagedLayout, inputs: Mapping[str, Tensor]) -> None:
        self.groups, self.latents = layout.group_of_layer, layout.latents
        pools, per_layer = [inputs[n] for n in layout.names], len(layout.kinds)
        self.pools = [tuple(pools[i : i + per_layer]) for i in range(0, len(pools), per_layer)]
        self.reads = {g.name: _GroupReads(g, inputs[g.read_name], inputs[g.write_name]) for g in layout.groups}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (1, heads, tokens, dim) to the pool, and return those (1, heads, read, dim) that the
        tokens read.

        Latent attention gives latents and rotary keys in place of both.
        """
        reads, pools = self.reads[self.groups[layer_idx].name], self.pools[layer_idx]
        if self.latents is not None:
            found = reads.update(pools[0], torch.cat([key_states, value_states], -1))
            latents, keys = found.split(self.latents, -1)
            return latents, keys
        keys, values = pools
        return reads.update(keys, key_states), reads.update(values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def traced_layer(self, i: int) -> tuple[Any, tuple[str, ...]]:
        """Return the tensors and the settings of layer ``i``: captures that copy equal layers compare them."""
        reads = self.reads[self.groups[i].name]
        return (*self.pools[i], *reads.tensors), (reads.group.name,)


class _GroupReads:
    """The rows that the layers of one group read and write in a step."""

    def __init__(self, group: LayerGroup, read: Tensor, write: Tensor) -> None:
        self.group, self.read, self.write = group, read, write
        self.tensors = (read, write)
        if group.window is not None:
            is_new = read == SENTINEL
            #: where the new tokens stand among what is read, and which of them stands there
            self.is_new, self.new_token = is_new[:, None, None], (is_new.cumsum(0) - 1).clamp(min=0)
            self.tensors = (read, write, self.is_new, self.new_token)

    def update(self, pool: Tensor, states: Tensor) -> Tensor:
        new = states[0].transpose(0, 1)
        if self.group.window is None:
            found = pool.index_copy_(0, self.write, new).index_select(0, self.read)
        else:  # a new token may overwrite one that this step still reads
            found = torch.where(self.is_new, new.index_select(0, self.new_token), pool.index_select(0, self.read))
            pool.index_copy_(0, self.write, new)
        return found.transpose(0, 1).unsqueeze(0)


def example_paged_step(model: nn.Module, layout: PagedLayout) -> StepExample:
    """Return the example inputs of the paged step of ``model``, and their free sizes."""
    device = next(model.parameters()).device
    tokens, kept, rows = Dim("tokens"), Dim("kept"), Dim("rows")

    def arange(size: int, start: int = 0) -> Tensor:
        return torch.arange(start, start + size, device=device)

    inputs = {"input_ids": arange(_TOKENS)[None], "position_ids": arange(_TOKENS, 2)[None], "keep": arange(_KEPT, 1)}
    shapes: dict[str, dict[int, Any]] = {"input_ids": {1: tokens}, "position_ids": {1: tokens}, "keep": {0: kept}}
    for group, size in zip(layout.groups, _READ, strict=False):
        read = Dim(group.read_name)
        inputs |= {
            group.read_name: arange(size, SENTINEL + 1),
            group.write_name: arange(_TOKENS, 7),
            group.mask_name: torch.ones(1, 1, _TOKENS, size, dtype=torch.bool, device=device),
        }
        shapes |= {group.read_name: {0: read}, group.write_name: {0: tokens}, group.mask_name: {2: tokens, 3: read}}
        if layout.latents is not None:
            inputs[group.reader_name], shapes[group.reader_name] = arange(size) % _TOKENS, {0: read}
    for name in layout.names:
        inputs[name] = torch.zeros(_ROWS, layout.heads, layout.dim, dtype=layout.dtype, device=device)
        shapes[name] = {0: rows}
    return StepExample(inputs, shapes)


@contextlib.contextmanager
def captured_as_paged_step(model: nn.Module, layout: PagedLayout) -> Generator[StepExample]:
    """Run the block with the paged step as the forward of ``model``; its own is restored afterwards.

    Raises CaptureError for a model whose forward takes no cache or no position_ids.
    """
    cache_argument, parameters = find_cache_argument(model), inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        raise CaptureError(
            f"the forward of {type(model).__name__} takes no position_ids, so tokens of several requests cannot be "
            "packed along one axis"
        )
    step, original, takes_keep = example_paged_step(model, layout), model.forward, "logits_to_keep" in parameters
    untyped: Any = model
    is_sdpa = untyped.config._attn_implementation == "sdpa"  # noqa: SLF001

    def as_mask(mask: Tensor) -> Tensor:
        """Return the mask in the form that the model's attention takes: other than "sdpa" adds it to the scores."""
        if is_sdpa:
            return mask
        lowest = torch.finfo(layout.dtype).min
        return torch.zeros(mask.shape, dtype=layout.dtype, device=mask.device).masked_fill(~mask, lowest)

    def forward(**inputs: Any) -> Tensor:
        equate_sizes(inputs, step.dynamic_shapes)
        masks = {group.name: as_mask(inputs[group.mask_name]) for group in layout.groups}
        arguments: dict[str, Any] = {
            "input_ids": inputs["input_ids"],
            "position_ids": inputs["position_ids"],
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            cache_argument: PagedLayers(layout, inputs),
            "use_cache": False,
        }
        if takes_keep:
            arguments["logits_to_keep"] = inputs["keep"]
        logits = original(**arguments).logits
        return logits if takes_keep else logits[:, inputs["keep"]]

    with patch_forward(model, forward, step.parameters), packed_attention():
        yield step


def token_inputs_of(layout: PagedLayout) -> TokenInputs:
    """Return which inputs have an axis of tokens, and which ones pick tokens."""
    made = {"input_ids": 1, "position_ids": 1}
    for group in layout.groups:
        made |= {group.write_name: 0, group.mask_name: 2}
    readers = [group.reader_name for group in layout.groups] if layout.latents is not None else []
    return TokenInputs(made, picked_by=("keep", *readers))


def probe_paged_step(layout: PagedLayout, vocab_size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Return the inputs of two steps of equal sizes, in which each token is a text of its own."""
    draw, tokens = torch.Generator().manual_seed(0), torch.arange(_TOKENS, device=device)
    probes: list[dict[str, Tensor]] = []
    for _ in range(2):
        ids = torch.randint(0, vocab_size, (2, 1, _TOKENS), generator=draw).to(device)
        inputs = {"input_ids": ids[0], "position_ids": ids[1] % 7, "keep": tokens}
        for group in layout.groups:
            rows = tokens + 7
            inputs[group.write_name] = rows
            inputs[group.read_name] = rows if group.window is None else torch.full_like(rows, SENTINEL)
            inputs[group.mask_name] = torch.eye(_TOKENS, dtype=torch.bool, device=device)[None, None]
            if layout.latents is not None:
                inputs[group.reader_name] = tokens
        for name in layout.names:
            inputs[name] = torch.zeros(_ROWS, layout.heads, layout.dim, dtype=layout.dtype, device=device)
        probes.append(inputs)
    return probes
