"""Layers that are not what their class says: computed weights, added keys and values.

What PEFT's files mean there is computed, or the layer is refused by name; never is something else adapted.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
import torch.nn.utils.prune
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations as parametrized

import adaptc
from tests.support.subject import FILE, quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    # torch's own, of the hooks that compute a weight in front of a call
    pytest.mark.filterwarnings("ignore:The tensor attributes? self.first.layer:UserWarning"),
]


class Net(nn.Module):
    """A layer, and a plain one that an entry may mean as well."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"layer": layer})
        self.second = nn.ModuleDict({"layer": nn.Linear(5, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.first["layer"](x).mean() + self.second["layer"](
            x[..., :5].float() if x.is_floating_point() else OWN
        )


OWN = torch.linspace(-1, 1, 10).reshape(2, 5)


def pruned() -> nn.Module:
    layer = nn.Linear(5, 7)
    torch.nn.utils.prune.random_unstructured(layer, "weight", 0.4)
    return layer


ROWS, IMAGE, IDS = torch.randn(3, 5), torch.randn(3, 5, 7), torch.arange(6).reshape(2, 3)
#: layer, its input, what its weight is computed of, and what undoes it
COMPUTED: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(5, 7)), ROWS, "weight_g and weight_v", "remove_weight_norm"),
    "weight_norm_conv": (
        lambda: nn.utils.weight_norm(nn.Conv1d(5, 7, 3)),
        IMAGE,
        "weight_g and weight_v",
        "remove_weight_norm",
    ),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(5, 7)), ROWS, "weight_orig", "remove_spectral_norm"),
    "pruned": (pruned, ROWS, "weight_orig and weight_mask", "prune.remove"),
    "new_weight_norm": (lambda: parametrized.weight_norm(nn.Linear(5, 7)), ROWS, "original0 and original1", "remove_p"),
    "new_spectral_norm": (lambda: parametrized.spectral_norm(nn.Linear(5, 7)), ROWS, "original", "remove_p"),
    "orthogonal": (lambda: parametrized.orthogonal(nn.Linear(5, 7)), ROWS, "original", "remove_p"),
    "new_weight_norm_conv": (lambda: parametrized.weight_norm(nn.Conv1d(5, 7, 3)), IMAGE, "original0", "remove_p"),
    "new_weight_norm_embedding": (lambda: parametrized.weight_norm(nn.Embedding(11, 7)), IDS, "original0", "remove_p"),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_refused(name):
    """By its name, by an ending that another layer has too, and among all linear layers, whatever the method."""
    build, x, parts, undo = COMPUTED[name]
    model = Net(build()).eval()
    message = rf"first\.layer\.weight' is computed of {parts}.*{undo}.*leave the module out"
    program = torch.export.export(model, (x,))
    linear = ["all-linear"] if isinstance(model.first["layer"], nn.Linear) else []
    for target in (["first.layer"], ["layer"], r".*layer", *linear):
        config = adaptc.LoraConfig(r=2, target_modules=target)
        with pytest.raises(adaptc.TargetError, match=message):
            adaptc.compile(program, config)
    config = adaptc.IA3Config(target_modules=["first.layer"], feedforward_modules=[])
    with pytest.raises(adaptc.TargetError, match=message):
        adaptc.compile(model, config, example_inputs=x)
    kept = adaptc.compile(program, adaptc.LoraConfig(r=2, target_modules=["second.layer"]))
    assert [a.module for a in kept.adaptation.attachments] == ["second.layer"]


def test_what_undoes_it_makes_it_a_target():
    layer = parametrized.weight_norm(nn.Linear(5, 7))
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    program = adaptc.compile(
        Net(layer).eval(), adaptc.LoraConfig(r=2, target_modules=["first.layer"]), example_inputs=ROWS
    )
    assert [a.fqn for a in program.adaptation.attachments] == ["first.layer.weight"]


def test_a_computed_bias_leaves_the_weight_a_target():
    layer = parametrized.weight_norm(nn.Linear(5, 7), "bias", dim=None)
    program = adaptc.compile(
        Net(layer).eval(), adaptc.LoraConfig(r=2, target_modules=["first.layer"]), example_inputs=ROWS
    )
    assert [a.fqn for a in program.adaptation.attachments] == ["first.layer.weight"]


def test_parameters_that_only_sound_alike():
    """A module of one's own with matrices called like parts of a weight norm, of other axes."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_g, self.w_v = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w_v.T * self.w_g

    program = adaptc.compile(Net(Gate()), adaptc.LoraConfig(r=2, target_modules=["first.layer"]), example_inputs=ROWS)
    assert [a.fqn for a in program.adaptation.attachments] == ["first.layer.w_v"]


class Attention(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(15, 3, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x.flip(1), x * 2, need_weights=False)[0]


@pytest.mark.few(2)
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize(
    "options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "bias": False}]
)
def test_attention_with_added_keys_and_values(options, bias, tmp_path):
    torch.manual_seed(1)
    x = torch.randn(2, 5, 15)
    model, twin = Attention(**options).eval(), Attention(**options).eval()
    twin.load_state_dict(model.state_dict())
    with quiet():
        wrapped = peft.get_peft_model(twin, peft.LoraConfig(r=2, target_modules=["attn"], bias=bias)).eval()
        with torch.no_grad():
            for p in wrapped.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn_like(p) * 0.3)
        wrapped.save_pretrained(str(tmp_path / "peft"))
        expected = wrapped(x).detach()
    program = adaptc.compile(model, tmp_path / "peft", example_inputs=x)
    assert float((expected - model(x)).detach().abs().max()) > 1e-2
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adaptc.merge(program)(x), expected, rtol=1e-4, atol=1e-5)
    written = load_file(adaptc.save_adapter(program, tmp_path / "ours") / FILE)
    given = load_file(tmp_path / "peft" / FILE)
    assert written.keys() == given.keys()
    assert all(torch.equal(written[k], v) for k, v in given.items())


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}, {"padding_idx": 2}])
def test_embeddings_with_options(options, tmp_path):
    """Outputs are PEFT's; what the options do to gradients is in tests/families/test_embedding_layers.py."""
    torch.manual_seed(1)
    model, twin = (nn.Sequential(nn.Embedding(11, 7, **options)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    with quiet():
        wrapped = peft.get_peft_model(twin, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
        wrapped.save_pretrained(str(tmp_path))
    program = adaptc.compile(model, tmp_path, example_inputs=IDS)
    torch.testing.assert_close(program(IDS), wrapped(IDS).detach(), rtol=1e-5, atol=1e-6)
