"""A shared prefix is one of the same adapters: tokens are hashed together with them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.serving import batching_manager
from adaptc.serving.request_adapter import salted_tokens
from tests.serving.models import expected_tokens, prompts, results, running, serving

#: adapters of requests with one prompt, one after another, and how many of its 23 tokens each finds in the cache
TURNS: list[tuple[Any, int]] = [
    ("first", 0),
    ("second", 0),
    (None, 0),
    ("first", 20),
    ({"first": 0.5}, 0),
    ({"first": 0.5}, 20),
    ({"first": 0.5, "second": 1.0}, 0),
    ({"second": 1.0, "first": 0.5}, 20),
    ({"second": 1.0}, 20),
    ({"second": 0.0}, 20),
    (None, 20),
]


def watched_turns(turns: list[Any]) -> list[tuple[int, list[int]]]:
    """For each request, which is alone in the manager: the tokens that it found in the cache, and its answer."""
    text, out = prompts(23)[0], []
    with running(serving(), num_blocks=96) as manager:
        for adapter in turns:
            request = manager.add_request(text, adapter=adapter)
            matched: list[int] = []
            while manager.batch_processor is None:
                pass
            cache = manager.batch_processor.cache
            search = vars(cache)["search_prefix_match"]

            def watch(request_id: str, ids: list[int], search: Any = search, into: list[int] = matched) -> int:
                into.append(search(request_id, ids))
                return into[-1]

            cache.search_prefix_match = watch
            found = results(manager, [request])[request]
            cache.search_prefix_match = search
            out.append((matched[-1] if matched else -1, found.generated_tokens))
    return out


@pytest.mark.long
def test_requests_share_what_requests_with_the_same_adapters_computed() -> None:
    text = prompts(23)[0]
    found = watched_turns([adapter for adapter, _ in TURNS])
    for (adapter, shared), (matched, tokens) in zip(TURNS, found, strict=True):
        assert tokens == expected_tokens("llama", text, adapter), adapter
        assert matched in (shared, -1), adapter  # -1: the request began before it was watched
    assert sum(matched >= 0 for matched, _ in found) >= len(TURNS) // 2


@pytest.mark.long
def test_without_the_adapters_a_request_would_read_what_another_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above would fail."""
    monkeypatch.setattr(batching_manager, "salted_tokens", lambda tokens, *_: tokens)
    text = prompts(23)[0]
    (_, first), (_, second) = watched_turns(["first", "second"])
    assert first == expected_tokens("llama", text, "first")
    assert second != expected_tokens("llama", text, "second")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 60_999), min_size=1, max_size=6), st.binary(max_size=8)), max_size=9),
    st.integers(4, 8),
)
def test_hashed_tokens_are_equal_where_tokens_and_adapters_are(texts: list[tuple[list[int], bytes]], page: int) -> None:
    """Within int32, and those of the base as they are. Adapters differ in the bits that a page of tokens has room
    for."""
    made = [salted_tokens(tokens, salt, 61_000, page) for tokens, salt in texts]
    for (tokens, salt), one in zip(texts, made, strict=True):
        assert len(one) == len(tokens)
        assert all(0 <= t < 2**31 for t in one)
        assert [t % 61_000 for t in one] == tokens
        assert one == tokens or int.from_bytes(salt, "little")
    for (a, b), (c, d) in zip(itertools.combinations(texts, 2), itertools.combinations(made, 2), strict=True):
        if len(a[0]) >= 5 <= len(b[0]) and page >= 5:
            same = a[0] == b[0] and int.from_bytes(a[1], "little") == int.from_bytes(b[1], "little")
            assert (c == d) == same
