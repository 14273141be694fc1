"""``adaptc.quantize(model, gguf_file=...)`` gives weights the blocks of the file that the model was loaded from."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc import LoraConfig
from adaptc.errors import AdaptcError, AdaptcWarning, CheckpointError, ConfigError, TargetError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.gguf_file import GgufMatrix, WeightLayout, find_weights
from tests.support.gguf_files import HALVES, blocks, write_expert_gguf, write_gguf

KINDS = {
    "token_embd": Kind.Q8_0,
    "blk.0.attn_q": Kind.Q4_1,
    "blk.0.attn_k": Kind.Q4_0,
    "blk.0.attn_v": Kind.Q6_K,
    "blk.0.attn_output": Kind.Q4_K,
    "blk.0.ffn_down": Kind.Q8_0,
}
#: the module that has each of these matrices, after "model."
MODULES = {
    "embed_tokens": "token_embd",
    "layers.0.self_attn.q_proj": "blk.0.attn_q",
    "layers.0.self_attn.k_proj": "blk.0.attn_k",
    "layers.0.self_attn.v_proj": "blk.0.attn_v",
    "layers.0.self_attn.o_proj": "blk.0.attn_output",
    "layers.0.mlp.down_proj": "blk.0.ffn_down",
}
IDS = torch.tensor([[5, 7, 9, 30, 3]])


def load(path: Path, dtype: torch.dtype) -> Any:
    plain = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=plain
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, 61, hidden=256, inner=96, heads=4, kv_heads=2, kinds=KINDS)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_transformers_gets_the_blocks_of_its_file(file: Path, dtype: torch.dtype) -> None:
    model = load(file, dtype)
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    logits = model(IDS).logits
    assert adaptc.quantize(model, gguf_file=file) is model
    quantised = {n for n, t in model.named_parameters() if isinstance(t, QuantizedTensor)}
    assert quantised == {f"model.{m}.weight" for m in MODULES}
    for name in quantised:
        weight = model.get_parameter(name)
        assert torch.equal(weight.dequantize(), before[name])
        bits = {Kind.Q8_0: 8.5, Kind.Q4_0: 4.5, Kind.Q4_1: 5, Kind.Q4_K: 4.625, Kind.Q6_K: 6.5625}
        kind = KINDS[MODULES[name.removeprefix("model.").removesuffix(".weight")]]
        assert weight.stored_bytes == bits[kind] * weight.numel() / 8
    assert torch.equal(model(IDS).logits, logits)
    with torch.no_grad():
        found = model(IDS).logits
    # Without a gradient, layers of 4 bits in bfloat16 take a kernel that rounds scales, each to 2^-9 of itself.
    expected = logits.detach()
    error = float((found - expected).float().norm() / expected.float().norm())
    assert error < (0.02 if dtype == torch.bfloat16 else 1e-6)
    report = model.quantize_report
    assert len(report.weights) == len(MODULES)
    assert report.max_error == 0


def test_rows_that_transformers_puts_in_another_order_are_found(file: Path) -> None:
    """The order of q and k differs from the file's, so this checks what it says."""
    model = load(file, torch.float32)
    adaptc.quantize(model, gguf_file=str(file), target_modules=["q_proj", "v_proj"])
    q, v = (model.model.layers[0].self_attn.get_submodule(f"{n}_proj").weight for n in "qv")
    values = {n: m.quantized(torch.float32).dequantize() for n, m in matrices(file).items()}
    assert not torch.equal(q.dequantize(), values["blk.0.attn_q.weight"])
    assert torch.equal(v.dequantize(), values["blk.0.attn_v.weight"])
    assert not isinstance(model.model.layers[0].mlp.down_proj.weight, QuantizedTensor)


@pytest.mark.long
def test_the_experts_of_a_file_keep_their_blocks(tmp_path: Path) -> None:
    path = tmp_path / "experts.gguf"
    stacks = {"ffn_gate_exps": Kind.Q4_K, "ffn_up_exps": Kind.Q4_K, "ffn_down_exps": Kind.Q8_0}
    write_expert_gguf(path, 61, {"blk.0.attn_q": Kind.Q8_0, **{f"blk.0.{n}": k for n, k in stacks.items()}})
    model = load(path, torch.float32).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every matrix in blocks is found
        adaptc.quantize(model, gguf_file=path)
    experts = model.model.layers[0].mlp.experts
    for weight, bits in ((experts.gate_up_proj, 4.625), (experts.down_proj, 8.5)):
        assert weight.stored_bytes == bits * weight.numel() / 8
    assert model.quantize_report.max_error == 0
    program = adaptc.compile(model, LoraConfig(r=3, target_modules=["q_proj"]))
    error = float((program(input_ids=IDS).logits - expected).norm() / expected.norm())
    assert error < 1e-6


def matrices(file: Path) -> dict[str, GgufMatrix]:
    from adaptc.quantized_layers.gguf_file import read_gguf_matrices

    return {m.name: m for m in read_gguf_matrices(file)}


@pytest.mark.long
def test_programs_and_generators_get_them_and_all_else_works(file: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    plain = adaptc.compile(load(file, torch.float32), config)
    program = adaptc.quantize(plain, gguf_file=str(file))
    names = {n for n, t in program.state_dict.items() if isinstance(t, QuantizedTensor)}
    assert names == {f"model.{m}.weight" for m in MODULES}
    expected = plain(input_ids=IDS).logits
    torch.testing.assert_close(program(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    again = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    merged = adaptc.merge(program, keep="residual")
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    generator = adaptc.quantize(
        adaptc.compile_for_generation(load(file, torch.float32), config, max_batch=1, max_length=32),
        gguf_file=str(file),
    )
    adaptc.swap(generator, adaptc.save_adapter(plain, tmp_path / "adapter"))
    found = generator.generate(IDS, max_new_tokens=3, do_sample=False)
    for position in range(IDS.shape[1], found.shape[1]):
        logits = plain(input_ids=found[:, :position]).logits[0, -1]
        torch.testing.assert_close(logits[found[0, position]], logits.max(), rtol=1e-4, atol=1e-4)


def written(tmp_path: Path, **kinds: Kind) -> Path:
    path = tmp_path / "one.gguf"
    write_gguf(path, 61, hidden=64, inner=96, heads=4, kv_heads=2, kinds={f"blk.0.{n}": k for n, k in kinds.items()})
    return path


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_weights_are_found_in_any_order_of_rows(kind: Kind, dtype: torch.dtype, is_transposed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    found_in = [
        GgufMatrix(f"m{i}", kind, torch.from_numpy(blocks(kind, rows, columns, seed=i)))
        for i, (rows, columns) in enumerate([(7, 256), (7, 256), (11, 512), (256, 256)])
    ]
    weights: dict[str, WeightLayout] = {}
    for matrix in found_in[1:]:
        values = matrix.quantized(dtype).dequantize()
        values = values[torch.randperm(values.shape[0], generator=generator)]
        weight = values.t().contiguous() if is_transposed else values
        weights[f"of {matrix.name}"] = WeightLayout(weight, is_transposed)
    weights["other"] = WeightLayout(torch.randn(weights["of m1"].tensor.shape, dtype=dtype), is_transposed)
    found = find_weights(found_in, weights)
    assert {n: [m.name for m in w.matrices] for n, w in found.items()} == {f"of {n}": [n] for n in ("m1", "m2", "m3")}
    for name, where in found.items():
        weight = weights[name].tensor
        assert torch.equal(where.quantized(weight).dequantize(), weight)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_two_projections_of_experts_are_found_in_one_weight(kind: Kind, is_transposed: bool) -> None:
    """transformers puts the rows of an expert's first projection before those of its second."""

    def stack(seed: int, rows: int = 7, is_stack: bool = True) -> GgufMatrix:
        data = torch.from_numpy(blocks(kind, 3 * rows, 256, seed=seed))
        return GgufMatrix(f"m{seed}", kind, data, is_stack)

    def values(matrix: GgufMatrix) -> Tensor:
        return matrix.quantized(torch.bfloat16).dequantize().reshape(3, -1, 256)

    def joined(*matrices: GgufMatrix) -> WeightLayout:
        weight = torch.cat([values(m) for m in matrices], 1)
        return WeightLayout(weight.mT.contiguous() if is_transposed else weight, is_transposed, 2)

    gate, up, down = stack(0), stack(1), stack(2, rows=14)
    flat = stack(4, is_stack=False)
    weights = {"both": joined(gate, up), "one": joined(down), "same": joined(up, up), "flat": joined(gate, flat)}
    found = find_weights([gate, up, down, flat], weights)
    assert {n: [m.name for m in w.matrices] for n, w in found.items()} == {
        "both": ["m0", "m1"],
        "one": ["m2"],
        "same": ["m1", "m1"],
    }
    for name, where in found.items():
        weight = weights[name].tensor
        made = where.quantized(weight)
        assert made.row_axes == 2
        assert torch.equal(made.dequantize(), weight)
    changed = weights["both"].tensor.clone()
    changed[1, 2, 3] += 1
    assert not find_weights([gate, up], {"both": WeightLayout(changed, is_transposed, 2)})


def test_a_weight_with_one_other_value_is_not_found() -> None:
    matrix = GgufMatrix("m", Kind.Q8_0, torch.from_numpy(blocks(Kind.Q8_0, 5, 64)))
    values = matrix.quantized(torch.float32).dequantize()
    assert set(find_weights([matrix], {"w": WeightLayout(values)})) == {"w"}
    values[3, 17] = torch.nextafter(values[3, 17], torch.tensor(9.0))
    assert find_weights([matrix], {"w": WeightLayout(values)}) == {}


def test_layers_that_store_their_weight_transposed(tmp_path: Path) -> None:
    path = written(tmp_path, ffn_up=Kind.Q4_0)
    net = nn.Sequential(Conv1D(96, 64))
    values = matrices(path)["blk.0.ffn_up.weight"].quantized(torch.float32).dequantize()
    with torch.no_grad():
        net[0].weight.copy_(values.t())
    adaptc.quantize(net, gguf_file=str(path))
    assert net[0].weight.is_transposed
    assert torch.equal(net[0].weight.dequantize(), values.t())


def check_refused(model: nn.Module, match: str, error: type[AdaptcError], **options: Any) -> None:
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptcWarning)
        with pytest.raises(error, match=match):
            adaptc.quantize(model, **options)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])


def test_what_cannot_be_taken_over_is_refused_by_name(file: Path, tmp_path: Path) -> None:
    model = load(file, torch.float32)
    name = str(file)
    check_refused(model, "one of the two", ConfigError)
    check_refused(model, "one of the two", ConfigError, scheme="int8", gguf_file=name)
    check_refused(model, r"gguf_file=3: the path of", ConfigError, gguf_file=3)
    check_refused(model, "those of its blocks", ConfigError, gguf_file=name, group_size=32)
    check_refused(model, "lm_head.weight' has not the values", TargetError, gguf_file=name, target_modules=["lm_head"])
    check_refused(model, r"there is no file '.*absent.gguf'", CheckpointError, gguf_file=str(tmp_path / "absent.gguf"))
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data += 1
    check_refused(other, r"6 of the 6 matrices.*are no weight", CheckpointError, gguf_file=name)
    plain = tmp_path / "plain.gguf"
    write_gguf(plain, 61)
    check_refused(model, "stores no matrix in blocks", CheckpointError, gguf_file=str(plain))


@pytest.mark.parametrize("length", [0, 3, 40, 2000, -100])
def test_a_damaged_file_is_refused(file: Path, tmp_path: Path, length: int) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:length])
    check_refused(load(file, torch.float32), "damaged.gguf'", CheckpointError, gguf_file=str(damaged))


def test_matrices_that_are_not_taken_over_are_named(file: Path) -> None:
    model = load(file, torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.warns(AdaptcWarning, match=r"1 of the 6 matrices in blocks \(1 of Q8_0\), such as 'blk.0.ffn_down"):
        adaptc.quantize(model, gguf_file=str(file))
    assert not isinstance(model.model.layers[0].mlp.down_proj.weight, QuantizedTensor)
    with pytest.raises(ConfigError, match="quantised already"), pytest.warns(AdaptcWarning):
        adaptc.quantize(model, gguf_file=str(file), target_modules=["q_proj"])
