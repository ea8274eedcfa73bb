"""What others call the settings of the model, the method and the data."""

from __future__ import annotations

from siliang.language import Bilingual
from siliang.other_names.formats import dtypes
from siliang.other_names.row import Row, row

QLORA = "method=lora quantization.bits=4"

ROWS: tuple[Row, ...] = (
    # the model and the run
    row(
        "model",
        "model_name_or_path base_model pretrained_model_name_or_path model_path model_id model_name model_dir "
        "base_model_name_or_path model_id_or_path",
        "./qwen",
    ),
    row("revision", "model_revision base_model_revision revision_of_model", "main"),
    row(
        "output",
        "output_dir save_dir save_path out_dir outdir output_path run_dir",
        "runs/first",
    ),
    row(
        "task",
        "stage task_type task_name",
        "causal_lm",
        values={
            "sft": "task=causal_lm",
            "pt": "task=causal_lm",
            "pretrain": "task=causal_lm",
            "seq2seq": "task=seq_2_seq_lm",
            "dpo": "task=preference",
            "rlhf": "task=preference",
            "kto": "task=preference preference.loss=kto",
            "orpo": "task=preference preference.loss=orpo",
            "simpo": "task=preference preference.loss=simpo",
            "cpo": "task=preference preference.loss=cpo",
            "rm": "task=reward",
        },
        lacks=dict.fromkeys(
            ("ppo", "grpo"),
            Bilingual(
                "siliang does not have it: it learns from given answers.", "siliang 没有它：它从给定的答案中学习。"
            ),
        ),
    ),
    # the method
    row(
        "method",
        "finetuning_type tuner_type train_type sft_type tuning_type peft_type peft_method adapter method_name",
        "lora",
        values={"qlora": QLORA, "dora": "method=lora method.use_dora=true", "none": "method=full"},
    ),
    row("quantization.bits", "qlora", "4", values={"true": QLORA, "false": None}, any_value=False),
    row("method.use_dora", "dora use_dora peft_use_dora lora_use_dora do_dora", "true"),
    row("method.use_rslora", "rslora use_rslora peft_use_rslora lora_use_rslora rank_stabilized", "true"),
    row("method.r", "lora_rank lora_r rank lora_dim r lora_attention_dim", "16"),
    row("method.lora_alpha", "alpha lora_alpha", "32"),
    row("method.lora_dropout", "lora_dropout lora_dropout_p lora_dropout_rate dropout", "0.05"),
    row(
        "method.target_modules",
        "lora_target lora_target_modules target_modules lora_modules",
        "[q_proj, v_proj]",
        values={"all": "method.target_modules=all-linear"},
    ),
    row(
        "method.target_modules",
        "lora_target_linear target_all_linear",
        "all-linear",
        values={"true": "method.target_modules=all-linear", "false": None},
        any_value=False,
    ),
    row("method.modules_to_save", "additional_target lora_modules_to_save modules_to_save", "[embed_tokens]"),
    row("method.layers_to_transform", "peft_layers_to_transform layers_to_transform", "[0, 1]"),
    row("method.bias", "lora_bias_type bias", "none"),
    row(
        "method.init_lora_weights",
        "pissa_init use_pissa",
        "pissa",
        values={"true": "method.init_lora_weights=pissa", "false": None},
        any_value=False,
    ),
    row("method.init_lora_weights", "init_lora_weights peft_init_lora_weights init_weights", "pissa"),
    row(
        "method.num_virtual_tokens",
        "num_virtual_tokens pre_seq_len prompt_length prefix_length n_prompt_tokens prompt_tuning_num_tokens",
        "20",
        note=Bilingual(
            "It is a setting of prompt_tuning, p_tuning and prefix_tuning.",
            "这是 prompt_tuning、p_tuning 和 prefix_tuning 的配置项。",
        ),
    ),
    # a quantized base model
    row(
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
    row(
        "quantization.bits",
        "load_in_4bit use_4bit bnb_4bit",
        "4",
        values={"true": "quantization.bits=4", "false": None},
        any_value=False,
    ),
    row(
        "quantization.bits",
        "load_in_8bit use_8bit bnb_8bit",
        "8",
        values={"true": "quantization.bits=8", "false": None},
        any_value=False,
    ),
    row("quantization.type", "bnb_4bit_quant_type quantization_type quant_type", "nf4"),
    row("quantization.double", "double_quantization bnb_4bit_use_double_quant use_double_quant", "true"),
    row(
        "quantization.compute_dtype",
        "bnb_4bit_compute_dtype compute_dtype",
        "bf16",
        values=dtypes("quantization.compute_dtype"),
    ),
    # the data
    row(
        "data.train",
        "dataset datasets train_file train_dataset data_path dataset_path train_data dataset_name data_files "
        "training_data train_files",
        "reviews.csv",
    ),
    row(
        "data.eval",
        "eval_dataset val_dataset validation_file val_data eval_file test_datasets eval_data validation_data "
        "validation_dataset test_file val_file dev_file",
        "held-out.csv",
    ),
    row(
        "data.test_size",
        "val_size val_set_size split_dataset_ratio eval_ratio dataset_test_ratio test_split validation_split "
        "eval_size val_split",
        "0.1",
        note=Bilingual("It is a share of the rows, not their number.", "这是样本的比例，不是条数。"),
    ),
    row("data.seed", "split_seed", "42"),
    row(
        "data.max_length",
        "cutoff_len max_seq_length max_seq_len seq_len sequence_len seq_length max_len block_size model_max_length "
        "max_sequence_length context_length max_source_length max_input_length cutoff_length",
        "512",
    ),
    row("data.max_target_length", "max_target_len max_output_length", "64"),
    row("data.stride", "doc_stride", "128"),
    row(
        "data.template",
        "chat_template prompt_template conversation_template template_name prompt_style template_type",
        "chat",
        values={
            "tokenizer_default": "data.template=chat",
            "default": "data.template=auto",
            "llama-2": "data.template=llama2",
            "qwen": "data.template=qwen2",
            "phi": "data.template=phi3",
        },
        note=Bilingual("`chat` is the tokenizer's own template.", "`chat` 是分词器自己的模板。"),
    ),
    row("data.streaming", "stream use_streaming iterable_dataset", "true"),
    row("data.shuffle_buffer", "buffer_size shuffle_buffer_size streaming_buffer_size", "1000"),
    row("data.mix_temperature", "mixing_temperature sampling_temperature temperature_sampling", "3"),
    row(
        "data.template_arguments",
        "chat_template_kwargs template_kwargs template_args",
        '{"enable_thinking": false}',
    ),
    row("data.layout", "format dataset_format data_format conversation_format formatting", "sharegpt"),
    row(
        "data.train_on",
        "mask_history",
        "last",
        values={"true": "data.train_on=last", "false": "data.train_on=all"},
        any_value=False,
    ),
    row(
        "data.too_long",
        "truncation_strategy excess_length_strategy truncation",
        "cut",
        values={
            "delete": "data.too_long=drop",
            "drop": "data.too_long=drop",
            "right": "data.too_long=cut",
            "truncate": "data.too_long=cut",
            "split": "data.long_text=window",
            "true": "data.too_long=cut",
        },
        any_value=False,
        lacks={
            "left": Bilingual(
                "siliang does not have it: data.too_long=cut takes the end of an answer off, not its beginning.",
                "siliang 没有它：data.too_long=cut 截掉答案的末尾，而不是开头。",
            ),
            "raise": Bilingual(
                "siliang does not have it: `siliang check` reports rows that are too long.",
                "siliang 没有它：`siliang check` 会报告过长的样本。",
            ),
            "false": Bilingual(
                "siliang does not have it: a row that is too long is cut or dropped, by data.too_long.",
                "siliang 没有它：过长的样本按 data.too_long 截断或丢弃。",
            ),
        },
    ),
    row("data.columns.text", "dataset_text_field text_column text_field text_column_name sentence_column", "review"),
    row("data.columns.text_pair", "text_pair_column sentence2_column sentence2_key text_b", "second"),
    row("data.columns.label", "label_column label_field label_column_name label_key target_column", "stars"),
    row("data.columns.messages", "messages_column field_messages conversation_column conversations_column", "talk"),
    row("data.columns.instruction", "instruction_column prompt_column field_instruction query_column", "question"),
    row("data.columns.output", "output_column response_column field_output", "reply"),
    row(
        "classification.problem",
        "problem_type label_type multi_label is_multilabel",
        "several_labels",
        values={
            "single_label_classification": "classification.problem=one_label",
            "multi_label_classification": "classification.problem=several_labels",
            "regression": "classification.problem=number",
            "true": "classification.problem=several_labels",
            "false": "classification.problem=one_label",
        },
    ),
    row("classification.class_weights", "class_weight pos_weight loss_weights label_weights", "balanced"),
    row("classification.focal_gamma", "focal_loss_gamma gamma_focal", "2.0"),
    row("classification.threshold", "classification_threshold decision_threshold", "0.5"),
    row("classification.label_separator", "label_delimiter label_sep multi_label_separator", ";"),
    row("data.labels", "label_names class_names label_list classes label_names_list", "[bad, good]"),
    row(
        "data.workers",
        "preprocessing_num_workers dataset_num_proc num_proc dataset_processes dataset_map_num_proc",
        "2",
    ),
    row("data.add_tokens", "new_special_tokens additional_special_tokens add_special_tokens", "[<a>]"),
)
