"""The settings of evaluations of written texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from siliang.config.section import Section, as_names

MeasureName = Literal["rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "exact_match"]
BleuTokenizer = Literal["auto", "13a", "zh", "char", "intl"]


class EvaluationConfig(Section):
    """The measures of written texts, for causal_lm and seq_2_seq_lm (docs/measures.md)."""

    measures: Annotated[list[MeasureName], BeforeValidator(as_names)] = Field(default_factory=list)
    """The measures of the texts that the model writes for held-out rows, at each evaluation: rouge_1, rouge_2, rouge_l,
    bleu, chrf, exact_match. The measure of train.best is one of them without being named. Empty: none in training;
    `siliang eval` measures rouge_l for seq_2_seq_lm.

    每次评估时，对模型为验证样本所写文本计算的指标：rouge_1、rouge_2、rouge_l、bleu、chrf、exact_match。train.best 所用
    的指标不必列出。为空：训练时不计算；`siliang eval` 对 seq_2_seq_lm 计算 rouge_l。"""
    rows: Annotated[int, Field(ge=1)] | None = 200
    """The number of held-out rows for which the model writes a text: writing takes much longer than a loss. They are
    chosen at random, and are the same rows each time. null: all.

    模型要为多少条验证样本写出文本：生成比计算损失慢得多。样本随机选出，每次都相同。null：全部。"""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """The maximum number of tokens of a written text. null: data.max_target_length, or fewer if the model has no more
    positions.

    所写文本的词元数上限。null：data.max_target_length；模型的位置不够时更少。"""
    bleu_tokenizer: BleuTokenizer = "auto"
    """sacrebleu's tokenizer for BLEU. auto: zh if most letters of the references are Chinese characters, char if they
    are of another script without blanks (Japanese, Thai), otherwise 13a.

    BLEU 所用的 sacrebleu 分词方式。auto：参考文本的多数字母是汉字时用 zh，是其他不写空格的文字（日文、泰文）时用 char，
    否则用 13a。"""
