"""FRoD: W' = U (diag(l) + S) V^T, where layers of one role share V and the places of a sparse S (doi
10.1609/aaai.v40i31.39813).

The role of a layer, its category, is the end of its name, such as ``self_attn_q_proj``. V follows from the weights of
all layers of a category. U has the columns of W V^-T, scaled to length one, and l starts as their lengths. So W' starts
as W, up to the rounding of U and l to float32. Trained are l and the entries of S, off the diagonal, which start at
zero.

Slots, in PEFT's shapes: each site has ``frod_lambda_l`` (in,) and ``frod_lambda_s_values`` (n,). Its category has
``frod_V`` (in, in), ``frod_s_indices`` (2, n) and ``frod_s_size`` (2,), which are in files with ``save_projection``,
once for all of its sites. Without it, they are made of the weights and of ``projection_prng_key``, as PEFT makes them.
``frod_U`` (out, in) always follows from W and V, in float64. ``frod_is_present`` is 0 at a site that the adapter lacks,
and is not in files. Where W has a lower rank than V, columns of U are what rounding left there. So an adapter is made
for one dtype of the base. Beyond PEFT's linear layers, W is the weight as a matrix, kernels in its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_matrix, check_probability, prepare_adapter_input
from adaptc.methods.sparse.sparse import scatter_dense
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.shared_slots import SharedSlots
from adaptc.torch_modes import outside_modes

DIAGONAL, ENTRIES = "frod_lambda_l", "frod_lambda_s_values"
V, INDICES, SIZE = "frod_V", "frod_s_indices", "frod_s_size"
U, PRESENT = "frod_U", "frod_is_present"
#: the length from which a column of W V^-T counts as a direction
_SHORTEST = 1e-12


@dataclass
class FrodConfig(TargetedConfig):
    """PEFT's ``FrodConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        projection_prng_key: the seed of the places of the trained entries.
        save_projection: whether files hold the shared basis and the places.
        frod_dropout: the dropout probability of the adapter's input.
        sparse_rate: how many entries are trained, as a share of all entries of S.
        regularization_alpha: what is added to the diagonals of the matrices that are inverted to find the basis.
        progressbar: kept for files, and without an effect: the basis is found in one step, with no bar.
        runtime_offload_base_weight: refused, since the weights of a program stay on their device.
        init_weights: whether W' starts as W. False adds random numbers to l and to the entries of S.

    Example:
        >>> config = adaptc.FrodConfig(sparse_rate=0.02, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "FROD"
    dropout_field: ClassVar[str] = "frod_dropout"
    unsupported_fields: ClassVar[Mapping[str, str]] = {
        "runtime_offload_base_weight": "the base weights of a program stay on the device of the program"
    }

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "frod_dropout")
        check_probability(self, "sparse_rate", allow_one=True)

    def method(self, name: str, kind: str) -> Frod:
        return Frod(
            key=self.projection_prng_key,
            saved=self.save_projection,
            dropout=self.frod_dropout,
            rate=self.sparse_rate,
            ridge=self.regularization_alpha,
            scheme=self.init_weights,
            category=category_of(name),
            block=block_of(name),
        )


def category_of(name: str) -> str:
    """Return the role of the module ``name``, by which layers share a basis, as PEFT tells it.

    It is the last two parts of the name, or the last part below a number. BERT's ``attention.output.dense`` has a name
    of its own, or it would be one with ``output.dense``.
    """
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(parts[-2:])


def block_of(name: str) -> int:
    """Return the number of the block that the module ``name`` is in, -1 for none: the number behind ``layers``, or else
    the first number."""
    parts = name.split(".")
    behind = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    numbers = [p for p in (*behind, *parts) if p.isdigit()]
    return int(numbers[0]) if numbers else -1


@torch.no_grad()
def joint_basis(matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """Return a basis V (columns, columns) for matrices (rows_i, columns), by a joint decomposition of all of them.

    With fewer rows than columns in all, V has the right singular vectors of the stacked matrices. Raises ConfigError
    for matrices that are not finite, and where an inverse does not exist.
    """
    stacked = torch.cat([m.detach().to("cpu", torch.float32) for m in matrices])
    if not bool(stacked.isfinite().all()):
        raise ConfigError("FRoD decomposes the weights, but not all of them are finite")
    try:
        return _decompose(stacked, [m.shape[0] for m in matrices], ridge)
    except RuntimeError as error:  # torch.linalg's, which torch does not export
        raise ConfigError(
            f"FRoD found no common basis of its weights with regularization_alpha={ridge!r} ({error}); a larger one "
            "keeps matrices invertible"
        ) from error


def _decompose(stacked: Tensor, rows: list[int], ridge: float) -> Tensor:
    columns = stacked.shape[1]
    if stacked.shape[0] < columns:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.t()
    q, r = torch.linalg.qr(stacked)
    eye = torch.eye(columns, dtype=r.dtype)
    total = torch.zeros_like(eye)
    for part in q.split(rows):
        total += torch.linalg.inv(part.t() @ part + ridge * eye)
    return r.t() @ torch.linalg.eigh(total / len(rows)).eigenvectors


def count_entries(size: int, rate: float) -> int:
    """Return how many entries of a matrix (size, size) are trained, all off its diagonal."""
    most = size * (size - 1)
    return max(1, min(int(size * size * rate), most)) if rate > 0 and most else 0


@lru_cache(maxsize=2)
def draw_entries(key: int, rate: float, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return the places of the trained entries for matrices of these sizes, each (2, n) int64 on the CPU.

    One generator draws them all, as in PEFT. They are cached: copy them, never write to them.
    """
    out: list[Tensor] = []
    with outside_modes(), torch.no_grad():
        generator = torch.Generator().manual_seed(key)
        for size in sizes:
            n = count_entries(size, rate)
            at = torch.randperm(size * (size - 1), generator=generator)[:n] if n else torch.empty(0, dtype=torch.int64)
            rows, columns = at // max(1, size - 1), at % max(1, size - 1)
            out.append(torch.stack([rows, columns + (columns >= rows)]))  # the diagonal is left out
    return tuple(out)


@torch.no_grad()
def directions_and_lengths(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (rows, columns) and l (columns,) with U diag(l) V^T = W, in float32 on the CPU, computed in float64."""
    w, v = (t.detach().to("cpu", torch.float64) for t in (matrix, basis))
    try:
        scaled = torch.linalg.solve(v, w.t()).t()
    except RuntimeError:  # a basis that is singular
        scaled = w @ torch.linalg.pinv(v, rtol=1e-6).t()
    lengths = torch.linalg.norm(scaled, dim=0)
    long = lengths > _SHORTEST
    return torch.where(long, scaled / lengths.where(long, 1.0), 0.0).float(), lengths.float()


class FrodFiles(FileFormat):
    method: Frod

    def keys(self, op: Op) -> list[str]:
        return [V, INDICES, SIZE]  # a file may hold what could be made again

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        size, indices = op.matrix_shape[1], found.get(INDICES)
        if indices is not None and indices.numel() and not indices.is_floating_point():
            low, high = int(indices.min()), int(indices.max())
            if not 0 <= low <= high < size:
                raise CheckpointError(
                    f"{INDICES}.{self.method.category!r} holds places from {low} to {high}, and the layer has {size} "
                    "inputs"
                )
        return dict(found)

    def needs_base(self) -> bool:
        return True

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        return {**self.method.identity(op, W, dtype), **self.method.frozen_values(op, W, dtype, found.get(V))[0]}


class FrodSharing(SharedSlots):
    method: Frod

    def settle_shared_sizes(self, sites: Sequence[tuple[Method, Op]]) -> list[Method]:
        sizes: dict[str, int] = {}
        for method, op in sites:
            assert isinstance(method, Frod)
            size = sizes.setdefault(method.category, op.matrix_shape[1])
            if size != op.matrix_shape[1]:
                raise ConfigError(
                    f"FRoD has one basis for all layers of the role {method.category!r}, and these have {size} and "
                    f"{op.matrix_shape[1]} inputs; adapt them by adapters of their own"
                )
        names = sorted(sizes)
        settled = tuple(sizes[n] for n in names)
        return [
            replace(method, all_sizes=settled, place=names.index(method.category))
            for method, _ in sites
            if isinstance(method, Frod)
        ]

    def grouped_slots(self, sites: Sequence[tuple[Method, Op]]) -> list[Mapping[str, int]]:
        first: dict[str, int] = {}
        categories = [method.category for method, _ in sites if isinstance(method, Frod)]
        return [dict.fromkeys((V, INDICES, SIZE), first.setdefault(c, i)) for i, c in enumerate(categories)]

    def with_weights(self, sites: Sequence[tuple[Method, Op, Callable[[], Tensor]]]) -> list[Method]:
        members: dict[str, dict[int, Callable[[], Tensor]]] = {}
        for i, (method, op, read) in enumerate(sites):
            assert isinstance(method, Frod)
            # As in PEFT, the later one of two layers of one role and block stands for both.
            block = i if method.block < 0 else method.block
            members.setdefault(method.category, {})[block] = lambda op=op, read=read: op.matrix(read())

        @cache
        def make(category: str, ridge: float) -> Tensor:
            return joint_basis([read() for _, read in sorted(members[category].items())], ridge)

        return [replace(m, basis=lambda m=m: make(m.category, m.ridge)) for m, _, _ in sites if isinstance(m, Frod)]


@dataclass(frozen=True)
class Frod(Method):
    """FRoD at one site. ``block``: the number of its block, -1 for none. ``dropout`` acts in training only.

    ``all_sizes``: the number of inputs of each category of the adapter, by name, and ``place`` that of this one among
    them. ``basis`` makes V, where values are made that follow from it.
    """

    name: ClassVar[str] = "frod"
    stacks: ClassVar[bool] = True  # stacked experts are refused
    takes_complex: ClassVar[bool] = False  # the lengths of columns are real
    swappable: ClassVar[frozenset[str]] = Method.swappable | {
        *("key", "saved", "ridge", "category", "block", "all_sizes", "place", "basis")
    }
    files = FrodFiles()
    sharing = FrodSharing()

    key: int = 0
    saved: bool = True
    dropout: float = 0.0
    rate: float = 0.01
    ridge: float = 1e-3
    scheme: bool = True
    training: bool = False
    category: str = ""
    block: int = -1
    all_sizes: tuple[int, ...] = ()
    place: int = 0
    basis: Callable[[], Tensor] | None = field(default=None, compare=False, repr=False)

    def options(self) -> dict[str, Any]:
        return {k: v for k, v in super().options().items() if k != "basis"}

    def slots(self, op: Op) -> dict[str, Slot]:
        check_matrix("FRoD", op)
        if op.experts:
            raise TargetError(
                f"FRoD makes one basis for layers of one role, and this weight stacks {op.experts} matrices of "
                "experts; leave it out"
            )
        rows, columns = op.matrix_shape
        n = count_entries(columns, self.rate)
        shared: dict[str, Any] = {"trainable": False, "saved": self.saved}
        return {
            DIAGONAL: Slot((columns,)),
            ENTRIES: Slot((n,)),
            V: Slot((columns, columns), key=f"{V}.{self.category}", **shared),
            INDICES: Slot((2, n), dtype=torch.int64, key=f"{INDICES}.{self.category}", **shared),
            SIZE: Slot((2,), dtype=torch.int64, key=f"{SIZE}.{self.category}", **shared),
            U: Slot((rows, columns), trainable=False, saved=False),
            PRESENT: Slot((), trainable=False, saved=False),
        }

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        frozen, lengths = self.frozen_values(op, W, dtype, None)
        diagonal, entries = lengths.to(W.dtype), torch.zeros(self.slots(op)[ENTRIES].shape, dtype=W.dtype)
        if not self.scheme:
            entries.normal_(std=0.1, generator=generator)
            diagonal = diagonal + torch.empty_like(diagonal).normal_(generator=generator) * 0.1
        trained = {DIAGONAL: diagonal.to(W.device, dtype), ENTRIES: entries.to(W.device, dtype)}
        return InitialValues({**trained, **frozen})

    def frozen_values(
        self, op: Op, W: Tensor, dtype: torch.dtype, basis: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the values of the slots that are not trained, and the first values of l in float32.

        ``basis`` is V where a file has it. Else it is made of the weights of all layers of the category.
        """
        if basis is None:
            # PEFT holds V in the base weight's dtype, which rounds it, and makes U of what is left.
            made = joint_basis([op.matrix(W)], self.ridge) if self.basis is None else self.basis()
            basis = made.to(W.dtype)
        size = op.matrix_shape[1]
        indices = draw_entries(self.key, self.rate, self.all_sizes or (size,))[self.place]
        directions, lengths = directions_and_lengths(op.matrix(W), basis)
        values = {
            V: basis.to(W.device, dtype),
            INDICES: indices.to(W.device, copy=True),
            SIZE: torch.tensor([size, size], device=W.device),
            U: directions.to(W.device, dtype),
            PRESENT: torch.ones((), dtype=dtype, device=W.device),
        }
        return values, lengths

    # -- meaning -------------------------------------------------------------------------------------------------------

    def _middle(self, op: Op, slots: Slots) -> Tensor:
        """Return diag(l) + S (in, in)."""
        size, (rows, columns) = op.matrix_shape[1], slots[INDICES]
        return scatter_dense((size, size), rows * size + columns, slots[ENTRIES]) + slots[DIAGONAL].diag()

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        return self.weight_over(op, W, W, slots, scale)

    def weight_over(self, op: Op, base: Tensor, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        new = slots[U] @ self._middle(op, slots) @ slots[V].t()
        # Several adapters add up what each changes of the base, as in PEFT.
        wide = torch.promote_types(W.dtype, new.dtype)
        rest = cast(W, wide) - cast(base, wide) * cast(slots[PRESENT], wide)
        return cast(rest + op.unmatrix(cast(new, wide)), W.dtype)

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        x = prepare_adapter_input(self, op, x, slots[U].dtype)
        h = op(x, slots[V].t().reshape(-1, *op.shape[1:]))
        out = op.up(op.up(h, self._middle(op, slots)), slots[U])
        return cast(y + out - op(x, cast(W, out.dtype)) * slots[PRESENT], y.dtype)
