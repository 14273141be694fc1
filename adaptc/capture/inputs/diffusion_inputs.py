"""Make example inputs for the denoisers of diffusers from their config.

The inputs of a diffusers ``ModelMixin`` are keyword inputs as its pipelines pass them, on its device and in its dtype.
Each tensor's free dimensions are given by name, as in ``example_inputs``. Only inputs that the config asks for are
passed. A config field that asks for an unknown input is refused by name. This file never imports diffusers.

A denoiser inside a pipeline is called in more ways than alone (``pipeline_example``). Its time steps are float32, a row
each, since schedulers give integers, floats, or one number for all rows. A UNet takes feature maps of every size.
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
    return _make_example(_InputBuilder(model), training)


def pipeline_example(model: Any, *, with_residuals: bool, token_times: bool = False) -> ExampleInputs:
    """Return example inputs for ``model`` as the denoiser of a pipeline.

    ``with_residuals`` adds the outputs of a ControlNet, with which a UNet takes multiples of its total downsampling
    alone. ``token_times`` gives each token of a video a time, along the axes that ``pipelines.token_times`` gives them.
    Raises :class:`CaptureError` like :func:`diffusion_example`, and where the model takes no such inputs.
    """
    maker = _InputBuilder(model, in_pipeline=True, with_residuals=with_residuals, token_times=token_times)
    return _make_example(maker, training=False)


def _make_example(maker: _InputBuilder, training: bool) -> ExampleInputs:
    model = maker.model
    make = next((_INPUT_BUILDERS[c.__name__] for c in type(model).__mro__ if c.__name__ in _INPUT_BUILDERS), None)
    if make is None:
        raise CaptureError(
            f"the inputs of diffusers' {type(model).__name__} are not known to adaptc: pass example_inputs, a dict of "
            f"keyword inputs (its forward takes {', '.join(inspect.signature(model.forward).parameters)})"
        )
    make(maker, training)
    if maker.token_times and maker.kwargs["timestep"].ndim < 2:
        raise CaptureError(f"{type(model).__name__} with a time for each token is not known to adaptc")
    if maker.with_residuals and not maker.has_residuals:
        raise CaptureError(
            f"the inputs of {type(model).__name__} beside a ControlNet are not known to adaptc: adapt a pipeline "
            "without one"
        )
    return ExampleInputs(maker.kwargs, maker.free_dims)


class _InputBuilder:
    """A collector of a model's example inputs, which reads the sizes from the model's config."""

    def __init__(
        self, model: Any, in_pipeline: bool = False, with_residuals: bool = False, token_times: bool = False
    ) -> None:
        self.model, self.config, self.token_times = model, model.config, token_times
        self.in_pipeline, self.with_residuals, self.has_residuals = in_pipeline, with_residuals, False
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

    def require_pipeline(self) -> None:
        """Raise CaptureError where the model is no pipeline's, since only a pipeline's calls are made into tensors."""
        if not self.in_pipeline:
            raise CaptureError(
                f"{type(self.model).__name__} takes lists and sizes, and a program takes tensors: adapt its pipeline, "
                "adaptc.compile(pipe, ...), which turns one into the other"
            )

    def add_input(self, name: str, *sizes: int | str | None, dtype: torch.dtype | None = None) -> None:
        """Add an input of these sizes, whose named sizes are free. A ``name`` of the form ``outer.key`` is an entry of
        a dict, and ``outer.0`` of a tuple."""
        shape = [_SIZES[s] if isinstance(s, str) else s for s in sizes]
        self.free_dims[name] = {i: s for i, s in enumerate(sizes) if isinstance(s, str)}
        value = self._values(torch.Size(shape), dtype or self.dtype)  # type: ignore[arg-type]
        outer, _, key = name.partition(".")
        if key.isdigit():
            self.kwargs[outer] = (*self.kwargs.get(outer, ()), value)
        elif key:
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
        channels = self.require_config("in_channels")
        if self.in_pipeline and not self.with_residuals:
            # Odd sizes, and names that torch chooses: feature maps are halves that were rounded up.
            self.add_input("sample", BATCH, channels, self.unit * _HEIGHT + 1, self.unit * _WIDTH + 1)
            self.free_dims["sample"] |= {2: None, 3: None}
        else:
            self.add_map("sample", channels, 1)

    @property
    def unit(self) -> int:
        """Return the model's total downsampling."""
        return 2 ** max(len(self.config_value("block_out_channels") or ()) - 1, 0)

    def add_map(self, name: str, channels: int, downsampling: int) -> None:
        """Add a feature map (batch, channels, height, width) that is smaller than ``sample`` by ``downsampling``."""
        unit = self.unit // downsampling
        self.add_input(name, BATCH, channels, unit * _HEIGHT, unit * _WIDTH)
        times = f"{unit}*" if unit > 1 else ""
        self.free_dims[name] |= {2: f"{times}height", 3: f"{times}width"}

    def add_video_times(self, **sizes: int) -> None:
        """Add the time steps of a video: a row each, or one for each token along axes of these sizes and names."""
        self.add_times(dtype=torch.float32)
        if self.token_times:
            self.add_input("timestep", BATCH, *sizes.values(), dtype=torch.float32)
            self.free_dims["timestep"] |= dict(enumerate(sizes, 1))

    def add_times(self, name: str = "timestep", *, per_row: bool = True, dtype: torch.dtype | None = None) -> None:
        """Add the time steps, a row each in a pipeline; ``per_row`` and ``dtype`` say what they are elsewhere."""
        if self.in_pipeline:
            self.add_input(name, BATCH, dtype=torch.float32)
        else:
            self.add_input(name, *([BATCH] if per_row else []), dtype=dtype)


def _add_unet_inputs(m: _InputBuilder, training: bool) -> None:
    m.add_sample()
    m.add_times(per_row=training, dtype=torch.int64)
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

    if m.with_residuals:
        _add_unet_residuals(m)


def _add_unet_residuals(m: _InputBuilder) -> None:
    """Add what a ControlNet gives a UNet: a map after its first layer, after each layer and downsampling of its down
    blocks, and in its middle."""
    widths, layers = list(m.config_value("block_out_channels")), m.config_value("layers_per_block")
    maps, downsampling = [(widths[0], 1)], 1
    for i, width in enumerate(widths):
        maps += [(width, downsampling)] * (layers if isinstance(layers, int) else layers[i])
        if i + 1 < len(widths):
            downsampling *= 2
            maps.append((width, downsampling))
    for i, (width, smaller) in enumerate(maps):
        m.add_map(f"down_block_additional_residuals.{i}", width, smaller)
    m.add_map("mid_block_additional_residual", widths[-1], downsampling)
    m.has_residuals = True


def _common_text_width(m: _InputBuilder) -> int | None:
    """Return the one cross-attention width where the config lists a width for each block, and None otherwise."""
    widths = m.config_value("cross_attention_dim")
    if not isinstance(widths, (list, tuple)) or m.config_value("encoder_hid_dim_type") is not None:
        return None
    return widths[0] if len(set(widths)) == 1 else None


def _add_sd3_inputs(m: _InputBuilder, training: bool) -> None:
    patch = m.require_config("patch_size")
    m.add_input("hidden_states", BATCH, m.require_config("in_channels"), patch * _HEIGHT, patch * _WIDTH)
    times = f"{patch}*" if patch > 1 else ""
    m.free_dims["hidden_states"] |= {2: f"{times}height", 3: f"{times}width"}
    m.add_input("encoder_hidden_states", BATCH, TEXT, m.require_config("joint_attention_dim"))
    m.add_input("pooled_projections", BATCH, m.require_config("pooled_projection_dim"))
    m.add_times(dtype=torch.float32)


def _add_flux_inputs(m: _InputBuilder, training: bool) -> None:
    m.add_input("hidden_states", BATCH, IMAGE, m.require_config("in_channels"))
    m.add_input("encoder_hidden_states", BATCH, TEXT, m.require_config("joint_attention_dim"))
    m.add_input("pooled_projections", BATCH, m.require_config("pooled_projection_dim"))
    m.add_times()
    _add_rotary_inputs(m)


def _add_rotary_inputs(m: _InputBuilder, *rows: str) -> None:
    """Add the positions of images and texts, ``rows`` of them, and the scale of distilled guidance."""
    axes = len(m.config_value("axes_dims_rope"))
    m.add_input("img_ids", *rows, IMAGE, axes)
    m.add_input("txt_ids", *rows, TEXT, axes)
    if m.config_value("guidance_embeds"):
        m.add_input("guidance", BATCH)


def _add_flux2_inputs(m: _InputBuilder, training: bool) -> None:
    m.add_input("hidden_states", BATCH, IMAGE, m.require_config("in_channels"))
    m.add_input("encoder_hidden_states", BATCH, TEXT, m.require_config("joint_attention_dim"))
    m.add_times()
    # Its pipelines give each row its positions, of which the model takes those of the first row. A program of a
    # pipeline has these alone, or no row would be apart from the first.
    _add_rotary_inputs(m, *([] if m.in_pipeline else [BATCH]))


def _add_wan_inputs(m: _InputBuilder, training: bool) -> None:
    frames, *patch = m.config_value("patch_size")
    sizes = (frames * 5, patch[0] * _HEIGHT, patch[1] * _WIDTH)
    m.add_input("hidden_states", BATCH, m.require_config("in_channels"), *sizes)
    units = {2: (frames, "frames"), 3: (patch[0], "height"), 4: (patch[1], "width")}
    m.free_dims["hidden_states"] |= {i: f"{n}*{name}" if n > 1 else name for i, (n, name) in units.items()}
    m.add_video_times(frames=5, height=_HEIGHT, width=_WIDTH)
    if m.config_value("image_dim") is None:
        m.require_config("added_kv_proj_dim", None)
        m.add_input("encoder_hidden_states", BATCH, TEXT, m.require_config("text_dim"))
        return
    m.require_config("pos_embed_seq_len", None)
    # The model takes the last 512 of texts and images, one after another, for the text.
    m.add_input("encoder_hidden_states", BATCH, 512, m.require_config("text_dim"))
    m.add_input("encoder_hidden_states_image", BATCH, IMAGE, m.require_config("image_dim"))


def _add_qwen_image_inputs(m: _InputBuilder, training: bool) -> None:
    m.require_pipeline()
    for field in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond"):
        m.require_config(field, None, False)
    m.add_input("hidden_states", BATCH, IMAGE, m.require_config("in_channels"))
    m.add_input("encoder_hidden_states", BATCH, TEXT, m.require_config("joint_attention_dim"))
    m.add_input("encoder_hidden_states_mask", BATCH, TEXT, dtype=torch.bool)
    m.add_times()
    for i, axis in enumerate((IMAGE, TEXT)):
        m.add_input(f"img_shapes.{i}", axis, sum(m.config_value("axes_dims_rope")) // 2, 2, dtype=torch.float32)


def _add_ltx_inputs(m: _InputBuilder, training: bool) -> None:
    m.require_pipeline()
    m.add_input("hidden_states", BATCH, IMAGE, m.require_config("in_channels"))
    m.add_input("encoder_hidden_states", BATCH, TEXT, m.require_config("caption_channels"))
    m.add_video_times(**{IMAGE: _SIZES[IMAGE]})
    m.add_input("encoder_attention_mask", BATCH, TEXT, dtype=torch.int64)
    width = m.require_config("num_attention_heads") * m.require_config("attention_head_dim")
    for i in range(2):
        m.add_input(f"video_coords.{i}", BATCH, IMAGE, width, dtype=torch.float32)


def _add_z_image_inputs(m: _InputBuilder, training: bool) -> None:
    m.require_pipeline()
    m.require_config("siglip_feat_dim", None)
    (patch,), (frames,) = (m.config_value(n) for n in ("all_patch_size", "all_f_patch_size"))
    m.add_input("x", BATCH, IMAGE, frames * patch**2 * m.require_config("in_channels"))
    m.add_times("t")
    m.add_input("cap_feats", BATCH, TEXT, m.require_config("cap_feat_dim"))
    for name, axis in (("x", IMAGE), ("cap", TEXT)):
        m.add_input(f"{name}_rotary", BATCH, axis, sum(m.config_value("axes_dims")) // 2, 2, dtype=torch.float32)
        m.add_input(f"{name}_fill", BATCH, axis, dtype=torch.bool)
    m.add_input("cap_mask", BATCH, TEXT, dtype=torch.bool)


_INPUT_BUILDERS: dict[str, Callable[[_InputBuilder, bool], None]] = {
    "UNet2DModel": _add_unet_inputs,
    "UNet2DConditionModel": _add_conditional_unet,
    "SD3Transformer2DModel": _add_sd3_inputs,
    "FluxTransformer2DModel": _add_flux_inputs,
    "Flux2Transformer2DModel": _add_flux2_inputs,
    "WanTransformer3DModel": _add_wan_inputs,
    "QwenImageTransformer2DModel": _add_qwen_image_inputs,
    "LTXVideoTransformer3DModel": _add_ltx_inputs,
    "ZImageTransformer2DModel": _add_z_image_inputs,
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
