"""OFT: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from torch import Tensor, nn

import adaptc
from adaptc.methods.orthogonal.oft import Oft
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.graph.ops import Op
from tests.support.custom_models import OneLayer
from tests.support.pass_checks import attach, export, random_values

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(15, 11), torch.linspace(-2, 3, 45).reshape(3, 15)),
    "embedding": (lambda: nn.Embedding(7, 15), torch.tensor([[1, 6, 1, 0]])),
    "conv2d": (lambda: nn.Conv2d(5, 7, 3, padding=1), torch.linspace(-2, 3, 150).reshape(1, 5, 6, 5)),
    "groups": (lambda: nn.Conv2d(30, 21, 1, groups=3), torch.linspace(-2, 3, 360).reshape(1, 30, 4, 3)),
}


def model(layer: str) -> OneLayer:
    torch.manual_seed(3)
    return OneLayer(LAYERS[layer][0]()).eval()


def options(**changes: Any) -> dict[str, Any]:
    return {"target_modules": ["layer"], "oft_block_size": 3, **changes}


def by_peft(layer: str, path: Path, **changes: Any) -> peft.PeftModel:
    """A random adapter of PEFT's, saved to ``path``."""
    wrapped = peft.get_peft_model(model(layer), peft.OFTConfig(**options(init_weights=False, **changes))).eval()
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "oft_" in n:
                p.copy_(torch.randn(p.shape) * 0.4)
    wrapped.save_pretrained(str(path))
    return wrapped


def compiled(layer: str, adapter: Any, **more: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(model(layer), adapter, example_inputs=LAYERS[layer][1], **more)


def slot(program: adaptc.AdaptedProgram) -> Tensor:
    return next(t for n, t in program.binding.values.items() if "oft_" in n)


def rows(n: int, b: int, size: float = 0.4) -> Tensor:
    torch.manual_seed(n)
    return torch.randn(n, b * (b - 1) // 2, dtype=torch.float64) * size


def test_fields_and_defaults_are_pefts():
    theirs = vars(peft.OFTConfig())
    ours = {k: v for k, v in vars(adaptc.OFTConfig()).items() if k not in ("peft_version", "target_parameters")}
    assert ours == {k: theirs[k] for k in ours}
    assert set(theirs) - set(ours) == {"peft_type", "peft_version"}


@pytest.mark.parametrize("layer", ["linear", "embedding", "conv2d"])
def test_one_seed_gives_what_peft_gives(layer):
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model(layer), peft.OFTConfig(**options(init_weights=False)))
    torch.manual_seed(7)
    # The model is built under another seed, as in the line above.
    program = compiled(layer, adaptc.OFTConfig(**options(init_weights=False)))
    expected = next(p for n, p in wrapped.named_parameters() if "oft_" in n)
    assert torch.equal(slot(program), expected.detach())
    assert expected.any()


# -- sizes -------------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 200), asked=st.integers(1, 220), by_count=st.booleans())
def test_sizes_that_do_not_divide_are_adjusted_as_in_peft(n, asked, by_count):
    method = Oft(blocks=asked, size=0) if by_count else Oft(size=asked)
    fits = asked if n % asked == 0 else OFTLayer.adjust_oft_parameters(None, n, asked)  # type: ignore[arg-type]
    b = n // fits if by_count else fits
    assert method.slots(Op("linear", (3, n)))["oft_R.weight"].shape == (n // b, b * (b - 1) // 2)


def test_an_adjusted_size_is_told():
    with pytest.warns(adaptc.AdaptcWarning, match=r"oft_block_size=4 does not divide the width 15 .* oft_block_size=3"):
        program = compiled("linear", adaptc.OFTConfig(**options(oft_block_size=4)))
    assert slot(program).shape == (5, 3)
    with pytest.warns(adaptc.AdaptcWarning, match=r"r=16 does not divide the width 15 .* r=15; .* nothing to train"):
        program = compiled("linear", adaptc.OFTConfig(**options(oft_block_size=0, r=16)))
    x = LAYERS["linear"][1]
    assert slot(program).shape == (15, 0)
    torch.testing.assert_close(program(x), model("linear")(x))


def test_file_with_an_adjusted_size(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = by_peft("linear", tmp_path, oft_block_size=4)
    x = LAYERS["linear"][1]
    torch.testing.assert_close(compiled("linear", tmp_path)(x), wrapped(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3}, "one of r and oft_block_size"),
        ({"oft_block_size": 0}, "one of r and oft_block_size"),
        ({"oft_block_size": -3}, "got r=0 and oft_block_size=-3"),
        ({"bias": "lora_only"}, "'oft_only'"),
        ({"module_dropout": 1.5}, "module_dropout must lie in"),
        ({"init_weights": "normal"}, "init_weights must be True or False"),
        ({"coft": True, "eps": 0.0}, "eps"),
        ({"num_cayley_neumann_terms": 1}, "must be 2 or more"),
    ],
)
def test_refused_options(changes, message):
    with pytest.raises(adaptc.ConfigError, match=message):
        adaptc.OFTConfig(**options(**changes))


def test_files_of_older_releases():
    data = peft.OFTConfig(**options()).to_dict() | {"peft_type": "OFT"}
    assert adaptc.OFTConfig.from_dict(data | {"peft_version": "0.18.0"}).oft_block_size == 3
    for old in ({**data, "peft_version": "0.17.1"}, {k: v for k, v in data.items() if k != "peft_version"}):
        with pytest.warns(adaptc.AdaptcWarning, match="before 0.18"):
            adaptc.OFTConfig.from_dict(old)
    del data["oft_block_size"]
    with pytest.raises(adaptc.ConfigError, match=r"PEFT 0\.13 or older"):
        adaptc.OFTConfig.from_dict(data)


# -- rotations ---------------------------------------------------------------------------------------------------------


@given(
    b=st.sampled_from([1, 2, 3, 5, 8]),
    terms=st.sampled_from([0, 2, 3, 4, 5, 6, 9]),
    share=st.booleans(),
    coft=st.booleans(),
)
def test_rotations_are_pefts(b, terms, share, coft):
    k = 1 if share else 4
    values = rows(k, b)
    module = OFTRotationModule(k, values.shape[1], b, 4 * b, coft, 0.5, share, (0, 0), terms > 0, terms).double()
    module.weight.data.copy_(values)
    method = Oft(size=b, share=share, terms=terms, radius=0.5 if coft else 0.0)
    op = Op("linear", (7, 4 * b))
    x = torch.randn(3, 4 * b, dtype=torch.float64)
    mine = values.clone().requires_grad_()
    found = method.rotate(op, x, {"oft_R.weight": mine})
    expected = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if b > 1:
        weights = torch.randn_like(x)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(mine.grad, module.weight.grad, rtol=1e-8, atol=1e-8)


def test_the_exact_rotation_turns_the_other_way():
    op, x = Op("linear", (7, 10)), torch.randn(3, 10, dtype=torch.float64)
    slots = {"oft_R.weight": rows(2, 5, 0.1)}
    exact, series = Oft(size=5, terms=0), Oft(size=5, terms=40)
    torch.testing.assert_close(exact.rotate(op, x, slots), series.rotate(op, x, slots, transpose=True))
    assert not torch.allclose(exact.rotate(op, x, slots), series.rotate(op, x, slots), rtol=1e-2, atol=1e-2)
    there_and_back = exact.rotate(op, exact.rotate(op, x, slots), slots, transpose=True)
    torch.testing.assert_close(there_and_back, x)


@given(groups=st.sampled_from([1, 2, 3]), kernel=st.sampled_from([(1,), (3,), (2, 3)]), b=st.sampled_from([2, 4, 12]))
def test_weights_of_grouped_convolutions(groups, kernel, b):
    """The rotation is of all channels; where a block reaches over two groups the weight becomes dense."""
    aten = torch.ops.aten
    target = aten.conv1d.default if len(kernel) == 1 else aten.conv2d.default
    one = [1] * len(kernel)
    op = Op("conv1d", (5 * groups, 12, *kernel), target, (one, [0] * len(kernel), one, groups))
    method = Oft(size=b if groups == 1 else 3 * b)
    W = torch.randn(op.shape, dtype=torch.float64)
    size = method.block_size(op)
    R = rows(method.rotation_size(op) // size, size)
    found = op.dense(method.weight(op, W, {"oft_R.weight": R}, None)) if op.matrix_shape[1] % size == 0 else None
    dense = op.dense(W)
    wide = Op("linear", (dense.shape[0], dense[0].numel()))
    expected = Oft(size=size).weight(wide, dense.flatten(1), {"oft_R.weight": R}, None).reshape(dense.shape)
    if found is None:
        found = method.weight(op, W, {"oft_R.weight": R}, None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block", [5, 6])
def test_grouped_convolutions_of_one_place_are_pefts(block, tmp_path):
    """Also where a block reaches over two groups, in both forms and merged, of which PEFT has but the first."""
    wrapped, x = by_peft("groups", tmp_path, oft_block_size=block), LAYERS["groups"][1]
    expected = wrapped(x)
    for form in ("apply", "weight"):
        program = compiled("groups", tmp_path, form=form)
        torch.testing.assert_close(program(x), expected)
        torch.testing.assert_close(adaptc.merge(program)(x), expected)


def test_a_kernel_is_turned_as_pefts_merge_turns_it(tmp_path):
    """PEFT's own forward is another function, and not even the layer's own when the adapter is fresh."""
    wrapped, x = by_peft("conv2d", tmp_path), LAYERS["conv2d"][1]
    unmerged = wrapped(x)
    merged = wrapped.merge_and_unload()
    program = compiled("conv2d", tmp_path)
    torch.testing.assert_close(program(x), merged(x))
    torch.testing.assert_close(adaptc.merge(program).state_dict["layer.weight"], merged.layer.weight)
    assert not torch.allclose(unmerged, merged(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("fqn", ["0.weight", "1.weight"])
def test_two_on_one_layer_compose_as_merges_do(fqn):
    """W R1^T R2^T: in PEFT this is the merge, and the forward has another order."""
    torch.manual_seed(3)
    program = export(nn.Sequential(nn.Embedding(7, 15), nn.Linear(15, 11)).double(), x := torch.tensor([[1, 6, 0]]))
    pair = [attach(program, fqn, Oft(size=s), adapter=f"a{s}", variant=i) for i, s in enumerate((3, 5))]
    values = random_values(program, pair)
    result = Inject(pair, values)(program)
    merged = Merge(result.data, values)(result.program).program
    torch.testing.assert_close(result.program.module()(x), merged.module()(x), rtol=1e-12, atol=1e-12)
    W = program.state_dict[fqn].detach()
    for a in result.data:
        op = Op("embedding" if fqn == "0.weight" else "linear", (15, 7) if fqn == "0.weight" else (11, 15))
        slots = {n: values[f] for n, f in a.slots.items()}
        W = op.stored(a.method.weight(op, op.canonical(W), slots, None))
    torch.testing.assert_close(merged.state_dict[fqn], W)


def test_module_dropout_leaves_blocks_as_they_are():
    method = Oft(size=3, dropout=0.4, training=True)
    op, values = Op("linear", (7, 1500)), rows(500, 3)
    R = method.rotation_blocks(3, values)
    full = method.evaluated().rotation_blocks(3, values)
    dropped = torch.eye(3, dtype=R.dtype).eq(R).all(-1).all(-1)
    assert 0.3 < float(dropped.double().mean()) < 0.5
    assert torch.equal(R[~dropped], full[~dropped])
    assert op.in_features == 3 * len(R)


@pytest.mark.long
def test_module_dropout_acts_in_training_alone(tmp_path):
    by_peft("linear", tmp_path, module_dropout=0.5)
    x = LAYERS["linear"][1]
    program = compiled("linear", tmp_path, training=True)
    exact = compiled("linear", tmp_path)(x)
    outs = [program.module().train()(x) for _ in range(12)]
    assert len({tuple(o.detach().flatten().tolist()) for o in outs}) > 1
    torch.testing.assert_close(program.module().eval()(x), exact)
    torch.testing.assert_close(adaptc.merge(program)(x), exact)
