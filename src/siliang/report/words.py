"""The texts of the report, in English and Chinese side by side."""

from __future__ import annotations

from siliang.language import Bilingual
from siliang.types import ConfigError

# key: (English, Chinese)
WORDS: dict[str, tuple[str, str]] = {
    "lang": ("en", "zh-CN"),
    "title": ("Which method is best on this data?", "在这份数据上，哪种方法最好？"),
    "question": (
        "{methods} methods on {data}: {rows} training rows, {held} held-out rows; base model {model}, {task}.",
        "在 {data} 上比较 {methods} 种方法：{rows} 条样本用于训练，{held} 条用于验证；基座模型 {model}，任务 {task}。",
    ),
    "question_alone": (
        "{label} on {data}: {rows} training rows, {held} held-out rows; base model {model}, {task}.",
        "{label}，数据 {data}：{rows} 条样本用于训练，{held} 条用于验证；基座模型 {model}，任务 {task}。",
    ),
    "unfinished": (
        "The comparison is not finished: this page shows the results so far.",
        "比较尚未完成：本页只显示目前已有的结果。",
    ),
    "title_alone": ("How good is this method on this data?", "在这份数据上，这种方法效果如何？"),
    "alone": (
        "{label}: {metric} {score}{over_alone}, in {minutes} of training and {memory} of memory. It is "
        "not compared with another method.",
        "{label}：{metric} {score}{over_alone}，训练用时 {minutes}，内存 {memory}。没有与其他方法比较。",
    ),
    "over_alone": (" over {n} seeds", "（{n} 个种子的平均）"),
    "best": (
        "{label} is the best here: {metric} {score}{over}, in {minutes} of training and {memory} of memory.",
        "效果最好的是 {label}：{metric} {score}{over}，训练用时 {minutes}，内存 {memory}。",
    ),
    "best_tied": (
        "{label} is ahead with {metric} {score}{over}, but these seeds do not show that it is better than {others}.",
        "{label} 领先，{metric} {score}{over}，但仅凭这几个种子，还不能断定它优于 {others}。",
    ),
    "over": (" over {n} seeds", "（{n} 个种子）"),
    "one_run": (" (one seed: differences of this size may be chance)", "（只有一个种子：这种幅度的差别可能是偶然）"),
    "small": (
        "{label} reaches {share} of that with {fewer} of the trained parameters ({saved} saved).",
        "{label} 达到其 {share}，可训练参数只有其 {fewer}（保存大小 {saved}）。",
    ),
    "small_loss": (
        "{label} reaches {share} of its loss reduction with {fewer} of the trained parameters ({saved} saved).",
        "{label} 的损失降幅（相对基座模型）达到其 {share}，可训练参数只有其 {fewer}（保存大小 {saved}）。",
    ),
    "no_small": (
        "No method with at most half of its trained parameters comes within 5% of it.",
        "可训练参数不超过其一半的方法中，没有一种达到它的 95%。",
    ),
    "no_small_loss": (
        "No method with at most half of its trained parameters comes within 5% of its loss reduction.",
        "可训练参数不超过其一半的方法中，没有一种的损失降幅达到它的 95%。",
    ),
    "not_measured": (
        "No run has its {metric} yet: it is not finished, failed, or has no held-out rows.",
        "还没有运行得到{metric}：尚未完成、失败，或没有验证样本。",
    ),
    "none_alone": (
        "This method learned nothing. See the mark in the table, and try another learning rate.",
        "这种方法没有学到东西。请看表中的标记，换一个学习率再试。",
    ),
    "none": (
        "No method learned anything. See the marks in the table, and try other learning rates.",
        "没有一种方法学到东西。请看表中的标记，换几个学习率再试。",
    ),
    "majority_note": (
        "Always predicting the most frequent class gives accuracy {share}.",
        "全部预测为样本最多的类别，准确率也有 {share}。",
    ),
    "base_loss_note": (
        "The untuned base model has a held-out loss of {eval_loss}.",
        "未微调的基座模型在验证集上的损失是 {eval_loss}。",
    ),
    "base_note": (
        "The untuned base model has a held-out loss of {eval_loss} (perplexity {perplexity}).",
        "未微调的基座模型在验证集上的损失是 {eval_loss}（困惑度 {perplexity}）。",
    ),
    "table": ("All methods", "全部方法"),
    "table_note": (
        "Mean ± standard deviation over seeds. ★: no other method is better with as little memory. Click "
        "a column to sort.",
        "各种子的均值 ± 标准差。★：内存不高于它的方法中，没有效果更好的。点击列名可排序。",
    ),
    "table_note_cpu": (
        "Peak memory is that of the process, libraries included; “above” is what training added to what was loaded.",
        "峰值内存是整个进程的，包括各种库；“净增”是训练在已加载内容之外占用的部分。",
    ),
    "table_note_cuda": (
        "Peak memory is that of the GPU, weights included; “above” is what training added to what was loaded.",
        "峰值内存是显存，包括权重；“净增”是训练在已加载内容之外占用的部分。",
    ),
    "table_note_alone": ("Mean ± standard deviation over seeds.", "各种子的均值 ± 标准差。"),
    "terminal_note": (
        "± standard deviation over seeds; ★ no other method is better with as little memory.",
        "± 为各种子的标准差；★ 内存不高于它的方法中，没有效果更好的。",
    ),
    "method": ("method", "方法"),
    "total": ("parameters", "总参数"),
    "trained": ("trained", "可训练参数"),
    "share": ("share", "占比"),
    "peak": ("peak memory", "峰值内存"),
    "above": ("above", "净增"),
    "train_speed": ("train tokens/s", "训练 词元/秒"),
    "eval_speed": ("eval rows/s", "评估 条/秒"),
    "minutes": ("minutes", "分钟"),
    "loss": ("loss", "损失"),
    "accuracy": ("accuracy", "准确率"),
    "f1": ("F1", "F1"),
    "eval_loss": ("loss", "损失"),
    "perplexity": ("perplexity", "困惑度"),
    "byte_perplexity": ("perplexity per byte", "每字节困惑度"),
    "bits_per_byte": ("bits per byte", "每字节比特数"),
    "margin": ("margin of rewards", "奖励差"),
    "kl": ("distance from the base model (KL)", "与基座模型的距离（KL）"),
    "ndcg_at_10": ("nDCG@10", "nDCG@10"),
    "recall_at_1": ("recall@1", "召回率@1"),
    "recall_at_10": ("recall@10", "召回率@10"),
    "mrr_at_10": ("MRR@10", "MRR@10"),
    "spearman": ("Spearman's rank correlation", "斯皮尔曼秩相关"),
    "precision": ("precision", "精确率"),
    "recall": ("recall", "召回率"),
    "f1_micro": ("micro F1", "微平均 F1"),
    "subset_accuracy": ("all labels right", "标签全对率"),
    "coverage": ("coverage", "覆盖率"),
    "accuracy_covered": ("accuracy where covered", "覆盖部分的准确率"),
    "kappa": ("quadratic kappa", "二次加权 kappa"),
    "mse": ("MSE", "均方误差"),
    "mae": ("MAE", "平均绝对误差"),
    "r2": ("R²", "R²"),
    "exact_match": ("exact match", "完全匹配"),
    "rouge_1": ("ROUGE-1", "ROUGE-1"),
    "rouge_2": ("ROUGE-2", "ROUGE-2"),
    "rouge_l": ("ROUGE-L", "ROUGE-L"),
    "bleu": ("BLEU", "BLEU"),
    "chrf": ("chrF", "chrF"),
    "saved": ("saved", "保存大小"),
    "rate": ("learning rate", "学习率"),
    "no_metrics": ("failed", "失败"),
    "one class": ("learned nothing: predicts only one class", "没有学到东西：只预测一个类别"),
    "majority": (
        "learned nothing: no better than always predicting the most frequent class",
        "没有学到东西：不比全部预测为样本最多的类别好",
    ),
    "not below the base": ("learned nothing: loss not below the base model's", "没有学到东西：损失不低于基座模型"),
    "not above chance": (
        "learned nothing: does not prefer the chosen answers",
        "没有学到东西：并不偏好所选的回答",
    ),
    "not above the mean": (
        "learned nothing: no nearer to the numbers than their mean",
        "没有学到东西：不比全部预测为平均值更接近",
    ),
    "no spans": ("learned nothing: no span is correct", "没有学到东西：没有一个片段正确"),
    "no number": ("learned nothing: its loss is not finite", "没有学到东西：损失不是有限值"),
    "of_runs": ("{what} ({n} of {of} runs)", "{what}（{of} 次运行中的 {n} 次）"),
    "of_seeds": ("{what} was measured for {n} of {of} seeds only", "{what} 只在 {of} 个种子中的 {n} 个上测过"),
    "failed": ("seed {seed}: {error}", "种子 {seed}：{error}"),
    "disagree": (
        "comparison.json and the records of its runs do not agree. One of them was changed after it was written:",
        "comparison.json 与各次运行的记录不一致，其中之一在写入之后被改动过：",
    ),
    "run": ("{label}, seed {seed}", "{label}，种子 {seed}"),
    "differs_by": (
        "{run}: {field} is {in_comparison} in comparison.json and {in_record} in the run's record",
        "{run}：{field}在 comparison.json 中是 {in_comparison}，在该次运行的记录中是 {in_record}",
    ),
    "differs": (
        "{run}: {field} differs between comparison.json and the run's record",
        "{run}：{field}在 comparison.json 与该次运行的记录中不同",
    ),
    "folder_missing": ("{run}: its folder {folder} is missing", "{run}：缺少它的文件夹 {folder}"),
    "field_task": ("the task", "任务"),
    "field_method": ("the method", "方法"),
    "field_seed": ("the seed", "种子"),
    "field_learning_rate": ("the learning rate", "学习率"),
    "field_data": ("the data's SHA-256", "数据的 SHA-256"),
    "field_model": ("the base model's SHA-256", "基座模型的 SHA-256"),
    "field_trained": ("trained parameters", "可训练参数"),
    "field_total": ("parameters", "总参数"),
    "field_adapter_bytes": ("saved bytes", "保存的字节数"),
    "field_peak_bytes": ("peak memory in bytes", "峰值内存字节数"),
    "field_train_s": ("seconds of training", "训练秒数"),
    "field_eval_s": ("seconds of evaluation", "评估秒数"),
    "field_tokens_trained": ("trained tokens", "训练的词元数"),
    "field_train_loss": ("training loss", "训练损失"),
    "plots": ("What it costs", "代价"),
    "against_memory": ("{metric} against peak memory", "{metric}与峰值内存"),
    "against_time": ("{metric} against training time", "{metric}与训练时间"),
    "against_trained": ("{metric} against trained parameters", "{metric}与可训练参数"),
    "curves": ("Training loss by step", "各步的训练损失"),
    "predicted": ("Predicted against measured peak memory", "预测与实测的峰值内存"),
    "predicted_axis": ("predicted, {unit}", "预测，{unit}"),
    "memory_parts": ("Predicted peak memory by part", "预测的峰值内存的构成"),
    "part_overhead": ("outside the tensors", "张量以外"),
    "part_weights": ("weights", "权重"),
    "part_trained": ("trained parameters", "可训练参数"),
    "part_gradients": ("gradients", "梯度"),
    "part_optimizer": ("optimizer", "优化器"),
    "part_activations": ("activations", "激活值"),
    "part_frozen": ("cached outputs of frozen layers", "缓存的冻结层输出"),
    "part_logits": ("logits", "logits"),
    "part_workspace": ("workspace", "临时张量"),
    "measured_axis": ("measured, {unit}", "实测，{unit}"),
    "memory_axis": ("peak memory, {unit}", "峰值内存，{unit}"),
    "minutes_axis": ("minutes of training", "训练分钟数"),
    "trained_axis": ("trained parameters", "可训练参数"),
    "step_axis": ("step", "步数"),
    "loss_axis": ("loss", "损失"),
    "front": (
        "Error bars: standard deviation over seeds. Dashed line: no other method is better at the same cost.",
        "误差线：各种子的标准差。虚线：同样代价下没有效果更好的方法。",
    ),
    "curves_note": ("Mean over seeds.", "各种子的均值。"),
    "up": ("higher is better", "越高越好"),
    "down": ("lower is better", "越低越好"),
    "prompts": ("The same questions for all methods", "相同的问题，各方法的回答"),
    "prompts_note": (
        "Answers of the base model before training, and of each method (first seed).",
        "训练前的基座模型与各方法（第一个种子）的回答。",
    ),
    "prompts_note_new": (
        "Answers of each method (first seed). The base model is left out: its head is new and not trained.",
        "各方法（第一个种子）的回答。未列出基座模型：它的分类头是新建的，未经训练。",
    ),
    "base": ("base", "基座模型"),
    "expected": ("expected", "标准答案"),
    "classes": ("By class", "各类别"),
    "classes_note": (
        "{label}, first seed, on the held-out rows.",
        "{label}（第一个种子），在验证集上。",
    ),
    "class": ("class", "类别"),
    "class_rows": ("rows", "样本数"),
    "class_predicted": ("predicted", "预测为"),
    "calibration": (
        "Probabilities are divided by the temperature {t}: expected calibration error {before} before, {after} after.",
        "概率经温度 {t} 校准：期望校准误差之前为 {before}，之后为 {after}。",
    ),
    "chosen_here": (
        "Temperature and thresholds were chosen on these rows: all metrics of this page are without them.",
        "温度和阈值就是在这些样本上选取的：本页的指标都没有使用它们。",
    ),
    "confusion": (
        "Confusion: a row for each right class, a column for each predicted one",
        "混淆矩阵：每行是正确类别，每列是预测类别",
    ),
    "mistakes": ("The most confident mistakes", "置信度最高的错误"),
    "mistakes_of_numbers": ("The largest differences", "相差最大的样本"),
    "row_text": ("text", "文本"),
    "row_predicted": ("predicted", "预测"),
    "changed": ("Where the methods disagree", "各方法判断不一的样本"),
    "changed_note": (
        "Held-out rows that some methods get right and others wrong, {shown} of {n}, first seed. Wrong "
        "answers of each method, in the {rows} rows checked:",
        "有的方法答对、有的方法答错的验证样本，共 {n} 条，列出 {shown} 条（第一个种子）。在查看的 {rows} "
        "条样本中，各方法答错的数量：",
    ),
    "rows_wrong": ("{n} wrong", "错 {n} 条"),
    "reproduce": ("To reproduce it", "如何复现"),
    "reproduce_note": ("Save this as compare.yaml, and run:", "存为 compare.yaml，然后运行："),
    "reproduce_run": ("The settings of the first run:", "第一次运行的设置："),
    "all_settings": ("All settings, defaults included", "全部设置，包括默认值"),
    "versions": ("Versions and machine", "版本与机器"),
    "seeds": ("seeds", "种子"),
    "device": ("machine", "设备"),
    "precision_used": ("precision", "精度"),
    "model_hash": ("model SHA-256", "模型 SHA-256"),
    "data_hash": ("data SHA-256", "数据 SHA-256"),
    "next": ("What to do next", "接下来"),
    "try": ("ask it yourself, and compare it with the base model", "向它提问，并与基座模型对照"),
    "use": ("classify a text", "给一段文本分类"),
    "measure": ("evaluate it again, or on other data", "重新评估，或换一份数据"),
    "merge": ("merge it into a plain model, and verify that the outputs are equal", "合并成普通模型，并验证输出一致"),
    "more_seeds": ("add seeds or methods; finished runs are kept", "增加种子或方法；已完成的运行不会重做"),
    "threads": ("threads", "线程"),
    "made": (
        "Made by siliang {version} from records only; this page loads nothing from the network.",
        "由 siliang {version} 仅根据记录生成；本页不加载任何外部内容。",
    ),
    "and": (" and ", "、"),
    "comma": (", ", "、"),
    "min": ("{n} min", "{n} 分钟"),
    "second": ("{n} s", "{n} 秒"),
}
LANGUAGES = ("en", "zh")


def words(language: str) -> dict[str, str]:
    """The texts in one language.

    Raises:
        ConfigError: The language is neither en nor zh.
    """
    if language not in LANGUAGES:
        raise ConfigError(Bilingual(f"--lang {language}: must be en or zh.", f"--lang {language}：只能是 en 或 zh。"))
    return {key: texts[LANGUAGES.index(language)] for key, texts in WORDS.items()}
