"""Rows for embeddings and rerankers."""

from __future__ import annotations

from typing import Any

from every_task import rows_of
from tiny import WORDS


def rows(kind: str, n: int = 24) -> list[dict[str, Any]]:
    """Rows of a layout, whose texts differ."""
    found: list[dict[str, Any]] = []
    for i, row in enumerate(rows_of("embedding", n)):
        first, second = f"{row['anchor']} {WORDS[i % 20]}", f"{row['positive']} {WORDS[(i + 7) % 20]} {WORDS[i % 20]}"
        match kind:
            case "pairs":
                found.append({"anchor": first, "positive": second})
            case "triplets":
                found.append({"anchor": first, "positive": second, "negative": f"{WORDS[i % 20]} {second} a"})
            case "scored":
                found.append({"sentence1": first, "sentence2": second, "score": (i % 6) / 5})
            case "reranked":
                found.append({"query": first, "pos": [second], "neg": [f"{WORDS[i % 20]} {second} a", WORDS[i % 20]]})
            case "graded":
                found.append({"query": first, "document": second, "score": float(i % 3 == 0)})
            case _:
                found.append({"text": first, "label": f"class {i % 4}"})
    return found
