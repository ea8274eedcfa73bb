"""What LLaMA-Factory, ms-swift, Unsloth, axolotl, transformers' Trainer, TRL and PEFT call siliang's settings.

One table. The error for such a name in run.yaml, after --set or as an option says the setting, and the value where it
is written otherwise. Nothing is accepted under a second name: run.yaml has one spelling. docs/names.md is made from
here, by `python -m siliang.other_names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One of siliang's settings, or what siliang does in place of a setting.

    Attributes:
        setting: Its dotted name; empty where there is none.
        names: What others call it.
        example: A value that is good for it, as for --set.
        values: What is written otherwise here: the others' value, and the assignments that say it. A value of None
            means: nothing has to be set. With `values`, others than these are no values of the setting, unless
            `any_value`.
        any_value: Values that are not in `values` are good as they stand.
        note: What else is to be known, a sentence.
        lacks: Others' values that siliang has nothing for, and what is said of each.
    """

    setting: str
    names: tuple[str, ...]
    example: str = ""
    values: Mapping[str, str | None] = field(default_factory=dict)
    any_value: bool = True
    note: str = ""
    lacks: Mapping[str, str] = field(default_factory=dict)


def _row(setting: str, names: str, example: str = "", **more: Any) -> Row:
    return Row(setting, tuple(names.split()), example, **more)


def _nothing(names: str, note: str) -> Row:
    return Row("", tuple(names.split()), note=note)


DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16", "float": "fp32", "no": "fp32",
    "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32",
}  # fmt: skip


def _dtypes(setting: str) -> dict[str, str | None]:
    return {theirs: f"{setting}={ours}" for theirs, ours in DTYPES.items()}


OTHER_FORMAT = "Where another number format is set to true, leave a false one out."
# What a run may be measured by (the figures of tasks/), as train.best takes it.
MEASURED = ("loss", "accuracy", "f1", "precision", "recall", "exact_match", "perplexity")
QLORA = "method=lora quantization.bits=4"

TABLE: tuple[Row, ...] = (
    # the model and the run
    _row(
        "model",
        "model_name_or_path base_model pretrained_model_name_or_path model_path model_id model_name model_dir "
        "base_model_name_or_path model_id_or_path",
        "./qwen",
    ),
    _row("revision", "model_revision base_model_revision revision_of_model", "main"),
    _row(
        "output",
        "output_dir save_dir save_path out_dir outdir output_path run_dir",
        "runs/first",
    ),
    _row(
        "task",
        "stage task_type task_name",
        "causal_lm",
        values={
            "sft": "task=causal_lm",
            "pt": "task=causal_lm",
            "pretrain": "task=causal_lm",
            "seq2seq": "task=seq_2_seq_lm",
        },
        lacks=dict.fromkeys(
            ("rm", "ppo", "dpo", "kto", "orpo", "grpo", "rlhf"), "siliang does not have it: it learns from answers."
        ),
    ),
    # the method
    _row(
        "method",
        "finetuning_type tuner_type train_type sft_type tuning_type peft_type peft_method adapter method_name",
        "lora",
        values={"qlora": QLORA, "dora": "method=lora method.use_dora=true", "none": "method=full"},
    ),
    _row("quantization.bits", "qlora", "4", values={"true": QLORA, "false": None}, any_value=False),
    _row("method.use_dora", "dora use_dora peft_use_dora lora_use_dora do_dora", "true"),
    _row("method.use_rslora", "rslora use_rslora peft_use_rslora lora_use_rslora rank_stabilized", "true"),
    _row("method.r", "lora_rank lora_r rank lora_dim r lora_attention_dim", "16"),
    _row("method.lora_alpha", "alpha lora_alpha", "32"),
    _row("method.lora_dropout", "lora_dropout lora_dropout_p lora_dropout_rate dropout", "0.05"),
    _row(
        "method.target_modules",
        "lora_target lora_target_modules target_modules lora_modules",
        "[q_proj, v_proj]",
        values={"all": "method.target_modules=all-linear"},
    ),
    _row(
        "method.target_modules",
        "lora_target_linear target_all_linear",
        "all-linear",
        values={"true": "method.target_modules=all-linear", "false": None},
        any_value=False,
    ),
    _row("method.modules_to_save", "additional_target lora_modules_to_save modules_to_save", "[embed_tokens]"),
    _row("method.layers_to_transform", "peft_layers_to_transform layers_to_transform", "[0, 1]"),
    _row("method.bias", "lora_bias_type bias", "none"),
    _row(
        "method.init_lora_weights",
        "pissa_init use_pissa",
        "pissa",
        values={"true": "method.init_lora_weights=pissa", "false": None},
        any_value=False,
    ),
    _row("method.init_lora_weights", "init_lora_weights peft_init_lora_weights init_weights", "pissa"),
    _row(
        "method.num_virtual_tokens",
        "num_virtual_tokens pre_seq_len prompt_length prefix_length n_prompt_tokens prompt_tuning_num_tokens",
        "20",
        note="It is a setting of prompt_tuning, p_tuning and prefix_tuning.",
    ),
    # a quantized base model
    _row(
        "quantization.bits",
        "quantization_bit quant_bits quantize_bits bits quantization quantize n_bit",
        "4",
        values={
            "nf4": "quantization.bits=4",
            "fp4": "quantization.bits=4 quantization.type=fp4",
            "4bit": "quantization.bits=4",
            "8bit": "quantization.bits=8",
            "int4": "quantization.bits=4",
            "int8": "quantization.bits=8",
            "false": None,
            "none": None,
        },
    ),
    _row(
        "quantization.bits",
        "load_in_4bit use_4bit bnb_4bit",
        "4",
        values={"true": "quantization.bits=4", "false": None},
        any_value=False,
    ),
    _row(
        "quantization.bits",
        "load_in_8bit use_8bit bnb_8bit",
        "8",
        values={"true": "quantization.bits=8", "false": None},
        any_value=False,
    ),
    _row("quantization.type", "bnb_4bit_quant_type quantization_type quant_type", "nf4"),
    _row("quantization.double", "double_quantization bnb_4bit_use_double_quant use_double_quant", "true"),
    _row(
        "quantization.compute_dtype",
        "bnb_4bit_compute_dtype compute_dtype",
        "bf16",
        values=_dtypes("quantization.compute_dtype"),
    ),
    # the data
    _row(
        "data.train",
        "dataset datasets train_file train_dataset data_path dataset_path train_data dataset_name data_files "
        "training_data train_files",
        "reviews.csv",
    ),
    _row(
        "data.eval",
        "eval_dataset val_dataset validation_file val_data eval_file test_datasets eval_data validation_data "
        "validation_dataset test_file val_file dev_file",
        "held-out.csv",
    ),
    _row(
        "data.test_size",
        "val_size val_set_size split_dataset_ratio eval_ratio dataset_test_ratio test_split validation_split "
        "eval_size val_split",
        "0.1",
        note="It is a share of the rows, not their number.",
    ),
    _row("data.seed", "split_seed", "42"),
    _row(
        "data.max_length",
        "cutoff_len max_seq_length max_seq_len seq_len sequence_len seq_length max_len block_size model_max_length "
        "max_sequence_length context_length max_source_length max_input_length cutoff_length",
        "512",
    ),
    _row("data.max_target_length", "max_target_len max_output_length", "64"),
    _row("data.stride", "doc_stride", "128"),
    _row(
        "data.template",
        "chat_template prompt_template conversation_template template_name prompt_style template_type",
        "chat",
        values={
            "tokenizer_default": "data.template=chat",
            "llama-2": "data.template=llama2",
        },
        note="`chat` is the tokenizer's own template.",
    ),
    _row("data.format", "dataset_format data_format conversation_format formatting", "sharegpt"),
    _row(
        "data.train_on",
        "mask_history",
        "last",
        values={"true": "data.train_on=last", "false": "data.train_on=all"},
        any_value=False,
    ),
    _row(
        "data.too_long",
        "truncation_strategy excess_length_strategy truncation",
        "cut",
        values={
            "delete": "data.too_long=drop",
            "drop": "data.too_long=drop",
            "right": "data.too_long=cut",
            "truncate": "data.too_long=cut",
            "true": "data.too_long=cut",
        },
        any_value=False,
        lacks={
            "left": "siliang does not have it: data.too_long=cut takes the end of an answer off, not its beginning.",
            "split": "siliang does not have it: a row is cut or dropped, by data.too_long.",
            "raise": "siliang does not have it: `siliang check` tells of rows that are too long.",
            "false": "siliang does not have it: a row that is too long is cut or dropped, by data.too_long.",
        },
    ),
    _row("data.columns.text", "dataset_text_field text_column text_field text_column_name sentence_column", "review"),
    _row("data.columns.text_pair", "text_pair_column sentence2_column sentence2_key text_b", "second"),
    _row("data.columns.label", "label_column label_field label_column_name label_key target_column", "stars"),
    _row("data.columns.messages", "messages_column field_messages conversation_column conversations_column", "talk"),
    _row("data.columns.instruction", "instruction_column prompt_column field_instruction query_column", "question"),
    _row("data.columns.output", "output_column response_column field_output", "reply"),
    _row("data.labels", "label_names class_names label_list classes label_names_list", "[bad, good]"),
    _row(
        "data.workers",
        "preprocessing_num_workers dataset_num_proc num_proc dataset_processes dataset_map_num_proc",
        "2",
    ),
    _row("data.add_tokens", "new_special_tokens additional_special_tokens add_special_tokens", "[<a>]"),
    # the training
    _row("train.learning_rate", "lr learning_rate peak_lr base_lr max_lr initial_lr lr_rate learningrate", "5e-5"),
    _row("train.epochs", "num_train_epochs num_epochs epoch n_epochs max_epochs train_epochs total_epochs", "3"),
    _row(
        "train.max_steps",
        "max_iters num_steps total_steps train_iters num_train_steps training_steps max_train_steps",
        "100",
    ),
    _row(
        "train.batch_size",
        "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size train_batch_size batchsize bsz bs "
        "per_device_batch_size mini_batch_size",
        "8",
    ),
    _row(
        "train.gradient_accumulation",
        "gradient_accumulation_steps grad_accum accumulate_grad_batches grad_accumulation_steps "
        "grad_accum_steps accumulation_steps gradient_accumulation_step",
        "4",
        note="It counts the batches of all devices together.",
    ),
    _row(
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
        note="It is a share of all steps: 100 of 1,000 are 0.1.",
    ),
    _row(
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
            "siliang does not have it; `siliang config` lists those of train.schedule, each behind a warm-up.",
        ),
    ),
    _row(
        "train.max_grad_norm", "gradient_clipping clip_grad_norm max_norm gradient_clip_val grad_clip clip_grad", "1.0"
    ),
    _row("train.weight_decay", "wd adam_weight_decay weightdecay", "0.01"),
    _row(
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
    _row(
        "train.precision",
        "fp16 use_fp16 half_precision float16",
        "fp16",
        values={"true": "train.precision=fp16", "auto": "train.precision=auto", "false": "train.precision=fp32"},
        any_value=False,
        note=OTHER_FORMAT,
    ),
    _row(
        "train.precision",
        "fp32 float32",
        "fp32",
        values={"true": "train.precision=fp32", "false": "train.precision=auto"},
        any_value=False,
        note=OTHER_FORMAT,
    ),
    _row(
        "train.precision",
        "pure_bf16",
        "pure-bf16",
        values={"true": "train.precision=pure-bf16", "false": None},
        any_value=False,
        note=OTHER_FORMAT,
    ),
    _row(
        "train.precision",
        "mixed_precision torch_dtype dtype compute_type model_dtype amp",
        "bf16",
        values=_dtypes("train.precision") | {"true": "train.precision=auto", "false": "train.precision=fp32"},
    ),
    _row(
        "train.packing",
        "sample_packing neat_packing use_packing padding_free batch_flattening packing",
        "true",
        note="It leaves out the padding, and a step's rows stay the same.",
    ),
    _row(
        "train.group_by_length",
        "length_grouping group_by_len train_sampling_strategy sortish_sampler",
        "true",
        values={"group_by_length": "train.group_by_length=true", "random": "train.group_by_length=false"},
    ),
    _row(
        "train.gradient_checkpointing",
        "use_gradient_checkpointing activation_checkpointing checkpoint_activations recompute gradient_checkpoint",
        "true",
        values={"unsloth": "train.gradient_checkpointing=true"},
    ),
    _row(
        "train.gradient_checkpointing",
        "disable_gradient_checkpointing",
        "true",
        values={"true": None, "false": "train.gradient_checkpointing=true"},
        any_value=False,
    ),
    _row("train.log_every", "logging_steps log_steps log_interval logging_interval print_every", "10"),
    _row(
        "train.eval_every",
        "eval_steps evaluation_steps eval_interval eval_step",
        "50",
        note="It is a number of steps.",
    ),
    _row("train.save_every", "save_steps saving_steps save_interval checkpoint_steps save_step", "100"),
    _row("train.keep", "save_total_limit save_limit max_checkpoints keep_last_n", "2"),
    _row("train.seed", "random_seed random_state rng_seed", "42"),
    _row(
        "train.best",
        "metric_for_best_model best_metric monitor",
        "loss",
        values={before + name: f"train.best={name}" for name in MEASURED for before in ("", "eval_", "val_")},
        any_value=False,
    ),
    _row(
        "train.best",
        "load_best_model_at_end",
        "loss",
        values={"true": "train.best=loss", "false": None},
        any_value=False,
    ),
    _row("train.max_time", "max_duration time_limit max_train_time walltime", "8h"),
    # several devices
    _row(
        "distributed.deepspeed",
        "deepspeed deepspeed_config ds_config",
        "zero2.json",
        note="It needs distributed.strategy=deepspeed beside it.",
    ),
    _row(
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
    _row("distributed.zero_stage", "zero_stage stage_of_zero", "2", note="It needs distributed.strategy=deepspeed."),
    # what is no setting here
    _row(
        "train.optimizer",
        "optim optimizer_name optim_type optimizer_type",
        "adamw",
        values={
            **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adam"), "train.optimizer=adamw"),
            "adamw_bnb_8bit": "train.optimizer=adamw_8bit",
            **dict.fromkeys(("lion_32bit", "lion_pytorch"), "train.optimizer=lion"),
        },
        lacks=dict.fromkeys(
            ("sgd", "galore_adamw", "apollo_adamw", "lion_8bit", "paged_lion_8bit", "schedule_free_adamw", "ademamix"),
            "siliang does not have it; `siliang config` lists those of train.optimizer.",
        ),
    ),
    _row("train.patience", "early_stopping_patience early_stopping", "3", note="It needs train.eval_every."),
    _row("train.loraplus_ratio", "loraplus_lr_ratio lora_plus_lr_ratio", "16"),
    _row("train.layerwise_decay", "layer_decay layerwise_lr_decay llrd", "0.9"),
    _nothing(
        "adam_beta1 adam_beta2 adam_epsilon adam_eps betas optim_args",
        "siliang's AdamW has betas of 0.9 and 0.999, and an eps of 1e-8; leave it out.",
    ),
    _nothing(
        "flash_attn flash_attention use_flash_attention_2 attn_implementation attn_impl use_flash_attn sdp_attention "
        "xformers_attention",
        "siliang chooses the attention for the model by itself; leave it out.",
    ),
    _nothing(
        "use_liger_kernel enable_liger_kernel liger_kernel use_liger use_unsloth unsloth use_cache use_reentrant "
        "torch_compile",
        "siliang chooses its fast paths by itself, with the same result; leave it out.",
    ),
    _nothing(
        "report_to wandb_project wandb_run_name run_name swanlab_project use_swanlab plot_loss tensorboard logging_dir",
        "run.json in the run's folder holds every figure, and `siliang report RUN` shows them; leave it out.",
    ),
    _nothing(
        "overwrite_output_dir overwrite_cache overwrite_output",
        "siliang overwrites nothing: choose another folder with --output.",
    ),
    _nothing(
        "resume_from_checkpoint resume auto_resume_from_checkpoints resume_only_model",
        "`siliang train --resume RUN` resumes an interrupted run; `siliang compare FOLDER/compare.yaml` a comparison.",
    ),
    _nothing(
        "do_train do_eval do_predict predict_with_generate eval_on_start",
        "the commands are `siliang train`, `siliang eval` and `siliang predict`; leave it out.",
    ),
    _nothing(
        "per_device_eval_batch_size eval_batch_size",
        "evaluations take batches of train.batch_size, and no figure depends on it; leave it out.",
    ),
    _nothing(
        "dataset_dir",
        "data.train names files and folders themselves.",
    ),
    _nothing(
        "special_tokens",
        "siliang takes the special tokens of the model's tokenizer; leave it out.",
    ),
    _nothing(
        "data_seed",
        "train.seed sets the order of the rows, and data.seed which of them are held out.",
    ),
    _nothing(
        "generation_max_length val_max_target_length max_new_tokens",
        "it is no setting of a training: evaluations write up to data.max_target_length, `siliang generate` has "
        "--max-new-tokens.",
    ),
    _nothing(
        "validation_steps val_steps eval_max_steps",
        "siliang measures on all held-out rows; train.eval_every is the number of steps between two evaluations.",
    ),
    _nothing(
        "greater_is_better",
        "siliang knows which way each metric is better; leave it out.",
    ),
    _nothing(
        "eval_strategy evaluation_strategy evals_per_epoch",
        "train.eval_every is a number of steps; without it the run is measured at its end.",
    ),
    _nothing(
        "save_strategy saves_per_epoch save_only_model save_safetensors",
        "train.save_every is a number of steps; without it a checkpoint is made only where the run is interrupted.",
    ),
    _nothing(
        "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss train_on_responses_only "
        "loss_scale mask_prompt",
        "siliang learns answers and never prompts (data.train_on says which answers); leave it out.",
    ),
    _nothing(
        "num_labels num_classes",
        "siliang finds the classes in the training rows; data.labels names them in an order of your own.",
    ),
    _nothing(
        "trust_remote_code remote_code",
        "no file can allow a model's own code: leave it out, read the code, and allow it yourself with --allow-code "
        "and its SHA-256, which the error for such a model gives.",
    ),
    _nothing(
        "device_map device devices num_gpus n_gpu gpus no_cuda use_cpu ddp_backend ddp_timeout "
        "ddp_find_unused_parameters local_rank nproc_per_node",
        "siliang takes the device that is there; several with `siliang train --devices N`.",
    ),
    _nothing(
        "dataloader_num_workers dataloader_pin_memory num_workers remove_unused_columns lazy_tokenize streaming",
        "siliang needs no such setting: rows are tokenised once, and kept; leave it out.",
    ),
    _nothing(
        "max_samples max_train_samples max_eval_samples n_samples",
        "siliang uses all rows of a file; train.max_steps makes a short trial run.",
    ),
    _nothing(
        "push_to_hub hub_model_id hub_strategy hub_token",
        "siliang sends nothing anywhere: upload the run's adapter folder yourself.",
    ),
    _nothing("merge_lora merge_and_unload export_dir", "`siliang merge RUN --output DIR` merges."),
    _nothing("early_stopping_threshold", "train.patience counts evaluations that are no better at all; leave it out."),
    _nothing(
        "neftune_noise_alpha label_smoothing_factor label_smoothing loraplus_lr_embedding galore use_galore "
        "use_badam badam max_grad_value lisa_activated_layers nefttune_alpha",
        "siliang does not have it.",
    ),
)

NAMES: dict[str, Row] = {name: row for row in TABLE for name in row.names}

# The same for what is written as the value of `method` and of `task`.
METHOD_VALUES: dict[str, str] = {
    "qlora": QLORA,
    "dora": "method=lora method.use_dora=true",
    "qdora": "method=lora method.use_dora=true quantization.bits=4",
    "rslora": "method=lora method.use_rslora=true",
    "pissa": "method=lora method.init_lora_weights=pissa",
    "olora": "method=lora method.init_lora_weights=olora",
    "full_finetuning": "method=full",
    "finetune": "method=full",
    "full_parameter": "method=full",
    "none": "method=full",
    "linear_probe": "method=head",
    "layernorm": "method=ln_tuning",
    "ln": "method=ln_tuning",
    "ptuning": "method=p_tuning",
    "p_tuning_v2": "method=prefix_tuning",
    "ptuning_v2": "method=prefix_tuning",
    "ptv2": "method=prefix_tuning",
    "(ia)3": "method=ia3",
    "soft_prompt": "method=prompt_tuning",
}
TASK_VALUES: dict[str, str] = {
    "sft": "causal_lm", "pt": "causal_lm", "pretrain": "causal_lm", "text_generation": "causal_lm", "clm": "causal_lm",
    "generation": "causal_lm", "instruct": "causal_lm", "chat": "causal_lm", "lm": "causal_lm",
    "classification": "seq_cls", "text_classification": "seq_cls", "sequence_classification": "seq_cls",
    "cls": "seq_cls", "sentiment": "seq_cls", "sentiment_analysis": "seq_cls", "seqcls": "seq_cls",
    "token_classification": "token_cls", "ner": "token_cls", "tagging": "token_cls", "pos": "token_cls",
    "seq2seq": "seq_2_seq_lm", "seq2seq_lm": "seq_2_seq_lm", "seq_2_seq": "seq_2_seq_lm", "translation": "seq_2_seq_lm",
    "summarization": "seq_2_seq_lm", "summarisation": "seq_2_seq_lm", "text2text_generation": "seq_2_seq_lm",
    "qa": "question_ans", "question_answering": "question_ans", "squad": "question_ans",
    "extractive_qa": "question_ans",
}  # fmt: skip


def plain(name: str) -> str:
    """A name as the table has it: --Per-Device-Train-Batch-Size becomes per_device_train_batch_size."""
    return name.strip().lstrip("-").lower().replace("-", "_").replace(" ", "_")


def find(name: str) -> Row | None:
    """The table's row for a name of another tool."""
    return NAMES.get(plain(name))


def is_method(name: str) -> bool:
    """Whether a name is a method's, of ours or another tool's, as others write it after `adapter`."""
    return plain(name) in METHOD_VALUES or plain(name) == "lora"


def assignments(row: Row, value: Any) -> list[str] | None:
    """How the row's setting is written with `value`, as for --set; empty where nothing has to be set, None where the
    value has no counterpart."""
    text = written(value)
    if text.lower() in row.lacks:
        return None
    if text.lower() in row.values:
        found = row.values[text.lower()]
        return [] if found is None else re.split(r" (?=[a-z_.]+=)", found)
    if not row.any_value or not row.setting:
        return None
    return [f"{row.setting}={text}"]


def written(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple | set):
        return f"[{', '.join(written(inner) for inner in value)}]"
    return str(value)


def as_markdown() -> str:
    """docs/names.md."""
    parts = [
        "# Names from other tools",
        "",
        "Made by `make docs` from `src/siliang/other_names.py`. LLaMA-Factory, ms-swift, Unsloth, axolotl,",
        "transformers' Trainer, TRL and PEFT have other names for siliang's settings. Write one of them in `run.yaml`,",
        "after `--set`, or as an option, and the error says what it is here; nothing is accepted under a second name.",
        "",
        "| here | elsewhere | what is written otherwise |",
        "| --- | --- | --- |",
    ]
    for row in TABLE:
        if row.setting:
            other = "; ".join(
                f"{theirs}: "
                + (", ".join(f"`{a}`" for a in re.split(r" (?=[a-z_.]+=)", ours)) if ours else "leave it out")
                for theirs, ours in row.values.items()
            )
            lacking = "; ".join(f"{theirs}: {said.rstrip('.')}" for theirs, said in row.lacks.items())
            said = ". ".join(part for part in (other, lacking, row.note.rstrip(".")) if part)
            parts.append(f"| `{row.setting}` | {', '.join(row.names)} | {said} |")
    parts += ["", "These have no setting here:", "", "| elsewhere | here |", "| --- | --- |"]
    parts += [f"| {', '.join(row.names)} | {row.note} |" for row in TABLE if not row.setting]
    parts += ["", "Names of methods and tasks:", "", "| elsewhere | here |", "| --- | --- |"]
    parts += [f"| method {name} | `{ours}` |" for name, ours in METHOD_VALUES.items()]
    parts += [f"| task {name} | `task={ours}` |" for name, ours in TASK_VALUES.items()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
