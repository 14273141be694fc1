"""Train the adapters of a bank while adapters come and go.

Each adapter has an optimizer, a scheduler, clipping, a number of steps and first values of its own. Gradients of an
adapter come from its own rows alone, so a step of many adapters is the step that each would take alone.

The program runs as in inference: its dropout is off, for one mask would be drawn for rows of several adapters.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from adaptc.adapter_files.load import has_tensors
from adaptc.bank.bank import Bank
from adaptc.bank.base_program import check_bank_options
from adaptc.bank.row_adapters import adapter_names_in, check_adapter_names, parse_row_adapters
from adaptc.bank.stack_placement import StackPlacement, make_placement
from adaptc.bank.training.adapter_trainer import (
    AdapterTrainer,
    TrainingOptions,
    read_training_state,
    write_training_state,
)
from adaptc.bank.training.row_losses import (
    Loss,
    RowBatch,
    add_row_gradients,
    as_arguments,
    losses_by_name,
    names_of_rows,
)
from adaptc.bank.training.step_report import AdapterLoss, StepReport
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.locks import reset_after_fork
from adaptc.state.adapter_output import write_adapter
from adaptc.state.core import ProgramCore
from adaptc.state.runner import FORWARD
from adaptc.state.values import Constraints
from adaptc.torch_modes import outside_modes

#: a function of a config and of a source of random numbers that gives the binding that a new adapter begins with
FirstValues = Callable[[Any, torch.Generator | None], Binding]


class TrainingBank(Bank):
    """Adapters by name that train on rows of their own, made by ``AdaptedProgram.bank(training=True)``.

    ``first_values`` makes the binding of a config. ``defaults`` train adapters that are added without options of their
    own.

    Example:
        >>> trained = adaptc.compile(model, LoraConfig(r=2, target_modules=["0"]), example_inputs=x, training=True)
        >>> bank = trained.bank(training=True)
        >>> bank.add("r4", LoraConfig(r=4, target_modules=["0"]), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        >>> losses = bank.forward_backward(x, ["r4"] * len(x), lambda out, target: out.square().mean())
        >>> bank.step()["r4"].steps
        1
    """

    placement: StackPlacement

    def __init__(
        self,
        placement: StackPlacement,
        first_values: FirstValues,
        adapters: Mapping[str, Any] | None = None,
        defaults: TrainingOptions | None = None,
        **options: Any,
    ) -> None:
        if not placement.base_program.training:
            raise ConfigError(
                "the program was captured for inference, and the adapters of its banks do not train: "
                "compile(model, config, training=True).bank(training=True)"
            )
        self._first_values, self._defaults = first_values, defaults or TrainingOptions()
        #: name -> what trains the adapter
        self._trainers: dict[str, AdapterTrainer] = {}
        self._step_lock = reset_after_fork(threading.RLock())
        super().__init__(placement)
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter, **options)

    # -- adapters ------------------------------------------------------------------------------------------------------

    @outside_modes()
    def add(
        self,
        name: str,
        adapter: Any,
        *,
        optimizer: Callable[[list[Tensor]], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        max_grad_norm: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        """Add an adapter to train. After an error the bank is unchanged.

        Args:
            name: its name.
            adapter: a config for a new adapter, or an adapter as ``Bank.add`` takes it, whose values are copied. Of
                configs, the method is the program's and the layers are some of its layers.
            optimizer: a function of a list of parameters that gives an optimizer, such as
                ``lambda params: torch.optim.AdamW(params, lr=1e-4)``. None for the bank's, or AdamW with torch's
                defaults.
            scheduler: a function of the optimizer that gives a scheduler of torch, which is stepped with the optimizer.
                None for the bank's, or none.
            max_grad_norm: the norm to which the adapter's gradients are clipped. None for the bank's, or no clipping.
            seed: the seed of a new adapter's first values; None for torch's global generator.
            **options: the options of ``adaptc.swap``, for an adapter that has values.

        Raises:
            ConfigError: the name is taken, the bank is full, or an option cannot be honoured, such as dropout.
            SwapError: the adapter needs other sites than the program has.
            CheckpointError: the adapter does not fit, or is not finite.
        """
        self._check_name(name)
        training = self._defaults.overridden_by(TrainingOptions(optimizer, scheduler, max_grad_norm))
        binding = self._bind_new(name, adapter, seed, options)
        trainer = AdapterTrainer(name, binding, training, self._constraints_of(binding))
        with self._table.lock:
            self._store_new(name, binding)
            self._trainers[name] = trainer

    def _bind_new(self, name: str, adapter: Any, seed: int | None, options: Mapping[str, Any]) -> Binding:
        has_values = has_tensors(adapter) or isinstance(getattr(adapter, "binding", adapter), Binding)
        if has_values and seed is not None:
            raise ConfigError(f"seed={short_repr(seed)} is for the first values of a config, and {name!r} has values")
        if not has_values:
            if options:
                raise ConfigError(f"{next(iter(options))} is for adapters with values, and {name!r} is a config")
            adapter = self._first_values(adapter, _seeded_generator(seed))
        binding = _own_parameters(self._bind(name, adapter, options), self.placement)
        for method in binding.methods.values():
            if p := getattr(method, "dropout", 0.0):
                raise ConfigError(
                    f"adapter {name!r} has a dropout of {p}, which a bank that trains does not have, since one mask "
                    "would be drawn for rows of several adapters: set it to 0"
                )
        return binding

    def _constraints_of(self, binding: Binding) -> Constraints:
        base = self.placement.base_program
        return Constraints(base.attachments, base.ops, binding)

    def replace(self, name: str, adapter: Any, **options: Any) -> NoReturn:
        """Raise AdaptcError: the optimizer of an adapter is of its parameters."""
        raise AdaptcError(
            "an adapter in training is not replaced, for its optimizer is of its own parameters: bank.remove(name), "
            "and then bank.add(name, adapter, optimizer=...)"
        )

    def remove(self, name: str) -> None:
        """Remove an adapter with its optimizer; a batch that has begun keeps its values, and its gradients are dropped.

        Args:
            name: the name of the adapter.

        Raises:
            AdaptcError: the bank does not have the name.
        """
        with self._table.lock:
            super().remove(name)
            del self._trainers[name]

    def trainer(self, name: str) -> AdapterTrainer:
        """Return what trains an adapter: its parameters, optimizer, scheduler and number of steps.

        Args:
            name: the name of the adapter.

        Returns:
            the trainer.

        Raises:
            AdaptcError: the bank does not have the name.
        """
        check_adapter_names([name], self._trainers)
        return self._trainers[name]

    # -- training ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapters: Any = ..., cu_seq_lens: Any = None, **kwargs: Any) -> Any:
        """Run the program as ``Bank`` does; gradients reach the adapters that rows have.

        A value that is not finite in one row may reach the gradients of other adapters. :meth:`forward_backward` keeps
        them apart.
        """
        if torch.is_grad_enabled():
            for name in adapter_names_in(parse_row_adapters(adapters)):
                if (trainer := self._trainers.get(name)) is not None:
                    trainer.constrain()
        return super().__call__(*args, adapters=adapters, cu_seq_lens=cu_seq_lens, **kwargs)

    def forward_backward(
        self,
        inputs: Any,
        adapters: Sequence[str | None],
        loss: Loss | Mapping[str, Loss],
        targets: Any = None,
    ) -> dict[str, AdapterLoss]:
        """Run a batch, and add to the gradients of each adapter those of its own loss.

        An adapter whose loss function raises, or whose loss or gradients are not finite, gets no gradients. The others
        get those of a batch without its rows.

        Args:
            inputs: the program's inputs: a tensor, a tuple, or a dict of keywords.
            adapters: for each row a name, or None for a row of the base, which has no loss.
            loss: a function of an adapter's outputs and targets that gives a scalar tensor, or a dict of such functions
                by name. It gets the rows of that adapter alone.
            targets: a tensor, or a dict or tuple of tensors, with the rows along the first axis.

        Returns:
            name -> the :class:`AdapterLoss` of each adapter.

        Raises:
            AdaptcError: the bank does not have a name, a row has a mix, or the call fails for every adapter.
            ConfigError: an adapter has no loss function.
        """
        names = names_of_rows(adapters)
        check_adapter_names([n for n in dict.fromkeys(names) if n is not None], self._trainers)
        losses = losses_by_name(loss, names)
        args, kwargs = as_arguments(inputs)
        self.placement.check_call(len(names), args, kwargs)
        named = {str(i): a for i, a in enumerate(args)} | kwargs

        def run(values: Mapping[str, Any], rows: Sequence[str | None]) -> Any:
            keywords = {n: values[n] for n in kwargs}
            return self(*(values[str(i)] for i in range(len(args))), adapters=[*rows], **keywords)

        axes = self.placement.row_programs[FORWARD].batch.inputs
        with self._step_lock:
            trainers = dict(self._trainers)
            return add_row_gradients(RowBatch(run, named, names, targets, losses, axes), trainers)

    def step(self, names: Collection[str] | None = None) -> StepReport:
        """Take a step of each adapter that got gradients since its last step; all others stay as they are.

        Args:
            names: the adapters; None for all that got gradients.

        Returns:
            a report of each adapter's step. A step is skipped, and told, where its gradients are not finite.

        Raises:
            AdaptcError: the bank does not have a name, or there are no gradients.
        """
        with self._step_lock:
            trainers = dict(self._trainers)
            if names is not None:
                if isinstance(names, str):
                    raise AdaptcError(f"names={names!r} must be a list of names")
                check_adapter_names(names, trainers)
            due = [t for n, t in trainers.items() if (names is None or n in names) and t.gradients]
            if not due:
                raise AdaptcError(
                    "no adapter has gradients: call bank.forward_backward, or backward() on a loss of the bank's "
                    "outputs, before bank.step()"
                )
            return StepReport({t.name: t.step() for t in due})

    def zero_grad(self) -> None:
        """Drop the gradients of all adapters."""
        for trainer in list(self._trainers.values()):
            trainer.zero_grad()

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_adapter(self, name: str, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write an adapter as ``adaptc.save_adapter`` does.

        Args:
            name: the name of the adapter.
            path: the directory.
            **options: the options of ``adaptc.save_adapter``.

        Returns:
            the path that was written.

        Raises:
            AdaptcError: the bank does not have the name.
            CheckpointError: the path cannot be written.
        """
        check_adapter_names([name], self._trainers)
        with self._step_lock:
            return write_adapter(self.program, path, self.adapters[name], **options)

    def save_state(self, name: str, path: str | os.PathLike[str]) -> Path:
        """Write an adapter as a PEFT directory, and beside it what a run needs to go on with it.

        Args:
            name: the name of the adapter.
            path: the directory.

        Returns:
            the directory.

        Raises:
            AdaptcError: the bank does not have the name.
            CheckpointError: the path cannot be written.
        """
        trainer = self.trainer(name)
        with self._step_lock:
            state = trainer.state_dict()
            return write_training_state(Path(path), lambda: write_adapter(self.program, path, trainer.binding), state)

    def load_state(self, name: str, path: str | os.PathLike[str], **training: Any) -> None:
        """Add an adapter that :meth:`save_state` wrote, to go on where it was.

        Args:
            name: its name, which may be another one than it had.
            path: the directory.
            **training: ``optimizer``, ``scheduler`` and ``max_grad_norm`` as :meth:`add` takes them, the same as then.

        Raises:
            ConfigError: the name is taken, or the bank is full.
            CheckpointError: the directory cannot be read, or was written with another optimizer.
        """
        state, source = read_training_state(path, self.device)
        self._check_name(name)
        options = self._defaults.overridden_by(TrainingOptions(**training))
        binding = self._bind_new(name, os.fspath(path), None, {})
        trainer = AdapterTrainer(name, binding, options, self._constraints_of(binding))
        trainer.load_state_dict(state, source)
        with self._table.lock:
            self._store_new(name, binding)
            self._trainers[name] = trainer

    # -- copies --------------------------------------------------------------------------------------------------------

    def __copy__(self) -> NoReturn:
        raise _copy_error()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise _copy_error()


def make_training_bank(
    program: ProgramCore, first_values: FirstValues, adapters: Mapping[str, Any] | None = None, **options: Any
) -> TrainingBank:
    """Return a bank of ``program`` whose adapters train, with the limits and options of ``AdaptedProgram.bank``.

    Raises ConfigError for an option that such a bank does not have.
    """
    for name in ("evict", "loader"):
        if options.pop(name, None):
            raise ConfigError(
                f"{name} is for banks that serve: what an adapter in training has learned would be lost. Leave it out, "
                "and remove adapters with bank.remove"
            )
    names = [f.name for f in fields(TrainingOptions)]
    defaults = TrainingOptions(**{n: options.pop(n) for n in names if n in options})
    placement = make_placement(program, options)
    check_bank_options(options)
    return TrainingBank(placement, first_values, adapters, defaults, **options)


def _own_parameters(binding: Binding, placement: StackPlacement) -> Binding:
    """Return the binding with parameters of its own that train: those of the sites that the adapter has."""
    base, trained, copies = placement.base_program, set[str](), dict[int, Tensor]()
    for a in base.attachments:
        if (method := binding.methods.get(a.id)) is not None:
            slots = a.method.slots(base.ops[a.id])
            trained |= {a.slots[n] for n, s in slots.items() if s.trainable and n in method.slots(base.ops[a.id])}

    def copied(fqn: str, t: Tensor) -> Tensor:
        if id(t) not in copies:
            if fqn in trained and (t.is_floating_point() or t.is_complex()):
                copies[id(t)] = nn.Parameter(t.detach().clone())
            else:
                copies[id(t)] = nn.Parameter(t.detach(), False) if isinstance(t, nn.Parameter) else t.detach()
        return copies[id(t)]

    ordered = sorted(binding.values.items(), key=lambda item: item[0] not in trained)
    made = {n: copied(n, t) for n, t in ordered}
    return replace(binding, values={n: made[n] for n in binding.values})


def _seeded_generator(seed: Any) -> torch.Generator | None:
    if seed is None:
        return None
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed={short_repr(seed)} must be an integer, or None for torch's global generator")
    return torch.Generator().manual_seed(seed)


def _copy_error() -> AdaptcError:
    return AdaptcError(
        "a bank that trains is not copied, for its optimizers are of its own parameters: bank.save_state writes an "
        "adapter with its optimizer, and bank.load_state of another bank goes on with it"
    )
