"""Rules on the base model: its tokenizer, its modules, its positions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from siliang.check.finding import Problem
from siliang.check.input import CheckInput
from siliang.language import Bilingual, local
from siliang.models.positions import trained_length
from siliang.types import OTHER_HEADS, ConfigError, TargetError


def no_pad_token(s: CheckInput) -> Iterator[Problem]:
    """The tokenizer has no pad token.

    Cause: Rows of a batch are padded to one length, and the tokenizer has no token for it. siliang uses the end of
    sequence or the unknown token if there is one: labels and attention are masked by position, so any token works.

    Fix: Name a pad_token in the model's tokenizer_config.json.

    分词器没有填充词元

    原因：一个批次中的样本要填充到相同长度，而分词器没有可用的词元。有结束符或未知词元时，siliang 会用它们代替：标签和注
    意力都按位置屏蔽，用哪个词元都可以。

    办法：在模型的 tokenizer_config.json 中设置 pad_token。
    """
    if s.tokenizer.pad_token_id is None:
        yield Problem(
            Bilingual(
                f"{s.config.model}: its tokenizer has no pad token, no end of sequence and no unknown token",
                f"{s.config.model} 的分词器既没有填充词元，也没有结束符和未知词元",
            )
        )


def vocabulary(s: CheckInput) -> Iterator[Problem]:
    """Tokens without an embedding.

    Cause: The tokenizer has more tokens than the embedding has rows. The first token beyond them ends the run with an
    index error, which on a GPU does not show the cause.

    Fix: Use the model's own tokenizer, or name the new tokens in data.add_tokens, which enlarges the embeddings.

    有词元没有对应的嵌入

    原因：分词器的词元数超过嵌入矩阵的行数。遇到第一个这样的词元，训练就会因索引越界而中止；在 GPU 上，报错信息甚至看不
    出原因。

    办法：使用模型自带的分词器，或在 data.add_tokens 中列出新词元，嵌入矩阵会随之扩大。
    """
    rows = getattr(s.text_config, "vocab_size", None)
    if rows is None or s.data.add_tokens:
        return
    read = [ids for part in (s.train, s.eval) for ids in part.lists("input_ids") if len(ids)]
    largest = max((int(ids.max()) for ids in read), default=0)
    named = {"pad": s.tokenizer.pad_token_id, "eos": s.tokenizer.eos_token_id, "bos": s.tokenizer.bos_token_id}
    beyond = [(name, token) for name, token in named.items() if token is not None and token >= rows]
    own = len(set(s.tokenizer.get_vocab().values()) - set(s.tokenizer.get_added_vocab().values()))
    if largest >= rows:
        yield Problem(
            Bilingual(
                f"the data holds token {largest:,}, and the embedding has {rows:,} rows",
                f"数据中有词元 {largest:,}，而嵌入只有 {rows:,} 行",
            )
        )
        return
    sizes = Bilingual(
        f"the tokenizer has {len(s.tokenizer):,} tokens, the embedding {rows:,} rows",
        f"分词器有 {len(s.tokenizer):,} 个词元，嵌入只有 {rows:,} 行",
    )
    if beyond:
        name, token = beyond[0]
        yield Problem(
            Bilingual(f"{sizes}, and its {name} token is {token:,}", f"{sizes.zh}，其 {name} 词元是 {token:,}")
        )
    elif own > rows:
        yield Problem(
            Bilingual(
                f"{sizes}, and {own:,} of them its own: it is another model's tokenizer",
                f"{sizes.zh}，其中自有词元 {own:,} 个：这是另一个模型的分词器",
            )
        )
    elif len(s.tokenizer) > rows:
        yield Problem(
            Bilingual(f"{sizes}; the data uses none beyond", f"{sizes.zh}；数据没有用到超出的词元"), severity="warning"
        )


def targets(s: CheckInput) -> Iterator[Problem]:
    """The method does not fit the model.

    Cause: method.target_modules names modules that this model does not have, all of them or some (PEFT silently skips
    names that match nothing), or a setting of the method, such as a rank or a block size, does not fit their sizes.

    Fix: Name modules that the model has, or leave target_modules out; where a setting does not fit, change that.

    方法与模型不匹配

    原因：method.target_modules 中的模块名全部或部分不在这个模型里（PEFT 会悄悄跳过匹配不到的名称），或者方法的某个配
    置项（如秩、块大小）与这些模块的尺寸不符。

    办法：改用模型中存在的模块名，或去掉 target_modules；如果是配置项不符，请修改该配置项。
    """
    if s.method.tunes == "biases" or (error := _attach(s)) is None:
        return
    fix = Bilingual("Change that setting of the method.", "请修改该方法的这一配置项。")
    if isinstance(error, TargetError) and "target_modules" in error.text:
        fix = Bilingual("Name modules in method.target_modules.", "请在 method.target_modules 中写出模块名。")
        if s.config.method.arguments.get("target_modules") is not None:
            fix = Bilingual(
                "Name modules that the model has and the method can tune, or leave target_modules out.",
                "请改用模型中存在且该方法能微调的模块名，或去掉 target_modules。",
            )
    yield Problem(error.text, fix=fix)


def not_on_quantized(s: CheckInput) -> Iterator[Problem]:
    """The method does not work on a quantized base model.

    Cause: The method, or one of its settings, trains or changes the base model's own weights, and needs all of their
    bits. Here the weights are quantized, by the section quantization or in the model's own files.

    Fix: Leave quantization out and use a model in 16 or 32 bits, or another method, or another value of the setting
    that the message names.

    该方法不能用于量化的基座模型

    原因：这个方法或它的某个配置项要训练或改动基座模型自身的权重，需要完整的精度；而这里的权重已量化，可能是因为配置了
    quantization，也可能模型文件本身就是量化的。

    办法：去掉 quantization 并使用 16 位或 32 位的模型，或换一种方法，或修改提示中的那个配置项。
    """
    if (wanted := s.config.quantization) is not None:
        where = Bilingual(f"quantization.bits = {wanted.bits}", f"设置了 quantization.bits = {wanted.bits}")
    elif getattr(s.model_config, "quantization_config", None) is not None:
        where = Bilingual(f"{s.config.model} is quantized", f"{s.config.model} 已量化")
    else:
        return
    if (why := s.method.why_settings_not_quantized(s.config.method.arguments)) is not None:
        yield Problem(Bilingual(f"{where}: {why.rstrip('.')}", f"{where.zh}：{local(why, 'zh').rstrip('。')}"))


def no_biases(s: CheckInput) -> Iterator[Problem]:
    """BitFit on a model without biases.

    Cause: BitFit trains the biases, and Llama and similar models have none: nothing would be learned.

    Fix: Use method=lora, or a model with biases (BLOOM, BERT, GPT-2, Qwen2's attention).

    模型没有偏置，无法使用 BitFit

    原因：BitFit 只训练偏置，而 Llama 一类的模型没有偏置：什么都学不到。

    办法：改用 method=lora，或换一个有偏置的模型（BLOOM、BERT、GPT-2、Qwen2 的注意力层）。
    """
    if s.method.tunes == "biases" and (error := _attach(s)) is not None:
        yield Problem(error.text)


def invented(s: CheckInput) -> Iterator[Problem]:
    """Weights that the model's files do not hold.

    Cause: The model has parts, besides the task's head, that its files lack, such as the pooler of a BERT that was
    trained without one. They are initialized at random when the model is loaded. Frozen, they would differ wherever the
    adapter is opened, so they are trained, and saved with the adapter (modules_to_save), as the head is.

    Fix: Nothing needs to be done if the model normally comes without them. Otherwise use a checkpoint that has them.

    模型文件缺少部分权重

    原因：除任务头之外，模型还有文件中没有的部分，例如训练时不带 pooler 的 BERT。它们在加载时随机初始化。如果冻结，每次
    打开适配器都会不同，因此它们与任务头一样参与训练，并随适配器保存（modules_to_save）。

    办法：如果这个模型本来就不含这些权重，无需处理；否则请换用包含它们的检查点。
    """
    heads = (*s.task.model.heads, *OTHER_HEADS)
    if new := [path for path in s.invented if not any(head in path.split(".") for head in heads)]:
        names = ", ".join(new)
        yield Problem(
            Bilingual(
                f"{s.config.model} has no weights for {names}: they are new, trained, and saved with the adapter",
                f"{s.config.model} 的文件中没有 {names}：这部分是新建的，会一同训练和保存",
            )
        )


def tied_embedding(s: CheckInput) -> Iterator[Problem]:
    """An adapter on a tied embedding.

    Cause: The model's output head is its embedding. An adapter on one of them leaves the other unchanged, and a merge
    separates the two: the merged model has one more embedding, and a program that ties them again gives different
    answers.

    Fix: Leave the embedding and the head out of target_modules and modules_to_save, or do not merge.

    在共享权重的嵌入上加适配器

    原因：这个模型的输出头与嵌入共享权重。适配器加在其中一个上，另一个不变；合并时两者会分开：合并后的模型多出一份嵌入，
    而重新共享权重的程序会给出不同的输出。

    办法：不要把嵌入和输出头列入 target_modules 和 modules_to_save，或不要合并。
    """
    if not getattr(s.text_config, "tie_word_embeddings", False) or s.method.config is None:
        return
    given = s.config.method.arguments
    names: list[str] = []
    for key in ("target_modules", "modules_to_save"):
        value = given.get(key) or []
        names += [value] if isinstance(value, str) else list(value)
    touched = [n for n in names if any(part in n for part in ("embed", "lm_head", "wte", "output_layer", "shared"))]
    if touched:
        named = ", ".join(touched)
        yield Problem(
            Bilingual(
                f"{named} is tied to the model's other end (tie_word_embeddings)",
                f"{named} 的权重由嵌入和输出头共享（tie_word_embeddings）",
            )
        )


def too_many_positions(s: CheckInput) -> Iterator[Problem]:
    """Rows longer than the model can read.

    Cause: The model has learned embeddings for a fixed number of positions: a longer row would end the run with an
    index error. Virtual tokens in front of a row (prompts, prefixes) take positions too. A model with rotary positions
    accepts longer rows, but was not trained on them and answers worse.

    Fix: Lower data.max_length to the model's length, less the method's virtual tokens.

    样本超出模型的最大长度

    原因：模型只有固定数目的位置嵌入，更长的样本会让训练因索引越界而中止。样本前面的虚拟词元（提示、前缀）也占用位置。使
    用旋转位置编码的模型虽能继续，但没有训练过这么长的输入，效果会变差。

    办法：把 data.max_length 降到模型的最大长度减去方法的虚拟词元数。
    """
    positions = s.positions
    longest = max(part.longest_sequence for part in (s.train, s.eval))
    if positions.reads is not None and longest > positions.reads:
        limit = positions.in_words(positions.reads)
        yield Problem(
            Bilingual(
                f"a row has {longest:,} tokens, the model {limit}", f"有样本长 {longest:,} 个词元，而模型有 {limit.zh}"
            )
        )
    if s.task.has_encoder:
        longest = max(int(part.learned.max(initial=0)) for part in (s.train, s.eval))
        if positions.writes is not None and longest > positions.writes:
            limit = positions.in_words(positions.writes)
            yield Problem(
                Bilingual(
                    f"a target has {longest:,} tokens, the model's decoder {limit}",
                    f"有目标文本长 {longest:,} 个词元，而模型的解码器有 {limit.zh}",
                ),
                fix=Bilingual("Lower data.max_target_length to that.", "把 data.max_target_length 降到这个数以内。"),
            )
        return
    trained = trained_length(s.model_config)
    if positions.reads is None and trained and longest + positions.virtual > trained:
        yield Problem(
            Bilingual(
                f"a row has {longest:,} tokens, the model was trained for {trained:,}",
                f"有样本长 {longest:,} 个词元，而模型是按 {trained:,} 个词元训练的",
            ),
            severity="warning",
        )


READ_AT_EOS = ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")


def class_read_at_the_end(s: CheckInput) -> Iterator[Problem]:
    """The class is read at an end-of-sequence token that is not there.

    Cause: Models with an encoder and a decoder (BART, T5) read the class of a text at its last end-of-sequence token.
    Without one in each row, and as many in each, the forward pass ends with an error.

    Fix: Take the model's own tokenizer, which adds the token, and texts that do not contain it; or a model with an
    encoder alone.

    读取类别的结束符不存在

    原因：由编码器和解码器组成的模型（BART、T5）在文本最后一个结束符处读取类别。每条样本都要有结束符，且数目相同，否则前向
    计算会报错。

    办法：使用会添加结束符的模型自带分词器，文本中也不要含有结束符；或改用只有编码器的模型。
    """
    eos = getattr(s.model_config, "eos_token_id", None)
    reads_a_class = s.task.model.auto_class == "AutoModelForSequenceClassification"
    if getattr(s.model_config, "model_type", None) not in READ_AT_EOS or not reads_a_class or not isinstance(eos, int):
        return
    counts = [
        int((sequence == eos).sum())
        for part in (s.train, s.eval)
        for ids, lengths in zip(part.lists("input_ids"), part.lengths_by_entry, strict=True)
        for sequence in np.split(np.asarray(ids), np.cumsum(lengths)[:-1])
    ]
    none, n, least, most = counts.count(0), len(counts), min(counts, default=0), max(counts, default=0)
    if none or least < most:
        yield Problem(
            Bilingual(
                f"of {n:,} rows {none:,} have no token {eos}; the rows have {least:,} to {most:,} of it",
                f"{n:,} 条样本中有 {none:,} 条没有编号 {eos} 的词元；各条样本有 {least:,} 到 {most:,} 个",
            )
        )


def _attach(s: CheckInput) -> ConfigError | None:
    """The error of attaching the method to the model's skeleton; None without one."""
    if s.method.config is None:
        return None
    try:
        s.attached()
    except ConfigError as error:
        return error
    return None
