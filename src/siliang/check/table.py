"""The table of rules, and how they run."""

from __future__ import annotations

from collections.abc import Iterator

from siliang.check import rules_conversations as conversations
from siliang.check import rules_labels as labels
from siliang.check import rules_model as model
from siliang.check import rules_numbers as numbers
from siliang.check import rules_preferences as preferences
from siliang.check import rules_related as related
from siliang.check import rules_rows as rows
from siliang.check import rules_run as run
from siliang.check import rules_tokenizer as tokenizer
from siliang.check import rules_tokens as tokens
from siliang.check.finding import Finding, Rule
from siliang.check.input import CheckInput
from siliang.language import Bilingual, Language, local
from siliang.types import ConfigError, DataError, nearest

RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule("SL001", "error", rows.bad_rows, "rows"),
        Rule("SL002", "warning", rows.duplicates, "rows"),
        Rule("SL003", "warning", rows.overlap, "rows"),
        Rule("SL004", "warning", rows.damaged_text, "rows"),
        Rule("SL005", "error", labels.missing_classes, "rows"),
        Rule("SL006", "warning", labels.imbalance, "rows"),
        Rule("SL007", "error", tokens.end_not_learned),
        Rule("SL008", "error", tokens.all_masked),
        Rule("SL009", "warning", tokens.truncated),
        Rule("SL010", "error", tokens.prompt_learned),
        Rule("SL011", "error", tokens.shifted_labels),
        Rule("SL012", "warning", tokenizer.template_misfit),
        Rule("SL013", "warning", tokenizer.unknown_tokens),
        Rule("SL014", "warning", tokenizer.special_words),
        Rule("SL015", "warning", labels.contradictions, "rows"),
        Rule("SL016", "warning", rows.placeholders, "rows"),
        Rule("SL017", "warning", labels.broken_tags, "rows"),
        Rule("SL018", "error", rows.misplaced_answers, "rows"),
        Rule("SL019", "warning", rows.nothing_held_out, "rows"),
        Rule("SL020", "error", labels.doubtful_labels, "rows"),
        Rule("SL021", "error", model.no_pad_token, "model"),
        Rule("SL022", "error", tokens.padding_learned),
        Rule("SL023", "error", model.vocabulary, fatal=True),
        Rule("SL024", "error", model.targets, "model"),
        Rule("SL025", "error", model.no_biases, "model"),
        Rule("SL026", "warning", model.tied_embedding, "model"),
        Rule("SL028", "error", model.too_many_positions, fatal=True),
        Rule("SL029", "warning", rows.quoted_cells, "rows"),
        Rule("SL030", "error", tokens.rows_without_tokens),
        Rule("SL031", "warning", run.pure_fp16, "run"),
        Rule("SL032", "warning", run.emulated_precision, "run"),
        Rule("SL033", "warning", run.wide_quantized_compute, "run"),
        Rule("SL034", "error", tokens.nothing_varies),
        Rule("SL035", "warning", model.invented, "model"),
        Rule("SL036", "warning", rows.texts_not_used, "rows"),
        Rule("SL037", "warning", rows.parts_not_used, "rows"),
        Rule("SL038", "error", tokens.never_invoked),
        Rule("SL039", "error", model.not_on_quantized, "model", fatal=True),
        Rule("SL041", "warning", run.steps, "run"),
        Rule("SL042", "warning", run.learning_rate, "run"),
        Rule("SL043", "error", run.disk, "run"),
        Rule("SL044", "warning", preferences.contradictory_pairs, "rows"),
        Rule("SL045", "warning", preferences.length_decides, "rows"),
        Rule("SL046", "warning", preferences.refusals_preferred, "rows"),
        Rule("SL047", "warning", labels.rare_labels, "rows"),
        Rule("SL048", "warning", numbers.far_numbers),
        Rule("SL049", "error", preferences.one_kind_of_answer),
        Rule("SL050", "warning", related.same_texts, "rows"),
        Rule("SL051", "warning", related.wrong_negatives, "rows"),
        Rule("SL052", "error", related.nothing_to_compare, "rows"),
        Rule("SL053", "warning", related.classes_as_scores, "rows"),
        Rule("SL054", "warning", numbers.decimal_commas, "rows"),
        Rule("SL055", "warning", conversations.turns_that_do_not_fit, "rows"),
        Rule("SL056", "error", model.class_read_at_the_end, fatal=True),
    )
}


def find(subject: CheckInput, *, stop_early: bool = False) -> list[Finding]:
    """The findings of the rules: errors before warnings, then by code.

    Args:
        stop_early: Stop at the first stage with errors; for a run, which then does not start.

    Raises:
        SiliangError: The data or the model cannot be read.
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


def _run(rule: Rule, subject: CheckInput, accepted: set[str]) -> Iterator[Finding]:
    for problem in rule.function(subject):
        yield Finding.of(rule, problem, rule.code in accepted)


def find_rule(code: str) -> Rule:
    """The rule with that code.

    Raises:
        ConfigError: There is none.
    """
    try:
        return RULES[code.upper()]
    except KeyError:
        first, last, alike = min(RULES), max(RULES), nearest(code.upper(), RULES)
        raise ConfigError(
            Bilingual(
                f"rule {code} does not exist; the rules are {first} to {last}.{alike}",
                f"规则 {code} 不存在；规则从 {first} 到 {last}。{alike.zh}",
            )
        ) from None


def stop_on_errors(findings: list[Finding]) -> None:
    """Stops a run with errors before it starts.

    Raises:
        DataError: The findings include errors. The message has the first error, and the codes of the others.
    """
    errors = [f for f in findings if f.severity == "error"]
    if not errors:
        return
    code, fix = errors[0].code, errors[0].fix
    head = Bilingual(_head(errors[0], "en"), _head(errors[0], "zh"))
    others, others_zh = "", ""
    if len(errors) > 1:
        codes = ", ".join(dict.fromkeys(f.code for f in errors[1:]))
        others, others_zh = f" Also {codes}.", f"另有 {codes}。"
    raise DataError(
        Bilingual(
            f"{code} {head}.\n{fix}{others} `siliang check --explain {code}` explains it.",
            f"{code} {head.zh}。\n{local(fix, 'zh')}{others_zh}详见 `siliang check --explain {code}`。",
        )
    )


def _head(error: Finding, language: Language) -> str:
    lines = local(error.message, language).splitlines()
    # the following lines of SL024 list the model's modules
    return (" ".join(lines) if error.code != "SL024" else lines[0]).rstrip(".。")
