"""AdaMSS: W' = W + B_k A_k V on the rows of each cluster k of W's rows (Zheng et al., NeurIPS 2025).

A_k and B_k are trained. V has the ``r`` largest right singular vectors of W. At a layer with a bias they are those of
[W|b], and the bias changes as the last column says. Rows are clustered by k-means on the left singular vectors.

Tensors in files, in PEFT's shapes: ``adamss_newB`` (r, in or in + 1) is V, ``adamss_A.k`` (rank, r) and ``adamss_B.k``
(rows of the cluster, rank). No file has the rows of the clusters: they are found in the weight again, so a file means
something only together with it. ``adaptc.training.SubspaceAllocator`` ends the training of clusters (``use_asa``).

In a program all clusters are in two slots, ``adamss_A`` (clusters, rank, r) and ``adamss_B`` (out, rank). Zeros stand
for the terms that a smaller cluster lacks. PEFT adapts linear layers alone; here W is any weight as a matrix,
kernels in its columns.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import CheckpointError, ConfigError, TargetError
from adaptc.global_generator import global_generator_of, seeded_global_generator
from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.option_checks import check_integers, check_matrix, check_probability, warn_unused
from adaptc.passes.graph.ops import Op, cast
from adaptc.passes.protocol.method import InitialValues, Method, Scale, Slot, Slots
from adaptc.passes.protocol.parts.file_format import FileFormat
from adaptc.passes.protocol.parts.size_rule import SizeRule
from adaptc.torch_modes import outside_modes

A, B, V = "adamss_A", "adamss_B", "adamss_newB"
#: the last column of V, for the bias; the cluster of each row, as rows of zeros with a one; the place of each row in B
V_BIAS, MEMBERS, PLACES = "adamss_bias_column", "adamss_members", "adamss_places"
#: the sizes in the file: the rows and terms of each cluster, and in the end the rows of V and whether it is for a bias
LAYOUT = "adamss_layout"
#: PEFT's seed of the clusters
CLUSTER_SEED = 123456789
#: the options of ``use_asa``
SCHEDULE = (
    *("asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
    *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
)


@dataclass
class AdamssConfig(TargetedConfig):
    """PEFT's ``AdamssConfig``: same names, same defaults. Raises ConfigError for values without a meaning.

    Attributes:
        r: the number of singular vectors.
        num_subspaces: the number of clusters of rows.
        subspace_rank: the rank of a cluster's change.
        init_weights: "orthogonal" begins with B = 0, None or False with random numbers.
        use_asa: whether clusters leave the training, by :class:`adaptc.training.SubspaceAllocator`.
        asa_target_subspaces: the clusters of all layers that train to the end.
        init_warmup: the first step in which clusters may leave.
        final_warmup: the last one.
        mask_interval: the steps between.
        asa_importance_beta: the factor of the moving average of importance.
        asa_uncertainty_beta: the factor of the moving average of its uncertainty.
        asa_schedule_exponent: how fast the number of clusters falls.
        use_dynamic_rank: whether a cluster's rank is the number of its large singular values, at most
            ``subspace_rank``.
        svd_threshold: the smallest of these, as a share of the largest.
        random_seed: the seed of the singular vectors.

    Example:
        >>> config = adaptc.AdamssConfig(r=100, num_subspaces=5, target_modules=["q_proj", "v_proj"])
    """

    peft_type: ClassVar[str] = "ADAMSS"

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: Literal["orthogonal"] | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is True:
            raise ConfigError("AdamssConfig.init_weights must be 'orthogonal', False or None, got True")
        if self.init_weights is False:
            self.init_weights = None  # as PEFT's files have it
        sizes = ("r", "num_subspaces", "subspace_rank")
        check_integers(self, {n: getattr(self, n) for n in sizes})
        if self.use_asa:
            self._check_schedule()
        else:
            warn_unused(self, SCHEDULE, "without use_asa")
        if not self.use_dynamic_rank:
            warn_unused(self, ["svd_threshold"], "without use_dynamic_rank")

    def _check_schedule(self) -> None:
        check_integers(self, {n: getattr(self, n) for n in ("asa_target_subspaces", "mask_interval")})
        check_integers(self, {"init_warmup": self.init_warmup}, minimum=0)
        if self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"AdamssConfig leaves no steps in which clusters can leave: init_warmup={self.init_warmup} must be "
                f"less than final_warmup={self.final_warmup}"
            )
        check_probability(self, "asa_importance_beta", "asa_uncertainty_beta")
        if not self.asa_schedule_exponent > 0:
            raise ConfigError(
                f"AdamssConfig.asa_schedule_exponent must be positive, got {self.asa_schedule_exponent!r}"
            )

    def method(self, name: str, kind: str) -> Adamss:
        return Adamss(
            r=self.r,
            count=self.num_subspaces,
            rank=self.subspace_rank,
            threshold=self.svd_threshold if self.use_dynamic_rank else None,
            seed=self.random_seed,
            scheme=self.init_weights is not None,
        )


def cluster_rows(matrix: Tensor, count: int) -> Tensor:
    """Return the cluster of each row of ``matrix`` (rows, n), float32 on the CPU: (rows,), int64.

    The call is PEFT's, with its seed: no file holds the clusters. Raises ConfigError where scikit-learn is missing.
    """
    try:
        cluster: Any = importlib.import_module("sklearn.cluster")
    except ImportError:
        raise ConfigError(
            "AdaMSS finds its clusters of rows with scikit-learn, which is not installed: "
            "pip install 'adaptc[clusters]'"
        ) from None
    with warnings.catch_warnings():  # equal rows have fewer clusters, which the caller refuses
        warnings.simplefilter("ignore")
        means = cluster.KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=CLUSTER_SEED)
        return torch.as_tensor(means.fit_predict(matrix.numpy()), dtype=torch.int64)


class AdamssFiles(FileFormat):
    method: Adamss

    def keys(self, op: Op) -> list[str]:
        return [f"{name}.{k}" for name in (A, B) for k in range(self.method.sizes_at(op)[1])]

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows, columns = op.matrix_shape
        parts = [(found.get(f"{A}.{k}"), found.get(f"{B}.{k}")) for k in range(self.method.sizes_at(op)[1])]
        whole, v = [(a, b) for a, b in parts if a is not None and b is not None], found.get(V)
        if len(whole) < len(parts) or v is None:
            return {}  # the caller says what is missing
        r, _, rank = self.method.sizes_at(op)
        if v.ndim != 2 or v.shape[0] > r or v.shape[1] - columns not in (0, 1):
            raise CheckpointError(
                f"{V} has shape {tuple(v.shape)}; expected ({r}, {columns}), or ({r}, {columns + 1}) at a layer with a "
                "bias"
            )
        for k, (a, b) in enumerate(whole):
            # Joined with the others, numbers of another kind would become theirs unseen.
            for name, t in ((f"{A}.{k}", a), (f"{B}.{k}", b)):
                if (t.is_floating_point(), t.is_complex()) != (v.is_floating_point(), v.is_complex()):
                    raise CheckpointError(f"{name} holds {t.dtype} numbers, and {V} {v.dtype} ones")
            if a.ndim != 2 or b.ndim != 2 or a.shape != (b.shape[1], v.shape[0]) or not 0 < b.shape[1] <= rank:
                raise CheckpointError(
                    f"{A}.{k} and {B}.{k} have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (rank, "
                    f"{v.shape[0]}) and (rows of the cluster, rank) with a rank of 1 to {rank}"
                )
        if sum(b.shape[0] for _, b in whole) != rows:
            raise CheckpointError(f"{B}.0 and its like have {sum(b.shape[0] for _, b in whole)} rows, not {rows}")
        sizes = [*((b.shape[0], b.shape[1]) for _, b in whole), (v.shape[0], v.shape[1] - columns)]
        column = v[:, columns] if v.shape[1] > columns else v.new_zeros(v.shape[0])
        return {
            A: torch.stack([F.pad(a, (0, r - a.shape[1], 0, rank - a.shape[0])) for a, _ in whole]),
            B: torch.cat([F.pad(b, (0, rank - b.shape[1])) for _, b in whole]),
            V: F.pad(v[:, :columns], (0, 0, 0, r - v.shape[0])),
            V_BIAS: F.pad(column, (0, r - v.shape[0])),
            LAYOUT: torch.tensor(sizes, dtype=torch.int32),
        }

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        *sizes, (r, with_bias) = slots[LAYOUT].tolist()
        counts = [rows for rows, _ in sizes]
        out: dict[str, Tensor] = {}
        for k, (b, (_, rank)) in enumerate(zip(slots[B].split(counts), sizes, strict=True)):
            out[f"{A}.{k}"] = slots[A][k, :rank, :r].contiguous()
            out[f"{B}.{k}"] = b[:, :rank].contiguous()
        columns = [slots[V], slots[V_BIAS].unsqueeze(1)] if with_bias else [slots[V]]
        out[V] = torch.cat(columns, 1)[:r].contiguous()
        return out

    def derived(self, op: Op, W: Tensor, dtype: torch.dtype, found: Slots) -> dict[str, Tensor]:
        *sizes, (_, with_bias) = found[LAYOUT].tolist()
        method = self.method if with_bias else replace(self.method, layer_bias=None)
        if with_bias and method.layer_bias is None:
            raise CheckpointError(
                f"{V} has a column for a bias, and the layer has none: the adapter was made for another model"
            )
        clusters = method.find_clusters(op, method.left_vectors(op, W)[0])
        counts = torch.bincount(clusters, minlength=len(sizes)).tolist()
        if counts != [rows for rows, _ in sizes]:
            raise CheckpointError(
                f"the adapter's clusters have {', '.join(str(rows) for rows, _ in sizes)} rows, and those of the "
                f"weight {', '.join(map(str, counts))}: the weight is not the one that the adapter was trained on"
            )
        return method.cluster_slots(clusters, len(sizes), W.device, dtype)


class AdamssSizes(SizeRule):
    method: Adamss

    def rank(self) -> int | None:
        return None  # none of its three sizes is a rank that others could follow

    def minimal(self, op: Op) -> Adamss:
        return replace(self.method, r=2, count=2, rank=2)

    def with_sizes_of(self, op: Op, slots: Slots) -> Adamss:
        count = sum(n.startswith(f"{B}.") for n in slots)
        ranks = [t.shape[-1] for n, t in slots.items() if n.startswith(f"{B}.") and t.ndim == 2]
        if not count or not ranks or V not in slots:
            return self.method
        return replace(self.method, r=slots[V].shape[0], count=count, rank=max(ranks))


@dataclass(frozen=True)
class Adamss(Method):
    """AdaMSS at one site: ``r`` singular vectors, ``count`` clusters, and a change of at most ``rank`` for each.

    ``threshold``: the smallest singular value that counts for a cluster's rank; None for ``rank`` wherever there are as
    many rows. ``layer_bias``: the layer's bias while first values are made.
    """

    name: ClassVar[str] = "adamss"
    stacks: ClassVar[bool] = True  # to refuse stacked experts
    takes_complex: ClassVar[bool] = False
    swappable: ClassVar[frozenset[str]] = Method.swappable | {"count", "rank", "threshold", "seed", "layer_bias"}
    files = AdamssFiles(names=(A, B, V))
    sizes = AdamssSizes()

    r: int = 100
    count: int = 5
    rank: int = 1
    threshold: float | None = None
    seed: int = 0
    scheme: bool = True
    layer_bias: Tensor | None = field(default=None, compare=False, repr=False)

    def options(self) -> dict[str, Any]:
        return {k: v for k, v in super().options().items() if k != "layer_bias"}

    def with_layer_bias(self, b: Tensor | None) -> Adamss:
        return replace(self, layer_bias=b)

    def sizes_at(self, op: Op) -> tuple[int, int, int]:
        """Return how many singular vectors and clusters there are, and the most terms of a cluster."""
        check_matrix("AdaMSS", op)
        if op.experts:
            raise TargetError(
                f"AdaMSS has clusters of other sizes for each matrix, and this weight stacks {op.experts}, for which "
                "its files have no place: leave the experts out"
            )
        rows, columns = op.matrix_shape
        r = min(self.r, rows, columns + 1)  # a bias is one more column
        return r, min(self.count, rows), min(self.rank, rows, r)

    def slots(self, op: Op) -> dict[str, Slot]:
        (rows, columns), (r, count, rank) = op.matrix_shape, self.sizes_at(op)
        frozen: Any = {"trainable": False}
        unsaved: Any = {"trainable": False, "saved": False}
        return {
            A: Slot((count, rank, r), free=(0, 1, 2), apart=("clusters", "terms", "vectors"), fills_up=True),
            B: Slot((rows, rank), free=(1,), apart=("terms",), fills_up=True),
            V: Slot((r, columns), free=(0,), apart=("vectors",), fills_up=True, **frozen),
            V_BIAS: Slot((r,), free=(0,), apart=("vectors",), fills_up=True, **frozen),
            LAYOUT: Slot((count + 1, 2), free=(0,), apart=("layout",), fills_up=True, dtype=torch.int32, **frozen),
            MEMBERS: Slot((rows, count), free=(1,), apart=("clusters",), fills_up=True, **unsaved),
            PLACES: Slot((rows,), dtype=torch.int64, **unsaved),
        }

    @torch.no_grad()
    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        r, count, rank = self.sizes_at(op)
        left, right = self.left_vectors(op, W)
        clusters = self.find_clusters(op, left)
        (rows, columns), extra = op.matrix_shape, right.shape[1] - op.matrix_shape[1]
        a, b = (torch.zeros(shape, dtype=torch.float64) for shape in ((count, rank, r), (rows, rank)))
        sizes: list[tuple[int, int]] = []
        with global_generator_of(generator, W.device):
            for k in range(count):
                part, own = left[clusters == k], b[sum(n for n, _ in sizes) :]
                first = self._first_directions(part.to(W.device)).cpu()
                terms = first.shape[0]
                a[k, :terms, : left.shape[1]] = first
                if not self.scheme:
                    drawn = torch.randn(part.shape[0], terms, dtype=W.dtype, device=W.device) * 0.01
                    own[: part.shape[0], :terms] = drawn.cpu()
                sizes.append((part.shape[0], terms))
        sizes.append((left.shape[1], extra))
        # PEFT holds them in the base weight's dtype before it casts them, which rounds them.
        v = F.pad(right, (0, 1 - extra, 0, r - right.shape[0]))
        values = {A: a, B: b, V: v[:, :columns], V_BIAS: v[:, columns]}
        values = {n: t.to(W.device, W.dtype).to(dtype).contiguous() for n, t in values.items()}
        layout = torch.tensor(sizes, dtype=torch.int32, device=W.device)
        return InitialValues({**values, LAYOUT: layout, **self.cluster_slots(clusters, count, W.device, dtype)})

    def _first_directions(self, part: Tensor) -> Tensor:
        """Return the first A of a cluster, (terms, r), for its rows of the left singular vectors."""
        gram = part @ part.T
        terms = min(part.shape[0], self.rank, part.shape[1])
        if self.threshold is not None:
            singular = torch.svd_lowrank(gram, q=gram.shape[0], niter=2)[1]
            terms = max(1, min(terms, int((singular > self.threshold * singular[0]).sum())))
        directions = torch.svd_lowrank(gram, q=terms, niter=2)[0]
        return torch.linalg.qr(part.T @ directions).Q.T

    @torch.no_grad()
    def left_vectors(self, op: Op, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the left singular vectors (rows, r) and the right ones (r, columns) of [W|b], float32."""
        M = op.matrix(W).detach()
        if self.layer_bias is not None:
            M = torch.cat([M, self.layer_bias.detach().to(M.device, M.dtype).unsqueeze(1)], 1)
        M = M.float()
        if not bool(torch.isfinite(M).all()):
            raise ConfigError(f"AdaMSS decomposes the weight, and this one of shape {op.shape} is not finite")
        with outside_modes(), seeded_global_generator(self.seed, M.device):  # which svd_lowrank reads
            left, _, right = torch.svd_lowrank(M, q=min(self.r, *M.shape), niter=2)
        return left.cpu(), right.T.cpu()

    def find_clusters(self, op: Op, left: Tensor) -> Tensor:
        """Return the cluster of each row, (rows,), int64 on the CPU; raise ConfigError where clusters are empty."""
        count = self.sizes_at(op)[1]
        clusters = cluster_rows(left, count)
        found = clusters.unique().numel()
        if found < count:
            raise ConfigError(
                f"AdaMSS finds {found} clusters among the rows of this weight of shape {op.shape}, and "
                f"num_subspaces={self.count} asks for {count}: rows are equal. Use num_subspaces={found}"
            )
        return clusters

    def cluster_slots(
        self, clusters: Tensor, count: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return the slots that say which rows are in which cluster."""
        order = torch.argsort(clusters, stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.shape[0])
        members = clusters.unsqueeze(1) == torch.arange(count)
        return {MEMBERS: members.to(device, dtype), PLACES: places.to(device)}

    def _up(self, slots: Slots) -> Tensor:
        """Return B with a column for each term of each cluster, (rows, clusters * rank)."""
        own = slots[B].index_select(0, slots[PLACES])
        return (slots[MEMBERS].unsqueeze(2) * own.unsqueeze(1)).flatten(1)

    def weight(self, op: Op, W: Tensor, slots: Slots, scale: Scale) -> Tensor:
        delta = self._up(slots) @ (slots[A].flatten(0, 1) @ slots[V])
        return cast(W + op.unmatrix(delta), W.dtype)

    def bias(self, op: Op, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor | None:
        return None if b is None else cast(b + self._bias_change(slots), b.dtype)

    def _bias_change(self, slots: Slots) -> Tensor:
        return self._up(slots) @ (slots[A].flatten(0, 1) @ slots[V_BIAS])

    def has_apply(self, op: Op) -> bool:
        return op.callable and op.groups == 1

    def apply(self, op: Op, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, slots: Slots, scale: Scale) -> Tensor:
        x = op.cast_input(x, slots[A].dtype)
        delta = op.low_rank(x, slots[A].flatten(0, 1) @ slots[V], self._up(slots))
        if b is not None:
            delta = delta + op.along_out(self._bias_change(slots), y)
        return cast(y + delta, y.dtype)
