"""Give a pipeline of diffusers the verbs of its loaders, by swaps of the programs that its components run.

``AdaptedPipeline`` is mixed into the pipeline's own class, before it. The names and arguments are those of diffusers.
What the verbs do not take, and what programs cannot follow, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NoReturn, Self

from adaptc.bank.row_adapters import parse_row_adapters
from adaptc.errors import AdaptcError, ConfigError, listing
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.quantized.quantized_merge import parse_quantized_merge
from adaptc.pipelines.image_adapters import CallAdapters, calling_with, encoding_with
from adaptc.pipelines.pipeline_adapters import PipelineAdapters, check_components, default_name
from adaptc.pipelines.read_adapter import find_source
from adaptc.program.adapted_program import AdaptedProgram

#: parameters of pipelines that say how many images a prompt gets
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
#: parameters of pipelines whose first one that is given tells the number of prompts
_PROMPTS = ("prompt", "prompt_embeds")


class AdaptedPipeline:
    """A pipeline whose denoiser, and text encoders that have adapters, run as programs."""

    #: set by ``adapt_pipeline``
    adapters: PipelineAdapters
    _merged_adapters: set[str]

    @property
    def programs(self) -> dict[str, AdaptedProgram | PackagedProgram]:
        """Return component -> the program that it runs, as it is with the adapters that act; or its package."""
        return {n: m.state.current for n, m in self.adapters.programs.items()}

    def __call__(self, *args: Any, adapters: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """Run the pipeline. ``adapters`` has an entry for each prompt: a name, None for none, or a dict of weights.

        Each image is what it would be alone with its adapters. Without ``adapters``, all images have those that act.
        Raises ConfigError where there are not as many entries as prompts.
        """
        with calling_with(None if adapters is None else self._call_adapters(adapters, args, kwargs)):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the pipeline to a device. Raises ConfigError for another dtype, and then nothing is moved."""
        for module in self.adapters.programs.values():
            module.check_to(*args, **kwargs)
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Keep all weights on the CPU, and move each component to the device while it runs, as in diffusers.

        A component's program is copied to the device once; later it is given its weights there alone. Raises
        ConfigError for the package of a program, which runs where it was compiled for.
        """
        for module in self.adapters.programs.values():
            module.state.require_program("it runs on the device that it was compiled for")
        super().enable_model_cpu_offload(*args, **kwargs)  # type: ignore[misc]

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts as the pipeline does, with ``lora_scale`` on the adapters of its text encoders."""
        original = super().encode_prompt  # type: ignore[misc]
        scale = signature(original).bind(*args, **kwargs).arguments.get("lora_scale")
        with encoding_with(1.0 if scale is None else float(scale)):
            return original(*args, **kwargs)

    def _call_adapters(self, adapters: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallAdapters:
        mixes = parse_row_adapters(adapters)
        self.adapters.check_names(n for mix in mixes for n in mix)
        bound = signature(super().__call__).bind(*args, **kwargs)  # type: ignore[misc]
        bound.apply_defaults()
        given = bound.arguments
        prompts = next((p for n in _PROMPTS if (p := given.get(n)) is not None), None)
        count = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
        if count != len(mixes):
            raise ConfigError(
                f"adapters has {len(mixes)} entries, and there {'are' if count > 1 else 'is'} {count} "
                f"prompt{'s' if count > 1 else ''}: give one for each; for a prompt with several adapters, give it "
                "several times"
            )
        images = next((v for n in _COUNTS if (v := given.get(n)) is not None), 1)
        return CallAdapters(mixes, int(images))

    # -- the verbs of diffusers ----------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter, which acts alone from now on; ``hotswap`` exchanges one that is there.

        The file may be of any format that diffusers' converter for the pipeline or ``adaptc.compile`` reads.
        Text encoders that the adapter is for are captured where they were not; nothing else is.

        Raises:
            CheckpointError: the file is damaged, or has keys that no component has. The pipeline is unchanged.
            ConfigError: the name is taken, or an option is not known.
        """
        kwargs.pop("low_cpu_mem_usage", None)  # how a loader fills memory, of which this one needs none
        second = kwargs.pop("load_into_transformer_2", False)
        source = find_source(pretrained_model_name_or_path_or_dict, kwargs)
        if kwargs:
            raise ConfigError(f"load_lora_weights does not know {listing(kwargs)}: leave it out")
        name = default_name(self.adapters) if adapter_name is None else adapter_name
        known = self.adapters.names()
        if hotswap:
            self.adapters.check_names([name])
        elif name in known:
            raise ConfigError(
                f"the pipeline has an adapter {name!r}: delete_adapters first, or hotswap=True to exchange it"
            )
        self.adapters.load(name, source, keep_active=hotswap, into="transformer_2" if second else None)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Let these adapters act, and no others. Weights are numbers, or dicts by component and block."""
        self.adapters.set_active(adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the adapters that act in any component."""
        states = [m.state for m in self.adapters.programs.values()]
        return list(dict.fromkeys(n for s in states for n in s.active if n in self.adapters.names()))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return component -> the names of its adapters."""
        return {n: list(m.state.adapters) for n, m in self.adapters.programs.items() if m.state.adapters}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Delete adapters. Raises ConfigError for an unknown name."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.adapters.check_names(names)
        self.adapters.change(lambda _, state: state.without(names))

    def disable_lora(self) -> None:
        """Let no adapter act, until ``enable_lora``."""
        self.adapters.change(lambda _, state: state.switched(False))

    def enable_lora(self) -> None:
        """Let the adapters act again that did before ``disable_lora``."""
        self.adapters.change(lambda _, state: state.switched(True))

    def unload_lora_weights(self) -> None:
        """Delete all adapters. What is fused stays in the weights for good, as in diffusers."""
        self.adapters.change(lambda _, state: state.without_all())

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool = False,
        requantize: bool = False,
    ) -> None:
        """Merge adapters into the weights: those named, or those that act.

        Quantised weights need ``dequantize`` or ``requantize``, as in ``adaptc.merge``. Raises MergeError where neither
        is set, and where a weight is not finite and ``safe_fusing`` is set.
        """
        chosen = check_components(self.adapters, components)
        quantized = parse_quantized_merge(dequantize, requantize, None)
        self.adapters.fuse(chosen, adapter_names, lora_scale, safe_fusing, quantized)
        self._note_merged()

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Take the adapters out of the weights again, to the bit."""
        chosen = check_components(self.adapters, components)
        self.adapters.change(lambda n, state: state.unfused() if n in chosen else state)
        self._note_merged()

    def _note_merged(self) -> None:
        self._merged_adapters = {n for m in self.adapters.programs.values() for n in m.state.merged_names}

    def enable_lora_hotswap(self, **kwargs: Any) -> None:
        """Do nothing: adapters of any rank are exchanged without compiling. ``target_rank`` is not needed."""

    def save_lora_weights(self, save_directory: Any, adapter_name: str | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Write one adapter as diffusers' ``save_lora_weights`` does, with its config in the header.

        Args:
            save_directory: the directory.
            adapter_name: the adapter; None for the only one that acts.
            **kwargs: ``weight_name``, ``safe_serialization`` and ``save_function`` of diffusers' function.

        Raises:
            ConfigError: it is not clear which adapter is meant, or it is not LoRA, which alone the format has.
        """
        if adapter_name is None:
            active = self.get_active_adapters()
            if len(active) != 1:
                raise ConfigError(f"the adapters {active} act: say adapter_name=, one file has one adapter")
            adapter_name = active[0]
        self.adapters.check_names([adapter_name])
        layers: dict[str, Any] = {}
        for component, module in self.adapters.programs.items():
            if adapter_name not in module.state.adapters:
                continue
            found = module.state.adapter(adapter_name)
            if found.config.peft_type != "LORA":
                raise ConfigError(
                    f"{adapter_name!r} is {found.config.peft_type}, and diffusers' files have LoRA alone: "
                    f"adaptc.save_adapter(pipe.programs[{component!r}], path) writes it"
                )
            layers[f"{component}_lora_layers"] = {k: t.detach().contiguous() for k, t in found.tensors.items()}
            fields = found.config.to_dict().items()
            layers[f"{component}_lora_adapter_metadata"] = {k: v for k, v in fields if v is not None}
        super().save_lora_weights(save_directory, **layers, **kwargs)  # type: ignore[misc]


def _refuse(name: str, why: str) -> Any:
    def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise AdaptcError(f"{name} is not offered by a pipeline that runs programs: {why}")

    refused.__name__ = name
    refused.__doc__ = f"Raise AdaptcError: {why}."
    return refused


_FIXED = "it changes how the modules compute, and their programs are captured. Call it before adaptc.compile"
_ONE_DEVICE = "the weights of a program are on one device. Call pipe.to(device) or pipe.enable_model_cpu_offload()"
_IN_PROGRAM = "the programs have no such inputs. Use the pipeline that was adapted"
#: methods of pipelines that programs cannot follow -> why
REFUSED = {
    **dict.fromkeys(
        ("enable_sequential_cpu_offload", "enable_group_offload", "set_lora_device"),
        _ONE_DEVICE,
    ),
    **dict.fromkeys(("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter"), _IN_PROGRAM),
    **dict.fromkeys(
        (
            *("enable_attention_slicing", "enable_xformers_memory_efficient_attention", "enable_freeu"),
            *("fuse_qkv_projections", "unfuse_qkv_projections", "load_textual_inversion", "unload_textual_inversion"),
            *("enable_layerwise_casting",),
        ),
        _FIXED,
    ),
    "save_pretrained": "its modules are programs. Save the pipeline that was adapted, and save_lora_weights",
}
for _name, _why in REFUSED.items():
    setattr(AdaptedPipeline, _name, _refuse(_name, _why))
