"""Files of torch.export.save load as they did: every dtype, layout and container that a program may have."""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch.utils import _pytree as pytree

import adaptc

Pair = namedtuple("Pair", "a b")  # noqa: PYI024  # of the kind that torch registers
pytree._register_namedtuple(Pair, serialized_type_name="tests.Pair")


@dataclasses.dataclass
class Both:
    a: Tensor
    b: Tensor | None = None


torch.export.register_dataclass(Both, serialized_type_name="tests.Both")


class Does(nn.Module):
    """Runs a function of itself and its inputs; has a layer, and these buffers and parameters."""

    def __init__(self, does: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.does, self.lin = does, nn.Linear(5, 7)
        for name, t in tensors.items():
            if isinstance(t, nn.Parameter):
                setattr(self, name, t)
            else:
                self.register_buffer(name, t)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.does(self, *args, **kwargs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
        self.register_buffer("kept", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.n.add_(1)
        return x + self.n + self.kept.sum()


class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.ParameterDict({"a-b c": torch.randn(5), "größe": torch.randn(5)})

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table["a-b c"] + self.table["größe"]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.cond(x.sum() > 0, lambda t: self.lin(t), lambda t: t * 2, (x,))
        return map_rows(lambda row, w: row * w, y, torch.ones(5))


def by_item(self: Any, x: Tensor, n: Tensor) -> Tensor:
    count = n.item()
    torch._check(count >= 2)
    torch._check(count < 50)
    return self.lin(x).sum() + torch.ones(count).sum()


X = torch.linspace(-2, 3, 15).view(3, 5)
WIDE = torch.arange(99.0).view(11, 9)
AUTO = torch.export.Dim.AUTO
IMAGE = torch.linspace(-1, 1, 2 * 3 * 67 * 59).view(2, 3, 67, 59)

#: name -> (module, positional inputs, keyword inputs, dynamic sizes)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], Any]] = {
    "dynamic sizes": (lambda: Does(lambda s, x: torch.cat([s.lin(x)] * 2).view(2, -1)), (X,), {}, (({0: AUTO},),)),
    "sizes of one another": (
        lambda: Does(lambda s, x, y: s.lin(x)[:-1].sum() + y.sum()), (X, X[:2, 0]), {}, (({0: AUTO}, {0: AUTO}),),
    ),
    "sizes of layers": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=2), nn.Upsample(scale_factor=2)),
        (IMAGE,), {}, ({0: AUTO, 2: AUTO, 3: AUTO},),
    ),
    "sizes of values": (lambda: Does(by_item), (X, torch.tensor(4)), {}, None),
    "sizes found out": (lambda: Does(lambda s, x: torch.nonzero(x > 0)), (X,), {}, None),
    "nested inputs": (
        lambda: Does(lambda s, d, li, n, i, t: s.lin(d["a"]) + li[0][0] * i + (0 if n is None else 1)),
        ({"a": X, "b": [X]}, [(X[:, :1],)], None, 3, "text"), {}, None,
    ),
    "keyword inputs": (
        lambda: Does(lambda s, x, *, f=1.0, g=True, h=None, mode="a": s.lin(x) * f),
        (X,), {"f": 2.5, "g": False, "h": None, "mode": "b"}, None,
    ),
    "a dataclass as input": (lambda: Does(lambda s, b: s.lin(b.a) + b.b), (Both(X, X[:, :1]),), {}, None),
    "a named tuple as input": (lambda: Does(lambda s, b: s.lin(b.a) + b.b), (Pair(X, X[:, :1]),), {}, None),
    "an ordered dict": (lambda: Does(lambda s, x: OrderedDict(a=s.lin(x), b=None)), (X,), {}, None),
    "a default dict": (lambda: Does(lambda s, x: defaultdict(list, a=s.lin(x))), (X,), {}, None),
    "keys that are numbers": (lambda: Does(lambda s, x: {1: s.lin(x), "b": 3, None: 2.5, 2.5: x}), (X,), {}, None),
    "a deque": (lambda: Does(lambda s, x: deque([s.lin(x)], maxlen=4)), (X,), {}, None),
    "a named tuple": (lambda: Does(lambda s, x: Pair(s.lin(x), x)), (X,), {}, None),
    "a dataclass": (lambda: Does(lambda s, x: Both(s.lin(x))), (X,), {}, None),
    "all dtypes": (
        lambda: Does(
            lambda s, x: [getattr(s, f"t{i}").to(torch.complex64) for i in range(10)],
            **{f"t{i}": torch.arange(3).to(d) for i, d in enumerate([
                torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
                torch.bfloat16, torch.float64, torch.complex128,
            ])},
        ),
        (X,), {}, None,
    ),
    "float8": (lambda: Does(lambda s, x: s.t.float(), t=torch.randn(4).to(torch.float8_e4m3fn)), (X,), {}, None),
    "layouts": (
        lambda: Does(
            lambda s, x: (x @ s.w.t()[:5], s.cut, s.wide, s.empty, s.number),
            w=nn.Parameter(torch.randn(7, 5).t().contiguous().t()), cut=WIDE[2:7:2, 1:8:3],
            wide=torch.randn(1, 4).expand(6, 4), empty=torch.empty(0, 3), number=torch.tensor(2.5),
        ),
        (X,), {}, None,
    ),
    "tied weights": (Tied, (torch.tensor([1, 2]),), {}, None),
    "buffers that change": (Counts, (X,), {}, None),
    "constants": (lambda: Does(lambda s, x: x + torch.tensor([1.0, 2, 3, 4, 5])), (X,), {}, None),
    "odd names": (OddNames, (X,), {}, None),
    "subgraphs": (Branches, (X,), {}, None),
    "numbers": (
        lambda: Does(lambda s, x: s.lin(x).clamp(float("-inf"), 1e30).nan_to_num(0.5, float("inf"))), (X,), {}, None,
    ),
    "texts": (lambda: Does(lambda s, x: torch.einsum("ij,kj->ik", x, x)), (X,), {}, None),
    "several outputs": (lambda: nn.LSTM(5, 6, batch_first=True), (X[None],), {}, None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:No complete tensor found", "ignore:The tensor attributes")
@pytest.mark.parametrize("case", list(CASES))
def test_loads_and_computes_the_same(tmp_path: Path, case: str) -> None:
    make, args, kwargs, shapes = CASES[case]
    torch.manual_seed(5)
    exported = torch.export.export(make().eval(), args, kwargs, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "plain.pt2")
    loaded = adaptc.load(tmp_path / "plain.pt2")
    want, got = exported.module()(*args, **kwargs), loaded(*args, **kwargs)
    assert type(got) is type(want)
    wants, tree = pytree.tree_flatten(want)
    gots, other = pytree.tree_flatten(got)
    assert tree == other
    for a, b in zip(wants, gots, strict=True):
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a, b)
        else:
            assert a == b
    loaded.module()(*args, **kwargs)
    # and once more, from what adaptc makes of it
    again = adaptc.load(adaptc.save(loaded, tmp_path / "again.pt2"))
    assert list(again.state_dict) == list(loaded.state_dict)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_cache_of_transformers_goes_in_and_out(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=3, **sizes)).eval()
    register_cache_pytrees_for_model(model)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[1, 2, 3, 5]]), "use_cache": True}
    for name in ("first", "next"):
        exported = torch.export.export(model, (), inputs, strict=False)
        torch.export.save(exported, tmp_path / f"{name}.pt2")
        out = adaptc.load(tmp_path / f"{name}.pt2")(**inputs)
        assert torch.equal(out.logits, exported.module()(**inputs).logits)
        inputs = {"input_ids": torch.tensor([[7]]), "past_key_values": out.past_key_values, "use_cache": True}


def test_weights_alias_and_own_their_memory(tmp_path: Path) -> None:
    path = tmp_path / "tied.pt2"
    torch.export.save(torch.export.export(Tied(), (torch.tensor([1, 2]),)), path)
    loaded = adaptc.load(path)
    a, b = loaded.state_dict["embed.weight"], loaded.state_dict["head.weight"]
    assert a.data_ptr() == b.data_ptr()
    before = a.clone()
    with path.open("r+b") as file:
        file.truncate(100)
    assert torch.equal(a, before)
    a.data[0] = 9.0
    assert b[0, 0] == 9.0


def test_a_program_without_values(tmp_path: Path) -> None:
    layer = nn.Linear(5, 3, device="meta")
    torch.export.save(torch.export.export(layer, (torch.randn(2, 5, device="meta"),)), tmp_path / "meta.pt2")
    assert adaptc.load(tmp_path / "meta.pt2").state_dict["weight"].is_meta


def test_large_weights(tmp_path: Path) -> None:
    """Of more than the size from which memory is taken in large pages."""
    big = nn.Linear(1_031, 1_033, bias=False).requires_grad_(False)
    torch.export.save(torch.export.export(big, (torch.randn(2, 1_031),)), tmp_path / "big.pt2")
    assert torch.equal(adaptc.load(tmp_path / "big.pt2").state_dict["weight"], big.weight)


def test_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    good = tmp_path / "good.pt2"
    torch.export.save(torch.export.export(Tied(), (torch.tensor([1, 2]),)), good)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    (odd / "a.pt2").write_bytes(good.read_bytes())
    ids = torch.tensor([3, 4])
    assert torch.equal(adaptc.load(odd / "a.pt2")(ids), adaptc.load(good)(ids))
    (odd / "b.pt2").write_bytes(b"nothing")
    with pytest.raises(adaptc.CheckpointError, match=r"caf\\xe9/b\.pt2 cannot be read"):
        adaptc.load(odd / "b.pt2")
    with pytest.raises(adaptc.CheckpointError, match=r"there is no file .*caf\\xe9/c\.pt2"):
        adaptc.load(odd / "c.pt2")
