"""Define ``XLoraConfig``: the options of X-LoRA, under PEFT's names, and two fields that describe its experts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import sqrt
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError
from adaptc.methods._shared.config import AdapterConfig, TargetedConfig
from adaptc.methods._shared.method_parts import AdapterContent, ExpertAdapter
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.option_checks import check_integers, check_probability
from adaptc.methods.lora_family.experts import OWNER, RANK_AXES, SCALES, join_experts
from adaptc.methods.routed.xlora import CLASSIFIER, XLora, classifier_layers

METHOD_NAME = "X-LoRA"
#: fields that PEFT does not have: the configs of the experts, and their ranks and scales at each site
_EXPERT_FIELDS = ("experts", "sites")


@dataclass
class XLoraConfig(TargetedConfig):
    """PEFT's ``XLoraConfig``: same names, same defaults. The experts say which layers are adapted.

    Attributes:
        hidden_size: the width of the model's hidden states; 4096 for None.
        adapters: name -> directory of a plain LoRA adapter, of any ranks and layers. Names are free here; PEFT runs an
            adapter only if they are ``'0'``, ``'1'``, and so on.
        enable_softmax: whether the scalings are a softmax over the experts.
        enable_softmax_topk: whether the softmax is over the ``top_k_lora`` experts alone.
        layerwise_scalings: whether each layer has scalings of its own.
        xlora_depth: the number of layers of the classifier.
        xlora_size: the width of the classifier.
        xlora_dropout_p: the dropout probability of the classifier.
        use_trainable_adapters: whether the experts are trained, too.
        softmax_temperature: the divisor of the logits before the softmax.
        top_k_lora: how many experts act on a token; None for all.
        scaling_pass_value: the scaling of every expert in the duplicated base pass that the classifier reads.
        global_scaling_weight: the factor on all scalings.
        experts: the configs of the experts, filled in when they are read.
        sites: layer -> rank and scale of each expert there, filled in when they are read. It is in the order of the
            model's layers, in which ``layerwise_scalings`` numbers them.

    Example:
        >>> config = adaptc.XLoraConfig(hidden_size=4096, adapters={"0": "path/of/one", "1": "path/of/another"})
    """

    peft_type: ClassVar[str] = "XLORA"
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({"hidden_size": 24, "adapters": {"0": "path"}},)
    unsupported_fields: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
            "the experts say which layers are adapted",
        ),
        "modules_to_save": "X-LoRA trains its classifier, and its experts if use_trainable_adapters says so",
    }

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    experts: list[dict[str, Any]] | None = None
    sites: dict[str, list[list[float]]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size is None:
            self.hidden_size = 4096
        if self.scaling_pass_value is None:
            raise ConfigError("XLoraConfig.scaling_pass_value must be a number; 1 / len(adapters) for all alike")
        check_integers(self, {n: getattr(self, n) for n in ("hidden_size", "xlora_depth", "xlora_size")})
        check_probability(self, "xlora_dropout_p")
        if self.softmax_temperature == 0:
            raise ConfigError("XLoraConfig.softmax_temperature must not be zero, by which logits are divided")
        if self.top_k_lora is None:
            if self.enable_softmax_topk:
                raise ConfigError(
                    "XLoraConfig.enable_softmax_topk=True is a softmax over those that top_k_lora chooses, which is "
                    "None: set it, or leave enable_softmax_topk out"
                )
        else:
            check_integers(self, {"top_k_lora": self.top_k_lora})
            if self.adapters and self.top_k_lora > len(self.adapters):
                raise ConfigError(
                    f"XLoraConfig.top_k_lora={self.top_k_lora} is more than there are adapters ({len(self.adapters)})"
                )

    # -- its experts -----------------------------------------------------------------------------------------------

    def expert_paths(self) -> Mapping[str, str]:
        if self.sites is not None:
            return {}
        if self.target_modules is not None:
            raise ConfigError(
                "XLoraConfig.target_modules is not supported: the experts say which layers are adapted. Leave it out."
            )
        if not self.adapters:
            raise ConfigError(
                "XLoraConfig.adapters names no experts: give the directories of LoRA adapters by name, such as "
                "adapters={'0': 'path/of/one', '1': 'path/of/another'}"
            )
        return self.adapters

    def with_experts(
        self, experts: Sequence[ExpertAdapter], tensors: Mapping[str, Tensor] | None, tensor_names: Sequence[str]
    ) -> tuple[Self, dict[str, Tensor]]:
        joined = join_experts([ExpertAdapter(p.config, p.tensors, p.source) for p in experts], METHOD_NAME)
        places = {fqn.rpartition(".")[0]: i for i, fqn in reversed(list(enumerate(tensor_names)))}
        modules = sorted(joined.ranks, key=lambda m: places.get(m, len(places)))
        out: dict[str, Tensor] = {}
        sites: dict[str, list[list[float]]] = {}
        for module in modules:
            owner, scales = (joined.tensors[f"{module}.{n}"] for n in (OWNER, SCALES))
            own = [scales[owner == i].tolist() for i in range(joined.count)]
            sites[module] = [[len(s), s[0] if s else 0.0] for s in own]
            out |= {k: joined.tensors[k] for n in RANK_AXES if (k := f"{module}.{n}") in joined.tensors}
        new = copy.copy(self)
        new.experts = [p.config.to_dict() for p in experts]
        new.sites, new.target_modules = sites, list(modules)
        return new, {**out, **new.classifier_tensors(tensors)}

    def adapters_to_write(self, tensors: Mapping[str, Tensor], directory: str) -> Mapping[str, AdapterContent]:
        sites, experts = self.sites or {}, self.experts or []
        names = [str(i) for i in range(len(experts))]  # PEFT runs the adapter only with these names
        tensors_by_expert: list[dict[str, Tensor]] = [{} for _ in experts]
        other_tensors: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            module, name = next(((key[: -len(n) - 1], n) for n in RANK_AXES if key.endswith(f".{n}")), ("", ""))
            if module not in sites:
                other_tensors[key] = tensor
                continue
            ranks = [int(r) for r, _ in sites[module]]
            for own_tensors, rank, part in zip(
                tensors_by_expert, ranks, tensor.split(ranks, RANK_AXES[name]), strict=True
            ):
                if rank:
                    own_tensors[key] = part.contiguous()
        config = {k: v for k, v in self.to_dict().items() if k not in (*_EXPERT_FIELDS, "target_modules")}
        config["adapters"] = {name: f"{directory}/{name}" for name in names}
        return {
            **{n: (e, t) for n, e, t in zip(names, experts, tensors_by_expert, strict=True)},
            "": (config, other_tensors),
        }

    # -- its classifier --------------------------------------------------------------------------------------------

    @property
    def _num_scaling_layers(self) -> int:
        return len(self.sites or ()) if self.layerwise_scalings else 1

    def _classifier_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the classifier's tensors in files, by name."""
        widths = [self.hidden_size or 0, *[self.xlora_size] * (self.xlora_depth - 1)]
        outs = [*widths[1:], self._num_scaling_layers * len(self.experts or ())]
        out: dict[str, tuple[int, ...]] = {}
        for name, i, o in zip(classifier_layers(self.xlora_depth, self.xlora_dropout_p > 0), widths, outs, strict=True):
            out |= {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
        return out

    def classifier_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the classifier's tensors: a file's ``tensors``, or for None new ones as torch initialises ``Linear``.

        Raises CheckpointError where one is missing in the file.
        """
        if tensors is not None:
            self._check_classifier(tensors)
            return dict(tensors)
        out: dict[str, Tensor] = {}
        bound = 0.0
        for name, shape in self._classifier_shapes().items():
            bound = 1 / sqrt(shape[1]) if len(shape) > 1 else bound
            out[name] = torch.empty(shape).uniform_(-bound, bound)
        return out

    def _check_classifier(self, tensors: Mapping[str, Tensor]) -> None:
        for name in self._classifier_shapes():
            if name not in tensors:
                raise CheckpointError(
                    f"{METHOD_NAME}: the adapter's file has no {name!r}. PEFT 0.21 leaves out what of the classifier "
                    "has the name of an expert ('0', '1', ...) between dots. Take it from the trained model, {n: t for "
                    f"n, t in model.state_dict().items() if {CLASSIFIER!r} in n}}, and save that as the file"
                )

    # -- sites -----------------------------------------------------------------------------------------------------

    def with_model_defaults(self, facts: ModelFacts) -> Self:
        return self

    def method(self, name: str, kind: str) -> XLora:
        sites = self.sites or {}
        site = sites.get(name, [[0, 0.0] for _ in self.experts or self.adapters or ()])
        dropouts = {float(e.get("lora_dropout") or 0.0) for e in self.experts or ()}
        return XLora(
            ranks=tuple(int(r) for r, _ in site),
            scales=tuple(s for _, s in site),
            layer=list(sites).index(name) if self.layerwise_scalings and name in sites else 0,
            layers=self._num_scaling_layers,
            hidden_size=self.hidden_size or 0,
            depth=self.xlora_depth,
            size=self.xlora_size if self.xlora_depth > 1 else 0,
            drops_between=self.xlora_dropout_p > 0 and self.xlora_depth > 1,
            classifier_dropout=self.xlora_dropout_p,
            softmax=self.enable_softmax,
            softmax_topk=self.enable_softmax_topk,
            top_k=self.top_k_lora,
            temperature=self.softmax_temperature,
            weight_of_all=self.global_scaling_weight,
            pass_value=self.scaling_pass_value,
            trained_experts=self.use_trainable_adapters,
            unequal_dropouts=len(dropouts) > 1,
            dropout=max(dropouts, default=0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        own = {f.name for f in fields(AdapterConfig)} | {f.name for f in fields(XLoraConfig)}
        kept = {k: v for k, v in out.items() if k == "peft_type" or (k in own and k not in self.unsupported_fields)}
        return {k: v for k, v in kept.items() if v is not None or k not in (*_EXPERT_FIELDS, "target_modules")}
