"""Files that try to run code: each is refused by name, and what they would have run leaves no trace."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc import CheckpointError
from tests.support.archives import CONSTANTS, MODEL, SAMPLES, WEIGHTS, edit_json_record, read_records, write_records
from tests.support.saved_programs import outputs, outputs_are_equal, save_small


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "small.pt2"
    save_small(path)
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def refusal(path: Path, marker: Path) -> str:
    """The words in which a file is refused, which name it; no code of the file has made the ``marker``."""
    with pytest.raises(CheckpointError) as info:
        adaptc.load(path).module()  # where more texts become source
    assert not marker.exists(), "the file's code ran"
    assert str(path) in str(info.value)
    return str(info.value)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def code(marker: Path) -> str:
    return f"__import__('pathlib').Path('{marker}').touch()"


def test_the_payloads_of_these_tests_run(tmp_path: Path) -> None:
    """Where nothing refuses them; else that they leave no trace would say nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "plain")))
    torch.load(io.BytesIO(pickled(Payload(tmp_path / "torch"))), weights_only=False)
    eval(code(tmp_path / "code"))
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "torch", "code"}


def test_a_file_that_is_read_is_not_taken_for_refused(good: Path, marker: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refusal(good, marker)
    marker.touch()
    with pytest.raises(AssertionError, match="the file's code ran"):
        refusal(marker, marker)


# -- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_pickle_in_the_example_inputs(good: Path, marker: Path, tmp_path: Path, form: str) -> None:
    records = read_records(good)
    records[SAMPLES] = pickled(Payload(marker)) if form == "torch" else pickle.dumps(Payload(marker))
    said = "it would call posix.mkdir" if form == "torch" else "not a zip archive"
    assert re.search(said, refusal(write_records(tmp_path / "bad.pt2", records), marker))


def test_example_inputs_that_unpickle_expressions(good: Path, marker: Path, tmp_path: Path) -> None:
    """What torch writes for fake tensors: harmless to look at, but it evaluates the expressions of their sizes."""
    from torch._export.serde.serialize import _reconstruct_fake_tensor

    size = {"as_expr": {"expr_str": code(marker), "hint": None}}
    meta = {
        "dtype": 7, "sizes": [size], "strides": [{"as_int": 1}], "requires_grad": False, "layout": 7,
        "device": {"type": "cpu", "index": None}, "storage_offset": {"as_int": 0},
    }  # fmt: skip

    class Fake:
        def __reduce__(self) -> Any:
            return _reconstruct_fake_tensor, (json.dumps(meta).encode(), False)

    records = read_records(good)
    records[SAMPLES] = pickled(((Fake(),), {}))
    assert re.search("_reconstruct_fake_tensor", refusal(write_records(tmp_path / "bad.pt2", records), marker))


@pytest.mark.parametrize("table", [WEIGHTS, CONSTANTS])
def test_pickled_weights(good: Path, marker: Path, tmp_path: Path, table: str) -> None:
    records = read_records(good)
    data = json.loads(records[table])
    entry = next(iter(data["config"].values()))
    entry["use_pickle"] = True
    folder = table.rpartition("/")[0]
    records[table] = json.dumps(data).encode()
    records[f"{folder}/{entry['path_name']}"] = pickled(Payload(marker))
    assert re.search("use_pickle.*can run code", refusal(write_records(tmp_path / "bad.pt2", records), marker))


@pytest.mark.parametrize("kind", ["custom_obj_0", "opaque_obj_0"])
def test_objects_among_the_constants(good: Path, marker: Path, tmp_path: Path, kind: str) -> None:
    records = read_records(good)
    data = json.loads(records[CONSTANTS])
    data["config"]["object"] = {"path_name": kind, "is_param": False, "use_pickle": True, "tensor_meta": None}
    records[CONSTANTS] = json.dumps(data).encode()
    records[f"data/constants/{kind}"] = pickle.dumps(Payload(marker))
    assert re.search(f"{kind}.*can run code", refusal(write_records(tmp_path / "bad.pt2", records), marker))


@pytest.mark.parametrize("name", ["data/weights/model.pt", "data/constants/model.pt"])
def test_weights_as_older_files_have_them(good: Path, marker: Path, tmp_path: Path, name: str) -> None:
    records = read_records(good) | {name: pickled(Payload(marker))}
    assert re.search(name, refusal(write_records(tmp_path / "bad.pt2", records), marker))


def test_a_file_of_torch_2_7(marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_exported_program.json", "{}")
        for name in ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt"):
            archive.writestr(name, pickled(Payload(marker)))
    assert re.search("torch 2.7|no name that torch gives", refusal(path, marker))


def test_compiled_code_beside_the_program(good: Path, marker: Path, tmp_path: Path) -> None:
    records = read_records(good) | {"data/aotinductor/model/x.wrapper.so": b"\x7fELF" + b"\0" * 99}
    assert re.search(
        r"compiled code.*adaptc\.load_package", refusal(write_records(tmp_path / "bad.pt2", records), marker)
    )


# -- texts that are evaluated, or become source ----------------------------------------------------------------------


def size_of_x(data: Any) -> Any:
    return data["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]


def nodes(data: Any) -> Any:
    return data["graph_module"]["graph"]["nodes"]


def renamed(data: Any, old: str, new: str) -> Any:
    return json.loads(json.dumps(data).replace(json.dumps(old), json.dumps(new)))


def root(data: Any) -> Any:
    return data["graph_module"]["module_call_graph"][0]["signature"]


def _node_of(target: str, *args: Any) -> Any:
    kinds = {str: "as_string", list: "as_strings", int: "as_int"}
    return {
        "target": target,
        "name": "evil",
        "inputs": [{"name": "", "arg": {kinds[type(a)]: a}, "kind": 1} for a in args],
        "outputs": [{"as_none": True}],
        "metadata": {},
        "is_hop_single_tensor_return": None,
    }


def _call(target: str) -> Callable[[Any, Path], Any]:
    return lambda d, m: nodes(d).insert(0, _node_of(target, f"touch {m}"))


def _tree(node: Any) -> str:
    return json.dumps([1, node])


def _out(kind: str, context: Any) -> str:
    leaf = {"type": None, "context": None, "children_spec": []}
    return _tree({"type": kind, "context": context, "children_spec": [leaf, leaf]})


def _metadata(key: str, text: Callable[[Path], str]) -> Callable[[Any, Path], Any]:
    return lambda d, m: nodes(d)[0]["metadata"].update({key: text(m)})


def _factory(context: dict[str, str]) -> Callable[[Any, Path], Any]:
    return lambda d, m: root(d).update(out_spec=_out("collections.defaultdict", context | {"dict_context": ["y", "n"]}))


ROUTES: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "a size": (lambda d, m: size_of_x(d).update(expr_str=code(m)), "expr_str.*expected an expression over sizes"),
    "a size through a function": (
        lambda d, m: size_of_x(d).update(expr_str=f"Max(1, {code(m)})"),
        "expected an expression over sizes",
    ),
    "a symbol of another name": (
        lambda d, m: size_of_x(d).update(expr_str=f"Symbol({code(m)!r})"),
        "expected a symbol such as s7",
    ),
    "a range": (
        lambda d, m: d["range_constraints"].update({code(m): {"min_val": 2, "max_val": 4}}),
        "range_constraints.*expected an expression over sizes",
    ),
    "a guard": (lambda d, m: d["guards_code"].append(code(m)), "guards_code.*expected a condition on inputs"),
    "a guard that closes what it is in": (
        lambda d, m: d["guards_code"].append(f"True, ''), {code(m)}, (1"),
        "expected a condition on inputs",
    ),
    "a guard that calls a method": (
        lambda d, m: d["guards_code"].append(f"L['x'].numpy().tofile('{m}') == None".replace("/", "_")),
        "expected a condition on inputs",
    ),
    "a node's name": (
        lambda d, m: renamed(d, nodes(d)[0]["outputs"][0]["as_sym_int"]["as_name"], f"a = {code(m)}; b"),
        "expected a name of letters, digits and underscores",
    ),
    "an input's name": (
        lambda d, m: renamed(d, "x", f"x={code(m)}"),
        "expected a name of letters, digits and underscores|expected a text without quotes",
    ),
    "a parameter's path": (
        lambda d, m: renamed(d, "first.weight", f'first."),{code(m)},getattr(self, "w'),
        "expected a text without quotes",
    ),
    "a name of forward": (
        lambda d, m: root(d).update(forward_arg_names=[f"x={code(m)}", "gain", "mode"]),
        "forward_arg_names.*expected a name of letters",
    ),
    "a constant input": (
        lambda d, m: renamed(d, "plain", f"' + str({code(m)}) + '"),
        "expected a text without quotes",
    ),
    "an operator of the shell": (_call("torch.os.system"), "expected the name of an operator, found 'torch.os.system'"),
    "an operator of operator": (_call("_operator.methodcaller"), "expected the name of an operator"),
    "a loader of libraries": (_call("torch.ops.load_library"), "expected the name of an operator"),
    "a loader of pickles": (_call("torch.load"), "expected the name of an operator"),
    "an operator that writes": (_call("torch.ops.aten.save.default"), "one of TorchScript alone"),
    "an operator that maps files": (_call("torch.ops.aten.from_file.default"), "reaches beyond the program"),
    "an operator of other processes": (_call("torch.ops.c10d.send.default"), "reaches beyond the program"),
    "assembler": (_call("torch.ops.higher_order.inline_asm_elementwise"), "not one that programs hold subgraphs in"),
    "an operator as an argument": (
        lambda d, m: nodes(d)[1]["inputs"].append({"name": "fn", "arg": {"as_operator": "torch.os.system"}, "kind": 2}),
        "as_operator.*expected the name of an operator",
    ),
    "an enum in a tree": (
        lambda d, m: root(d).update(
            out_spec=_out("builtins.dict", json.dumps([{"__enum__": True, "fqn": "antigravity:A", "name": "A"}, "n"]))
        ),
        "out_spec.*expected a key of a dict",
    ),
    "a factory in a tree": (
        _factory({"default_factory_module": "os", "default_factory_name": "getcwd"}),
        "expected a factory such as builtins.list, found 'os.getcwd'",
    ),
    "an unknown container": (
        lambda d, m: root(d).update(out_spec=_out("antigravity.Box", "[]")),
        "'antigravity.Box', which nothing has registered here",
    ),
    "another module of transformers": (
        lambda d, m: root(d).update(out_spec=_out("transformers.commands.Box", "[]")),
        "nothing has registered here",
    ),
    "a keyword input": (
        lambda d, m: root(d).update(in_spec=root(d)["in_spec"].replace("gain", f"gain={code(m)}".replace("'", "_"))),
        "in_spec|expected a name",
    ),
    "a name behind a comment sign": (
        _metadata(
            "from_node", lambda m: json.dumps([{"name": f"a\n{code(m)}", "target": "t", "pass_name": "", "action": ""}])
        ),
        "from_node.*expected a text of one line",
    ),
    "where a node came from": (
        _metadata("source_fn_stack", lambda m: "a,torch.__class__.__init__.__globals__"),
        "source_fn_stack.*expected where a node came from",
    ),
    "an object in the graph": (
        lambda d, m: nodes(d)[1]["inputs"].append(
            {"name": "o", "arg": {"as_custom_obj": {"name": "o", "class_fqn": "a.B"}}, "kind": 2}
        ),
        "can run code",
    ),
}


@pytest.mark.parametrize("route", list(ROUTES))
def test_texts_of_the_graph(good: Path, marker: Path, tmp_path: Path, route: str) -> None:
    change, said = ROUTES[route]
    assert re.search(
        said, refusal(edit_json_record(good, MODEL, lambda d: change(d, marker), tmp_path / "bad.pt2"), marker)
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_cache_of_transformers_names_no_other_class(good: Path, marker: Path, tmp_path: Path) -> None:
    from transformers.cache_utils import DynamicCache
    from transformers.exporters.exporter_dynamo import register_pytree_node

    register_pytree_node(DynamicCache)
    context = json.dumps({"_t": "seq", "p": "subprocess:Popen", "v": [["touch", str(marker)]]})
    bad = edit_json_record(
        good, MODEL, lambda d: root(d).update(out_spec=_out("transformers.cache_utils:DynamicCache", context)),
        tmp_path / "bad.pt2",
    )  # fmt: skip
    assert re.search("'subprocess:Popen', which would be imported", refusal(bad, marker))


def test_words_for_people_lose_their_line_ends(good: Path, marker: Path, tmp_path: Path) -> None:
    """A stack trace and a module path are printed as comments; the file is read, and they end no line."""

    def change(data: Any) -> None:
        nodes(data)[0]["metadata"].update(
            stack_trace=f"File 'a'\r{code(marker)}\n next", torch_fn=f"a\n{code(marker)};b"
        )

    loaded = adaptc.load(edit_json_record(good, MODEL, change, tmp_path / "odd.pt2"))
    metas = [n.meta for n in loaded.graph.nodes if "File 'a'" in n.meta.get("stack_trace", "")]
    assert metas[0]["stack_trace"].count("\n") == 1
    assert "\r" not in metas[0]["stack_trace"]
    assert outputs_are_equal(outputs(loaded), outputs(adaptc.load(good)))
    loaded.module()
    loaded.graph_module.print_readable(print_output=False)
    assert not marker.exists()
