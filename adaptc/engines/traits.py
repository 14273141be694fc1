"""Find the traits of an adapter with which engines have trouble: options, kinds of tensors, and what they target.

A trait is a name that the tables of engines use, and a text that says where the adapter has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from adaptc.engines.facts import FACTOR_NAMES, AdapterFacts, LoraPair
from adaptc.engines.limits import EngineLimits
from adaptc.errors import short_repr
from adaptc.tables import shorten_paths

#: PEFT's types that change no weights
PROMPT_TYPES = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT", "ADAPTION_PROMPT"}
)
#: PEFT's types that change weights
WEIGHT_TYPES = frozenset({
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA",
    "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "POLY", "PSOFT",
    "PVERA", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "WAVEFT", "XLORA",
})  # fmt: skip
#: options of LoRA that mean something wherever they are set
_OPTIONS = (
    "use_dora", "lora_bias", "trainable_token_indices", "alora_invocation_tokens", "layer_replication", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "target_parameters",
)  # fmt: skip
#: schemes whose adapters are for a base that lost the first values
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda")
#: ends of keys that belong to an option of their own
_OWN_NAMES = ("lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_diag")


def find_traits(facts: AdapterFacts, engine: EngineLimits) -> dict[str, str]:
    """Return the traits of an adapter: name -> where it has it.

    ``engine`` tells which ranks, dtypes and whole modules are within its limits. Raises CheckpointError where the
    factors of LoRA are not in pairs.
    """
    kind = facts.method
    found: dict[str, str] = {"PEFT directory": "adapter_config.json"} if facts.is_directory else {}
    if kind not in PROMPT_TYPES | WEIGHT_TYPES:
        found["unknown method"] = f"peft_type={kind!r}"
    if kind != "LORA":
        return found | {"prompt method" if kind in PROMPT_TYPES else "method": f"peft_type={kind!r}"}
    pairs = facts.pairs()
    for option in _OPTIONS:
        if value := facts.config.get(option):
            found[option] = f"{option}={short_repr(value)}"
    scheme = facts.config.get("init_lora_weights")
    if isinstance(scheme, str) and scheme.lower().startswith(_CHANGES_BASE):
        found["init_lora_weights"] = f"init_lora_weights={scheme!r}"
    targets = facts.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        found["target_modules"] = f"target_modules={short_repr(targets)}"
    found |= _pair_traits(facts, engine, pairs)
    found |= _sibling_traits(pairs)
    return found | _key_traits(facts, engine)


def _pair_traits(facts: AdapterFacts, engine: EngineLimits, pairs: Mapping[str, LoraPair]) -> dict[str, str]:
    found: dict[str, str] = {}
    if embeddings := [m for m, p in pairs.items() if p.is_embedding]:
        found["embedding"] = shorten_paths(embeddings)
    if convolutions := [m for m, p in pairs.items() if _is_convolution(p, engine)]:
        found["convolution"] = shorten_paths(convolutions)
    # A module without its own rank is given the one of the config.
    if others := [m for m, p in pairs.items() if p.rank != facts.config.get("r")]:
        found["ranks"] = f"not r={facts.config.get('r')} at {shorten_paths(others)}"
    largest = max([p.rank for p in pairs.values()], default=0)
    if engine.max_rank is not None and largest > engine.max_rank:
        found["rank"] = f"rank {largest}"
    if engine.dtypes and (odd := [k for k, t in facts.tensors.items() if t.dtype not in engine.dtypes]):
        found["dtype"] = f"{odd[0]!r} is {facts.tensors[odd[0]].dtype}"
    return found


def _is_convolution(pair: LoraPair, engine: EngineLimits) -> bool:
    """Return whether the factors are of a convolution that the engine does not take."""
    kernel = pair.down.shape[2:]
    return any(n > 1 for n in kernel) if engine.takes_pointwise else bool(kernel)


def _sibling_traits(pairs: Mapping[str, LoraPair]) -> dict[str, str]:
    """Return the traits of layers that engines join, where not all have factors."""
    rules: Sequence[tuple[str, str, Callable[[set[str]], bool]]] = (
        ("q_proj without v_proj", "q_proj", lambda has: "v_proj" not in has),
        ("k_proj or v_proj without q_proj", "v_proj", lambda has: "q_proj" not in has),
        ("k_proj or v_proj without q_proj", "k_proj", lambda has: "q_proj" not in has),
        ("up_proj without gate_proj", "up_proj", lambda has: "gate_proj" not in has),
    )
    by_parent: dict[str, set[str]] = {}
    for module in pairs:
        parent, _, name = module.rpartition(".")
        by_parent.setdefault(parent, set()).add(name)
    found: dict[str, list[str]] = {}
    for parent, names in by_parent.items():
        for trait, name, is_lacking in rules:
            if name in names and is_lacking(names):
                found.setdefault(trait, []).append(f"{parent}.{name}".removeprefix("."))
    return {trait: shorten_paths(modules) for trait, modules in found.items()}


def _key_traits(facts: AdapterFacts, engine: EngineLimits) -> dict[str, str]:
    """Return the traits of tensors that are no factors of LoRA."""
    factors = tuple(name for pair in FACTOR_NAMES for name in pair)
    saved = [str(m) for m in _names(facts.config.get("modules_to_save"))]
    groups: dict[str, list[str]] = {}
    for key in facts.tensors:
        module, _, name = key.rpartition(".")
        # PEFT adds the base's weight of an adapted embedding, which every engine has.
        if key.endswith((*factors, *_OWN_NAMES, ".base_layer.weight")) or "trainable_tokens" in key:
            continue
        last = module.rpartition(".")[2]
        if last in engine.saved_modules:
            continue
        is_saved = any(module == m or module.endswith(f".{m}") or f".{m}." in f".{module}." for m in saved)
        is_bias = name == "bias" and facts.config.get("bias", "none") != "none"
        trait = "modules_to_save" if is_saved else "bias" if is_bias else "other tensors"
        groups.setdefault(trait, []).append(key)
    if rest := [m for m in saved if m.rpartition(".")[2] not in engine.saved_modules]:
        groups.setdefault("modules_to_save", rest)
    if facts.config.get("bias", "none") != "none":
        groups.setdefault("bias", [f"bias={facts.config['bias']!r}"])
    return {trait: shorten_paths(keys) for trait, keys in groups.items()}


def _names(value: object) -> Iterable[object]:
    return value if isinstance(value, (list, tuple)) else ()
