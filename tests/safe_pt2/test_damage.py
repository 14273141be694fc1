"""Files that are cut short, forged, or of other kinds: the error names record, place, what was expected and found."""

from __future__ import annotations

import io
import json
import re
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc import CheckpointError
from tests.support.archives import (
    CONSTANTS,
    MODEL,
    SAMPLES,
    SEAL,
    WEIGHTS,
    edit_json_record,
    read_records,
    write_records,
)
from tests.support.saved_programs import outputs, outputs_are_equal, save_small


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "small.pt2"
    save_small(path)
    return path


def refusal(path: Path) -> str:
    """The words in which a file is refused, which name it, are few, and come at once."""
    start = time.thread_time()
    with pytest.raises(CheckpointError) as info:
        adaptc.load(path)
    assert str(path) in str(info.value)
    assert len(str(info.value)) < 1_500
    # No measure of speed: a bomb takes hours of a processor, and everything else a fraction of a second.
    assert time.thread_time() - start < 20, "it hangs"
    return str(info.value)


def test_the_forger_of_these_tests_changes_nothing(good: Path, tmp_path: Path) -> None:
    again = write_records(tmp_path / "again.pt2", read_records(good))
    assert outputs_are_equal(outputs(adaptc.load(again)), outputs(adaptc.load(good)))
    assert SEAL in read_records(good)


def test_a_file_that_is_read_is_not_taken_for_refused(good: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refusal(good)


# -- weights ---------------------------------------------------------------------------------------------------------


def _length(count: Callable[[int], int]) -> Callable[[dict[str, bytes]], None]:
    def change(records: dict[str, bytes]) -> None:
        data = records["data/weights/weight_0"]
        records["data/weights/weight_0"] = (data * 3)[: count(len(data))]

    return change


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (lambda n: 0, r"\['first.weight'\]: a torch.float32 of sizes \[7, 5\].* needs 140 bytes, and .* has 0"),
        (lambda n: n - 4, "needs 140 bytes, and .* has 136"),
        (lambda n: n - 1, "needs 140 bytes, and .* has 139"),
        (lambda n: n + 2, "has 142"),
    ],
)
def test_a_weight_of_another_length(good: Path, tmp_path: Path, count: Callable[[int], int], said: str) -> None:
    records = read_records(good)
    _length(count)(records)
    assert re.search(said, refusal(write_records(tmp_path / "bad.pt2", records)))


def test_weights_without_a_record(good: Path, tmp_path: Path) -> None:
    records = read_records(good)
    del records["data/weights/weight_1"]
    assert re.search(
        r"\['first.bias'\]: there is no record .*weight_1", refusal(write_records(tmp_path / "bad.pt2", records))
    )


def _tensor(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    return lambda data: change(data["config"]["first.weight"]["tensor_meta"])


def _sizes(*sizes: int) -> list[dict[str, int]]:
    return [{"as_int": n} for n in sizes]


TABLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "swapped sizes": (_tensor(lambda t: t.update(sizes=_sizes(5, 7))), r"stored as a FLOAT of \[5, 7\], and the graph"),
    "other strides": (_tensor(lambda t: t.update(strides=_sizes(1, 9))), "needs 172 bytes"),
    "an offset": (_tensor(lambda t: t.update(storage_offset={"as_int": 1})), "needs 144 bytes"),
    "negative": (_tensor(lambda t: t.update(strides=_sizes(-5, 1))), "expected a size, stride or offset"),
    "too few strides": (_tensor(lambda t: t.update(strides=_sizes(5))), "2 sizes and 1 strides"),
    "another dtype": (_tensor(lambda t: t.update(dtype=4)), "stored as a INT"),
    "no dtype": (_tensor(lambda t: t.update(dtype=0)), "expected a number of a ScalarType, found 0"),
    "a dtype of later days": (_tensor(lambda t: t.update(dtype=99)), "expected a number of a ScalarType"),
    "a dtype that is none": (_tensor(lambda t: t.update(dtype=float("nan"))), "NaN is no JSON"),
    "a dtype as text": (_tensor(lambda t: t.update(dtype="7")), "expected a number of a ScalarType, found '7'"),
    "sparse": (_tensor(lambda t: t.update(layout=1)), "expected a dense layout, found SparseCoo"),
    "a symbol": (
        _tensor(lambda t: t["sizes"].__setitem__(0, {"as_expr": {"expr_str": "Symbol('s7')", "hint": None}})),
        "expected a size, stride or offset",
    ),
    "no device": (_tensor(lambda t: t.update(device={"type": "nowhere", "index": None})), "there is no device nowhere"),
    "no values": (lambda d: d["config"]["first.weight"].update(tensor_meta=None), "it has no dtype, sizes and strides"),
    "gone": (lambda d: d["config"].pop("first.weight"), "no tensor called 'first.weight'"),
    "a path": (
        lambda d: d["config"]["first.weight"].update(path_name="../weight_0"),
        "expected the record of a tensor",
    ),
    "a list": (lambda d: d.update(config=[]), r"config: expected an object, found a list of 0"),
    "a bool as text": (lambda d: d["config"]["first.weight"].update(is_param="yes"), "expected true or false"),
    "a field too many": (lambda d: d["config"]["first.weight"].update(more=1), "has no 'more'"),
    "a field too few": (lambda d: d["config"]["first.weight"].pop("is_param"), "lacks 'is_param'"),
}


@pytest.mark.parametrize("case", list(TABLES))
def test_the_table_of_weights(good: Path, tmp_path: Path, case: str) -> None:
    change, said = TABLES[case]
    assert re.search(said, refusal(edit_json_record(good, WEIGHTS, lambda d: change(d) and None, tmp_path / "bad.pt2")))


def test_an_expanded_weight_that_is_a_bomb(good: Path, tmp_path: Path) -> None:
    def change(data: Any) -> None:
        entry = json.loads(json.dumps(data["config"]["second.weight"]))
        entry["tensor_meta"].update(sizes=_sizes(2**40, 2**10), strides=_sizes(0, 0))
        data["config"]["unread"] = entry

    assert re.search(
        r"\['unread'\]: sizes .* are 4503599627370496 bytes",
        refusal(edit_json_record(good, WEIGHTS, change, tmp_path / "bad.pt2")),
    )


def test_a_truth_value_is_zero_or_one(tmp_path: Path) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.mask

    torch.export.save(torch.export.export(Masked(), (torch.randn(5, 3),)), tmp_path / "a.pt2")
    records = read_records(tmp_path / "a.pt2")
    records["data/weights/weight_0"] = b"\1\2\0"
    assert re.search("neither true nor false", refusal(write_records(tmp_path / "bad.pt2", records)))


# -- the archive -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, SAMPLES, WEIGHTS, CONSTANTS, "archive_version"])
def test_a_record_is_missing(good: Path, tmp_path: Path, name: str) -> None:
    records = read_records(good)
    del records[name]
    assert re.search(f"there is no record '{name}'", refusal(write_records(tmp_path / "bad.pt2", records)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("models/other.json", "files of one program"),
        ("data/stray", "none that a program has"),
        ("models/../../escape", "no name that torch gives"),
        ("a\\b", "no name that torch gives"),
        ("run.py", "none that a program has"),
    ],
)
def test_a_record_too_many(good: Path, tmp_path: Path, name: str, said: str) -> None:
    assert re.search(said, refusal(write_records(tmp_path / "bad.pt2", read_records(good) | {name: b"x"})))


def test_files_beside_the_program_are_not_read(good: Path, tmp_path: Path) -> None:
    extra = {"data/extra/notes.txt": b"\xff\xfe not UTF-8"}
    path = write_records(tmp_path / "extra.pt2", read_records(good) | extra)
    assert outputs_are_equal(outputs(adaptc.load(path)), outputs(adaptc.load(good)))


@pytest.mark.long
def test_compressed_records(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in read_records(good).items():
            archive.writestr(f"a/{name}", data)
        archive.writestr("a/data/weights/weight_9", bytes(300 << 20))
    assert path.stat().st_size < 1 << 20
    assert re.search("is compressed.*decompression bomb", refusal(path))


def test_a_size_that_the_file_has_not(good: Path, tmp_path: Path) -> None:
    """The directory claims more than the file has: nothing of that size is allocated."""
    path = write_records(tmp_path / "lie.pt2", read_records(good))
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\1\2")
    data[at + 20 : at + 28] = struct.pack("<II", 0xFFFF0000, 0xFFFF0000)
    path.write_bytes(data)
    assert re.search("claims 4294901760 bytes and there is room for", refusal(path))


def test_records_that_overlap(good: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "overlap.pt2", read_records(good))
    data = bytearray(path.read_bytes())
    first = struct.unpack("<I", data[-6:-2])[0]
    size = struct.unpack("<I", data[first + 20 : first + 24])[0] + 60
    data[first + 20 : first + 28] = struct.pack("<II", size, size)
    path.write_bytes(data)
    assert re.search("overlaps another|cut short", refusal(path))


def test_two_records_of_one_name(good: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "twice.pt2", read_records(good))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("forged/models/model.json", b"{}")
    assert re.search("two records called 'models/model.json'", refusal(path))


def test_another_name_before_the_data(good: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "names.pt2", read_records(good))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"forged/models/model.json", b"forged/models/madel.json", 1))
    assert re.search("has another name in front of its data", refusal(path))


def test_a_directory_without_end(tmp_path: Path) -> None:
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 10**9, 10**9, 10**11, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1)
    (tmp_path / "long.pt2").write_bytes(wide + locator + end)
    assert re.search("its directory claims 1000000000 records", refusal(tmp_path / "long.pt2"))


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7, 0.97, 0.999])
def test_cut_short(good: Path, tmp_path: Path, kept: float) -> None:
    data = good.read_bytes()
    (tmp_path / "short.pt2").write_bytes(data[: int(len(data) * kept)])
    assert re.search("not a zip archive, or is cut short", refusal(tmp_path / "short.pt2"))


def test_other_files(tmp_path: Path) -> None:
    assert re.search("there is no file", refusal(tmp_path / "none.pt2"))
    assert re.search("there is no file", refusal(tmp_path))
    (tmp_path / "text.pt2").write_text("<!doctype html>")
    assert re.search("not a zip archive", refusal(tmp_path / "text.pt2"))
    torch.save({"a": torch.ones(3)}, tmp_path / "tensors.pt2")
    assert re.search("there is no record 'archive_format'", refusal(tmp_path / "tensors.pt2"))


def test_any_flipped_byte_of_a_weight_is_found(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        weight = archive.read(archive.namelist()[0])
    at = data.find(weight)
    data[at + 17] ^= 4
    (tmp_path / "flip.pt2").write_bytes(data)
    assert re.search(r"weight_0': its bytes do not have the checksum", refusal(tmp_path / "flip.pt2"))


def test_a_file_that_was_edited_after_it_was_saved(good: Path, tmp_path: Path) -> None:
    """Another weight with the right checksum: what adaptc.save wrote has a hash of all records."""
    records = read_records(good)
    records["data/weights/weight_0"] = bytes(140)
    assert re.search(
        "was changed after adaptc.save wrote it",
        refusal(write_records(tmp_path / "edited.pt2", records, keep_seal=True)),
    )


# -- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [MODEL, WEIGHTS, CONSTANTS])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[]", "expected a"),
        (b"null", "expected a"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"config": {}, "config": {}}', "two entries of one name"),
        (b'{"config": ' + b"9" * 5000 + b"}", "expected JSON|expected an object"),
    ],
)
def test_json_that_is_none(good: Path, tmp_path: Path, record: str, text: bytes, said: str) -> None:
    records = read_records(good)
    records[record] = text
    assert re.search(f"{record}.*({said})", refusal(write_records(tmp_path / "bad.pt2", records)))


def _graph(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def do(data: Any) -> None:
        change(data["graph_module"]["graph"])

    return do


def _nested(depth: int) -> Any:
    empty = {"inputs": [], "outputs": [], "nodes": [], "tensor_values": {}, "sym_int_values": {}, "sym_bool_values": {}}
    graph = json.loads(json.dumps(empty))
    for _ in range(depth):
        node = {
            "target": "torch.ops.higher_order.cond",
            "inputs": [{"name": "", "arg": {"as_graph": {"name": "g", "graph": graph}}, "kind": 1}],
            "outputs": [],
            "metadata": {},
        }
        graph = json.loads(json.dumps(empty)) | {"nodes": [node]}
    return graph["nodes"][0]


def _argument(depth: int) -> Any:
    out: Any = {"as_int": 1}
    for _ in range(depth):
        out = {"as_string_to_argument": {"a": out}}
    return out


GRAPHS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "graphs in graphs": (_graph(lambda g: g["nodes"].insert(0, _nested(30))), "at most 6 graphs inside one another"),
    "arguments in arguments": (
        _graph(lambda g: g["nodes"][1]["inputs"].append({"name": "a", "arg": _argument(400), "kind": 2})),
        "nested too deeply",
    ),
    "a value from nowhere": (
        _graph(lambda g: g["nodes"][-1]["inputs"][0].update(arg={"as_tensor": {"name": "nowhere"}})),
        "reads 'nowhere', which nothing before it computes",
    ),
    "a result from nowhere": (
        _graph(lambda g: g["outputs"].__setitem__(0, {"as_tensor": {"name": "nowhere"}})),
        "outputs: it reads 'nowhere'",
    ),
    "an argument that the operator has not": (
        _graph(lambda g: g["nodes"][1]["inputs"][0].update(name="bios")),
        "has no argument 'bios'",
    ),
    "an argument twice": (
        _graph(lambda g: g["nodes"][0]["inputs"].append(g["nodes"][0]["inputs"][0])),
        "two arguments of one name",
    ),
    "a value without a shape": (_graph(lambda g: g["tensor_values"].pop("x")), "'x', and nothing says of what shape"),
    "an operator that is not here": (
        _graph(lambda g: g["nodes"][0].update(target="torch.ops.aten.sym_sise.int")),
        "there is no operator 'torch.ops.aten.sym_sise.int' here",
    ),
    "a range without end": (
        lambda d: d["range_constraints"].update(u999999999999={"min_val": 2, "max_val": 4}),
        "range_constraints.*expected a symbol",
    ),
    "a range upside down": (
        lambda d: next(iter(d["range_constraints"].values())).update(min_val=9, max_val=2),
        "cannot be read as an exported program",
    ),
    "a kind too many": (
        _graph(lambda g: g["inputs"][0].update(as_int=3)),
        r"graph\.inputs\[0\]: expected one kind of Argument, found a dict of 2",
    ),
    "an input too few": (
        lambda d: d["graph_module"]["signature"]["input_specs"].pop(),
        "names .* inputs and .* outputs, and the graph has",
    ),
    "a tree of other leaves": (
        lambda d: d["graph_module"]["module_call_graph"][0]["signature"].update(
            out_spec='[1, {"type": null, "context": null, "children_spec": []}]'
        ),
        "its trees have 3 inputs and 1 outputs, and the signature 3 and 2",
    ),
    "no trees": (lambda d: d["graph_module"].update(module_call_graph=[]), "does not say how the program is called"),
    "a schema of later days": (lambda d: d["schema_version"].update(major=99), "schema version"),
    "an integer of 65 bits": (
        _graph(lambda g: g["nodes"][0]["inputs"][1].update(arg={"as_int": 2**64})),
        "expected an integer of 64 bits",
    ),
    "an integer that is true": (
        _graph(lambda g: g["nodes"][0]["inputs"][1].update(arg={"as_int": True})),
        "expected an integer of 64 bits, found True",
    ),
}


@pytest.mark.parametrize("case", list(GRAPHS))
def test_the_graph(good: Path, tmp_path: Path, case: str) -> None:
    change, said = GRAPHS[case]
    assert re.search(said, refusal(edit_json_record(good, MODEL, lambda d: change(d) and None, tmp_path / "bad.pt2")))


def test_what_a_program_of_a_later_torch_has_more_is_left_out(good: Path, tmp_path: Path) -> None:
    def later(data: Any) -> None:
        data["later"] = 1
        data["schema_version"]["minor"] += 1

    path = edit_json_record(good, MODEL, later, tmp_path / "later.pt2")
    assert outputs_are_equal(outputs(adaptc.load(path)), outputs(adaptc.load(good)))
    assert re.search(
        "has no 'later'", refusal(edit_json_record(good, MODEL, lambda d: d.update(later=1), tmp_path / "bad.pt2"))
    )


def _tags(data: Any) -> list[dict[str, Any]]:
    return [
        n["metadata"] for n in data["graph_module"]["graph"]["nodes"] if "header" in n["metadata"].get("custom", "")
    ]


@pytest.mark.parametrize("field", ["config", "present", "parts", "unread", "carried", "training", "matches", "format"])
@pytest.mark.parametrize("value", [None, 3, "text", [1], {"a": 1}])
def test_the_header_of_the_adapter(good: Path, tmp_path: Path, field: str, value: Any) -> None:
    """A header of other types is refused, or it changes nothing of the program."""

    def change(data: Any) -> None:
        assert _tags(data)
        for metadata in _tags(data):
            custom = json.loads(metadata["custom"])
            custom["adaptc"]["header"][field] = value
            metadata["custom"] = json.dumps(custom)

    path = edit_json_record(good, MODEL, change, tmp_path / "bad.pt2")
    try:
        loaded = adaptc.load(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert outputs_are_equal(outputs(loaded), outputs(adaptc.load(good)))


# -- example inputs --------------------------------------------------------------------------------------------------


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _laughs() -> Any:
    value: Any = [1]
    for _ in range(60):
        value = [value, value]
    return ((value,), {})


def _deep() -> Any:
    value: Any = torch.ones(2)
    for _ in range(150):
        value = [value]
    return ((value,), {})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: [1], "expected positional and keyword inputs"),
        (_laughs, "more than 100000 values"),
        (_deep, "containers inside one another"),
        (lambda: ((torch.ones(1).expand(2**40),), {}), "that has 4 bytes"),
        (lambda: ((torch.ones(2),), {"a'b": 1}), "without quotes"),
    ],
)
def test_example_inputs(good: Path, tmp_path: Path, value: Callable[[], Any], said: str) -> None:
    records = read_records(good)
    records[SAMPLES] = _saved(value())
    assert re.search(f"sample_inputs.*{said}", refusal(write_records(tmp_path / "bad.pt2", records)))


def test_example_inputs_that_are_compressed(good: Path, tmp_path: Path) -> None:
    records = read_records(good)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(records[SAMPLES])) as old, zipfile.ZipFile(buffer, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    records[SAMPLES] = buffer.getvalue()
    assert re.search("is compressed", refusal(write_records(tmp_path / "bad.pt2", records)))
