"""Random damage of one small saved program: refused with a CheckpointError that names the file, or the same numbers.

Each case is made from its number, so that one that fails can be made again.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

import adaptc
from adaptc import CheckpointError
from tests.support.archives import CONSTANTS, MODEL, WEIGHTS, read_records, write_records
from tests.support.damage import BLOCK, mutate_bytes, mutate_json
from tests.support.saved_programs import outputs, outputs_are_equal, save_small


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("good") / "small.pt2"
    save_small(path)
    return path, outputs(adaptc.load(path))


def outcome(path: Path, want: Any, case: object) -> str:
    """Loads in time, and is refused or the same."""
    start = time.perf_counter()
    try:
        loaded = adaptc.load(path)
    except CheckpointError as error:
        assert str(path) in str(error), case  # noqa: PT017
        return "refused"
    finally:
        assert time.perf_counter() - start < 20, f"{case}: it hangs"
    assert outputs_are_equal(outputs(loaded), want), f"{case}: accepted with other numbers"
    return "same"


BLOCKS = [pytest.param(b, marks=() if b < 2 else pytest.mark.slow) for b in range(40)]


@pytest.mark.parametrize("block", BLOCKS)
def test_damaged_bytes(good: tuple[Path, Any], tmp_path: Path, block: int) -> None:
    data, seen = good[0].read_bytes(), set()
    for case in range(block * BLOCK, block * BLOCK + BLOCK):
        (tmp_path / "bad.pt2").write_bytes(mutate_bytes(data, random.Random(case)))
        seen.add(outcome(tmp_path / "bad.pt2", good[1], f"bytes {case}"))
    assert "refused" in seen


@pytest.mark.long
@pytest.mark.parametrize("block", BLOCKS)
def test_json_of_other_types(good: tuple[Path, Any], tmp_path: Path, block: int) -> None:
    """Under the seal of adaptc.save any change is refused. Without it, as a forger would have it, a value of another
    type, a field or an item less or more is; what then is another program altogether runs as what it is."""
    records = read_records(good[0])
    seen: set[str] = set()
    for case in range(block * BLOCK, block * BLOCK + BLOCK):
        rng = random.Random(10_000 + case)
        record = rng.choice([MODEL, MODEL, WEIGHTS, CONSTANTS])
        data, where = mutate_json(json.loads(records[record]), rng)
        forged = records | {record: json.dumps(data).encode()}
        path = write_records(tmp_path / "sealed.pt2", forged, keep_seal=True)
        assert outcome(path, good[1], f"sealed {case} {where}") == ("same" if forged == records else "refused")
        path = write_records(tmp_path / "bad.pt2", forged)
        seen.add(outcome(path, good[1], f"json {case} {record} {where}"))
    assert "refused" in seen
