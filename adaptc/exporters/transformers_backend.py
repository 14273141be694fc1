"""Export models by ``transformers.exporters`` with the adapter as inputs: a backend that its users choose by its name.

transformers traces a model, and each of its exporters converts what was traced. The exporter here adapts the program
between these two steps. So all that transformers does for a model's capture and conversion is done. The classes are
made when the backend is registered, since transformers is slow to import.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from adaptc.errors import BackendError, ConfigError
from adaptc.exporters.prepare_export import PreparedExport, prepare_inputs
from adaptc.exporters.to_onnx.base_branch import add_base_branch
from adaptc.exporters.to_onnx.onnx_adapter import read_adapter
from adaptc.exporters.to_onnx.program_to_onnx import add_defaults, with_contiguous_views
from adaptc.exporters.to_onnx.session import OnnxSession, quiet_options
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.runtime.options import RunOptions

#: the name of the backend: what users write where they wrote "onnx"
EXPORT_FORMAT = "onnx_adapters"
#: the keyword of calls that names an adapter
ADAPTER_ARGUMENT = "adapter"


def register_transformers_backend() -> None:
    """Register the backend ``"onnx_adapters"`` with ``transformers.exporters``.

    It takes the options of the backend "onnx", and ``adapter``: a config, or a PEFT directory or other adapter whose
    sites the program gets. Its programs take an adapter in each call: ``exported(**inputs, adapter="fr")``. They are
    loaded by ``exported.to(adapters={"fr": "path"})``, or by ``ExportedModel.from_pretrained(path, adapters={...})``.
    Calls without one compute the base. Saved programs are ONNX files as :func:`export_onnx` writes them.

    A process that loads such a program calls this first.

    Raises:
        BackendError: this transformers has no such interface, or onnx, onnxscript or onnxruntime is not installed.

    Example:
        >>> adaptc.exporters.register_transformers_backend()
        >>> from transformers.exporters import AutoHfExporter
        >>> AutoHfExporter.from_config({"export_format": "onnx_adapters"}).export_format
        'onnx_adapters'
    """
    try:
        from transformers.exporters import auto

        exporter, runner = _backend_classes()
    except ImportError as error:
        raise BackendError(
            f"this needs a transformers with transformers.exporters, and pip install 'adaptc[onnx]' ({error})"
        ) from error
    untyped: Any = auto
    known = untyped.EXPORT_BACKENDS.get(EXPORT_FORMAT)
    if known is None or known.exporter is not exporter:
        untyped.register_backend(exporter, runner)


@cache
def _backend_classes() -> tuple[type[Any], type[Any]]:
    """Return the exporter and the runner of the backend."""
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
    from transformers.exporters import configs, exporter_dynamo, exporter_onnx
    from transformers.exporters.runners import runner_onnx

    assert onnxruntime
    config_base: Any = configs.OnnxConfig
    tracer_base: Any = exporter_dynamo.DynamoExporter
    exporter_base: Any = exporter_onnx.OnnxExporter
    runner_base: Any = runner_onnx.OnnxModelRunner

    @dataclass
    class OnnxAdapterConfig(config_base):
        """The options of the backend "onnx", and the adapter whose sites the program gets."""

        export_format: str = EXPORT_FORMAT
        adapter: Any = None

        def __post_init__(self) -> None:
            parent: Any = super()
            parent.__post_init__()
            if self.adapter is None:
                raise ConfigError('the backend "onnx_adapters" needs adapter=: a config, or a PEFT directory')
            if self.quantizer is not None:
                raise ConfigError(
                    'the backend "onnx_adapters" takes no quantizer: quantise the program with adaptc.quantize, and '
                    "export it with adaptc.exporters.export_onnx"
                )

    class AdaptingTracer(tracer_base):
        """The tracing half of an exporter, which adapts what was traced.

        It stands between transformers' exporter and what that derives from, so the exporter's own call of its base
        class gets an adapted program.
        """

        def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
            parent: Any = super()
            program, metadata = parent.export_program(model, sample_inputs, config=config)
            adapted = compile_model(AdaptedProgram, program, config.adapter, RunOptions())
            prepared = prepare_inputs(adapted, "an ONNX file")
            metadata.prepared = prepared  # no field, so it is not saved
            return with_contiguous_views(prepared.program), metadata

    class OnnxAdapterExporter(exporter_base, AdaptingTracer):
        """transformers' exporter to ONNX, of programs with the adapter as inputs."""

        export_format = EXPORT_FORMAT
        config_class = OnnxAdapterConfig

        def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
            parent: Any = super()
            program, metadata = parent.export_program(model, sample_inputs, config=config)
            prepared = _take_prepared(metadata)
            names = {i.argument: i.name for i in prepared.inputs}
            for value in program.graph.inputs:
                value.name = names.get(value.name, value.name)
            add_defaults(program, prepared)
            add_base_branch(program, prepared)
            # Calls drop keywords that the export was not traced with.
            metadata.kwargs[ADAPTER_ARGUMENT] = {"container": "str"}
            return program, metadata

    class OnnxAdapterRunner(runner_base):
        """transformers' runner of ONNX programs, with adapters by name."""

        def __init__(self, metadata: Any, session: Any) -> None:
            parent: Any = super()
            parent.__init__(metadata, session)
            self.adapters = OnnxSession(Path("the exported program"), read_adapter, session=session)

        @classmethod
        def from_program(
            cls,
            program: Any,
            metadata: Any,
            device: Any = None,
            providers: list[Any] | None = None,
            session_options: Any = None,
            adapters: Mapping[str, Any] | None = None,
        ) -> Any:
            """Return a runner as transformers' does, which has the ``adapters``, by name."""
            options = quiet_options() if session_options is None else session_options
            parent: Any = super()
            runner = parent.from_program(program, metadata, device, providers, options)
            for name, adapter in (adapters or {}).items():
                runner.adapters.load_adapter(name, adapter)
            return runner

        def __call__(
            self, share_inputs: bool = True, share_outputs: bool = False, adapter: str | None = None, **kwargs: Any
        ) -> Any:
            """Run the program with an adapter; None computes the base."""
            if self.replays_cuda_graph and adapter is not None:
                raise ConfigError("a session that replays a CUDA graph keeps the inputs of its first call: turn it off")
            bound: Any = copy.copy(self)
            bound.session = _SessionWithAdapter(self.adapters, adapter)
            return runner_base.__call__(bound, share_inputs, share_outputs, **kwargs)

    return OnnxAdapterExporter, OnnxAdapterRunner


def _take_prepared(metadata: Any) -> PreparedExport:
    found: PreparedExport = metadata.prepared
    del metadata.prepared
    return found


class _SessionWithAdapter:
    """A session of ONNX Runtime whose IO bindings have the inputs of an adapter."""

    def __init__(self, adapters: OnnxSession, adapter: str | None) -> None:
        self._adapters, self._adapter = adapters, adapter

    def io_binding(self) -> Any:
        return self._adapters.io_binding(self._adapter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapters.session, name)
