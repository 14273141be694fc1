"""Make example inputs for the denoisers of diffusers from their config.

The inputs of a diffusers ``ModelMixin`` are keyword inputs as its pipelines pass them, on its device and in its dtype.
Each tensor's free dimensions are given by name, as in ``example_inputs``. Only inputs that the config asks for are
passed. A config field that asks for an unknown input is refused by name. This file never imports diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.inputs.example_inputs import BATCH, ExampleInputs, is_pretrained_model, pretrained_example
from adaptc.errors import CaptureError

TEXT, IMAGE = "text", "image"
_SIZES = {BATCH: 3, TEXT: 7, IMAGE: 13}
#: height and width of the smallest feature map that the model makes of the example
_HEIGHT, _WIDTH = 3, 5


def is_diffusion_model(model: object) -> bool:
    """Return whether ``model`` is a diffusers model, told by the names of its classes."""
    return any(c.__name__ == "ModelMixin" and c.__module__.startswith("diffusers.") for c in type(model).__mro__)


def diffusion_example(model: Any, *, training: bool) -> ExampleInputs:
    """Return example inputs for ``model``.

    With ``training`` each row has a time step of its own. Otherwise the rows of a UNet share one. Raises
    :class:`CaptureError` for an unknown class of model, and for a config that asks for unknown inputs.
    """
    make = next((_INPUT_BUILDERS[c.__name__] for c in type(model).__mro__ if c.__name__ in _INPUT_BUILDERS), None)
    if make is None:
        raise CaptureError(
            f"the inputs of diffusers' {type(model).__name__} are not known to adaptc: pass example_inputs, a dict of "
            f"keyword inputs (its forward takes {', '.join(inspect.signature(model.forward).parameters)})"
        )
    maker = _InputBuilder(model)
    make(maker, training)
    return ExampleInputs(maker.kwargs, maker.free_dims)


class _InputBuilder:
    """A collector of a model's example inputs, which reads the sizes from the model's config."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.kwargs: dict[str, Any] = {}
        self.free_dims: dict[str, dict[int, str | None]] = {}

    def config_value(self, field: str) -> Any:
        return getattr(self.config, field, None)

    def require_config(self, field: str, *known: Any) -> Any:
        """Return the config's value of ``field``, which must be an int, or one of ``known`` where those are given.

        Raises CaptureError for any other value.
        """
        value = self.config_value(field)
        if value not in known if known else not isinstance(value, int):
            raise CaptureError(
                f"the inputs of {type(self.model).__name__} with {field}={value!r} are not known to adaptc: pass "
                "example_inputs, a dict of keyword inputs"
            )
        return value

    def add_input(self, name: str, *sizes: int | str | None, dtype: torch.dtype | None = None) -> None:
        """Add an input of these sizes, whose named sizes are free. A ``name`` of the form ``outer.key`` is an entry of
        a dict."""
        shape = [_SIZES[s] if isinstance(s, str) else s for s in sizes]
        self.free_dims[name] = {i: s for i, s in enumerate(sizes) if isinstance(s, str)}
        value = self._values(torch.Size(shape), dtype or self.dtype)  # type: ignore[arg-type]
        outer, _, key = name.partition(".")
        if key:
            self.kwargs.setdefault(outer, {})[key] = value
        else:
            self.kwargs[name] = value

    def _values(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype, device=self.device)
        return torch.linspace(-1, 1, shape.numel(), device=self.device).reshape(shape).to(dtype)

    def add_sample(self) -> None:
        """Add ``sample`` (batch, channels, height, width), whose height and width are free multiples of the model's
        total downsampling."""
        unit = 2 ** max(len(self.config_value("block_out_channels") or ()) - 1, 0)
        self.add_input("sample", BATCH, self.require_config("in_channels"), unit * _HEIGHT, unit * _WIDTH)
        times = f"{unit}*" if unit > 1 else ""
        self.free_dims["sample"] |= {2: f"{times}height", 3: f"{times}width"}


def _add_unet_inputs(m: _InputBuilder, training: bool) -> None:
    m.add_sample()
    m.add_input("timestep", *([BATCH] if training else []), dtype=torch.int64)
    if m.config_value("num_class_embeds") is not None:
        m.require_config("class_embed_type", None)
        m.add_input("class_labels", BATCH, dtype=torch.int64)


def _add_conditional_unet(m: _InputBuilder, training: bool) -> None:
    for field in ("class_embed_type", "time_cond_proj_dim"):
        m.require_config(field, None)
    _add_unet_inputs(m, training)
    kind = m.require_config("encoder_hid_dim_type", None, "text_proj")
    width = (
        m.require_config("encoder_hid_dim" if kind else "cross_attention_dim")
        if not _common_text_width(m)
        else _common_text_width(m)
    )
    m.add_input("encoder_hidden_states", BATCH, TEXT, width)
    if m.require_config("addition_embed_type", None, "text", "text_time") == "text_time":  # SDXL
        ids = 6
        time = m.require_config("addition_time_embed_dim")
        m.add_input(
            "added_cond_kwargs.text_embeds",
            BATCH,
            m.require_config("projection_class_embeddings_input_dim") - ids * time,
        )
        m.add_input("added_cond_kwargs.time_ids", BATCH, ids)


def _common_text_width(m: _InputBuilder) -> int | None:
    """Return the one cross-attention width where the config lists a width for each block, and None otherwise."""
    widths = m.config_value("cross_attention_dim")
    if not isinstance(widths, (list, tuple)) or m.config_value("encoder_hid_dim_type") is not None:
        return None
    return widths[0] if len(set(widths)) == 1 else None


def _add_flux_inputs(m: _InputBuilder, training: bool) -> None:
    m.add_input("hidden_states", BATCH, IMAGE, m.require_config("in_channels"))
    m.add_input("encoder_hidden_states", BATCH, TEXT, m.require_config("joint_attention_dim"))
    m.add_input("pooled_projections", BATCH, m.require_config("pooled_projection_dim"))
    m.add_input("timestep", BATCH)
    axes = len(m.config_value("axes_dims_rope"))
    m.add_input("img_ids", IMAGE, axes)
    m.add_input("txt_ids", TEXT, axes)
    if m.config_value("guidance_embeds"):
        m.add_input("guidance", BATCH)


_INPUT_BUILDERS: dict[str, Callable[[_InputBuilder, bool], None]] = {
    "UNet2DModel": _add_unet_inputs,
    "UNet2DConditionModel": _add_conditional_unet,
    "FluxTransformer2DModel": _add_flux_inputs,
}


def make_example_inputs(model: Any, *, training: bool) -> ExampleInputs:
    """Return example inputs that the model's ``forward`` accepts, with their free dimensions.

    Raises CaptureError where the model has no config, or the config does not tell what the model takes.
    """
    if is_pretrained_model(model):
        return pretrained_example(model, training=training)
    if is_diffusion_model(model):
        return diffusion_example(model, training=training)
    raise CaptureError(
        f"{type(model).__name__} is not a transformers model, so its inputs cannot be made up: pass "
        "example_inputs, a tensor, a tuple of positional inputs or a dict of keyword inputs"
    )
