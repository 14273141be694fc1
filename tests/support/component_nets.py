"""A small net with the names of a diffusers UNet, and adapter files for it in the layouts of others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptc

#: module -> the shape of its weight
SHAPES = {
    "conv_in": (7, 3, 3, 3),
    "down_blocks.0.resnets.0.conv1": (10, 7, 3, 3),
    "down_blocks.0.attentions.0.proj_in": (6, 10, 1, 1),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (12, 6),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (5, 12),
    "up_blocks.0.resnets.0.time_emb_proj": (4, 5),
}
LINEAR = "up_blocks.0.resnets.0.time_emb_proj"
CONV = "down_blocks.0.resnets.0.conv1"
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 12)
        self.to_out = nn.ModuleList([nn.Linear(12, 5)])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 7, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].resnets = nn.ModuleList([nn.Module()])
        self.down_blocks[0].resnets[0].conv1 = nn.Conv2d(7, 10, 3)
        self.down_blocks[0].attentions = nn.ModuleList([nn.Module()])
        self.down_blocks[0].attentions[0].proj_in = nn.Conv2d(10, 6, 1)
        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList([nn.Module()])
        self.mid_block.attentions[0].transformer_blocks = nn.ModuleList([nn.Module()])
        self.mid_block.attentions[0].transformer_blocks[0].attn1 = Attention()
        self.up_blocks = nn.ModuleList([nn.Module()])
        self.up_blocks[0].resnets = nn.ModuleList([nn.Module()])
        self.up_blocks[0].resnets[0].time_emb_proj = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.down_blocks[0].resnets[0].conv1(torch.relu(self.conv_in(x))))
        h = self.down_blocks[0].attentions[0].proj_in(h).flatten(2).mean(-1)
        attn = self.mid_block.attentions[0].transformer_blocks[0].attn1
        return self.up_blocks[0].resnets[0].time_emb_proj(torch.relu(attn.to_out[0](torch.relu(attn.to_q(h)))))


def net(seed: int = 3) -> UNet:
    torch.manual_seed(seed)
    return UNet().eval()


def image() -> Tensor:
    torch.manual_seed(11)
    return torch.randn(2, 3, 9, 8)


def program(model: nn.Module, adapter: object, **options: object) -> adaptc.AdaptedProgram:
    return adaptc.compile(model, adapter, example_inputs=image(), **options)


def output_with_changes(model: nn.Module, changes: Mapping[str, Tensor]) -> Tensor:
    """What the model gives for :func:`image` with these added to the weights of its modules."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for module, change in changes.items():
        state[f"{module}.weight"] += change.reshape(state[f"{module}.weight"].shape)
    other = UNet().eval()
    other.load_state_dict(state)
    with torch.no_grad():
        return other(image())


def flat(module: str, prefix: str = "lora_unet_") -> str:
    return prefix + module.replace(".", "_")


def random_lora_factors(module: str, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(A, B), none of them zero, in the shapes of the module's kind."""
    g = torch.Generator().manual_seed(seed + sum(map(ord, module)))
    out, *rest = SHAPES[module]
    a = torch.randn(rank, *rest, generator=g) / 3
    b = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=g) / 3
    return a, b


def lora_change(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return (b.flatten(1).double() @ a.flatten(1).double() * scale).float()


def kohya(rank: int = 3, alpha: float | None = 2.0, modules: Mapping[str, object] = SHAPES) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for module in modules:
        a, b = random_lora_factors(module, rank)
        out |= {f"{flat(module)}.lora_down.weight": a, f"{flat(module)}.lora_up.weight": b}
        if alpha is not None:
            out[f"{flat(module)}.alpha"] = torch.tensor(alpha)
    return out


def kohya_changes(rank: int = 3, alpha: float | None = 2.0) -> dict[str, Tensor]:
    scale = 1.0 if alpha is None else alpha / rank
    return {m: lora_change(*random_lora_factors(m, rank), scale) for m in SHAPES}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt", **(header or {})})
    return path


LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def loha(module: str, r: int, kernel: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors in LyCORIS's layout, and the change by its formula."""
    g = torch.Generator().manual_seed(5)
    out, into, *size = SHAPES[module]

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / 2

    if kernel:
        halves = [(random_tensor(r, r, *size), random_tensor(r, out), random_tensor(r, into)) for _ in range(2)]
        change = torch.ones(out, into, *size)
        tensors = {}
        for i, (t, a, b) in enumerate(halves, 1):
            change = change * torch.einsum("ijkl,jr,ip->prkl", t, b, a)
            tensors |= {f"hada_t{i}": t, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
        return tensors, change
    width = into * (size[0] * size[1] if size else 1)
    tensors = dict(
        zip(
            LOHA,
            (random_tensor(out, r), random_tensor(r, width), random_tensor(out, r), random_tensor(r, width)),
            strict=True,
        )
    )
    change = (tensors[LOHA[0]] @ tensors[LOHA[1]]) * (tensors[LOHA[2]] @ tensors[LOHA[3]])
    return tensors, change


def lokr(
    module: str, r: int | None, split: tuple[int, int], first_rank: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """With ``split`` (l, m); ``r`` None for a whole second factor."""
    g = torch.Generator().manual_seed(6)
    (out, into, *size), (l, m) = SHAPES[module], split  # noqa: E741  # the paper's names
    k, n = out // l, into // m

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / 2

    if first_rank:
        tensors = {"lokr_w1_a": random_tensor(l, first_rank), "lokr_w1_b": random_tensor(first_rank, m)}
        first = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    else:
        tensors = {"lokr_w1": random_tensor(l, m)}
        first = tensors["lokr_w1"]
    if r is None:
        tensors["lokr_w2"] = random_tensor(k, n, *size)
        second = tensors["lokr_w2"]
    else:
        area = size[0] * size[1] if size else 1
        tensors |= {"lokr_w2_a": random_tensor(k, r), "lokr_w2_b": random_tensor(r, n * area)}
        second = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).reshape(k, n, *size)
    first = first.reshape(l, m, *[1] * len(size))
    return tensors, torch.kron(first, second).reshape(SHAPES[module])


def with_kohya_names(module: str, tensors: dict[str, Tensor], alpha: float | None = None) -> dict[str, Tensor]:
    out = {f"{flat(module)}.{n}": t for n, t in tensors.items()}
    return out if alpha is None else {**out, f"{flat(module)}.alpha": torch.tensor(alpha)}


@lru_cache
def program_with_all_sites() -> adaptc.AdaptedProgram:
    """A program with LoRA at every site, to swap files into."""
    return program(net(), adaptc.LoraConfig(target_modules=list(SHAPES)))


@torch.no_grad()
def check_program_output(program: adaptc.AdaptedProgram, model: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """That the program computes what the model does with these changes, which are some."""
    expected = output_with_changes(model, changes)
    torch.testing.assert_close(program(image()), expected, rtol=1e-5, atol=1e-5)
    assert (expected - model(image())).abs().max() > 1e-3, "the adapter does nothing, so nothing was compared"


def peft_keys(prefix: str = "") -> dict[str, Tensor]:
    out = {}
    for module in (TO_Q, CONV):
        a, b = random_lora_factors(module, 3)
        out |= {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}
    return out
