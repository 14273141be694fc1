"""Let models that loop over positions, or over chunks of them, be traced for any length.

A trace of such a loop has as many steps as the example has positions. So known functions are replaced while a model is
traced. A recurrence over positions is computed in a fixed number of steps. A model that computes by chunks itself gets
its inputs in whole chunks. There are always two or more, since a trace takes a single one for a constant.

A replacement is used only where it gives what the model's own function gives, on inputs drawn at random. Elsewhere the
function stays, and the program has the length of the example.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.capture.model_functions import Function, all_arguments, gives_the_same, replaced_functions
from adaptc.capture.replacements.delta_rules import gated_delta_rule
from adaptc.capture.replacements.parallel_scan import linear_recurrence, shift

#: lengths of the inputs that functions are tried on: one, less than a block of the scan, and more than many blocks
_LENGTHS = (1, 5, 301)
#: the logarithm of no weight
_LOWEST = -1e38


def any_length(model: nn.Module) -> AbstractContextManager[None]:
    """Run the block with functions of ``model`` that can be traced for any length, in this thread."""
    return replaced_functions(model, {name: known.replace for name, known in _KNOWN.items()})


def _is_close(want: Any, got: Any) -> bool:
    if got is None:  # a state for later calls, of which a trace has none
        return True
    tolerance = 1e-12 if want.dtype == torch.float64 else 1e-5
    return want.dtype == got.dtype and bool((want - got).abs().max() <= tolerance * want.abs().max())


@dataclass(frozen=True)
class _Known:
    """A function of transformers whose trace is of one length.

    Attributes:
        make: makes the replacement of a function.
        draw: gives the arguments of a call with a batch of this size and length. Those that a function does not have
            are left out.
        is_same: returns whether the replacement gives what the function gives, tensor by tensor.
    """

    make: Callable[[Function], Function]
    draw: Callable[[torch.Generator, int, int], dict[str, Any]]
    is_same: Callable[[Any, Any], bool] = _is_close

    def replace(self, original: Function) -> Function | None:
        """Return the replacement, or None where it gives something else than ``original``."""
        # A kernel that may lie around it is not part of a trace.
        plain = inspect.unwrap(original)
        made = self.make(plain)
        draw = torch.Generator().manual_seed(0)
        takes = inspect.signature(plain).parameters
        calls = ({n: v for n, v in self.draw(draw, 2, length).items() if n in takes} for length in _LENGTHS)
        return made if gives_the_same(plain, made, calls, self.is_same) else None


def _selective_scan(original: Function) -> Function:
    """Return Mamba's scan of states (batch, length, channels, state size)."""
    signature = inspect.signature(original)

    def scan_states(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        inputs, steps = given["hidden_states"], given["dt"]
        if (bias := given.get("delta_bias")) is not None:
            steps = steps + bias.to(steps.dtype).unsqueeze(-1)
        if given.get("delta_softplus"):
            steps = F.softplus(steps)
        per_step = steps.transpose(1, 2).unsqueeze(-1)
        added = per_step * given["B"].transpose(1, 2).unsqueeze(2).float()
        added = added * inputs.transpose(1, 2).unsqueeze(-1).float()
        states = linear_recurrence(torch.exp(given["A"] * per_step), added)
        out = states.to(inputs.dtype) @ given["C"].transpose(1, 2).unsqueeze(-1)
        out = out.squeeze(-1).transpose(1, 2)
        if (skip := given.get("D")) is not None:
            out = out + inputs * skip.unsqueeze(-1)
        if (gate := given.get("z")) is not None:
            out = out * F.silu(gate)
        return (out, states[:, -1]) if given.get("return_last_state") else out

    return scan_states


def _draw_selective_scan(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    channels, size = 3, 5
    return {
        "hidden_states": _random(draw, batch, channels, length),
        "dt": _random(draw, batch, channels, length),
        "A": -_random(draw, channels, size).exp(),
        "B": _random(draw, batch, size, length),
        "C": _random(draw, batch, size, length),
        "D": _random(draw, channels),
        "z": _random(draw, batch, channels, length),
        "delta_bias": _random(draw, channels),
        "delta_softplus": True,
        "return_last_state": length > 1,
    }


def _whole_chunks(original: Function) -> Function:
    """Return Mamba 2's scan for inputs of any length, by the function itself."""
    signature = inspect.signature(original)

    def scan_chunks(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        if given.get("initial_states") is not None:
            return original(*args, **kwargs)
        length, chunk = given["hidden_states"].shape[1], given["chunk_size"]
        # Two chunks at least: a trace takes a single one for a constant.
        count = torch.sym_max((length + chunk - 1) // chunk, 2)
        index = torch.arange(count * chunk, device=given["dt"].device)
        is_text = (index < length).unsqueeze(-1)
        # Positions after the last one have no influence on those before, and steps of zero have none on the state.
        index = index.clamp(max=length - 1)
        for name in ("hidden_states", "dt", "B", "C"):
            given[name] = given[name].index_select(1, index)
        given["dt"] = _step_sizes(given) * is_text
        given |= {"dt_bias": None, "dt_softplus": False, "dt_limit": (-torch.inf, torch.inf)}
        found = original(*bound.args, **bound.kwargs)
        out, *last = found if isinstance(found, tuple) else (found,)
        out = out.index_select(1, torch.arange(length, device=index.device))
        return (out, *last) if last else out

    return scan_chunks


def _step_sizes(given: dict[str, Any]) -> Tensor:
    """Return the sizes of steps (batch, length, heads) that Mamba 2's scan computes from its arguments."""
    steps = given["dt"]
    if (bias := given.get("dt_bias")) is not None:
        steps = steps + bias.to(steps.dtype)
    if given.get("dt_softplus"):
        steps = F.softplus(steps)
    low, high = given.get("dt_limit", (0.0, torch.inf))
    return torch.clamp(steps, min=low, max=high)


def _draw_chunks(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    heads, width, groups, size = 4, 3, 2, 5
    call = {
        "hidden_states": _random(draw, batch, length, heads, width),
        "dt": _random(draw, batch, length, heads),
        "A": -_random(draw, heads).exp(),
        "B": _random(draw, batch, length, groups, size),
        "C": _random(draw, batch, length, groups, size),
        "D": _random(draw, heads),
        "dt_bias": _random(draw, heads),
    }
    return {
        **{n: t.float() for n, t in call.items()},
        "chunk_size": 7,
        "dt_softplus": True,
        "return_final_states": length > 1,
    }


def _weighted_values(original: Function) -> Function:
    """Return RWKV's attention: a mean of values, whose weights decay with the distance."""

    def attend(
        time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Any = None, return_state: Any = False
    ) -> tuple[Tensor, Any]:
        if state is not None or return_state:
            return original(time_decay, time_first, key, value, state, return_state)
        keys, decay = key.float(), -torch.exp(time_decay)
        # About the largest logarithm of a weight at each position. Sums of weights are kept divided by it, whatever it
        # is exactly.
        steps = torch.arange(key.shape[1], device=key.device).unsqueeze(-1) * decay
        top = ((keys - steps).cummax(1).values + steps).detach()
        top_before = shift(top, _LOWEST)
        new = torch.exp(keys - top).unsqueeze(-1)
        added = torch.cat([new * value.unsqueeze(-1), new], -1)
        sums = linear_recurrence(torch.exp(top_before + decay - top).unsqueeze(-1).expand_as(added), added)
        values, weights = shift(sums, 0.0).unbind(-1)
        own_top = keys + time_first
        joint_top = torch.maximum(top_before, own_top)
        old, new = torch.exp(top_before - joint_top), torch.exp(own_top - joint_top)
        return ((old * values + new * value) / (old * weights + new)).to(key.dtype), None

    return attend


def _draw_weighted_values(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    channels = 5
    return {
        "time_decay": _random(draw, channels),
        "time_first": _random(draw, channels),
        "key": 4 * _random(draw, batch, length, channels),
        "value": _random(draw, batch, length, channels),
    }


def _gated_recurrence(original: Function) -> Function:
    """Return RecurrentGemma's method that scans gated inputs (batch, length, width)."""
    signature = inspect.signature(original)

    def scan_units(*args: Any, **kwargs: Any) -> Any:
        given = all_arguments(signature, args, kwargs)
        if given["recurrent_states"] is not None:
            return original(*args, **kwargs)
        inputs, dtype = given["hidden_states"], given["acc_dtype"]
        gate = given["recurrent_gate"] * ~given["reset"]
        states = linear_recurrence(gate.to(dtype), inputs.to(dtype))
        return states.to(inputs.dtype), None

    return scan_units


def _draw_gated_recurrence(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    width = 5
    return {
        "self": None,
        "hidden_states": _random(draw, batch, length, width),
        "recurrent_gate": _random(draw, batch, length, width).sigmoid(),
        "reset": torch.rand(batch, length, 1, generator=draw, device="cpu") < 0.1,
        "recurrent_states": None,
        "acc_dtype": torch.float64,
    }


def _draw_delta_rule(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    heads, key_width, width = 4, 3, 5
    call = {
        "query": _random(draw, batch, length, heads // 2, key_width),
        "key": _random(draw, batch, length, heads // 2, key_width),
        "value": _random(draw, batch, length, heads, width),
        "g": -F.softplus(_random(draw, batch, length, heads)),
        "beta": _random(draw, batch, length, heads).sigmoid(),
    }
    flags = {"use_qk_l2norm_in_kernel": True, "output_final_state": length > 1}
    return {**{n: t.float() for n, t in call.items()}, **flags}


def _draw_delta_rule_of_channels(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    call = _draw_delta_rule(draw, batch, length)
    heads, key_width = call["value"].shape[2], call["key"].shape[3]
    query, key, g = (_random(draw, batch, length, heads, key_width).float() for _ in range(3))
    return {**call, "query": query, "key": key, "g": -F.softplus(g)}


def _shifted_rows(original: Function) -> Function:
    """Return Funnel's function that shifts the scores of relative positions, row by row, by index."""

    def gather(positional_attn: Tensor, context_len: Any, shift: int) -> Tensor:
        rows = torch.arange(positional_attn.shape[2], device=positional_attn.device)
        columns = torch.arange(context_len, device=positional_attn.device)
        index = shift * (positional_attn.shape[2] - rows).unsqueeze(1) + columns
        return positional_attn.gather(3, index.expand(*positional_attn.shape[:2], -1, -1))

    return gather


def _draw_shifted_rows(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    shift = 1 if length < _LENGTHS[-1] else 2
    context = length if shift == 1 else 2 * length - 1
    scores = _random(draw, batch, 3, length, shift * length + context)
    return {"positional_attn": scores, "context_len": context, "shift": shift}


def _repeated_tokens(original: Function) -> Function:
    """Return Funnel's function that repeats pooled tokens up to the length of the text, by index."""
    signature = inspect.signature(original)

    def upsample(*args: Any, **kwargs: Any) -> Tensor:
        given = all_arguments(signature, args, kwargs)
        tokens, stride = given["x"], given["stride"]
        if stride == 1 or not (given["separate_cls"] and given["truncate_seq"]):
            return original(*args, **kwargs)
        index = torch.arange(given["target_len"], device=tokens.device)
        # The first token stays alone.
        index = (index + (stride - 1)) // stride
        is_there = (index < tokens.shape[1]).unsqueeze(1)
        return torch.where(is_there, tokens.index_select(1, index.clamp(max=tokens.shape[1] - 1)), 0.0)

    return upsample


def _draw_repeated_tokens(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    stride = 2 if length < _LENGTHS[-1] else 4
    tokens = _random(draw, batch, 1 + length, 3)
    return {
        "x": tokens,
        "stride": stride,
        "target_len": (1 + length) * stride - 1,
        "separate_cls": True,
        "truncate_seq": True,
    }


def _whole_windows(original: Function) -> Function:
    """Return Longformer's or LED's method that pads a text to whole windows, for two windows or more."""
    signature = inspect.signature(original)
    names = [n for n in signature.parameters if n not in ("self", "pad_token_id")]

    def pad(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        window, length = given["self"].config.attention_window, given["attention_mask"].shape[1]
        window = window if isinstance(window, int) else max(window)
        # A padded position at least: a trace has only one of the branches for none and for some.
        count = torch.sym_max(length // window + 1, 2)
        index = torch.arange(window * count, device=given["attention_mask"].device)
        fills = {"input_ids": given["pad_token_id"], "position_ids": given["pad_token_id"]}
        for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
            if (value := given.get(name)) is not None:
                padded = value.index_select(1, index.clamp(max=length - 1))
                given[name] = torch.where(index < length, padded, fills.get(name, 0)).to(value.dtype)
        if (embeds := given.get("inputs_embeds")) is not None:
            # The model itself makes the embedding of a padded position, behind a text of one token.
            first = {n: v[:, :1] if isinstance(v, Tensor) else v for n, v in given.items()}
            padding = original(**first)[1 + names.index("inputs_embeds")][:, 1:2]
            is_text = (index < length).unsqueeze(1)
            given["inputs_embeds"] = torch.where(is_text, embeds.index_select(1, index.clamp(max=length - 1)), padding)
        return (window * count - length, *(given.get(n) for n in names))

    return pad


def _draw_windows(draw: torch.Generator, batch: int, length: int) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    tensors = {n: torch.randint(9, (batch, length), generator=draw, device="cpu") for n in names}
    table = _random(draw, 9, 5)
    config = SimpleNamespace(attention_window=[4, 8], pad_token_id=3)
    owner = SimpleNamespace(config=config, embeddings=table.__getitem__, embed_tokens=table.__getitem__)
    return {"self": owner, **tensors, "inputs_embeds": table[tensors["input_ids"]], "pad_token_id": 3}


def _goes_on_padding(want: Any, got: Any) -> bool:
    """Return whether ``got`` is ``want`` with more of the padding that this ends with; numbers may be any."""
    if not isinstance(want, Tensor):
        return type(want) is type(got)
    index = torch.arange(got.shape[1]).clamp(max=want.shape[1] - 1)
    return want.dtype == got.dtype and torch.equal(want[:, index], got)


def _random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu")


#: name of a function or method of transformers -> what is known of it
_KNOWN = {
    "mamba_selective_scan": _Known(_selective_scan, _draw_selective_scan),
    "mamba2_chunk_scan": _Known(_whole_chunks, _draw_chunks),
    "rwkv_linear_attention": _Known(_weighted_values, _draw_weighted_values),
    "torch_chunk_gated_delta_rule": _Known(gated_delta_rule, _draw_delta_rule),
    "chunk_kimi_delta_attention": _Known(gated_delta_rule, _draw_delta_rule_of_channels),
    "_relative_shift_gather": _Known(_shifted_rows, _draw_shifted_rows),
    "upsample": _Known(_repeated_tokens, _draw_repeated_tokens),
    "_pad_to_window_size": _Known(_whole_windows, _draw_windows, _goes_on_padding),
    "_rnn_scan": _Known(_gated_recurrence, _draw_gated_recurrence),
}
