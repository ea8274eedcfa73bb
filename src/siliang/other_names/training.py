"""What others call the settings of the training and of several devices."""

from __future__ import annotations

from siliang.language import Bilingual
from siliang.other_names.formats import dtypes
from siliang.other_names.row import Row, row

OTHER_FORMAT = Bilingual(
    "Where another number format is set to true, leave a false one out.",
    "如果已把另一种数值格式设为 true，请去掉为 false 的这一项。",
)
# What a run may be measured by (the metrics of tasks/), as train.best takes it.
MEASURED = (
    *("loss", "accuracy", "f1", "precision", "recall", "exact_match"),
    *("perplexity", "byte_perplexity", "bits_per_byte", "margin"),
    *("ndcg_at_10", "recall_at_1", "recall_at_10", "mrr_at_10", "spearman"),
    *("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf"),
)

ROWS: tuple[Row, ...] = (
    # vectors of texts, as sentence-transformers and FlagEmbedding have them
    row(
        "embedding.loss",
        "embedding_loss contrastive_loss loss_class",
        "multiple_negatives",
        values={
            **dict.fromkeys(
                ("infonce", "mnrl", "multiplenegativesrankingloss", "cachedmultiplenegativesrankingloss"),
                "embedding.loss=multiple_negatives",
            ),
            "multiplenegativessymmetricrankingloss": "embedding.loss=multiple_negatives embedding.symmetric=true",
            "cosentloss": "embedding.loss=cosent",
            **dict.fromkeys(("cosinesimilarityloss", "cosine_similarity"), "embedding.loss=cosine"),
            "tripletloss": "embedding.loss=triplet",
            "batchhardtripletloss": "embedding.loss=batch_hard_triplet",
            "batchsemihardtripletloss": "embedding.loss=batch_semi_hard_triplet",
        },
    ),
    row("embedding.pooling", "sentence_pooling_method pooling_mode pooling_type", "mean"),
    row("embedding.normalize", "normlized normalize_embeddings normalized", "true"),
    row("embedding.query_prompt", "query_instruction_for_retrieval query_instruction", "'query: '"),
    row("embedding.document_prompt", "passage_instruction_for_retrieval passage_instruction", "'passage: '"),
    row(
        "embedding.scale",
        "contrastive_temperature infonce_temperature",
        "20",
        any_value=False,
        note=Bilingual("It is 1 / temperature: 0.05 is 20.", "它是 1 / 温度：0.05 写作 20。"),
    ),
    row("embedding.negatives", "num_hard_negatives max_negatives infonce_hard_negatives", "7"),
    row(
        "embedding.negatives",
        "train_group_size",
        "7",
        any_value=False,
        note=Bilingual(
            "A group is a positive and its negatives: 8 are 7 negatives.", "一组是一个正例和它的负例：8 即 7 个负例。"
        ),
    ),
    # the training
    row("train.learning_rate", "lr learning_rate peak_lr base_lr max_lr initial_lr lr_rate learningrate", "5e-5"),
    row("train.epochs", "num_train_epochs num_epochs epoch n_epochs max_epochs train_epochs total_epochs", "3"),
    row(
        "train.max_steps",
        "max_iters num_steps total_steps train_iters num_train_steps training_steps max_train_steps",
        "100",
    ),
    row(
        "train.batch_size",
        "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size train_batch_size batchsize bsz bs "
        "per_device_batch_size mini_batch_size",
        "8",
    ),
    row(
        "train.gradient_accumulation",
        "gradient_accumulation_steps grad_accum accumulate_grad_batches grad_accumulation_steps "
        "grad_accum_steps accumulation_steps gradient_accumulation_step",
        "4",
        note=Bilingual("It counts the batches of all devices together.", "它按所有设备的批次合计。"),
    ),
    row(
        "train.warmup_fraction",
        "warmup_ratio lr_warmup_fraction warmup_proportion warmup_percentage",
        "0.1",
    ),
    Row(
        "train.warmup_fraction",
        ("warmup_steps", "num_warmup_steps", "lr_warmup_steps", "warmup"),
        "0.1",
        values={"0": "train.warmup_fraction=0"},
        any_value=False,
        note=Bilingual(
            "It is a share of all steps: 100 of 1,000 are 0.1.", "这是占总步数的比例：1,000 步中的 100 步是 0.1。"
        ),
    ),
    row(
        "train.schedule",
        "lr_scheduler_type lr_scheduler scheduler lr_schedule scheduler_type lr_decay_style",
        "cosine",
        values={
            "constant": "train.schedule=constant train.warmup_fraction=0",
            "constant_with_warmup": "train.schedule=constant",
            "wsd": "train.schedule=warmup_stable_decay",
        },
        lacks=dict.fromkeys(
            ("reduce_lr_on_plateau", "cosine_warmup_with_min_lr", "greedy", "one_cycle", "rex"),
            Bilingual(
                "siliang does not have it; `siliang config` lists those of train.schedule, each behind a warm-up.",
                "siliang 没有它；`siliang config` 列出 train.schedule 的可选值，都先预热。",
            ),
        ),
    ),
    row(
        "train.max_grad_norm", "gradient_clipping clip_grad_norm max_norm gradient_clip_val grad_clip clip_grad", "1.0"
    ),
    row("train.weight_decay", "wd adam_weight_decay weightdecay", "0.01"),
    row(
        "train.precision",
        "bf16 bfloat16 use_bf16",
        "bf16",
        values={
            "true": "train.precision=bf16",
            "auto": "train.precision=auto",
            "false": "train.precision=fp32",
            "full": "train.precision=pure-bf16",
        },
        any_value=False,
        note=OTHER_FORMAT,
    ),
    row(
        "train.precision",
        "fp16 use_fp16 half_precision float16",
        "fp16",
        values={"true": "train.precision=fp16", "auto": "train.precision=auto", "false": "train.precision=fp32"},
        any_value=False,
        note=OTHER_FORMAT,
    ),
    row(
        "train.precision",
        "fp32 float32",
        "fp32",
        values={"true": "train.precision=fp32", "false": "train.precision=auto"},
        any_value=False,
        note=OTHER_FORMAT,
    ),
    row(
        "train.precision",
        "pure_bf16",
        "pure-bf16",
        values={"true": "train.precision=pure-bf16", "false": None},
        any_value=False,
        note=OTHER_FORMAT,
    ),
    row(
        "train.precision",
        "mixed_precision torch_dtype dtype compute_type model_dtype amp",
        "bf16",
        values=dtypes("train.precision") | {"true": "train.precision=auto", "false": "train.precision=fp32"},
    ),
    row(
        "train.packing",
        "sample_packing neat_packing use_packing padding_free batch_flattening packing",
        "true",
        note=Bilingual("It leaves out the padding, and a step's rows stay the same.", "它去掉填充，每步的样本不变。"),
    ),
    row(
        "train.group_by_length",
        "length_grouping group_by_len train_sampling_strategy sortish_sampler",
        "true",
        values={"group_by_length": "train.group_by_length=true", "random": "train.group_by_length=false"},
    ),
    row(
        "train.gradient_checkpointing",
        "use_gradient_checkpointing activation_checkpointing checkpoint_activations recompute gradient_checkpoint",
        "true",
        values={"unsloth": "train.gradient_checkpointing=true"},
    ),
    row(
        "train.gradient_checkpointing",
        "disable_gradient_checkpointing",
        "true",
        values={"true": None, "false": "train.gradient_checkpointing=true"},
        any_value=False,
    ),
    row("train.log_every", "logging_steps log_steps log_interval logging_interval print_every", "10"),
    row(
        "train.eval_every",
        "eval_steps evaluation_steps eval_interval eval_step",
        "50",
        note=Bilingual("It is a number of steps.", "这是步数。"),
    ),
    row("train.save_every", "save_steps saving_steps save_interval checkpoint_steps save_step", "100"),
    row("train.keep", "save_total_limit save_limit max_checkpoints keep_last_n", "2"),
    row("train.seed", "random_seed random_state rng_seed", "42"),
    row(
        "train.best",
        "metric_for_best_model best_metric monitor",
        "loss",
        values={before + name: f"train.best={name}" for name in MEASURED for before in ("", "eval_", "val_")},
        any_value=False,
        note=Bilingual("It needs train.eval_every.", "需要设置 train.eval_every。"),
    ),
    row(
        "train.best",
        "load_best_model_at_end",
        "loss",
        values={"true": "train.best=loss", "false": None},
        any_value=False,
    ),
    row("train.max_time", "max_duration time_limit max_train_time walltime", "8h"),
    # several devices
    row(
        "distributed.deepspeed",
        "deepspeed deepspeed_config ds_config",
        "zero2.json",
        note=Bilingual("It also needs distributed.strategy=deepspeed.", "还需要设置 distributed.strategy=deepspeed。"),
    ),
    row(
        "distributed.strategy",
        "fsdp use_fsdp parallel_mode distributed_type",
        "fsdp",
        values={
            "true": "distributed.strategy=fsdp",
            "full_shard": "distributed.strategy=fsdp",
            "full_shard auto_wrap": "distributed.strategy=fsdp",
            "multi_gpu": "distributed.strategy=ddp",
            "false": "distributed.strategy=ddp",
            "no": "distributed.strategy=ddp",
        },
    ),
    row(
        "distributed.zero_stage",
        "zero_stage stage_of_zero",
        "2",
        note=Bilingual("It needs distributed.strategy=deepspeed.", "需要设置 distributed.strategy=deepspeed。"),
    ),
)
