"""What others have as a setting, and siliang does in another way or not at all."""

from __future__ import annotations

from siliang.other_names.row import Row, nothing, row

ROWS: tuple[Row, ...] = (
    row(
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
    row("train.patience", "early_stopping_patience early_stopping", "3", note="It needs train.eval_every."),
    row("train.loraplus_ratio", "loraplus_lr_ratio lora_plus_lr_ratio", "16"),
    row("train.label_smoothing", "label_smoothing_factor", "0.1"),
    row("train.neftune_alpha", "neftune_noise_alpha nefttune_alpha", "5"),
    row("train.layerwise_decay", "layer_decay layerwise_lr_decay llrd", "0.9"),
    nothing(
        "adam_beta1 adam_beta2 adam_epsilon adam_eps betas optim_args",
        "siliang's AdamW has betas of 0.9 and 0.999, and an eps of 1e-8; leave it out.",
    ),
    nothing(
        "flash_attn flash_attention use_flash_attention_2 attn_implementation attn_impl use_flash_attn sdp_attention "
        "xformers_attention",
        "siliang chooses the attention for the model by itself; leave it out.",
    ),
    nothing(
        "use_liger_kernel enable_liger_kernel liger_kernel use_liger use_unsloth unsloth use_cache use_reentrant "
        "torch_compile",
        "siliang chooses its fast paths by itself, with the same result; leave it out.",
    ),
    row(
        "train.trackers",
        "report_to log_with logger loggers",
        "tensorboard",
        values={"none": None, "null": None, "[]": None},
        lacks={"all": "siliang takes trackers by name: train.trackers=[tensorboard, wandb]."}
        | dict.fromkeys(
            ("comet_ml", "neptune", "clearml", "azure_ml", "codecarbon", "dagshub", "dvclive", "flyte"),
            "siliang does not have it; train.trackers takes tensorboard, wandb, swanlab, mlflow, trackio.",
        ),
    ),
    *(
        row(
            "train.trackers",
            names,
            tracker,
            values={"true": f"train.trackers={tracker}", "false": None},
            any_value=False,
        )
        for tracker, names in (
            ("tensorboard", "tensorboard use_tensorboard"),
            ("wandb", "wandb use_wandb"),
            ("swanlab", "swanlab use_swanlab"),
            ("mlflow", "mlflow use_mlflow"),
            ("trackio", "trackio use_trackio"),
        )
    ),
    row(
        "train.tracker_project",
        "wandb_project swanlab_project trackio_project mlflow_experiment_name project",
        "siliang",
        note="It needs train.trackers.",
    ),
    nothing(
        "run_name wandb_run_name wandb_name swanlab_run_name",
        "trackers name a run after its folder, which is `output`; leave it out.",
    ),
    nothing(
        "logging_dir swanlab_logdir",
        "trackers write into `trackers` in the run's folder; leave it out.",
    ),
    nothing(
        "wandb_entity wandb_mode swanlab_mode swanlab_workspace mlflow_tracking_uri trackio_space_id",
        "no setting names a server; the environment may: WANDB_MODE, SWANLAB_MODE, MLFLOW_TRACKING_URI "
        "(docs/tracking.md).",
    ),
    nothing("plot_loss", "`siliang report RUN` shows the loss; leave it out."),
    nothing(
        "overwrite_output_dir overwrite_cache overwrite_output",
        "siliang overwrites nothing: choose another folder with --output.",
    ),
    nothing(
        "resume_from_checkpoint resume auto_resume_from_checkpoints resume_only_model",
        "`siliang train --resume RUN` resumes an interrupted run; `siliang compare FOLDER/compare.yaml` a comparison.",
    ),
    nothing(
        "do_train do_eval do_predict predict_with_generate eval_on_start",
        "the commands are `siliang train`, `siliang eval` and `siliang predict`; leave it out.",
    ),
    nothing(
        "per_device_eval_batch_size eval_batch_size",
        "evaluations take batches of train.batch_size, and no metric depends on it; leave it out.",
    ),
    nothing(
        "dataset_dir",
        "data.train names files and folders themselves.",
    ),
    nothing(
        "special_tokens",
        "siliang takes the special tokens of the model's tokenizer; leave it out.",
    ),
    nothing(
        "data_seed",
        "train.seed sets the order of the rows, and data.seed which of them are held out.",
    ),
    nothing(
        "generation_max_length val_max_target_length max_new_tokens",
        "it is not a setting of a training: evaluations write up to data.max_target_length, `siliang generate` has "
        "--max-new-tokens.",
    ),
    nothing(
        "validation_steps val_steps eval_max_steps",
        "siliang measures on all held-out rows; train.eval_every is the number of steps between two evaluations.",
    ),
    nothing(
        "greater_is_better",
        "siliang knows which way each metric is better; leave it out.",
    ),
    nothing(
        "eval_strategy evaluation_strategy evals_per_epoch",
        "train.eval_every is a number of steps; without it the run is measured at its end.",
    ),
    nothing(
        "save_strategy saves_per_epoch save_only_model save_safetensors",
        "train.save_every is a number of steps; without it a checkpoint is made only where the run is interrupted.",
    ),
    nothing(
        "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss train_on_responses_only "
        "loss_scale mask_prompt",
        "siliang learns answers and never prompts (data.train_on says which answers); leave it out.",
    ),
    nothing(
        "num_labels num_classes",
        "siliang finds the classes in the training rows; data.labels names them in an order of your own.",
    ),
    nothing(
        "trust_remote_code remote_code",
        "no file can allow a model's own code: leave it out, read the code, and allow it yourself with --allow-code "
        "and its SHA-256, which the error for such a model gives.",
    ),
    nothing(
        "device_map device devices num_gpus n_gpu gpus no_cuda use_cpu ddp_backend ddp_timeout "
        "ddp_find_unused_parameters local_rank nproc_per_node",
        "siliang takes the device that is there; several with `siliang train --devices N`.",
    ),
    nothing(
        "dataloader_num_workers dataloader_pin_memory num_workers remove_unused_columns lazy_tokenize streaming",
        "siliang needs no such setting: rows are tokenized once, and kept; leave it out.",
    ),
    nothing(
        "max_samples max_train_samples max_eval_samples n_samples",
        "siliang uses all rows of a file; train.max_steps makes a short trial run.",
    ),
    nothing(
        "push_to_hub hub_model_id hub_strategy hub_token",
        "siliang uploads no adapter: upload the run's adapter folder yourself.",
    ),
    nothing("merge_lora merge_and_unload export_dir", "`siliang merge RUN --output DIR` merges."),
    nothing("early_stopping_threshold", "train.patience counts evaluations that are no better at all; leave it out."),
    nothing(
        "loraplus_lr_embedding galore use_galore use_badam badam max_grad_value lisa_activated_layers",
        "siliang does not have it.",
    ),
)
