"""Counts of a data set: rows, tokens, lengths, labels."""

from __future__ import annotations

from collections import Counter

import numpy as np
from pydantic import JsonValue

from siliang.check.input import CheckInput


def count(s: CheckInput) -> dict[str, JsonValue]:
    """The counts by name; shares are between 0 and 1."""
    lengths, tokens = s.train.lengths, int(s.train.lengths.sum())
    parts, misplaced = (s.examples.train, s.examples.eval), [0, 0]
    if s.finds_spans and "SL018" not in {code.upper() for code in s.config.accept}:
        misplaced = [sum(example.problem is not None for example in part) for part in parts]
    train, held_out = (len(part) - bad for part, bad in zip(parts, misplaced, strict=True))
    counts: dict[str, JsonValue] = {
        "layout": s.examples.layout,
        "columns": {**s.examples.columns},
        "more_layouts": {n: {**c} for n, c in s.examples.layouts.items() if n != s.examples.layout},
        "template": s.prepared.template,
        "not_used": [*s.examples.unused],
        "notes": [*s.notes],
        "rows": {"train": train, "held_out": held_out, "bad": len(s.skipped) + sum(misplaced)},
        "tokens": tokens,
    }
    counts |= {"length": _spread(lengths)} if len(lengths) else {}
    if s.task.has_encoder and len(lengths):
        counts["target_length"] = _spread(s.train.learned)
    if not s.task.data.windows and len(lengths) > len(s.examples.train) - s.train.dropped:
        name = "windows" if s.examples.layout == "text" else "entries"
        counts[name] = {"all": len(lengths), "of_rows": len(np.unique(s.train.column("row")))}
    if s.finds_spans:
        counts["windows"] = {"all": len(lengths), "with_answer": int((s.train.column("end_positions") > 0).sum())}
    if s.task.data.label_per_token and not s.task.has_encoder and tokens:
        counts["learned"] = float(s.train.learned.sum() / tokens)
    if not s.task.data.windows:
        lost = s.train.column("lost")
        counts["truncated"] = {
            "rows": int((lost > 0).sum()),
            "tokens": int(lost.sum()),
            "answers": int((s.train.column("lost_answer") > 0).sum()),
            "dropped": s.train.dropped,
        }
    unknown = s.tokenizer.unk_token_id
    if unknown is not None and unknown not in (s.encoder.eos, s.tokenizer.bos_token_id) and tokens:
        counts["unknown"] = float(sum(int((ids == unknown).sum()) for ids in s.train.lists("input_ids")) / tokens)
    if s.task.data.named == "label":
        classes = Counter(name for example in s.examples.train for name in example.classes)
        counts["classes"] = dict(sorted(classes.items(), key=lambda item: -item[1])[:20])
    elif s.examples.labels is not None:
        counts["tags"] = len(s.examples.labels)
    counts["steps"] = {"all": s.steps} if s.data.streaming else {"per_epoch": s.steps_per_epoch, "all": s.steps}
    return counts


def _spread(lengths: np.ndarray) -> dict[str, JsonValue]:
    median, p90, p99 = np.percentile(lengths, [50, 90, 99]).astype(int).tolist()
    return {"median": median, "p90": p90, "p99": p99, "longest": int(lengths.max())}
