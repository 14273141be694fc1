"""Examines one row: whether the model runs, PEFT adapts it, and adaptc computes PEFT's numbers.

PEFT's outputs are what adaptc's are compared with. Where PEFT's forward leaves an adapted weight out, its merged model
counts. Where PEFT cannot adapt the model, adaptc's outputs must differ from the base's.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adaptc.api.adapt_model import compile as compile_program
from adaptc.capture.inputs.example_inputs import pretrained_example
from adaptc.errors import AdaptcError, AdaptcWarning, CaptureError
from adaptc.generation.compile_generation import compile_for_generation
from tests.coverage.build import build_and_run
from tests.coverage.outputs import Call, Outputs, difference, run
from tests.coverage.peft_oracle import GENERATE, NO_EFFECT, Oracle, ask_peft, idle_layers
from tests.coverage.rows import Result, Row
from tests.coverage.small_values import random_ids, reason, without_places

_TEXT = {"input_ids", "attention_mask", "decoder_input_ids"}
_OTHERS = {"pixel_values", "input_features", "input_values", "audio_values"}


def examine(row: Row) -> Result:
    """Return what happens to a row. Only errors of Python are caught."""
    result = Result(row.family, row.task, row.model_class)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")
        try:
            model, calls = build_and_run(row)
        except Exception as error:
            result.reason = reason(error)
            return result
        result.eager = True
        if set(calls[0]) <= _TEXT and _OTHERS & set(inspect.signature(model.forward).parameters):
            result.notes.append("examined with texts alone")
        generates = (
            row.task in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM") and "input_ids" in calls[0] and model.can_generate()
        )
        oracle = ask_peft(model, calls, directory, result, [], generates=generates)
        _examine_outputs(model, calls, oracle, result)
        unknown = result.status == "refused" and "no slot in the program" in result.reason
        if unknown and (idle := idle_layers(model, calls)):
            why = result.reason
            oracle = ask_peft(model, calls, f"{directory}/second", result, idle, generates=generates)
            _examine_outputs(model, calls, oracle, result)
            result.status = "idle layers" if result.status == "equal" else result.status
            result.reason = result.reason or why
        if generates and oracle.tokens is not None:
            _examine_generation(model, oracle, result)
    result.notes = list(dict.fromkeys(result.notes))
    if result.status == "equal" and NO_EFFECT in result.notes:
        result.status = "no effect"
    return result


def _examine_outputs(model: Any, calls: list[Call], oracle: Oracle, result: Result) -> None:
    start = time.process_time()
    try:
        program = _compile(model, calls, oracle.adapter, result)
    except Exception as error:
        result.status = "refused" if isinstance(error, AdaptcError) else "foreign error"
        result.reason = _reason_with_place(error)
        return
    finally:
        result.seconds = round(time.process_time() - start, 1)
    said = [
        _status(lambda i=i, call=call: _compare(run(program, call), oracle, i, result)) for i, call in enumerate(calls)
    ]
    statuses = [status for status, _ in said]
    worst = next((s for s in ("foreign error", "differs", "refused") if s in statuses), "equal")
    if worst == "refused" and "equal" in statuses:
        worst = "one size"
    if worst == "equal" and result.peft:
        worst = "runs without PEFT"
    result.status = worst
    result.reason = next((why for status, why in said if status == worst or why), "")


def _compile(model: Any, calls: list[Call], adapter: Any, result: Result) -> Any:
    """Return the program. The first call's inputs are given where adaptc makes none or others."""
    try:
        own = set(pretrained_example(model, training=False).kwargs)
    except Exception as error:
        own, why = set(), reason(error)
    else:
        why = f"adaptc's own are {', '.join(sorted(own))}"
    if own == set(calls[0]):
        try:
            return compile_program(model, adapter)
        except CaptureError as error:
            why = reason(error)
    program = compile_program(model, adapter, example_inputs=copy.deepcopy(calls[0]))
    result.notes.append(f"inputs given: {why}")
    return program


def _compare(outputs: Outputs, oracle: Oracle, index: int, result: Result) -> tuple[str, str]:
    by = difference(outputs, oracle.outputs[index])
    if result.peft:
        return ("equal", "") if by else ("differs", "the adapter changes nothing")
    if by and oracle.merged is not None and not difference(outputs, oracle.merged[index]):
        result.notes.append("PEFT's forward differs from its merged model, which adaptc equals")
        by = ""
    return ("differs", by) if by else ("equal", "")


def _status(compare: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    try:
        return compare()
    except Exception as error:
        return "refused" if isinstance(error, AdaptcError) else "foreign error", _reason_with_place(error)


def _examine_generation(model: Any, oracle: Oracle, result: Result) -> None:
    def compare() -> tuple[str, str]:
        made = compile_for_generation(model, oracle.adapter, max_batch=2, max_length=32)
        torch.manual_seed(0)
        tokens, expected = made.generate(random_ids(2, 7), **GENERATE), oracle.tokens
        assert expected is not None
        if torch.equal(tokens, expected):
            return "equal", ""
        if oracle.tokens_without_cache is not None and torch.equal(tokens, oracle.tokens_without_cache):
            result.notes.append("PEFT's tokens differ from those it gives without a cache, which adaptc equals")
            return "equal", ""
        if oracle.merged_tokens is not None and torch.equal(tokens, oracle.merged_tokens):
            result.notes.append("PEFT's tokens differ from those of its merged model, which adaptc equals")
            return "equal", ""
        row = next((i for i in range(len(expected)) if not torch.equal(tokens[i], expected[i])), 0)
        return "differs", f"row {row} has {tokens[row].tolist()} in place of {expected[row].tolist()}"

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result.generation, result.generation_reason = _status(compare)
    slow = [without_places(str(w.message).splitlines()[0])[:200] for w in said if issubclass(w.category, AdaptcWarning)]
    if result.generation == "equal" and slow:
        result.generation_reason = f"warns: {slow[0]}"


def _reason_with_place(error: BaseException) -> str:
    """Return the reason, and for an error that is not adaptc's the file of adaptc that it passed."""
    if isinstance(error, AdaptcError):
        return reason(error)
    root = Path(inspect.getfile(AdaptcError)).parents[1]
    places = [Path(f.filename) for f in traceback.extract_tb(error.__traceback__)]
    ours = [
        p.relative_to(root)
        for p in places
        if p.is_relative_to(root) and p.parts[len(root.parts)] in ("adaptc", "passes")
    ]
    return reason(error) + (f" (below {ours[-1]})" if ours else "")
