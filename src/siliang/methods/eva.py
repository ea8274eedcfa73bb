"""EVA: Explained Variance Adaptation (Paischer et al., 2024, arXiv:2410.07170), an
initialization of LoRA from data.

    A = the first R principal components of the layer's input, B = 0

The components follow from batches, one after the other (incremental PCA), until those that are needed stay where they
are (their cosine with those before is at least tau). The ranks of all layers together are given to the components that
explain the largest share of their layer's variance: a layer has 0 to rho R of them, and alpha R' / R where it has R'.

Shapes: X (N, I) rows of a layer's input, V (K, I) components, S (K,) their singular values; K = rho R.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.fields import check_fields
from siliang.methods.initialization import InitializationBatch, InitializationData
from siliang.methods.lora_initialization import Factors, TunedLayers
from siliang.models.introspect import features
from siliang.types import ConfigError

SEED = 42  # of the decompositions, as PEFT has it
MOST_BATCHES = 10_000  # until the components must have settled


@dataclass
class EvaConfig:
    """EVA's settings, with PEFT's names and defaults.

    Attributes:
        rho: A layer gets at most rho r ranks. 1: each keeps its own.
        tau: The cosine between a component and the one before it from which on it has settled.
        use_label_mask: Read only the tokens that are learned.
        label_mask_value: The label of the others.
        whiten: Divide each component by the root of its singular value.
        adjust_scaling_factors: Change alpha with a layer's rank, so that its scaling stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rho < 1.0:
            raise ConfigError(Bilingual(f"rho = {self.rho}: must be at least 1.", f"rho = {self.rho}：至少为 1。"))
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(Bilingual(f"tau = {self.tau}: must be 0 to 1.", f"tau = {self.tau}：须在 0 到 1 之间。"))


class IncrementalPca:
    """The first K principal components of rows that come in batches.

    Attributes:
        V: (K, I); None before the first batch.
        S: (K,).
        share: Of the rows' variance that each explains, (K,).
        settled: Which have hardly moved with the last batch, (K,).
    """

    def __init__(self, K: int, tau: float) -> None:
        self.K, self.tau = K, tau
        self.V: Tensor | None = None
        self.S = self.share = torch.zeros(K)
        self.settled = torch.zeros(K, dtype=torch.bool)
        self._n = 0  # rows so far, their mean and the sum of squares about it, in fp64
        self._mean = self._squares = torch.zeros(1)

    def add(self, X_NI: Tensor) -> None:
        """Takes a batch of at least K rows into account; of fewer rows it does nothing."""
        n = len(X_NI)
        if n < self.K:
            return
        X, before = X_NI.to(torch.float32, copy=True), self.V
        mean = X.sum(0, dtype=torch.float64) / n
        squares = (X - mean).square().sum(0)
        if before is None:
            self._n, self._mean, self._squares = n, mean, squares
            X -= mean
        else:
            own = X.mean(0)
            shift = (self._n / (self._n + n) * n) ** 0.5 * (self._mean - own)
            X = torch.vstack((self.S[:, None] * before, X - own, shift))
            total = self._n + n
            self._squares = self._squares + squares + (self._mean - mean).square() * self._n * n / total
            self._mean = (self._mean * self._n + mean * n) / total
            self._n = total
        with torch.random.fork_rng([X.device] if X.device.type == "cuda" else []):
            torch.manual_seed(SEED)
            _, S, V = torch.svd_lowrank(X, q=min(2 * self.K, *X.shape), niter=4)
        V = V.T[: self.K]
        largest = V.gather(1, V.abs().argmax(1, keepdim=True))
        self.V, self.S = V * largest.sign(), S[: self.K]
        self.share = self.S.square() / self._squares.sum()
        if before is not None:
            self.settled = torch.nn.functional.cosine_similarity(self.V, before) >= self.tau


def learn(model: nn.Module, tuned: TunedLayers, settings: EvaConfig, data: InitializationData) -> dict[str, Factors]:
    """A of each layer, (R', I): R' are the ranks after the redistribution, and may be 0."""
    found = principal_directions(tuned.layers, tuned.ranks, settings, data.batches(learned=settings.use_label_mask))
    return {path: Factors(A) for path, A in found.items()}


@torch.no_grad()
def principal_directions(
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    settings: EvaConfig,
    batches: Iterable[InitializationBatch],
    gather: Callable[[Tensor], Tensor] = lambda X: X,
) -> dict[str, Tensor]:
    """EVA's A of each layer, (R', I): R' are the ranks after the redistribution, and may be 0.

    Args:
        layers: The layers of the base model by path.
        ranks: R of each.
        batches: Read from the beginning again until all components have settled.
        gather: Puts the rows of several processes together.

    Raises:
        ConfigError: The batches are too small, or the components do not settle.
    """
    most = {path: min(round(ranks[path] * settings.rho), features(layer)[0]) for path, layer in layers.items()}
    leader = _same_inputs(layers, next(iter(batches)), gather)
    for path, first in leader.items():
        most[first] = max(most[first], most[path])
    leaders = [path for path in leader if leader[path] == path]
    order = {path: path for path in leaders} | leader  # the leaders first
    pca = {path: IncrementalPca(most[path], settings.tau) for path in leaders}
    found = {path: most[leader[path]] for path in layers}
    made = 0
    while True:
        for batch in batches:
            moving = [path for path in leaders if not pca[path].settled[: found[path]].all()]
            if not moving:
                return {path: _rows(pca[order[path]], found[path], settings.whiten) for path in order}
            with _reading({path: layers[path] for path in moving}, batch, gather, lambda path, X: pca[path].add(X)):
                batch.forward()
            if all(one.V is not None for one in pca.values()):
                found = _redistributed({path: pca[first].share for path, first in order.items()}, leader, ranks)
            made += 1
            if made == MOST_BATCHES:
                raise ConfigError(
                    Bilingual(
                        f"EVA's directions have not settled in {made:,} batches: lower eva_config.tau, or use larger "
                        "batches.",
                        f"EVA 的方向在 {made:,} 个批次后仍未稳定：请减小 eva_config.tau，或使用更大的批次。",
                    )
                )
        if small := [path for path in leaders if pca[path].V is None]:
            raise ConfigError(
                Bilingual(
                    f"EVA needs {pca[small[0]].K} tokens in a batch for {small[0]}, and no batch has so many: use "
                    "larger batches, a smaller r or eva_config.rho, or eva_config.use_label_mask=false.",
                    f"EVA 在 {small[0]} 上每批需要 {pca[small[0]].K} 个词元，而没有一批有这么多：请使用更大的批次、"
                    "更小的 r 或 eva_config.rho，或设 eva_config.use_label_mask=false。",
                )
            )


def _rows(pca: IncrementalPca, r: int, whiten: bool) -> Tensor:
    assert pca.V is not None
    return pca.V[:r] / pca.S[:r, None].sqrt() if whiten else pca.V[:r].clone()


def _same_inputs(
    layers: Mapping[str, nn.Module], batch: InitializationBatch, gather: Callable[[Tensor], Tensor]
) -> dict[str, str]:
    """For each layer the first one that reads the same, as q, k and v do."""
    first: dict[bytes, str] = {}
    leader: dict[str, str] = {}

    def compare(path: str, X: Tensor) -> None:
        read = X.detach().float().cpu().contiguous().numpy()
        leader[path] = first.setdefault(hashlib.blake2b(read.tobytes()).digest(), path)

    with _reading(layers, batch, gather, compare):
        batch.forward()
    if unread := [path for path in layers if path not in leader]:
        raise ConfigError(
            Bilingual(
                f"EVA: the data does not reach {unread[0]}: leave it out of target_modules.",
                f"EVA：数据不经过 {unread[0]}：请从 target_modules 中去掉它。",
            )
        )
    place = {path: i for i, path in enumerate(layers)}  # the first in the model, whichever ran first
    groups: dict[str, list[str]] = {}
    for path in sorted(leader, key=place.__getitem__):
        groups.setdefault(leader[path], []).append(path)
    return {path: group[0] for group in groups.values() for path in group}


@contextmanager
def _reading(
    layers: Mapping[str, nn.Module],
    batch: InitializationBatch,
    gather: Callable[[Tensor], Tensor],
    take: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Within the block `take` gets what each layer reads."""

    def hook(path: str) -> Callable[..., None]:
        return lambda _, args: take(path, gather(batch.rows_of(args[0], path)))

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _redistributed(shares: Mapping[str, Tensor], leader: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, int]:
    """Each layer's rank: all ranks together go to the components that explain the most."""
    owners = [path for path, share in shares.items() for _ in share]
    best = torch.cat(list(shares.values())).argsort(descending=True)[: sum(ranks.values())]
    counts = Counter(owners[i] for i in best.tolist())
    found = {path: counts[path] for path in shares}
    for path, first in leader.items():  # one that reads the same has no more than the first, whose components they are
        if found[first] < found[path]:
            found[first], found[path] = found[path], found[first]
    return found
