"""Make the module of a program that was a transformers model one that transformers' trainers take as a model.

It is a :class:`ProgramModule` and a ``PreTrainedModel`` under the model's class name. It has the model's config, and
takes the arguments of its ``forward`` as far as they change nothing. What would change the program is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.passes.train.checkpoint import checkpoint
from adaptc.passes.train.recomputed import RecomputedSegment
from adaptc.passes.train.set_mode import set_mode
from adaptc.state.core import ProgramCore
from adaptc.training.layer_tensors import LayerStandIn, insert_embedding_hook
from adaptc.training.module_files import PretrainedFiles
from adaptc.training.packed_calls import PackedCalls
from adaptc.training.program_module import ModuleFactory, ProgramModule, make_forward, shared_tables
from adaptc.training.reference_model import warn_of_copied_model, warn_of_second_model

_IGNORED = -100


class Backbone(nn.Module):
    """A program without its head, whose ``last_hidden_state`` is what the head would read.

    It takes the inputs of the module ``whole``. ``graph``: a graph that ``cut_at_head`` cut; it reads the tensors of
    ``whole``.
    """

    def __init__(self, module: PretrainedModule, graph: fx.GraphModule) -> None:
        super().__init__()
        share_tensors(module, graph)
        vars(self).update(shared_tables(graph), whole=module, graph_module=graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        whole: PretrainedModule = vars(self)["whole"]
        other, kwargs = whole.packed_calls.choose_module(kwargs)
        if other is not whole:
            return other.base_model(*args, **kwargs)
        args, kwargs = whole.inputs.fill_missing(args, kwargs)
        whole.constraints.enforce(whole.tensor_at)
        return BaseModelOutput(last_hidden_state=vars(self)["graph_module"](*args, **kwargs))


def share_tensors(module: nn.Module, graph: fx.GraphModule) -> None:
    """Let ``graph`` read the tensors of ``module``. It keeps the submodules that it runs itself: blocks, and segments
    that the backward computes again."""
    own = {n: m for n, m in graph.named_children() if isinstance(m, (fx.GraphModule, RecomputedSegment))}
    vars(graph).update(shared_tables(module))
    theirs = dict(module.named_children())
    vars(graph)["_modules"] = {
        n: m for n, m in theirs.items() if not isinstance(m, (fx.GraphModule, RecomputedSegment))
    } | own


def count_labels(labels: Tensor, has_virtual_tokens: bool) -> Tensor:
    """Return how many labels count in the loss of a causal language model.

    The first label of a row is not predicted, since no token precedes it, unless virtual tokens do.
    """
    return (labels[..., 0 if has_virtual_tokens else 1 :] != _IGNORED).sum()


class PretrainedModule(PretrainedFiles):
    """A module of a program that was a transformers model. :func:`pretrained_class` makes the subclasses that are used,
    which are ``PreTrainedModel`` as well."""

    #: the model's class
    model_class: ClassVar[type] = nn.Module

    def __init__(self, program: ProgramCore, owner: ProgramCore, graph: fx.GraphModule, making: ModuleFactory) -> None:
        embedding_hook = insert_embedding_hook(graph, program)
        super().__init__(program, owner, graph, making)
        source = self.source
        self.config = copy.deepcopy(source.config)
        self.generation_config = copy.deepcopy(source.generation_config)
        self.name_or_path = str(getattr(source.config, "name_or_path", "") or "")
        self.loss_type = source.loss_type
        #: the warnings that TRL has given, which it notes on the model so as to give each once
        self.warnings_issued: dict[str, bool] = {}
        self.all_tied_weights_keys: dict[str, str] = {}
        #: a function whose value is added to each loss; None for no addition
        self.extra_loss: Callable[[], Tensor | float] | None = None
        vars(self).update(port=embedding_hook, backbone=None)
        self.packed_calls = PackedCalls(self)

    # -- calls ---------------------------------------------------------------------------------------------------------

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Return whether calls take ``num_items_in_batch``: the number of labels that count in all batches of one step.
        The loss is then the sum over labels divided by that number."""
        aux = bool(getattr(self.config, "output_router_logits", False))
        own = any(m.changes("loss") for m, _ in self._program_methods())
        return self.source.is_causal_lm_loss and "labels" in self.inputs.names and not aux and not own

    def _check_pad_token(self) -> None:
        """Raise AdaptcError where a trainer changed the ``pad_token_id`` by which a sequence classifier finds the end
        of a row."""
        if "SequenceClassification" in self.model_class.__name__:
            now, captured = (c.get_text_config().pad_token_id for c in (self.config, self.source.config))
            if now != captured:
                raise AdaptcError(
                    f"pad_token_id is {now!r}, and the program was captured with {captured!r}, by which it finds the "
                    f"end of a row: set model.config.pad_token_id = {now!r}, and compile the model again"
                )

    def _program_methods(self) -> list[tuple[ProgramMethod, dict[str, Tensor]]]:
        """Return the methods that change the program and not a layer (:class:`ProgramMethod`), each with its slots by
        name."""
        binding = self.program.current
        values = {} if binding is None else binding.values
        found = [(a.method, a.slots) for a in self.program.adaptation.attachments]
        return [(m, {n: values[f] for n, f in slots.items()}) for m, slots in found if isinstance(m, ProgramMethod)]

    def forward(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        """Run the program on the arguments of the model's own ``forward``, and return what that returns.

        ``num_items_in_batch``: see :attr:`accepts_loss_kwargs`. Raises AdaptcError for inputs that the program was not
        captured for.
        """
        other, kwargs = self.packed_calls.choose_module(kwargs)
        if other is not self:
            self._refuse_if_sharded("a call with other inputs than the program was captured with")
            other.extra_loss = self.extra_loss
            return other.forward(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        self._check_pad_token()
        out = self._forward_with_loss(*self.inputs.call_names.arrange_arguments(args, kwargs), num_items_in_batch)
        return self.inputs.call_names.convert_output(out, args, kwargs)

    def _forward_with_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Return the output for the program's own inputs, with ``num_items_in_batch`` and the penalty worked into its
        loss."""
        labels = kwargs.get("labels")
        out = super().forward(*args, **kwargs)
        if labels is None or not hasattr(out, "loss"):
            return _without_loss(out) if "labels" in self.inputs.fills else out
        if num_items_in_batch is not None:
            if not self.accepts_loss_kwargs:
                raise AdaptcError("num_items_in_batch has no meaning for this program: its loss is no mean over labels")
            longer = [m.virtual_token_count(slots) for m, slots in self._program_methods() if m.changes("labels")]
            count = count_labels(labels, any(longer))
            # The mean over no labels is NaN: a batch in which none counts adds nothing.
            out.loss = torch.where(count > 0, out.loss * (count / num_items_in_batch), 0.0)
        if self.extra_loss is not None:
            out.loss = out.loss + self.extra_loss()
        return out

    @property
    def can_recapture(self) -> bool:
        """Return whether the model can be captured again: the program has adapters, was captured for training, and
        generates."""
        return self.source.skeleton is not None and bool(self.program.adaptation.attachments)

    def recapture_error(self) -> AdaptcError:
        """Return the error for a module that needs its model captured again, which it cannot be."""
        return AdaptcError(
            "the model of this module cannot be captured again, which generation and packed sequences need: that of "
            "adaptc.compile(model, config, training=True) can, of a model that generates"
        )

    def explain_failure(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the likely fault of a call that a layer refused, as the base class does. Token ids and labels outside
        the vocabulary count, too."""
        if found := super().explain_failure(args, kwargs):
            return found
        port = vars(self)["port"]
        sizes = {"input_ids": None if port is None else port.num_embeddings, "labels": self._class_count()}
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

    def _class_count(self) -> int | None:
        """Return the number of classes that the loss chooses from where these are tokens, which is the vocabulary size;
        else None."""
        return getattr(self.config, "vocab_size", None) if self.source.is_causal_lm_loss else None

    # -- what transformers asks of a model -----------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the first floating-point parameter, and warn a trainer that is about to load a second
        model of it."""
        warn_of_second_model(self)
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        warn_of_copied_model()
        return super().__deepcopy__(memo)

    def get_input_embeddings(self) -> LayerStandIn:
        """Return a stand-in for the input embeddings; hooks on it change the embeddings of calls (NEFTune). Raises
        AdaptcError where the program does not know its input embeddings."""
        if vars(self)["port"] is None:
            raise AdaptcError("the program does not know its input embeddings")
        return vars(self)["port"]

    def get_output_embeddings(self) -> LayerStandIn:
        """Return the weight and bias of the output layer, those of ``modules_to_save`` where they are trained.

        Raises AdaptcError for a layer with an adapter of another kind: its weight alone is not what the layer computes.
        Raises AdaptcError, too, where the program does not know its output layer.
        """
        path = self.source.output_embedding
        if path is None or not hasattr(self.get_submodule(path), "weight"):
            raise AdaptcError("the program does not know its output layer")
        layer = self.get_submodule(path)
        tensor_owners = {n: (layer, n) for n in ("weight", "bias") if getattr(layer, n, None) is not None}
        for a in self.program.adaptation.attachments:
            if a.module != path:
                continue
            if not a.method.replaces or len(a.slots) != 1 or a.param not in tensor_owners:
                raise AdaptcError(
                    f"the output layer {path!r} has an adapter, so its weight alone is not what it computes; leave it "
                    "out of target_modules, or train without what asks for it"
                )
            holder, _, name = next(iter(a.slots.values())).rpartition(".")
            tensor_owners[a.param] = self.get_submodule(holder), name
        return LayerStandIn(tensor_owners["weight"], tensor_owners.get("bias"))

    @property
    def base_model(self) -> nn.Module:
        """Return the program without its head, which trainers call that compute their own loss. Raises AdaptcError as
        :meth:`get_output_embeddings` does, and where the program does not end in one linear layer."""
        self._refuse_if_sharded("base_model")
        self.get_output_embeddings()
        if vars(self)["backbone"] is None:
            graph = self.factory.make_graph(self.program, self.source.output_embedding)
            insert_embedding_hook(graph, self.program, vars(self)["port"])
            if self.checkpoint_every is not None:
                checkpoint(graph, self.checkpoint_every)
            vars(self)["backbone"] = Backbone(self, graph)
            set_mode(graph, self.training, self.is_dropout_on)
            self._set_training_flags(self.training)
        return vars(self)["backbone"]

    def graph_modules(self) -> Sequence[fx.GraphModule]:
        backbone = vars(self).get("backbone")
        return [self.graph_module] if backbone is None else [self.graph_module, backbone.graph_module]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Compute repeated blocks again in the backward. Raises ConfigError for options of torch's checkpoint that a
        program does not have: reentrant checkpoints, layers left out, activations in other memory."""
        asked = {"every_n_layers": every_n_layers, "offload": offload, **(activation_checkpointing_kwargs or {})}
        known = {"every_n_layers": (1,), "offload": (False,), "use_reentrant": (False, None)}
        known["preserve_rng_state"] = (True,)
        if odd := {k: v for k, v in asked.items() if v not in known.get(k, ())}:
            raise ConfigError(
                f"gradient checkpointing of a program takes no {short_repr(odd)}: every repeated block is computed "
                "again, without re-entering autograd (use_reentrant=False)"
            )
        self.checkpoint()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **more: Any) -> None:
        """Compute repeated blocks again in the backward: the older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def activation_checkpointing_disable(self) -> None:
        self.keep_activations()

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.checkpoint_every is not None

    is_gradient_checkpointing = is_activation_checkpointing

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Do nothing: the program's weights are tied as the model's were."""

    def set_input_embeddings(self, *_: Any, **__: Any) -> Any:
        raise AdaptcError("the embeddings of a program are part of its graph: change the model, and compile it again")

    set_output_embeddings = resize_token_embeddings = set_input_embeddings

    @classmethod
    def can_generate(cls) -> bool:
        """Return whether the model's class generates, so that :meth:`generate` may."""
        return bool(getattr(cls.model_class, "can_generate", bool)())

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as the model's ``generate`` does, with the current adapter, in eval mode whatever mode the module is
        in.

        The first call captures a program that generates on the module's own tensors, as
        ``adaptc.compile_for_generation`` does. Raises AdaptcError for a module whose program was not captured for
        training. Raises, too, as that function and its ``generate`` do.
        """
        functions = self.program.adaptation.generate
        if functions is None:
            raise self.recapture_error()
        return functions.generate(self, inputs, generation_config, **kwargs)

    def generate_batch(self, inputs: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Any:
        """Generate for many prompts as the model's ``generate_batch`` does, with the current adapter.

        The first call captures a program as ``adaptc.compile_for_serving`` does, on the module's own tensors. Raises
        as :meth:`generate` does.
        """
        functions = self.program.adaptation.generate
        if functions is None:
            raise self.recapture_error()
        return functions.generate_batch(self, inputs, *args, **kwargs)

    def push_to_hub(self, *_: Any, **__: Any) -> Any:
        raise AdaptcError(
            "a program is not pushed: write the adapter with save_pretrained, and push that with huggingface_hub"
        )


@cache
def pretrained_class(
    model_class: type, n_args: int, names: tuple[str, ...], optional: frozenset[str]
) -> type[PretrainedModule]:
    """Return the class of modules for programs that were a ``model_class`` and take these inputs.

    ``n_args``: the number of positional inputs. ``names``: the keyword inputs, of which those in ``optional`` may be
    left out. Trainers read the class's name and the signature of its ``forward``.
    """
    from transformers import PreTrainedModel

    own = {
        "forward": make_forward(PretrainedModule, n_args, names, optional),
        "main_input_name": getattr(model_class, "main_input_name", "input_ids"),
        "config_class": getattr(model_class, "config_class", None),
        "model_class": model_class,
        "__module__": __name__,
    }
    return type(model_class.__name__, (PretrainedModule, PreTrainedModel), own)


def _without_loss(out: Any) -> Any:
    """Return a model's output without its loss, as the model returns it for a call without labels."""
    if not hasattr(out, "loss") or not isinstance(out, dict):
        return out
    return type(out)(**{k: v for k, v in out.items() if k != "loss"})
