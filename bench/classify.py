"""siliang beside PEFT + transformers.Trainer: LoRA on the demo's encoder and reviews, the same steps in turn.

Each library trains in a process of its own, in alternation; printed are the medians of useful tokens per second and of
the peak resident memory above the loaded model, their ratios, and the largest difference of the losses of each step.

    python bench/classify.py [--rounds 3] [--steps 30]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

LEARNING_RATE, BATCH = 2e-3, 16


def measure(library: str, steps: int) -> dict[str, Any]:
    """Trains once; returns tokens per second, bytes above the loaded model, and the loss of each step."""
    import peft
    import torch
    from transformers import Trainer, TrainingArguments, set_seed

    import siliang
    from siliang.config import DataConfig
    from siliang.data.collate import PadCollator
    from siliang.data.load import load_examples
    from siliang.data.tokens import tokenise
    from siliang.demo import TRAIN, encoder_folder
    from siliang.memory.peak import PeakMemory
    from siliang.models.load import load_model, load_tokenizer
    from siliang.types import TaskType

    set_seed(0)
    folder = str(encoder_folder())
    tokenizer = load_tokenizer(folder)
    settings = DataConfig(train=str(TRAIN), test_size=0.0, max_length=64)
    examples = load_examples(settings, TaskType.SEQ_CLS, seed=0)
    data = tokenise(examples.train, tokenizer, settings, TaskType.SEQ_CLS, labels=examples.labels)
    model: Any = load_model(folder, TaskType.SEQ_CLS, dtype=torch.float32, labels=examples.labels)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    maker: Any = {"siliang": siliang, "peft": peft}[library]
    set_seed(1)  # torch.nn draws B before it is zeroed, siliang does not: the data order must be the same all the same
    model = maker.get_peft_model(model, maker.LoraConfig(task_type="SEQ_CLS"))
    for i, (_, p) in enumerate(
        sorted((n, p) for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n)
    ):
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(i))
    with tempfile.TemporaryDirectory() as scratch, PeakMemory(torch.device("cpu")) as memory:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            label_names=["labels"],
            seed=3,
            dataloader_pin_memory=False,
        )
        collate, tokens = PadCollator(tokenizer.pad_token_id), 0

        def counting(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            nonlocal tokens
            batch = collate(rows)
            tokens += int(batch["attention_mask"].sum())
            return batch

        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=counting)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        used = memory.update() - memory.start_bytes
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"tokens_per_s": tokens / seconds, "peak_bytes": used, "losses": losses}


def main() -> None:
    """Runs both in turn and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--one", choices=("siliang", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT" + json.dumps(measure(options.one, options.steps)))
        return
    results: dict[str, list[dict[str, Any]]] = {"siliang": [], "peft": []}
    for _ in range(options.rounds):
        for library, found in results.items():
            command = [sys.executable, "-W", "ignore", __file__, "--one", library, "--steps", str(options.steps)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append(json.loads(out.partition("RESULT")[2]))
    median = {
        library: {key: statistics.median(r[key] for r in found) for key in ("tokens_per_s", "peak_bytes")}
        for library, found in results.items()
    }
    for library, m in median.items():
        print(
            f"{library:<8} {m['tokens_per_s']:8,.0f} tokens/s   {m['peak_bytes'] / 1e6:8,.0f} MB above the loaded model"
        )
    speed = median["siliang"]["tokens_per_s"] / median["peft"]["tokens_per_s"]
    memory = median["siliang"]["peak_bytes"] / median["peft"]["peak_bytes"]
    pairs = zip(results["siliang"][0]["losses"], results["peft"][0]["losses"], strict=True)
    print(f"siliang / peft: {speed:.2f}x the speed, {memory:.2f}x the memory, over {options.rounds} rounds")
    print(f"largest relative difference of a step's loss: {max(abs(a - b) / b for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
