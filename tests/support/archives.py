"""Archives (.pt2) taken apart and put together again, for tests that forge them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
SEAL = "data/extra/adaptc.sha256"
MANIFEST = "data/extra/adaptc.json"


def read_records(path: Path) -> dict[str, bytes]:
    """Every record, by its name inside the archive's folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_records(path: Path, records: Mapping[str, bytes], *, keep_seal: bool = False, root: str = "forged") -> Path:
    """An archive of these records. The seal of adaptc.save goes, unless ``keep_seal``: a forger leaves it out."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if keep_seal or name != SEAL:
                archive.writestr(f"{root}/{name}", data)
    return path


def edit_json_record(path: Path, record: str, edit: Callable[[Any], Any], target: Path) -> Path:
    """A copy in which the JSON of a record was changed, in place or by what ``edit`` returns."""
    records = read_records(path)
    data = json.loads(records[record])
    out = edit(data)
    records[record] = json.dumps(data if out is None else out).encode()
    return write_records(target, records)


def with_right_hashes(records: Mapping[str, bytes]) -> dict[str, bytes]:
    """A package's records, with a manifest that has the right hashes of them and of itself."""
    out = dict(records)
    if MANIFEST in out:
        data = json.loads(out[MANIFEST])
        data.pop("sha256", None)
        data["hashes"] = {n: hashlib.sha256(r).hexdigest() for n, r in out.items() if n != MANIFEST}
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        out[MANIFEST] = json.dumps(data | {"sha256": digest}).encode()
    return out
