"""What each of several processes holds, on this machine.

python -m bench.ranks    resident memory of each process under ddp and fsdp, and the plan's
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.command import train

ROWS, LENGTH, VOCABULARY = 8, 64, 4096


def llama(hidden: int, layers: int) -> Any:
    """A Llama whose layers outweigh its embeddings, with weights of no meaning."""
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def write_model(folder: Path, hidden: int, layers: int) -> int:
    """Saves it with a tokenizer of one word a token; its weights' bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    model = AutoModelForCausalLM.from_config(llama(hidden, layers))
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def memory(folder: Path) -> None:
    """Trains with 1, 2 and 4 processes under both strategies, and prints what each held."""
    weights = write_model(folder / "model", 1024, 8)
    print(f"weights {weights / 1e6:,.0f} MB, LoRA on q and v, a step of {ROWS} rows of {LENGTH} tokens, fp32")
    rows = [" ".join(f"w{4 + (17 * i + j) % 4000}" for j in range(LENGTH - 2)) for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    print("strategy  processes  predicted  measured, each process (MB)")
    for strategy, ranks in (("ddp", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)):
        settings = {
            "model": str(folder / "model"),
            "task": "causal_lm",
            "method": "lora",
            "data": {"train": str(folder / "rows.jsonl"), "max_length": LENGTH},
            "train": {"batch_size": ROWS, "max_steps": 4},
            "distributed": {"strategy": strategy},
        }
        try:
            record, _ = train(settings, folder / f"{strategy}-{ranks}", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
        except RuntimeError as error:
            print(f"{strategy:<8}  {ranks:>9}  {error}")
            continue
        found = record.memory
        each = found.peak_bytes_by_rank or [found.peak_bytes]
        print(
            f"{strategy:<8}  {ranks:>9}  {(found.predicted_bytes or 0) / 1e6:9,.0f}  "
            + "  ".join(f"{nbytes / 1e6:,.0f}" for nbytes in each),
            flush=True,
        )


def main() -> None:
    """Prints it."""
    argparse.ArgumentParser("python -m bench.ranks", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        memory(Path(folder))


if __name__ == "__main__":
    main()
