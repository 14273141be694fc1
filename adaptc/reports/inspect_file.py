"""Read what a file or directory holds, for a report: adapters of all formats, models, GGUF and ONNX files.

No model is made, and no weights are read but those of adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adaptc.adapter_files.adapter_data import PEFT_KEYS, LoadedAdapter
from adaptc.adapter_files.foreign_file import has_peft_prefix
from adaptc.adapter_files.format import CONFIG_NAME, MODEL_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from adaptc.adapter_files.formats.detect import detect_format
from adaptc.adapter_files.load import load
from adaptc.adapter_files.safetensors_reader import DTYPES
from adaptc.adapters.model_tensors import safetensors_files
from adaptc.capture.model_files import QUANTIZATION_CONFIG, is_gguf, read_model_config
from adaptc.engines.safetensors_header import read_header
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.reports.file_report import FileReport
from adaptc.tables import dtype_name

#: the most elements of a list that a table shows; tokenizers in GGUF files have lists of all words
_MAX_LIST = 16


def inspect_file(path: Path) -> FileReport:
    """Return the report of an adapter of any format, a transformers model directory, a GGUF file or an ONNX file.

    Of an adapter in another format than PEFT's, or in PEFT's without its config, only a model tells the config. Its
    report has the format, and the number of tensors of each component. Raises CheckpointError where there is none of
    these or it is damaged, and ConfigError where a package that reads the format is missing.
    """
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if is_gguf(path):
        return _inspect_gguf(path)
    has_adapter = any((path / n).exists() for n in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if (path / MODEL_CONFIG_NAME).is_file() and not has_adapter:
        return _inspect_model(path)
    return _inspect_adapter(path)


def _inspect_adapter(path: Path) -> FileReport:
    file = load(path, with_experts=False)
    config = _set_fields(file.config or {}) if file.format == PEFT_KEYS else _describe_format(file)
    tensors = {k: (tuple(t.shape), dtype_name(t.dtype)) for k, t in file.tensors.items()}
    kind = config.get("peft_type") or config.get("format", "unknown")
    return FileReport(file.path or path, f"{kind} adapter", config, tensors, file.nbytes)


def _inspect_model(path: Path) -> FileReport:
    config = read_model_config(path)
    files = safetensors_files(path)
    headers = [read_header(f) for f in files]
    tensors = {k: (s, dtype_name(DTYPES.get(d, d))) for header in headers for k, (s, d) in header.items()}
    names = config.get("architectures")
    kind = names[0] if isinstance(names, list) and names else config.get("model_type", "model")
    fields = _set_fields(config)
    if isinstance(quantization := fields.pop(QUANTIZATION_CONFIG, None), Mapping):
        fields |= {f"{QUANTIZATION_CONFIG}.{k}": v for k, v in _set_fields(quantization).items()}
    return FileReport(path, str(kind), {"files": len(files), **fields}, tensors, sum(f.stat().st_size for f in files))


def _inspect_gguf(path: Path) -> FileReport:
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF files are read with the package gguf: pip install 'adaptc[gguf]'") from None

    try:
        reader = gguf.GGUFReader(path)
        found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {
            t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name.lower()) for t in reader.tensors
        }
    except Exception as error:  # a damaged file raises whatever numpy and the reader meet in it
        raise CheckpointError(f"{path} is no GGUF file that can be read ({short_repr(str(error))})") from error
    kind = f"GGUF {found.get('general.type', 'model')} of {found.get('general.architecture', 'an unknown kind')}"
    return FileReport(path, kind, _set_fields(found), tensors, path.stat().st_size)


def _inspect_onnx(path: Path) -> FileReport:
    try:
        import onnx
    except ImportError:
        raise ConfigError("ONNX files are read with the package onnx: pip install onnx") from None

    try:
        model: Any = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # onnx has no type of its own for damaged files
        raise CheckpointError(f"{path} is no ONNX file that can be read ({short_repr(str(error))})") from error
    type_name = onnx.TensorProto.DataType.Name
    tensors = {t.name: (tuple(t.dims), type_name(t.data_type).lower()) for t in model.graph.initializer}

    def describe(value: Any) -> str:
        kind = value.type.tensor_type
        sizes = ", ".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
        return f"{value.name} {type_name(kind.elem_type).lower()}[{sizes}]"

    config = {
        "opset": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
        "inputs": [describe(v) for v in model.graph.input if v.name not in tensors],
        "outputs": [describe(v) for v in model.graph.output],
    }
    for name, graph in _onnx_graphs("nodes", model.graph):
        counts = Counter(n.op_type for n in graph.node).most_common(_MAX_LIST)
        config[name] = ", ".join(f"{n} x{c}" for n, c in counts)
    return FileReport(path, "ONNX model", config, tensors, path.stat().st_size)


def _onnx_graphs(name: str, graph: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, graph) of an ONNX graph and of the graphs in it: branches of ``If``, bodies of ``Loop``."""
    yield name, graph
    inner = [(n, a) for n in graph.node for a in n.attribute if a.type == a.GRAPH]
    for node, attribute in inner:
        yield from _onnx_graphs(f"{name} of {attribute.name} {node.name}".rstrip(), attribute.g)


def _set_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are set to anything, without long lists, in the order of their names."""
    return {
        k: v
        for k, v in sorted(config.items())
        if v not in (None, False, {}, [], "") and not (isinstance(v, list) and len(v) > _MAX_LIST)
    }


def _describe_format(file: LoadedAdapter) -> dict[str, Any]:
    """Return the format of a file, and the number of tensors of each component, as fields of a config."""
    if any(map(has_peft_prefix, file.tensors)):
        format_name, components = "PEFT, without its config", Counter[str]()
    else:
        found, parts = detect_format(file.tensors, file.source)
        format_name, components = found.name, Counter(p.component for p in parts)
    config = {"format": format_name} | {f"tensors of {name}": n for name, n in components.items() if name}
    return config | dict(file.component_configs or {})
