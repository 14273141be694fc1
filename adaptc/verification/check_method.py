"""Test a user's own method on small layers of every kind: its promises, and programs made with it.

The promises are those of ``passes.protocol.method_checks``, which ``compile`` checks for every method that is not
adaptc's own. Then follows what a user does with an adapter: compile, train, merge, write files, swap, save. A layer
that the method refuses with a TargetError is no fault, as long as some layer is left.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.adapter_files.directory import write_adapter
from adaptc.binding.bind import file_tensors
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.errors import AdaptcError, ConfigError, MethodError, TargetError
from adaptc.methods import ProgramConfig, TargetedConfig, check_registered
from adaptc.passes.protocol.method_checks import TRACED_PROMISES, VALUE_PROMISES
from adaptc.passes.protocol.method_names import check_names
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model, plan_adapters
from adaptc.program.files.program_file import load_program, save_program
from adaptc.progress import stage
from adaptc.runtime.options import RunOptions
from adaptc.tables import Column, Report, Table
from adaptc.verification.verify import verify_program

#: the largest difference that counts as rounding in float64, relative to the largest output
MAX_ERROR = 1e-9
BATCH = 3


class _Parameter(nn.Module):
    """A module whose parameter is read by no linear layer: a matrix, or with ``experts`` a matrix for each expert."""

    def __init__(self, inputs: int, outputs: int, experts: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*([experts] if experts else []), outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,...oi->b...o", x, torch.sin(self.weight) if self.weight.ndim == 2 else self.weight)


@dataclass(frozen=True)
class LayerCase:
    """A kind of layer.

    ``build``: makes the layer for sizes (inputs, outputs). ``sample_shape``: the shape of one sample of its input.
    ``parameter``: whether it is targeted by ``target_parameters``.
    """

    build: Callable[[int, int], nn.Module]
    sample_shape: Callable[[int], tuple[int, ...]]
    is_parameter: bool = False

    def make_args(self, inputs: int) -> tuple[Tensor]:
        shape = (BATCH, *self.sample_shape(inputs))
        if isinstance(self.build(inputs, 1 if self.is_parameter else inputs), nn.Embedding):
            return (torch.randint(inputs, shape),)
        return (torch.randn(shape, dtype=torch.float64),)


LAYERS: dict[str, LayerCase] = {
    "linear": LayerCase(nn.Linear, lambda i: (4, i)),
    "embedding": LayerCase(nn.Embedding, lambda i: (4,)),
    "conv1d": LayerCase(lambda i, o: nn.Conv1d(i, o, 3, stride=2, padding=1), lambda i: (i, 7)),
    "conv2d": LayerCase(lambda i, o: nn.Conv2d(i, o, (3, 1), bias=False), lambda i: (i, 5, 3)),
    "groups": LayerCase(lambda i, o: nn.Conv2d(i, o, 3, groups=2, padding=1), lambda i: (i, 4, 3)),
    "transposed": LayerCase(lambda i, o: nn.ConvTranspose1d(i, o, 3, stride=2), lambda i: (i, 5)),
    "parameter": LayerCase(_Parameter, lambda i: (i,), is_parameter=True),
    "experts": LayerCase(lambda i, o: _Parameter(i, o, 3), lambda i: (i,), is_parameter=True),
}


@dataclass(frozen=True)
class MethodCheck:
    """A check at one layer. ``passed`` None: there was nothing to check, and ``note`` says why."""

    name: str
    layer: str
    passed: bool | None
    note: str = ""


@dataclass(frozen=True, repr=False)
class MethodReport(Report):
    """The result of :func:`check_method`. ``refused``: layer -> why the method does not take it."""

    ROWS = ("checks",)

    method: str
    checks: tuple[MethodCheck, ...]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Return whether at least one check was run, and none failed."""
        ran = [c.passed for c in self.checks if c.passed is not None]
        return bool(ran) and all(ran)

    @property
    def failed(self) -> list[MethodCheck]:
        return [c for c in self.checks if c.passed is False]

    def sections(self) -> list[str | Table]:
        cells = {(c.name, c.layer): {True: "pass", False: "FAIL", None: "-"}[c.passed] for c in self.checks}
        layers = [n for n in LAYERS if n not in self.refused]
        rows = [
            [name, *(cells.get((name, n), "-") for n in layers)] for name in dict.fromkeys(c.name for c in self.checks)
        ]
        checks_table = Table([Column("check", no_wrap=True), *(Column(n, no_wrap=True) for n in layers)], rows)
        failed = []
        for name in dict.fromkeys(c.name for c in self.failed):  # most faults show at every layer
            (first, *rest) = (c for c in self.failed if c.name == name)
            failed.append(f"{name}, at {first.layer}" + (f" and {len(rest)} more" if rest else "") + f": {first.note}")
        refused = [f"{n}: refused. {why}" for n, why in self.refused.items()]
        verdict = "keeps its promises" if self.ok else "does NOT keep its promises" if failed else "could not be tried"
        return [f"{self.method} {verdict}", checks_table, "\n".join(failed), "\n".join(refused)]

    def values(self) -> dict[str, Any]:
        """Return a dict of ``method``, ``ok``, ``checks`` (one dict each) and ``refused`` (layer -> why)."""
        checks = [vars(c) for c in self.checks]
        return {"method": self.method, "ok": self.ok, "checks": checks, "refused": dict(self.refused)}


def check_method(
    config: TargetedConfig,
    *,
    sizes: tuple[int, int] = (24, 36),
    progress: bool = False,
    raise_on_failure: bool = False,
) -> MethodReport:
    """Test the method of ``config`` on small layers of every kind, print the report, and return it.

    It takes about half a minute.

    Args:
        config: a config of your method, registered with :func:`adaptc.methods.register_method`; its targets are
            ignored.
        sizes: inputs and outputs of the layers, for methods that need certain sizes. Both must be even, and they must
            differ, since a method that confuses two axes would pass otherwise.
        progress: whether to show a bar on a terminal from the start.
        raise_on_failure: whether to raise where a check failed.

    Returns:
        a report of all checks; ``report.ok`` sums up.

    Raises:
        ConfigError: ``config`` is no config of layers, or the sizes cannot be used.
        MethodError: the method has hooks under names of an older adaptc. With ``raise_on_failure`` also where a check
            failed.

    Example:
        >>> adaptc.methods.register_method(ShiftConfig, Shift)
        >>> report = adaptc.methods.check_method(ShiftConfig())  # doctest: +ELLIPSIS
        ShiftConfig keeps its promises...
    """
    if isinstance(config, ProgramConfig):
        raise ConfigError(
            f"check_method tries methods of layers, and {type(config).__name__} is of the program: adaptc.compile "
            "tries what such a method promises"
        )
    if not isinstance(config, TargetedConfig):
        raise ConfigError(f"check_method takes a config, such as LoraConfig(r=4), not a {type(config).__name__}")
    if len(sizes) != 2 or sizes[0] == sizes[1] or any(s < 2 or s % 2 for s in sizes):
        raise ConfigError(f"sizes={sizes!r} must be two different even numbers, the inputs and outputs of layers")
    check_names(config.method("", "linear"))
    checks: list[MethodCheck] = []
    refused: dict[str, str] = {}
    text = f"checking the method of {type(config).__name__}"
    with stage(text, always=progress) as progress_stage, torch.random.fork_rng(devices=[]):
        for name in progress_stage.track(LAYERS):
            torch.manual_seed(0)
            try:
                checks += _LayerTrial(config, name, sizes).run()
            except TargetError as error:
                refused[name] = _first_line(error)
    report = MethodReport(type(config).__name__, tuple(checks), refused)
    if raise_on_failure and not report.ok:
        raise MethodError(str(report))
    print(report)
    return report


class _LayerTrial:
    """A test of a method at one layer."""

    def __init__(self, config: TargetedConfig, layer: str, sizes: tuple[int, int]) -> None:
        layer_case = LAYERS[layer]
        targets: dict[str, Any] = {"target_modules": None, "target_parameters": None, "exclude_modules": None}
        targets |= {"target_parameters": ["layer.weight"]} if layer_case.is_parameter else {"target_modules": ["layer"]}
        self.config, self.layer, self.args = config.replace(**targets), layer, layer_case.make_args(sizes[0])
        self.model = nn.Sequential(OrderedDict(layer=layer_case.build(*sizes), tanh=nn.Tanh())).double().eval()

    def run(self) -> Iterator[MethodCheck]:
        """Yield the checks at this layer; raise TargetError where the method refuses the layer."""
        spec = plan_adapters(self.model, self.config, RunOptions(), example_inputs=self.args).spec
        (a,) = spec.attachments
        method, op = a.method.evaluated().unwrap(spec.ops[a.id])
        promises = [self._run_check("registered", lambda: check_registered(method))]
        promises += [
            self._run_check(promise.__name__.replace("_", " "), partial(promise, method, op))
            for promise in (*TRACED_PROMISES, *VALUE_PROMISES)
        ]
        yield from promises
        keeps_promises = all(c.passed for c in promises)
        for name, check in (
            ("trains", self._check_training),
            ("merges and unmerges", self._check_merge),
            ("adapter files", self._check_files),
            ("swaps to other sizes", self._check_swap),
            ("program files", self._check_program_file),
        ):
            # compile refuses a method that breaks a promise, and each of these would report the same error again.
            yield (
                self._run_check(name, check)
                if keeps_promises
                else MethodCheck(name, self.layer, None, "a promise is broken")
            )

    def _run_check(self, name: str, check: Callable[[], str | None]) -> MethodCheck:
        try:
            note = check()
        except Exception as error:  # whatever goes wrong inside a method is what the report is for
            kind = "" if isinstance(error, AdaptcError) else f"{type(error).__name__}: "
            return MethodCheck(name, self.layer, False, kind + _first_line(error))
        return MethodCheck(name, self.layer, None if note else True, note or "")

    # -- what a user does with an adapter ------------------------------------------------------------------------------

    def _compile(self, adapter: Any, training: bool = False) -> AdaptedProgram:
        return compile_model(
            AdaptedProgram, self.model, adapter, RunOptions(), example_inputs=self.args, training=training
        )

    @cached_property
    def program(self) -> AdaptedProgram:
        """Return a program whose adapter changes the layer's output: first values, plus noise on trained slots."""
        program = self._compile(self.config)
        (a,) = program.adaptation.attachments
        with torch.no_grad():
            for name, slot in a.method.slots(program.ops[a.id]).items():
                value = program.binding.values[a.slots[name]]
                if slot.trainable and value.is_floating_point():
                    value.add_(torch.randn_like(value), alpha=0.05)
        return program

    def _run_program(self, program: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            return program(*self.args)

    def _require_equal(self, subject: str, found: Tensor) -> None:
        expected = self._run_program(self.program)
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not error <= MAX_ERROR:
            raise MethodError(f"{subject} differs from the program by {error:.2e}")

    def _check_training(self) -> str | None:
        module = self._compile(self.config, training=True).module()
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            return "nothing is trainable"
        out = module(*self.args)
        (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
        if not any(p.grad is not None and p.grad.any() for p in trainable.values()):
            raise MethodError(f"no gradient reaches {', '.join(trainable)}")
        return None

    def _check_merge(self) -> str | None:
        report = verify_program(self.program, self.model)
        if not report.ok:
            raise MethodError(
                "; ".join(f"{c.name}: {c.note or f'error {c.error:.2e}'}" for c in report.checks if c.passed is False)
            )
        notes = [c.note for c in report.checks if c.passed is None]
        return notes[0] if notes else None

    def _write_adapter(self, folder: str) -> Path:
        binding = self.program.binding
        return write_adapter(folder, binding.config.to_dict(), file_tensors(self.program.spec(), binding))

    def _check_files(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._require_equal(
                "a program compiled from the adapter's file",
                self._run_program(self._compile(self._write_adapter(folder))),
            )

    def _check_swap(self) -> str | None:
        (a,) = self.program.adaptation.attachments
        method = a.method.unwrap(self.program.ops[a.id])[0]
        fields = {f.name for f in dataclasses.fields(self.config)} & method.swappable
        size_options = {
            n: v for n in sorted(fields) if isinstance(v := getattr(self.config, n), int) and not isinstance(v, bool)
        }
        if not size_options:
            return "adapters have no size to choose"
        other = self._compile(self.config.replace(**{n: 2 * v for n, v in size_options.items()}))
        with tempfile.TemporaryDirectory() as folder:
            other.install(bind_adapter(other, self._write_adapter(folder)))
            self._require_equal(
                f"a program compiled with twice {', '.join(size_options)} and swapped", self._run_program(other)
            )
        return None

    def _check_program_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = save_program(self.program, Path(folder, "program.pt2"))
            loaded = load_program(AdaptedProgram, path, RunOptions())
            if list(loaded.adaptation.attachments) != list(self.program.adaptation.attachments):
                raise MethodError("its options are not what they were: options() and from_options() must be inverse")
            self._require_equal("the program read from its file", self._run_program(loaded))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
