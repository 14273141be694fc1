"""Target rules against PEFT itself, on random module trees."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import peft
import pytest
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adaptc.errors import TargetError
from adaptc.methods._shared.name_patterns import check_patterns, unused_patterns
from adaptc.patterns import pattern_value
from adaptc.targets.name_rules import TargetCandidate, select_modules_to_save, select_targets
from tests.support.cover import examples

# No word ends another one: modules_to_save compares whole words in one place and endings in another.
WORDS = ("model", "layers", "h", "experts", "attn", "q_proj", "v_proj", "fc1", "gate", "lm_head", "norm")
SEGMENTS = (*WORDS, "0", "1", "2", "13")
LEAVES = {
    "linear": lambda: nn.Linear(3, 5),
    "addmm": lambda: Conv1D(5, 3),
    "embedding": lambda: nn.Embedding(7, 3),
    "conv2d": lambda: nn.Conv2d(3, 5, 2),
    "": lambda: nn.LayerNorm(3),
}


@st.composite
def trees(draw):
    """{leaf path: kind}, no path inside another; kind "" is a module that cannot be adapted."""
    paths = draw(st.lists(st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=5), min_size=2, max_size=9))
    names = sorted({".".join(p) for p in paths})
    names = [n for n in names if not any(m.startswith(n + ".") for m in names)]
    kinds = ["linear", "linear", "linear", "addmm", "embedding", "conv2d", ""]
    return {n: draw(st.sampled_from(kinds)) for n in draw(st.permutations(names))}


def build(tree):
    root = nn.Module()
    for name, kind in tree.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, LEAVES[kind]())
    return root


def class_name(module):
    return f"{type(module).__module__}.{type(module).__qualname__}"


def candidates_of(model):
    kinds = ((nn.Linear, "linear"), (Conv1D, "addmm"), (nn.Embedding, "embedding"), (nn.Conv2d, "conv2d"))
    return [
        TargetCandidate(n, class_name(m), next(k for t, k in kinds if isinstance(m, t)))
        for n, m in model.named_modules()
        if isinstance(m, tuple(t for t, _ in kinds))
    ]


def names_of(model):
    return {n: class_name(m) for n, m in model.named_modules()}


def suffixes(tree):
    return st.sampled_from(sorted(tree)).flatmap(
        lambda n: st.integers(0, n.count(".")).map(lambda i: ".".join(n.split(".")[i:]))
    )


def regexes(tree):
    word = st.sampled_from([*sorted({w for n in tree for w in n.split(".")}), "absent"])
    return st.one_of(
        st.sampled_from(sorted(tree)).map(re.escape),
        st.builds(r".*\.({}|{})".format, word, word),
        st.builds(".*{}".format, word),
        st.builds(r"{}\..*".format, word),
        st.builds(r"(.*\.)?\d+\.{}.*".format, word),
        word,
    )


@st.composite
def problems(draw, suffix_lists_only=False):
    """A tree and options for it. Most entries name something that is there, or little would ever be selected."""
    tree = draw(trees())
    targets = {n: k for n, k in tree.items() if k} or tree
    target = draw(st.lists(suffixes(targets), min_size=1, max_size=4).map(draw(st.sampled_from([list, set]))))
    if not suffix_lists_only and draw(st.integers(0, 2)) == 0:
        target = draw(regexes(tree))
    layers = pattern = None
    if not isinstance(target, str) and draw(st.booleans()):
        there = sorted({int(w) for n in targets for w in n.split(".") if w.isdigit()}) or [0]
        layers = draw(st.sampled_from(there) | st.lists(st.sampled_from(there), max_size=2) | st.just([2]))
        pattern = draw(st.sampled_from([None, None, "layers", "h", ["h", "layers"], [], "lay.*"]))
    return tree, {
        "target_modules": target,
        "exclude_modules": draw(st.none() | st.lists(suffixes(tree), max_size=2) | regexes(tree)),
        "layers_to_transform": layers,
        "layers_pattern": pattern,
        "modules_to_save": draw(st.none() | st.lists(st.sampled_from(WORDS), max_size=1)),
    }


@contextmanager
def quiet():
    """PEFT warns when it adapts a Conv1D, and again at the next Linear."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def adapted_by_peft(model, **options):
    with quiet():
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, **options), model)
    return tuple(n for n, m in model.named_modules() if isinstance(m, LoraLayer))


def oracle(name, **options):
    fields = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"))
    config = SimpleNamespace(**{**fields, **options}, target_parameters=None)
    return check_target_module_exists(config, name)


def as_entries(value):
    return [value] if isinstance(value, str) else list(value or ())


def must_refuse(adaptable, leaves, options):
    """Whether some entry of the options does nothing, worked out from PEFT's check one entry at a time."""
    target, exclude = options["target_modules"], options["exclude_modules"]
    one = (lambda e: e) if isinstance(target, str) else (lambda e: [e])
    if not all(any(oracle(n, target_modules=one(e)) for n in adaptable) for e in as_entries(target)):
        return True
    skip = (lambda e: e) if isinstance(exclude, str) else (lambda e: [e])
    for e in as_entries(exclude):
        if not any(isinstance(oracle(n, target_modules=[], exclude_modules=skip(e)), _ExcludedModule) for n in leaves):
            return True
    wanted = options["layers_to_transform"]
    hit = [n for n in adaptable if "." in n and oracle(n, target_modules=target)]
    for i in [wanted] if isinstance(wanted, int) else wanted or ():
        at = {"layers_to_transform": [i], "layers_pattern": options["layers_pattern"]}
        if not any(oracle(n, target_modules=[n.rpartition(".")[2]], **at) for n in hit):
            return True
    return not any(oracle(n, **options) for n in adaptable)


@settings(max_examples=examples(250))
@given(problems())
def test_selection_equals_peft(problem):
    tree, options = problem
    model = build(tree)
    adaptable = [n for n in names_of(model) if tree.get(n)]
    refused = must_refuse(adaptable, list(tree), options)
    event("refused" if refused else "selected")
    if refused:
        with pytest.raises(TargetError):
            select_targets(candidates_of(model), **options, all_names=names_of(model))
        return
    got = select_targets(candidates_of(model), **options, all_names=names_of(model))
    assert got.names == tuple(n for n in adaptable if oracle(n, **options))
    left = [n for n, _ in got.left_out if n in adaptable]
    assert sorted([*got.names, *left]) == sorted(adaptable)
    assert all(why for _, why in got.left_out)
    one = (lambda e: e) if isinstance(options["target_modules"], str) else (lambda e: [e])
    for entry in as_entries(options["target_modules"]):
        assert got.matches[entry] == tuple(n for n in got.names if oracle(n, target_modules=one(entry)))


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.filter_too_much])
@given(problems(suffix_lists_only=True))
def test_selection_equals_injection(problem):
    tree, options = problem
    options["modules_to_save"] = None
    model = build(tree)
    # PEFT refuses the whole call when a container or a norm is among the matches.
    assume(not any(oracle(n, **options) for n in names_of(model) if n and not tree.get(n)))
    try:
        got = select_targets(candidates_of(model), **options, all_names=names_of(model))
    except TargetError:
        assume(False)
    assert got.names == adapted_by_peft(model, **options)


@settings(max_examples=examples(30))
@given(trees(), st.sampled_from(["all-linear", "All-Linear"]), st.data())
def test_all_linear_equals_injection(tree, word, data):
    linear = {n for n, k in tree.items() if k in ("linear", "addmm")}
    # PEFT reads "all-linear" as a list of names, which are suffixes as well: "a" then means the embedding "b.a" too.
    model = build(tree)
    assume(not any(other.endswith(f".{n}") for n in linear for other in names_of(model) if other not in linear))
    exclude = data.draw(st.none() | suffixes({n: k for n, k in tree.items() if k} or tree).map(lambda n: [n]))
    assume(any(oracle(n, target_modules=[n], exclude_modules=exclude) for n in linear))
    got = select_targets(candidates_of(model), target_modules=word, exclude_modules=exclude, all_names=names_of(model))
    assert got.names == adapted_by_peft(model, target_modules=word, exclude_modules=exclude)
    assert got.matches == {word: got.names}


def test_all_linear_does_not_reach_other_layers_of_the_same_name():
    tree = {"proj": "linear", "visual.proj": "conv2d", "visual.out": "linear"}
    model = build(tree)
    assert select_targets(candidates_of(model), target_modules="all-linear").names == ("proj", "visual.out")
    assert "visual.proj" in adapted_by_peft(model, target_modules="all-linear")


def test_all_linear_leaves_the_output_head():
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=19,
            num_key_value_heads=1,
        )
    )  # fmt: skip
    got = select_targets(
        candidates_of(model), target_modules="all-linear", output_embedding="lm_head", all_names=names_of(model)
    )
    assert ("lm_head", "the output head") in got.left_out
    assert ("model.embed_tokens", "not a linear layer") in got.left_out
    assert got.names == adapted_by_peft(model, target_modules="all-linear")


@pytest.mark.parametrize("target", ["all-linear", ["query", "classifier"]])
@pytest.mark.parametrize("given_heads", [None, ["pooler"]])
def test_task_head_is_trained_whole(target, given_heads):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=19)
    model = BertForSequenceClassification(config)
    got = select_targets(candidates_of(model), target_modules=target, task_type="SEQ_CLS", modules_to_save=given_heads)
    saved = select_modules_to_save(names_of(model), given_heads, "SEQ_CLS")
    assert "classifier" in saved
    assert ("classifier", "under modules_to_save ('classifier')") in got.left_out
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=target, task_type="SEQ_CLS", modules_to_save=given_heads)
    ).base_model.model
    assert got.names == tuple(n for n, m in wrapped.named_modules() if isinstance(m, LoraLayer))
    assert saved == [n for n, m in wrapped.named_modules() if isinstance(m, ModulesToSaveWrapper)]


def test_token_classification_head_is_not_adapted_and_saved_at_once():
    # PEFT adapts the head, then fails to save it.
    linear = [TargetCandidate(n, "torch.nn.modules.linear.Linear", "linear") for n in ("layer.0.query", "classifier")]
    assert select_targets(linear, target_modules="all-linear", task_type="TOKEN_CLS").names == ("layer.0.query",)


@settings(max_examples=examples(30))
@given(trees(), st.lists(st.sampled_from([*WORDS, "proj", "1", "d"]), min_size=1, max_size=3))
def test_saved_modules_equal_peft(tree, entries):
    model = build(tree)
    names = list(names_of(model))
    if not all(any(n.endswith(e) for n in names) for e in entries):
        with pytest.raises(TargetError, match="modules_to_save"):
            select_modules_to_save(names, entries)
        return
    got = select_modules_to_save(names, entries)
    # PEFT replaces modules while it walks, so one below another that it saved is lost to it.
    assume(not any(a.startswith(b + ".") for a in got for b in got))
    model.add_module("first", nn.Linear(3, 5))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["first"], modules_to_save=entries), model)
    assert got == [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]


def test_saved_heads_need_not_exist_unless_named():
    names = ["bert.pooler", "score_head", "qa_outputs"]
    assert select_modules_to_save(["bert", "classifier"], None, "SEQ_CLS") == ["classifier"]
    assert select_modules_to_save(["bert"], None, "TOKEN_CLS") == []
    assert select_modules_to_save(names, None, peft.TaskType.QUESTION_ANS) == ["qa_outputs"]
    # As PEFT writes it to disk: its own heads appended to the user's list.
    assert select_modules_to_save(["bert", "classifier"], ["classifier", "score"], "SEQ_CLS") == ["classifier"]
    for entries, task in (
        (["score"], "SEQ_CLS"),
        (["classifier", "score"], None),
        (["classifier", "score"], "SEQ_CLS"),
    ):
        with pytest.raises(TargetError, match="score"):
            select_modules_to_save(["bert", "klassifier"], entries, task)


pattern_keys = st.one_of(
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map(".".join),
    st.builds("^{}".format, st.sampled_from(SEGMENTS)),
    st.builds(r".*\.{}".format, st.sampled_from(SEGMENTS)),
    st.builds(r"{}|{}".format, st.sampled_from(SEGMENTS), st.sampled_from(SEGMENTS)),
    st.builds(r"{}\.\d+\..*".format, st.sampled_from(SEGMENTS)),
    st.sampled_from(["q.proj", "proj", ".", r"[a-z]\w*"]),
)


@settings(max_examples=examples(250))
@given(st.lists(pattern_keys, max_size=5, unique=True), st.lists(st.sampled_from(SEGMENTS), min_size=1).map(".".join))
@example(["q.proj", "q_proj"], "a.q_proj")
@example(["0.gate"], "layers.0xgate")
def test_pattern_value_equals_peft(keys, name):
    pattern = {k: i for i, k in enumerate(keys)}
    assert pattern_value(pattern, name, -1) == pattern.get(get_pattern_key(pattern.keys(), name), -1)
    expected = [k for k in keys if not re.match(rf"(.*\.)?({k})$", name)]
    assert unused_patterns(pattern, [name]) == expected
    if expected:
        with pytest.raises(TargetError, match=re.escape(repr(expected[0]))):
            check_patterns("rank_pattern", pattern, [name])
    else:
        check_patterns("rank_pattern", pattern, [name])


def test_a_full_name_is_not_filtered_by_layer():
    names = ["model.layers.0.q_proj", "model.layers.2.q_proj"]
    linear = [TargetCandidate(n, "torch.nn.modules.linear.Linear", "linear") for n in names]
    options = {"target_modules": names, "layers_to_transform": [2]}
    assert select_targets(linear, **options).names == tuple(names)
    assert all(oracle(n, **options) for n in names)


@pytest.mark.parametrize("pattern", [None, "layers", "experts", ["h", "experts"], ["experts", "layers"]])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_first_index_is_the_layer(layer, pattern):
    names = [f"model.layers.{i}.experts.{j}.fc1" for i in (0, 1, 2) for j in (2, 1, 0)]
    linear = [TargetCandidate(n, "torch.nn.modules.linear.Linear", "linear") for n in names]
    options = {"target_modules": ["fc1"], "layers_to_transform": layer, "layers_pattern": pattern}
    expected = tuple(n for n in names if oracle(n, **options))
    assert 0 < len(expected) < len(names)
    assert select_targets(linear, **options).names == expected
