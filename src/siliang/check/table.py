"""The rules in one table, and how they are run."""

from __future__ import annotations

from collections.abc import Iterator

from siliang.check import rules_rows as rows
from siliang.check import rules_run as run
from siliang.check import rules_tokens as tokens
from siliang.check.finding import Finding, Rule
from siliang.check.subject import Subject
from siliang.types import ConfigError, DataError, nearest

RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule("SL001", "error", rows.bad_rows, "rows"),
        Rule("SL002", "warning", rows.duplicates, "rows"),
        Rule("SL003", "warning", rows.overlap, "rows"),
        Rule("SL004", "warning", rows.damaged_text, "rows"),
        Rule("SL005", "error", rows.missing_classes, "rows"),
        Rule("SL006", "warning", rows.imbalance, "rows"),
        Rule("SL007", "error", tokens.end_not_learned),
        Rule("SL008", "error", tokens.all_masked),
        Rule("SL009", "warning", tokens.truncated),
        Rule("SL010", "error", tokens.prompt_learned),
        Rule("SL011", "error", tokens.shifted_labels),
        Rule("SL012", "warning", tokens.template_misfit),
        Rule("SL013", "warning", tokens.unknown_tokens),
        Rule("SL014", "warning", tokens.special_words),
        Rule("SL015", "warning", rows.contradictions, "rows"),
        Rule("SL016", "warning", rows.placeholders, "rows"),
        Rule("SL017", "warning", rows.broken_tags, "rows"),
        Rule("SL018", "error", rows.misplaced_answers, "rows"),
        Rule("SL019", "warning", rows.nothing_held_out, "rows"),
        Rule("SL020", "error", rows.doubtful_labels, "rows"),
        Rule("SL021", "error", run.no_pad_token, "model"),
        Rule("SL022", "error", tokens.padding_learned),
        Rule("SL023", "error", run.vocabulary, ends=True),
        Rule("SL024", "error", run.targets, "model"),
        Rule("SL025", "error", run.no_biases, "model"),
        Rule("SL026", "warning", run.tied_embedding, "model"),
        Rule("SL028", "error", run.too_many_positions, ends=True),
        Rule("SL029", "warning", rows.quoted_cells, "rows"),
        Rule("SL030", "error", tokens.rows_without_tokens),
        Rule("SL031", "warning", run.pure_fp16, "run"),
        Rule("SL032", "warning", run.emulated_precision, "run"),
        Rule("SL033", "warning", run.wide_quantised_compute, "run"),
        Rule("SL034", "error", tokens.nothing_varies),
        Rule("SL035", "warning", run.invented, "model"),
        Rule("SL036", "warning", rows.texts_not_used, "rows"),
        Rule("SL037", "warning", rows.parts_not_used, "rows"),
        Rule("SL041", "warning", run.steps, "run"),
        Rule("SL042", "warning", run.learning_rate, "run"),
        Rule("SL043", "error", run.disk, "run"),
    )
}


def find(subject: Subject, *, stop_early: bool = False) -> list[Finding]:
    """What the rules find, by code.

    Args:
        stop_early: Do not make tokens of rows that are in error already; for a run that will not start anyhow.

    Raises:
        SiliangError: The data or the model cannot be read at all.
    """
    accepted = {code.upper() for code in subject.config.accept}
    for code in accepted:
        find_rule(code)
    findings: list[Finding] = []
    order = ("rows", "model", "tokens", "run")
    for stage in order:
        for rule in RULES.values():
            if rule.reads == stage:
                findings += _run(rule, subject, accepted)
        if stop_early and any(f.severity == "error" for f in findings):
            break
    return sorted(findings, key=lambda f: (f.severity, f.code))


def _run(rule: Rule, subject: Subject, accepted: set[str]) -> Iterator[Finding]:
    for found in rule.function(subject):
        yield Finding.of(rule, found, rule.code in accepted)


def find_rule(code: str) -> Rule:
    """The rule of that code.

    Raises:
        ConfigError: There is none.
    """
    try:
        return RULES[code.upper()]
    except KeyError:
        known = f"{min(RULES)} to {max(RULES)}"
        raise ConfigError(f"there is no rule {code}; there are {known}.{nearest(code.upper(), RULES)}") from None


def stop_on_errors(findings: list[Finding]) -> None:
    """For a run that is about to start.

    Raises:
        DataError: There is an error among the findings: the first in words, the others by code.
    """
    errors = [f for f in findings if f.severity == "error"]
    if not errors:
        return
    first = errors[0]
    others = f" Also {', '.join(dict.fromkeys(f.code for f in errors[1:]))}." if len(errors) > 1 else ""
    message = first.message.splitlines()
    head = (" ".join(message) if first.code != "SL024" else message[0]).rstrip(".")
    raise DataError(f"{first.code} {head}.\n{first.fix}{others} `siliang check --explain {first.code}` says more.")
