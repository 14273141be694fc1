"""The module of a program that was a transformers model, as transformers' trainers expect one.

Before: a program that remembers its model. After: a :class:`ProgramModule` that is a ``PreTrainedModel`` under the
model's class name. It has the model's config, takes what that model's ``forward`` takes, as far as it changes nothing,
and saves an adapter directory. What would change the program (other embeddings, caches, generation) is refused by name.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaptc.binding.source import as_binding
from adaptc.capture.capture import Source
from adaptc.errors import AdaptcError, ConfigError, shown
from adaptc.passes.ir.module_paths import module_path, owners_of
from adaptc.passes.ir.program_method import ProgramMethod
from adaptc.passes.train.checkpoint import checkpoint
from adaptc.passes.train.recomputed import Recomputed
from adaptc.passes.train.set_mode import set_mode
from adaptc.program.core import ProgramCore
from adaptc.program.in_parts import first_of, mesh_of, whole
from adaptc.program.model_directory import taken, write_model
from adaptc.program.module_files import write_module
from adaptc.program.program_module import Making, ProgramModule, forward_taking, tables_of

_IGNORED = -100


class Tensors(nn.Module):
    """The ``weight`` and ``bias`` of a layer of a program, as they are now; hooks on it see and change what the layer
    gives. ``bias`` is None for a layer without one."""

    def __init__(self, holder: nn.Module, weight: str) -> None:
        super().__init__()
        vars(self)["_where"] = holder, weight

    @property
    def weight(self) -> Tensor:
        holder, name = vars(self)["_where"]
        return getattr(holder, name)

    @property
    def bias(self) -> Tensor | None:
        return getattr(vars(self)["_where"][0], "bias", None)

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, y: Tensor) -> Tensor:
        return y


class Backbone(nn.Module):
    """A program without its head. Takes what the module ``whole`` takes; ``last_hidden_state`` is what the head reads.

    ``graph``: made by ``cut_at_head``; it reads the tensors of ``whole``.
    """

    def __init__(self, whole: PretrainedModule, graph: fx.GraphModule) -> None:
        super().__init__()
        share(whole, graph)
        vars(self).update(tables_of(graph), whole=whole, graph_module=graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        whole: PretrainedModule = vars(self)["whole"]
        args, kwargs = whole.inputs.complete(args, kwargs)
        whole.constraints.hold(whole)
        return BaseModelOutput(last_hidden_state=vars(self)["graph_module"](*args, **kwargs))


def share(whole: nn.Module, graph: fx.GraphModule) -> None:
    """Let a graph read the tensors of ``whole``, but run what it has of its own: blocks, and segments of them."""
    own = {n: m for n, m in graph.named_children() if isinstance(m, (fx.GraphModule, Recomputed))}
    vars(graph).update(tables_of(whole))
    theirs = dict(whole.named_children())
    vars(graph)["_modules"] = {n: m for n, m in theirs.items() if not isinstance(m, (fx.GraphModule, Recomputed))} | own


class PretrainedModule(ProgramModule):
    """See the module docstring; made by :func:`pretrained`."""

    def __init__(self, program: ProgramCore, owner: ProgramCore, graph: fx.GraphModule, making: Making) -> None:
        port = _open_port(graph, program)
        super().__init__(program, owner, graph, making)
        source = self.source
        self.config = copy.deepcopy(source.config)
        self.generation_config = copy.deepcopy(source.generation_config)
        self.name_or_path = str(getattr(source.config, "name_or_path", "") or "")
        self.loss_type = source.loss_type
        #: what TRL notes on models, so as to warn once
        self.warnings_issued: dict[str, bool] = {}
        self.all_tied_weights_keys: dict[str, str] = {}
        #: what is added to a loss, where something is
        self.penalty: Callable[[], Tensor] | None = None
        vars(self).update(port=port, backbone=None)

    @property
    def source(self) -> Source:
        source = self.program.adaptation.source
        assert source is not None
        return source

    # -- calls ---------------------------------------------------------------------------------------------------------

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether calls take ``num_items_in_batch``: the labels that count in all batches of one step, by which the
        sum of the losses is then divided."""
        aux = bool(getattr(self.config, "output_router_logits", False))
        own = any(m.changes("loss") for m, _ in self._program_methods())
        return self.source.means_over_next_labels and "labels" in self.inputs.names and not aux and not own

    def _program_methods(self) -> list[tuple[ProgramMethod, dict[str, Tensor]]]:
        """Methods that speak of the program, with their slots."""
        binding = self.program.current
        values = {} if binding is None else binding.values
        found = [(a.method, a.slots) for a in self.program.adaptation.attachments]
        return [(m, {n: values[f] for n, f in slots.items()}) for m, slots in found if isinstance(m, ProgramMethod)]

    def forward(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        """What the model's own ``forward`` takes. Raises AdaptcError for what the program was not captured for."""
        out = self._answer(*self.inputs.calls.arranged(args, kwargs), num_items_in_batch)
        return self.inputs.calls.as_asked(out, args, kwargs)

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Of a call with the program's own inputs."""
        labels = kwargs.get("labels")
        out = super().forward(*args, **kwargs)
        if labels is None or not hasattr(out, "loss"):
            return _without_loss(out) if "labels" in self.inputs.fills else out
        if num_items_in_batch is not None:
            if not self.accepts_loss_kwargs:
                raise AdaptcError("num_items_in_batch has no meaning for this program: its loss is no mean over labels")
            # Tokens in front have a next one that counts, where they are the first.
            longer = [m.lengthens(slots) for m, slots in self._program_methods() if m.changes("labels")]
            first = 0 if any(longer) else 1
            count = (labels[..., first:] != _IGNORED).sum()
            # A batch without labels that count has no loss, and adds nothing.
            out.loss = torch.where(count > 0, out.loss * (count / num_items_in_batch), 0.0)
        if self.penalty is not None:
            out.loss = out.loss + self.penalty()
        return out

    def why_wrong(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Also tokens and labels that the vocabulary does not have."""
        if found := super().why_wrong(args, kwargs):
            return found
        port = vars(self)["port"]
        sizes = {"input_ids": None if port is None else port.num_embeddings, "labels": self._classes()}
        for name, size in sizes.items():
            t = kwargs.get(name)
            if size is None or not isinstance(t, Tensor) or t.is_floating_point() or t.is_meta:
                continue
            out = t[(t < 0) | (t >= size)]
            out = out[out != _IGNORED] if name == "labels" else out
            if len(out):
                also = f", or {_IGNORED} where there is none" if name == "labels" else ""
                return f"input {name!r} holds {out[0].item()}; expected numbers from 0 to {size - 1}{also}"
        return ""

    def _classes(self) -> int | None:
        """How many there are to choose from in the loss, where that is a word each."""
        return getattr(self.config, "vocab_size", None) if self.source.means_over_next_labels else None

    # -- what transformers asks of a model -----------------------------------------------------------------------------

    def get_input_embeddings(self) -> Tensors:
        """Hooks on it act on the embeddings (NEFTune). Raises AdaptcError where the program has none that it knows."""
        if vars(self)["port"] is None:
            raise AdaptcError("the program does not know its input embeddings")
        return vars(self)["port"]

    def get_output_embeddings(self) -> Tensors:
        """Weight and bias of the output layer. Raises AdaptcError for one that has an adapter, whose weight says only
        half of what it computes, and where the program has none that it knows."""
        path = self.source.output_embedding
        if path is None or not hasattr(self.get_submodule(path), "weight"):
            raise AdaptcError("the program does not know its output layer")
        if any(a.module == path for a in self.program.adaptation.attachments):
            raise AdaptcError(
                f"the output layer {path!r} has an adapter, so its weight alone is not what it computes; leave it out "
                "of target_modules and modules_to_save, or train without what asks for it"
            )
        return Tensors(self.get_submodule(path), "weight")

    @property
    def base_model(self) -> nn.Module:
        """The program without its head: trainers that compute their own loss call it. Raises AdaptcError as
        :meth:`get_output_embeddings` does."""
        self.get_output_embeddings()
        if vars(self)["backbone"] is None:
            graph = self.making.graph(self.program, self.source.output_embedding)
            _open_port(graph, self.program, vars(self)["port"])
            if self.checkpointed is not None:
                checkpoint(graph, self.checkpointed)
            vars(self)["backbone"] = Backbone(self, graph)
            set_mode(graph, self.training)
            self._set_flags(self.training)
        return vars(self)["backbone"]

    def graph_modules(self) -> Sequence[fx.GraphModule]:
        backbone = vars(self).get("backbone")
        return [self.graph_module] if backbone is None else [self.graph_module, backbone.graph_module]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Compute repeated blocks again in the backward. Raises ConfigError for what torch's checkpoint is not asked
        for here: reentrant ones, layers left out, memory elsewhere."""
        asked = {"every_n_layers": every_n_layers, "offload": offload, **(activation_checkpointing_kwargs or {})}
        known = {"every_n_layers": (1,), "offload": (False,), "use_reentrant": (False, None)}
        known["preserve_rng_state"] = (True,)
        if odd := {k: v for k, v in asked.items() if v not in known.get(k, ())}:
            raise ConfigError(
                f"gradient checkpointing of a program takes no {shown(odd)}: every repeated block is computed again, "
                "without re-entering autograd (use_reentrant=False)"
            )
        self.checkpoint()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **more: Any) -> None:
        """The same under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def activation_checkpointing_disable(self) -> None:
        self.keep_activations()

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.checkpointed is not None

    is_gradient_checkpointing = is_activation_checkpointing

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """The program's weights are tied as the model's were."""

    def set_input_embeddings(self, *_: Any, **__: Any) -> Any:
        raise AdaptcError("the embeddings of a program are part of its graph: change the model, and compile it again")

    set_output_embeddings = resize_token_embeddings = set_input_embeddings

    def generate(self, *_: Any, **__: Any) -> Any:
        raise AdaptcError(
            "a program has no cache to generate with: save the adapter (adaptc.save_adapter) and load it into the model"
        )

    def push_to_hub(self, *_: Any, **__: Any) -> Any:
        raise AdaptcError(
            "a program is not pushed: write the adapter with save_pretrained, and push that with huggingface_hub"
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        save_embedding_layers: bool = False,
        **options: Any,
    ) -> None:
        """Write the adapter as a PEFT directory, or, of a program that was merged or unloaded, the model as a
        transformers directory, where ``is_main_process``. ``state_dict``: tensors to be written instead, in PEFT's keys
        or in the model's. Of a module that FSDP2 holds in parts all processes call it, and the first writes.

        In an adapter's directory ``model.safetensors`` is a second name of its weights, which Trainer looks for when it
        resumes. Of a model ``options`` are ``max_shard_size`` and ``save_original_format``, as transformers has them.
        Raises ConfigError for other options, CheckpointError as ``adaptc.save_adapter`` does and as
        :func:`adaptc.program.model_directory.write_model` does, and where an adapter's directory has a
        ``model.safetensors`` that is something else.
        """
        if push_to_hub:
            raise ConfigError("push_to_hub=True: write the directory, and push it with huggingface_hub")
        options = {k: v for k, v in options.items() if v is not None}
        if self.program.current is None:
            options |= {"safe_serialization": safe_serialization, "save_embedding_layers": save_embedding_layers}
            self._save_model(save_directory, is_main_process, state_dict, taken(options))
            return
        if options:
            raise ConfigError(
                f"save_pretrained of a program writes its adapter, and takes no {', '.join(sorted(options))}; "
                "adaptc.merge(program).module().save_pretrained writes the model"
            )
        write_module(
            self,
            save_directory,
            None if state_dict is None else as_binding(self.program, state_dict),
            here=is_main_process,
            for_trainer=safe_serialization,
            safe_serialization=safe_serialization,
            base_model=self.name_or_path or None,
            save_embedding_layers=save_embedding_layers,
        )

    def _save_model(
        self,
        path: str | os.PathLike[str],
        here: bool,
        state: Mapping[str, Tensor] | None,
        options: Mapping[str, Any],
    ) -> None:
        own = self.tensors()
        own = {k: own[k] for k in self.program.state_dict if k in own}
        mesh = next((m for t in own.values() if (m := mesh_of(t)) is not None), None)
        own = {k: whole(t) for k, t in own.items()} if state is None else dict(state)
        with first_of(mesh) as first:
            if first and (here or mesh is not None):
                write_model(self.source, own, path, **options)


@cache
def pretrained(kind: type, n_args: int, names: tuple[str, ...], optional: frozenset[str]) -> type[PretrainedModule]:
    """The class of modules of programs that were a ``kind``. Trainers read its name and what ``forward`` takes."""
    from transformers import PreTrainedModel

    own = {
        "forward": forward_taking(PretrainedModule, n_args, names, optional),
        "main_input_name": getattr(kind, "main_input_name", "input_ids"),
        "config_class": getattr(kind, "config_class", None),
        "__module__": __name__,
    }
    return type(kind.__name__, (PretrainedModule, PreTrainedModel), own)


def _without_loss(out: Any) -> Any:
    """What a model gives that was not given labels."""
    if not hasattr(out, "loss") or not isinstance(out, dict):
        return out
    return type(out)(**{k: v for k, v in out.items() if k != "loss"})


def _open_port(graph: fx.GraphModule, program: ProgramCore, port: Tensors | None = None) -> Tensors | None:
    """Lead what the input embeddings give through a module that can have hooks, a new one or ``port``."""
    source = program.adaptation.source
    path = None if source is None else source.input_embedding
    known = owners_of(program)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        weight = node.args[0]
        if path and module_path(node, known) == path and weight.op == "get_attr":
            holder, _, name = str(weight.target).rpartition(".")
            port = port or Tensors(graph.get_submodule(holder), name)
            target = next(n for i in range(10**6) if not hasattr(graph, n := f"input_embeddings{i or ''}"))
            graph.add_submodule(target, port)
            with graph.graph.inserting_after(node):
                through = graph.graph.call_module(target, (node,))
            through.meta = dict(node.meta)
            node.replace_all_uses_with(through, delete_user_cb=lambda user, through=through: user is not through)
            graph.recompile()
            return port
    return None
