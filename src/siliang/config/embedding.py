"""The settings of learning vectors of texts, and scores of pairs of texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from siliang.config.section import Section, Verbatim
from siliang.language import Bilingual
from siliang.types import ConfigError

Pooling = Literal["auto", "mean", "cls", "last"]
EmbeddingLoss = Literal[
    "auto",
    "multiple_negatives",
    "cosent",
    "cosine",
    "triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
]
PromptName = Literal["auto", "query", "document", "none"]
RerankerLoss = Literal["binary_cross_entropy", "mse"]


class EmbeddingConfig(Section):
    """The vector and the loss of the task embedding."""

    pooling: Pooling = "auto"
    """The states of the last layer that become the vector of a text: the mean of all, that of the first token (cls), or
    that of the last token. auto: as the base model is, if it is one of sentence-transformers; otherwise last for a
    model that writes, and mean for an encoder.

    用最后一层的哪些状态作为文本的向量：全部的均值（mean）、第一个词元（cls）或最后一个词元（last）。auto：基座模型若是
    sentence-transformers 的模型，与它相同；否则，生成文本的模型用 last，编码器用 mean。"""
    normalize: bool = True
    """Divide each vector by its length. The losses other than triplets use cosines, for which this changes nothing.

    把每个向量除以它的长度。三元组以外的损失用余弦，结果不受影响。"""
    loss: EmbeddingLoss = "auto"
    """The loss. multiple_negatives: a text is nearer to its own positive than to all other texts of the step. cosent,
    cosine: for pairs with scores. triplet: nearer to the positive than to its negative. batch_hard_triplet,
    batch_semi_hard_triplet: for texts with classes. auto: multiple_negatives, cosent or batch_semi_hard_triplet, as the
    rows are.

    损失函数。multiple_negatives：文本离自己的正例比离该步其他所有文本更近。cosent、cosine：用于带分数的句对。triplet：离正例
    比离负例更近。batch_hard_triplet、batch_semi_hard_triplet：用于带类别的文本。auto：根据样本的格式，取
    multiple_negatives、cosent 或 batch_semi_hard_triplet。"""
    scale: Annotated[float, Field(gt=0.0)] = 20.0
    """The factor of the cosines in multiple_negatives and cosent: 1 / temperature.

    multiple_negatives 和 cosent 中余弦的倍数，即 1 / 温度。"""
    symmetric: bool = False
    """multiple_negatives also in the other direction, from each positive to the first texts; the mean of both.

    multiple_negatives 同时计算反方向，即从每个正例到各条锚文本，取两者的均值。"""
    margin: Annotated[float, Field(ge=0.0)] = 5.0
    """The margin of the triplets' distances. Between vectors of length 1, distances are at most 2, and 0.2 to 1 is
    usual.

    三元组损失中距离的间隔。长度为 1 的向量之间距离最多为 2，常用 0.2 到 1。"""
    matryoshka_dims: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Also learn the first dimensions of the vectors alone, such as [384, 128, 64]: the loss is summed over these. The
    full size should be among them.

    让向量的前若干维单独可用，如 [384, 128, 64]：损失对这些维数求和。其中应包括完整的维数。"""
    matryoshka_weights: list[Annotated[float, Field(gt=0.0)]] = Field(default_factory=list)
    """The weight of the loss of each of matryoshka_dims. Empty: 1 each.

    matryoshka_dims 中各维数的损失的权重。空：各为 1。"""
    query_prompt: Annotated[str | None, Verbatim()] = None
    """What is put in front of a query, the first text of a pair. null: that of the base model, if it is one of
    sentence-transformers; otherwise nothing.

    加在查询（每对文本的第一段）之前的文字。null：基座模型若是 sentence-transformers 的模型，与它相同；否则不加。"""
    document_prompt: Annotated[str | None, Verbatim()] = None
    """What is put in front of a document: of the other texts of a row. null: as query_prompt.

    加在文档（一条样本的其余文本）之前的文字。null：与 query_prompt 相同的规则。"""
    prompt_name: PromptName = "auto"
    """The prompt of a text that stands alone: of a text with a class, and of a single text that is to become a vector,
    unless `siliang predict --prompt-name` chooses another one. query: query_prompt; document: document_prompt; none:
    none. auto: with the prompts of a base model of sentence-transformers, its default prompt, or none where it has no
    default; with prompts that are set here, document.

    单独一段文本所用的提示：用于带类别的文本，以及要转换成向量的单段文本（除非 `siliang predict --prompt-name` 另行
    指定）。query：query_prompt；document：document_prompt；none：不加。auto：使用 sentence-transformers 基座模型自带的
    提示时，取其默认提示，没有默认提示则为 none；提示在此处设置时为 document。"""
    negatives: Annotated[int, Field(ge=0)] | None = None
    """The most hard negatives of a row, the first ones. null: all.

    一条样本最多使用的难负例数，取最前面的。null：全部。"""

    @model_validator(mode="after")
    def _of_the_loss(self) -> EmbeddingConfig:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if len(set(dims)) < len(dims):
            raise ConfigError(
                Bilingual(
                    f"embedding.matryoshka_dims = {dims} has a number twice: each once.",
                    f"embedding.matryoshka_dims = {dims} 中有重复的数：每个只写一次。",
                )
            )
        if weights and len(weights) != len(dims):
            raise ConfigError(
                Bilingual(
                    f"embedding.matryoshka_weights has {len(weights)} numbers, and embedding.matryoshka_dims "
                    f"{len(dims)}: as many, or leave it out.",
                    f"embedding.matryoshka_weights 有 {len(weights)} 个数，而 embedding.matryoshka_dims 有 "
                    f"{len(dims)} 个：数目应相同，或不写。",
                )
            )
        return self


class RerankerConfig(Section):
    """The loss of the task reranker."""

    loss: RerankerLoss = "binary_cross_entropy"
    """The loss. binary_cross_entropy: labels and scores from 0 to 1, and pairs with negatives. mse: the squared error,
    for scores of any size.

    损失函数。binary_cross_entropy：用于 0 到 1 的标签或分数，以及带负例的文本对。mse：平方误差，用于任意大小的分数。"""
    negatives: Annotated[int, Field(ge=0)] | None = None
    """The most negatives of a row, the first ones. null: all.

    一条样本最多使用的负例数，取最前面的。null：全部。"""
