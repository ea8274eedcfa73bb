"""On paper, past these machines: what a step takes on 1 to 1,024 cards.

    step time = compute + exposed communication + imbalance

`python -m bench.scaling` prints the tables of docs/scaling.md; `bench/local_ranks.py` compares the formulae with real
processes.

Letters: N ranks (one a card), k batches of a step on each rank, M weights of the model, P weights of the adapter.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2

from bench.folders import SHARED
from siliang.engine.order import shares

RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
TOKENS_A_CARD = 8192
LABELLED = 0.65  # of the tokens, in alpaca_zh
BUCKET_BYTES = 25 * 2**20  # of DDP's messages
DATA = SHARED / "data" / "alpaca_zh_52k.json"
TOKENIZER = SHARED / "tokenizers" / "minimind"


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def kv(self) -> int:
        """Width of the keys."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return 2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def root(self) -> int:
        """Weights outside of the layers: embeddings, output layer, last norm."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def whole(self) -> int:
        return self.layers * self.layer + self.root

    def lora(self, rank: int = 16) -> int:
        """Weights of LoRA on all linear layers."""
        h, kv, m = self.hidden, self.kv, self.inner
        return self.layers * rank * (2 * (h + h) + 2 * (h + kv) + 3 * (h + m))

    def flops_per_token(self, trained: int, length: float, *, full: bool) -> float:
        """Required ones, as PERFORMANCE.md counts them: 4 a frozen weight (forward, dX), 6 a trained one."""
        linear, head = self.layers * (self.layer - 2 * self.hidden), self.vocabulary * self.hidden
        attention = 3.5 * 2 * length * self.hidden * self.layers
        return (6 if full else 4) * (linear + LABELLED * head) + (0 if full else 6 * trained) + attention


@dataclass(frozen=True)
class Cluster:
    """Nodes of 8 cards.

    Attributes:
        flops: Of a card that are reached: its peak in bf16, times what a step makes of it.
        bus: Bytes/s that each card of a node sends and receives at once in a ring, as nccl-tests' busbw has it.
        network: Bytes/s that leave a node, all its network cards together.
        hop_s: From card to card in a node; net_hop_s: from node to node.
    """

    name: str
    flops: float
    bus: float
    network: float
    memory: float
    hop_s: float
    net_hop_s: float
    base_s: float = 8.4e-6
    cards: int = 8

    def gather_s(self, size: float, ranks: int) -> float:
        """An all-gather of `size` bytes in all, or a reduce-scatter: a ring, in N - 1 hops."""
        nodes = max(1, ranks // self.cards)
        hops = (ranks - nodes) * self.hop_s + (nodes - 1) * self.net_hop_s
        return 0.0 if ranks == 1 else self.base_s + hops + (ranks - 1) / ranks * size / self._speed(nodes)

    def reduce_s(self, size: float, ranks: int) -> float:
        """An all-reduce: a ring, or a tree where it is quicker, which sends as much in fewer hops."""
        nodes = max(1, ranks // self.cards)
        tree = 2 * (min(ranks, self.cards) - 1) * self.hop_s + 2 * log2(nodes) * self.net_hop_s
        bits = 2 * (ranks - 1) / ranks * size / self._speed(nodes)
        return 0.0 if ranks == 1 else min(2 * self.gather_s(size, ranks), self.base_s + tree + bits)

    def _speed(self, nodes: int) -> float:
        return self.bus if nodes == 1 else min(self.bus, self.network)


CLUSTERS = (
    # bf16 989 TFLOP/s, of which 40%; 8 x 400 Gb/s a node, of which 94%
    Cluster("H100, NVLink, 400 Gb/s a card", 0.40 * 989e12, 360e9, 0.94 * 400e9, 80e9, 3.4e-6, 9.6e-6),
    # bf16 165 TFLOP/s, of which 40%; PCIe 4.0 x16, of which 60%; 25 Gb/s a node, of which 90%
    Cluster("RTX 4090, PCIe 4.0, 25 Gb/s a node", 0.40 * 165e12, 19e9, 0.9 * 3.125e9, 24e9, 5.7e-6, 30e-6),
)

SHAPES = (
    Shape("1B", 16, 2048, 8192, 32, 8, 128_256, tied=True),
    Shape("3B", 28, 3072, 8192, 24, 8, 128_256, tied=True),
    Shape("8B", 32, 4096, 14_336, 32, 8, 128_256),
    Shape("14B", 40, 5120, 13_824, 40, 8, 152_064),
    Shape("32B", 64, 5120, 27_648, 40, 8, 152_064),
    Shape("70B", 80, 8192, 28_672, 64, 8, 128_256),
)


@dataclass(frozen=True)
class Strategy:
    """How the ranks share the work; what siliang calls it, and whether all weights are trained.

    Attributes:
        weight_bytes: Of a weight that is sent. siliang's full tuning keeps weights in fp32, and FSDP2 sends them so;
            DeepSpeed keeps a copy in bf16, and sends that.
        gradient_bytes: Of a gradient that is sent.
        sharded: Weights are sharded, and gathered for each batch.
        halves: Each gradient is sent to one rank alone, which then sends what it made of it: ZeRO.
    """

    name: str
    full: bool
    weight_bytes: int
    gradient_bytes: int
    sharded: bool = False
    halves: bool = False

    def trained(self, shape: Shape) -> int:
        """Weights that are trained."""
        return shape.whole if self.full else shape.lora()

    def sent(self, shape: Shape, ranks: int, batches: int = 1, *, scatter: float = 1.0) -> float:
        """Bytes that each rank sends in a step.

        Args:
            scatter: Of a reduce-scatter, in shares of the tensor; gloo makes an all-reduce of it, which sends two.
        """
        r, trained = (ranks - 1) / ranks, self.trained(shape)
        gradients = self.gradient_bytes * trained
        if not self.sharded:  # all-reduce; ZeRO-2's reduce-scatter in every batch, then its all-gather of weights
            once = r * (batches * scatter * gradients + self.weight_bytes * trained)
            return once if self.halves else 2 * r * gradients
        layers, root = self.weight_bytes * shape.layers * shape.layer, self.weight_bytes * shape.root
        if self.halves:  # ZeRO-3: everything for forward and again for backward, and gradients in every batch
            own = 0 if self.full else self.weight_bytes * trained
            return batches * r * (2 * (layers + root + own) + scatter * gradients)
        # FSDP2: the root stays gathered from forward to backward; adapters are replicated, and averaged at the end
        return batches * r * (2 * layers + root) + r * (scatter if self.full else 2) * gradients

    def held(self, shape: Shape, ranks: int) -> float:
        """Bytes of weights, gradients and Adam's moments on each rank; activations come on top."""
        trained = self.trained(shape)
        if self.full and not self.halves:
            return 16 * trained / (ranks if self.sharded else 1)
        if self.full:  # a copy in 2 bytes, gradients in 2, and 12 of fp32 weight and moments, which are sharded
            return trained * ((2 + 2 + 12) / ranks if self.sharded else 2 + (2 + 12) / ranks)
        frozen, own = 2 * shape.whole, 16 * trained
        if not self.sharded:
            return frozen + (own if not self.halves else 4 * trained + 12 * trained / ranks)
        together = 2 * (2 * shape.layer + shape.root)  # of the layer that computes, the next, and the root
        return frozen / ranks + together + (own / ranks if self.halves else own)

    def exposed_s(self, shape: Shape, cluster: Cluster, ranks: int, compute_s: float, batches: int = 1) -> float:
        """Seconds of a step in which a rank waits for the network.

        Args:
            compute_s: What it computes in a step: a third of it is forward in full tuning, half with a frozen base.
        """
        if ranks == 1:
            return 0.0
        gradients = self.gradient_bytes * self.trained(shape)
        behind = (2 / 3 if self.full else 1 / 2) * compute_s / batches  # a batch's backward
        if not self.sharded:
            first, once = min(gradients, BUCKET_BYTES), cluster.gather_s if self.halves else cluster.reduce_s
            waits = max(once(first, ranks), once(gradients, ranks) - behind)
            after = cluster.gather_s(self.weight_bytes * self.trained(shape), ranks) if self.halves else 0.0
            return (batches if self.halves else 1) * waits + after
        layer_s = cluster.gather_s(self.weight_bytes * shape.layer, ranks)
        root_s = cluster.gather_s(self.weight_bytes * shape.root, ranks)
        backward_s, forward_s = behind / shape.layers, (compute_s / batches - behind) / shape.layers
        deal_s = cluster.gather_s(gradients / shape.layers, ranks) if self.full or self.halves else 0.0
        each = root_s + layer_s + (shape.layers - 1) * max(0.0, layer_s - forward_s)
        each += shape.layers * max(0.0, layer_s - backward_s) + (root_s if self.halves else 0.0)
        # in the batches before the last FSDP2 keeps gradients to itself, and ZeRO does not
        dealing = shape.layers * max(0.0, layer_s + deal_s - backward_s) - shape.layers * max(0.0, layer_s - backward_s)
        whole_s = 0.0 if self.full or self.halves else cluster.reduce_s(gradients, ranks)
        return batches * each + (batches if self.halves else 1) * (dealing + deal_s) + whole_s


STRATEGIES = (
    Strategy("ddp, LoRA", False, 2, 4),
    Strategy("fsdp, LoRA whole", False, 2, 4, sharded=True),
    Strategy("ZeRO-2, LoRA", False, 2, 2, halves=True),
    Strategy("ZeRO-3, LoRA", False, 2, 2, sharded=True, halves=True),
    Strategy("ddp, full", True, 4, 4),
    Strategy("fsdp, full", True, 4, 4, sharded=True),
    Strategy("ZeRO-2, full", True, 2, 2, halves=True),
    Strategy("ZeRO-3, full", True, 2, 2, sharded=True, halves=True),
)


def step_s(
    strategy: Strategy,
    shape: Shape,
    cluster: Cluster,
    ranks: int,
    tokens: float,
    *,
    imbalance: float,
    length: float,
    batches: int = 1,
) -> tuple[float, float, float]:
    """(compute, exposed communication, imbalance) of a step with so many tokens on each rank.

    Args:
        imbalance: Excess of the rank with the most tokens over the mean, as a share of the mean.
        length: Mean length of the row of a token.
    """
    flops = tokens * shape.flops_per_token(strategy.trained(shape), length, full=strategy.full)
    compute = flops / cluster.flops
    return compute, strategy.exposed_s(shape, cluster, ranks, compute, batches), imbalance * compute


def imbalance(lengths: Sequence[int], ranks: int, rows: int, *, in_turn: bool = False, steps: int = 20) -> float:
    """Mean excess of the rank with the most tokens over the mean, in random steps, as `train` distributes rows.

    Args:
        rows: Of a step, on each rank.
        in_turn: Distribute them in turn, as torch's DistributedSampler does.
    """
    chance, found = random.Random(ranks), []
    for _ in range(max(2, min(steps, 20_000 // (rows * ranks)))):
        step = [chance.randrange(len(lengths)) for _ in range(rows * ranks)]
        own = [lengths[i] for i in step]
        in_turns = [step[rank::ranks] for rank in range(ranks)] if in_turn else None
        tokens = [sum(lengths[i] for i in share) for share in in_turns] if in_turns else _sums(own, ranks)
        found.append(max(tokens) / (sum(tokens) / ranks) - 1)
    return statistics.fmean(found)


def _sums(own: list[int], ranks: int) -> list[int]:
    return [sum(own[i] for i in share) for share in shares(own, range(len(own)), ranks)]


def row_lengths(limit: int = 256) -> list[int]:
    """Tokens of alpaca_zh's rows, as siliang would train on them.

    Raises:
        FileNotFoundError: The project's test data is not there.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    texts = ["\n".join(filter(None, (r["instruction"], r["input"], r["output"]))) for r in rows]
    return [min(len(ids) + 8, limit) for ids in tokenizer(texts)["input_ids"]]  # type: ignore[arg-type]


# ---- tables ----


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def size(n: float) -> str:
    """Bytes, short."""
    for unit, each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= each:
            return f"{digits(n / each)} {unit}"
    return f"{n:.0f} B"


def digits(x: float, most: int = 3) -> str:
    """A number in so many digits, never with an exponent: 1,130 and not 1.13e+03."""
    return f"{float(f'{x:.{most}g}'):,g}"


def paper(lengths: Sequence[int]) -> str:
    """All tables."""
    parts = []
    mean = statistics.fmean(lengths)
    length = sum(n * n for n in lengths) / sum(lengths)
    parts.append(f"Rows: {len(lengths):,}, mean {mean:.0f} tokens, the row of a mean token {length:.0f}.\n")

    parts.append("## Bytes that each card sends in a step, of one batch, on 8 cards\n")
    rows = [[s.name, *(size(s.sent(shape, 8)) for shape in SHAPES)] for s in STRATEGIES]
    parts.append(table(["", *(f"{s.name} ({s.whole / 1e9:.3g}e9)" for s in SHAPES)], rows))

    parts.append("## Bytes held by each card before activations, on 1 / 8 / 64 cards\n")
    rows = [
        [s.name, *(" / ".join(digits(s.held(shape, n) / 1e9) for n in (1, 8, 64)) + " GB" for shape in SHAPES)]
        for s in STRATEGIES
    ]
    parts.append(table(["", *(s.name for s in SHAPES)], rows))

    parts.append("## Imbalance: tokens of the fullest card above the mean\n")
    per_card = (4, 8, 16, 64)
    rows = []
    for ranks in RANKS[1:]:
        cells = [
            f"{digits(100 * imbalance(lengths, ranks, n), 2)}% "
            f"({digits(100 * imbalance(lengths, ranks, n, in_turn=True), 2)}%)"
            for n in per_card
        ]
        rows.append([f"{ranks:,}", *cells])
    parts.append(table(["cards", *(f"{n} rows a card (in turn)" for n in per_card)], rows))

    n_rows = round(TOKENS_A_CARD / mean)
    uneven = {n: imbalance(lengths, n, n_rows) for n in RANKS}
    for cluster in CLUSTERS:
        parts.append(f"## {cluster.name}: share of one card's speed that each has, {TOKENS_A_CARD:,} tokens a card\n")
        rows = []
        for shape in SHAPES:
            for s in STRATEGIES:
                cells = []
                for n in RANKS:
                    times = step_s(s, shape, cluster, n, TOKENS_A_CARD, imbalance=uneven[n], length=length)
                    fits = s.held(shape, n) < cluster.memory
                    cells.append(f"{100 * times[0] / sum(times):.0f}%" if fits else "-")
                if any(cell != "-" for cell in cells):
                    rows.append([shape.name, s.name, *cells])
        parts.append(table(["", "", *(f"{n:,}" for n in RANKS)], rows))

    parts.append("## The parts of a step: 8B, 8,192 tokens a card, milliseconds (compute + exposed + imbalance)\n")
    for cluster in CLUSTERS:
        parts.append(f"{cluster.name}:\n")
        rows = []
        for s in STRATEGIES:
            cells = []
            for n in (8, 64, 1024):
                times = step_s(s, SHAPES[2], cluster, n, TOKENS_A_CARD, imbalance=uneven[n], length=length)
                cells.append(" + ".join(f"{1e3 * t:,.0f}" for t in times))
            rows.append([s.name, *cells])
        parts.append(table(["", "8 cards", "64", "1,024"], rows))

    total = 1024
    parts.append(f"## A step of {total:,} rows, whatever the number of cards: times one card's speed (8B, LoRA)\n")
    rows = []
    for cluster in CLUSTERS:
        for s in STRATEGIES[:2]:
            whole = total * mean
            alone = sum(step_s(s, SHAPES[2], cluster, 1, whole, imbalance=0, length=length))
            cells = []
            for n in RANKS:
                even = imbalance(lengths, n, total // n)
                times = step_s(s, SHAPES[2], cluster, n, whole / n, imbalance=even, length=length)
                cells.append(digits(alone / sum(times)))
            rows.append([cluster.name, s.name, *cells])
    parts.append(table(["", "", *(f"{n:,}" for n in RANKS)], rows))

    parts.append("## Beside what others measured: full tuning of Llama 3.1 8B, FSDP2, 16,384 tokens a card\n")
    # bf16 gathered, fp32 gradients, as torchtitan's mixed precision has it; no imbalance: rows are cut to one length
    titan = Strategy("", True, 2, 4, sharded=True)
    here = {n: step_s(titan, SHAPES[2], CLUSTERS[0], n, 16_384, imbalance=0, length=8192) for n in (8, 128)}
    speeds = {n: 16_384 / sum(times) for n, times in here.items()}
    measured = {8: (5762, 6667), 128: (5605, 6514)}
    rows = [
        [f"{n}", f"{speeds[n]:,.0f}", f"{speeds[n] / speeds[8]:.3f}"]
        + [f"{v:,} ({v / b:.3f})" for v, b in zip(measured[n], measured[8], strict=True)]
        for n in (8, 128)
    ]
    parts.append(
        table(["cards", "model: tokens/s a card", "of 8 cards'", "torchtitan (of 8)", "compiled (of 8)"], rows)
    )
    return "\n".join(parts)


if __name__ == "__main__":
    print(paper(row_lengths()))
