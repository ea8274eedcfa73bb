"""What others have as a setting, and siliang does in another way or not at all."""

from __future__ import annotations

from siliang.language import Bilingual
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
            Bilingual(
                "siliang does not have it; `siliang config` lists those of train.optimizer.",
                "siliang 没有它；`siliang config` 列出 train.optimizer 的可选值。",
            ),
        ),
    ),
    row(
        "train.patience",
        "early_stopping_patience early_stopping",
        "3",
        note=Bilingual("It needs train.eval_every.", "需要设置 train.eval_every。"),
    ),
    row("train.loraplus_ratio", "loraplus_lr_ratio lora_plus_lr_ratio", "16"),
    row("train.label_smoothing", "label_smoothing_factor", "0.1"),
    row("train.neftune_alpha", "neftune_noise_alpha nefttune_alpha", "5"),
    row("train.layerwise_decay", "layer_decay layerwise_lr_decay llrd", "0.9"),
    nothing(
        "adam_beta1 adam_beta2 adam_epsilon adam_eps betas optim_args",
        Bilingual(
            "siliang's AdamW has betas of 0.9 and 0.999, and an eps of 1e-8; leave it out.",
            "siliang 的 AdamW 固定用 betas 0.9 和 0.999、eps 1e-8；请去掉。",
        ),
    ),
    nothing(
        "flash_attn flash_attention use_flash_attention_2 attn_implementation attn_impl use_flash_attn sdp_attention "
        "xformers_attention",
        Bilingual(
            "siliang chooses the attention for the model by itself; leave it out.",
            "siliang 会自动为模型选择注意力实现；请去掉。",
        ),
    ),
    nothing(
        "use_liger_kernel enable_liger_kernel liger_kernel use_liger use_unsloth unsloth use_cache use_reentrant "
        "torch_compile",
        Bilingual(
            "siliang chooses its fast paths by itself, with the same result; leave it out.",
            "siliang 会自动选择加速实现，结果不变；请去掉。",
        ),
    ),
    row(
        "train.trackers",
        "report_to log_with logger loggers",
        "tensorboard",
        values={"none": None, "null": None, "[]": None},
        lacks={
            "all": Bilingual(
                "siliang takes trackers by name: train.trackers=[tensorboard, wandb].",
                "请写出跟踪工具的名称：train.trackers=[tensorboard, wandb]。",
            )
        }
        | dict.fromkeys(
            ("comet_ml", "neptune", "clearml", "azure_ml", "codecarbon", "dagshub", "dvclive", "flyte"),
            Bilingual(
                "siliang does not have it; train.trackers takes tensorboard, wandb, swanlab, mlflow, trackio.",
                "siliang 没有它；train.trackers 可用 tensorboard、wandb、swanlab、mlflow、trackio。",
            ),
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
        note=Bilingual("It needs train.trackers.", "需要设置 train.trackers。"),
    ),
    nothing(
        "run_name wandb_run_name wandb_name swanlab_run_name",
        Bilingual(
            "trackers name a run after its folder, which is `output`; leave it out.",
            "跟踪工具以运行文件夹（`output`）命名；请去掉。",
        ),
    ),
    nothing(
        "logging_dir swanlab_logdir",
        Bilingual(
            "trackers write into `trackers` in the run's folder; leave it out.",
            "跟踪工具写入运行文件夹中的 `trackers`；请去掉。",
        ),
    ),
    nothing(
        "wandb_entity wandb_mode swanlab_mode swanlab_workspace mlflow_tracking_uri trackio_space_id",
        Bilingual(
            "no setting names a server; the environment may: WANDB_MODE, SWANLAB_MODE, MLFLOW_TRACKING_URI "
            "(docs/tracking.md).",
            "服务器不在配置中设置，可用环境变量：WANDB_MODE、SWANLAB_MODE、MLFLOW_TRACKING_URI（见 "
            "docs/tracking.md）。",
        ),
    ),
    nothing(
        "plot_loss",
        Bilingual("`siliang report RUN` shows the loss; leave it out.", "`siliang report RUN` 会显示损失；请去掉。"),
    ),
    nothing(
        "overwrite_output_dir overwrite_cache overwrite_output",
        Bilingual(
            "siliang overwrites nothing: choose another folder with --output.",
            "siliang 不覆盖任何内容：请用 --output 换一个文件夹。",
        ),
    ),
    nothing(
        "resume_from_checkpoint resume auto_resume_from_checkpoints resume_only_model",
        Bilingual(
            "`siliang train --resume RUN` resumes an interrupted run; `siliang compare FOLDER/compare.yaml` "
            "a comparison.",
            "用 `siliang train --resume RUN` 续训中断的运行，用 `siliang compare FOLDER/compare.yaml` 继续中断的比较。",
        ),
    ),
    nothing(
        "do_train do_eval do_predict predict_with_generate eval_on_start",
        Bilingual(
            "the commands are `siliang train`, `siliang eval` and `siliang predict`; leave it out.",
            "对应的命令是 `siliang train`、`siliang eval` 和 `siliang predict`；请去掉。",
        ),
    ),
    nothing(
        "per_device_eval_batch_size eval_batch_size",
        Bilingual(
            "evaluations take batches of train.batch_size, and no metric depends on it; leave it out.",
            "评估的批大小就是 train.batch_size，指标与它无关；请去掉。",
        ),
    ),
    nothing(
        "dataset_dir",
        Bilingual("data.train names files and folders themselves.", "请在 data.train 中直接写文件和文件夹。"),
    ),
    nothing(
        "special_tokens",
        Bilingual(
            "siliang takes the special tokens of the model's tokenizer; leave it out.",
            "siliang 使用模型分词器的特殊词元；请去掉。",
        ),
    ),
    nothing(
        "data_seed",
        Bilingual(
            "train.seed sets the order of the rows, and data.seed which of them are held out.",
            "train.seed 决定样本的顺序，data.seed 决定留出哪些样本。",
        ),
    ),
    nothing(
        "generation_max_length val_max_target_length max_new_tokens",
        Bilingual(
            "it is not a setting of a training: evaluations write up to data.max_target_length, `siliang generate` has "
            "--max-new-tokens.",
            "这不是训练的配置：评估时最多生成 data.max_target_length 个词元，`siliang generate` 用 --max-new-tokens。",
        ),
    ),
    nothing(
        "validation_steps val_steps eval_max_steps",
        Bilingual(
            "siliang measures on all held-out rows; train.eval_every is the number of steps between two evaluations.",
            "siliang 在全部验证集上评估；train.eval_every 是两次评估之间的步数。",
        ),
    ),
    nothing(
        "greater_is_better",
        Bilingual(
            "siliang knows which way each metric is better; leave it out.",
            "siliang 知道每个指标越大还是越小越好；请去掉。",
        ),
    ),
    nothing(
        "eval_strategy evaluation_strategy evals_per_epoch",
        Bilingual(
            "train.eval_every is a number of steps; without it the run is measured at its end.",
            "train.eval_every 是步数；不设置则只在结束时评估。",
        ),
    ),
    nothing(
        "save_strategy saves_per_epoch save_only_model save_safetensors",
        Bilingual(
            "train.save_every is a number of steps; without it a checkpoint is made only where the run is interrupted.",
            "train.save_every 是步数；不设置则只在中断时保存检查点。",
        ),
    ),
    nothing(
        "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss train_on_responses_only "
        "loss_scale mask_prompt",
        Bilingual(
            "siliang learns answers and never prompts (data.train_on says which answers); leave it out.",
            "siliang 只学习答案，从不学习提示（data.train_on 决定学习哪些答案）；请去掉。",
        ),
    ),
    nothing(
        "num_labels num_classes",
        Bilingual(
            "siliang finds the classes in the training rows; data.labels names them in an order of your own.",
            "siliang 从训练样本中得到类别；要自己规定顺序请用 data.labels。",
        ),
    ),
    nothing(
        "trust_remote_code remote_code",
        Bilingual(
            "no file can allow a model's own code: leave it out, read the code, and allow it yourself with "
            "--allow-code "
            "and its SHA-256, which the error for such a model gives.",
            "任何文件都不能授权模型自带的代码：请去掉，阅读代码之后用 --allow-code 加上它的 SHA-256（"
            "见该模型的错误提示）自行授权。",
        ),
    ),
    nothing(
        "device_map device devices num_gpus n_gpu gpus no_cuda use_cpu ddp_backend ddp_timeout "
        "ddp_find_unused_parameters local_rank nproc_per_node",
        Bilingual(
            "siliang takes the device that is there; several with `siliang train --devices N`.",
            "siliang 自动使用现有的设备；多设备用 `siliang train --devices N`。",
        ),
    ),
    nothing(
        "dataloader_num_workers dataloader_pin_memory num_workers remove_unused_columns lazy_tokenize",
        Bilingual(
            "siliang needs no such setting: rows are tokenized once, and kept; leave it out.",
            "siliang 不需要它：样本只分词一次并缓存；请去掉。",
        ),
    ),
    nothing(
        "max_samples max_train_samples max_eval_samples n_samples",
        Bilingual(
            "siliang uses all rows of a file; train.max_steps makes a short trial run.",
            "siliang 使用文件的全部样本；短时间试跑请用 train.max_steps。",
        ),
    ),
    nothing(
        "push_to_hub hub_model_id hub_strategy hub_token",
        Bilingual(
            "siliang uploads no adapter: upload the run's adapter folder yourself.",
            "siliang 不上传适配器：请自行上传运行中的 adapter 文件夹。",
        ),
    ),
    nothing(
        "merge_lora merge_and_unload export_dir",
        Bilingual("`siliang merge RUN --output DIR` merges.", "合并请用 `siliang merge RUN --output DIR`。"),
    ),
    nothing(
        "early_stopping_threshold",
        Bilingual(
            "train.patience counts evaluations that are no better at all; leave it out.",
            "train.patience 按毫无改善的评估次数计数；请去掉。",
        ),
    ),
    nothing(
        "loraplus_lr_embedding galore use_galore use_badam badam max_grad_value lisa_activated_layers",
        Bilingual("siliang does not have it.", "siliang 没有它。"),
    ),
)
