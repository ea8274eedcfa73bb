"""The methods one after the other, each on a fresh base model: its config, its parameters, a few steps, its adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from siliang import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)

METHODS = ("soft-prompt", "text-prompt", "p-tuning", "prefix", "lora", "ia3", "qlora")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of a causal model, such as bloom-1b4-zh")
parser.add_argument("--data", required=True, help="json(l) file or save_to_disk folder: instruction, input, output")
parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
parser.add_argument("--output", default=".", help="each method's checkpoints go into a folder of its name in there")
parser.add_argument("--targets", nargs="+", help="target_modules of LoRA; default: those of the model type")
parser.add_argument("--ia3-targets", nargs="+", help="target_modules of IA3, feed-forward layers among them")
parser.add_argument("--ia3-feedforward", nargs="+", help="those of them whose input is scaled")
parser.add_argument("--names", action="store_true", help="print the model's parameter names, to choose targets from")
parser.add_argument("--prompt", default="下面是人和聊天机器人的对话。", help="the text that text-prompt starts from")
parser.add_argument("--virtual-tokens", type=int, default=10)
parser.add_argument("--encoder-hidden-size", type=int, default=1024, help="of p-tuning's LSTM")
parser.add_argument("--rows", type=int, help="use the first rows only")
parser.add_argument("--max-length", type=int, default=256)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--accumulation", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=5e-5, help="the Trainer's default, as in the tutorial")
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--save-steps", type=int, default=100)
options = parser.parse_args()

dataset = Dataset.load_from_disk(options.data) if Path(options.data).is_dir() else Dataset.from_json(options.data)
dataset = dataset.select(range(min(options.rows or len(dataset), len(dataset))))
tokenizer = AutoTokenizer.from_pretrained(options.model)


def process_func(example: dict[str, str]) -> dict[str, list[int]]:
    """Question and answer as one row of tokens, of which the answer's alone carry labels."""
    question = "\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: "
    instruction = tokenizer(question)
    response = tokenizer(example["output"] + tokenizer.eos_token)
    row = {
        "input_ids": instruction["input_ids"] + response["input_ids"],
        "attention_mask": instruction["attention_mask"] + response["attention_mask"],
        "labels": [-100] * len(instruction["input_ids"]) + response["input_ids"],
    }
    return {name: values[: options.max_length] for name, values in row.items()}


tokenized_dataset = dataset.map(process_func, remove_columns=dataset.column_names)


def config_of(method: str) -> PeftConfig:
    """The method's config."""
    if method == "soft-prompt":
        return PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=options.virtual_tokens)
    if method == "text-prompt":
        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=options.prompt,
            num_virtual_tokens=len(tokenizer(options.prompt)["input_ids"]),
            tokenizer_name_or_path=options.model,
        )
    if method == "p-tuning":
        return PromptEncoderConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=options.virtual_tokens,
            encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM,
            encoder_dropout=0.1,
            encoder_num_layers=2,
            encoder_hidden_size=options.encoder_hidden_size,
        )
    if method == "prefix":
        return PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=options.virtual_tokens, prefix_projection=True
        )
    if method == "ia3":
        return IA3Config(
            task_type=TaskType.CAUSAL_LM,
            target_modules=options.ia3_targets,
            feedforward_modules=options.ia3_feedforward,
        )
    return LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=options.targets)


for method in options.methods:
    print(f"== {method}")
    if method == "qlora":
        in_4_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=in_4_bits, device_map="auto")
        model = prepare_model_for_kbit_training(model)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    if options.names:
        print(*(name for name, _ in model.named_parameters()), sep="\n")
    model = get_peft_model(model, config_of(method))
    model.print_trainable_parameters()
    trainer = Trainer(
        args=TrainingArguments(
            output_dir=str(Path(options.output) / method),
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            logging_steps=10,
            max_steps=options.max_steps,
            save_steps=options.save_steps,
            learning_rate=options.learning_rate,
        ),
        train_dataset=tokenized_dataset,
        model=model,
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
    )
    trainer.train()
