"""Texts behind one system prompt, with its keys and values computed once and for each text, in turn.

python -m bench.written [--rounds 3] [--rows 64] [--batch 16] [--system 300] [--new 32]

stories260K, and W1's Llama with random weights, in fp32. A line for each way gives new tokens per second of the
process's CPU time, the median of the rounds; then in how many texts both agree, since random weights make ties.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bench.folders import SHAPES, SHARED, VOCABULARY
from siliang.engine.prompt_sharing import batches_of, beginning_once, find_prompt_sharing
from siliang.engine.prompts import padded_prompts

WAYS = {"each": False, "once": True}


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.written", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--system", type=int, default=300)
    parser.add_argument("--new", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, **SHAPES["llama"])
    stories = AutoModelForCausalLM.from_pretrained(SHARED / "weights" / "stories260K", dtype=torch.float32)
    for name, model in (("stories260K", stories), ("W1's Llama", LlamaForCausalLM(config))):
        compare(name, model.eval(), options)


def compare(name: str, model: Any, options: argparse.Namespace) -> None:
    """Prints a line for each way."""
    model.generation_config.eos_token_id = None
    vocabulary = model.config.vocab_size
    g = torch.Generator().manual_seed(1)
    system, *ends = (
        torch.randint(3, vocabulary, (n,), generator=g).tolist()
        for n in (options.system, *(10 + i % 21 for i in range(options.rows)))
    )
    prompts = {i: system + end for i, end in enumerate(ends)}
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    texts: dict[str, dict[int, list[int]]] = {}
    with torch.no_grad():
        print(f"{name}: {find_prompt_sharing(model, 0)}", flush=True)
        for _ in range(options.rounds):
            for way, share in WAYS.items():
                start = time.process_time()
                texts[way] = write(model, prompts, options, share=share)
                speeds[way].append(options.rows * options.new / (time.process_time() - start))
    medians = {way: statistics.median(of) for way, of in speeds.items()}
    same = sum(texts["each"][i] == texts["once"][i] for i in prompts)
    for way, speed in medians.items():
        print(f"{name}: beginning computed {way}: {speed:,.0f} new tokens/s", flush=True)
    print(f"{name}: {medians['once'] / medians['each']:.2f}x, {same} of {len(prompts)} texts agree", flush=True)


def write(
    model: Any, prompts: dict[int, list[int]], options: argparse.Namespace, *, share: bool
) -> dict[int, list[int]]:
    """The new tokens of each prompt."""
    found: dict[int, list[int]] = {}
    for batch in batches_of(model, prompts, options.batch, options.new, pad=0, share=share):
        inputs = padded_prompts([prompts[i] for i in batch.numbers], 0, left=True, common=batch.common)
        with beginning_once(model, batch.common):
            ids = model.generate(**inputs, max_new_tokens=options.new, do_sample=False, pad_token_id=0)
        found |= zip(batch.numbers, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
    return found


if __name__ == "__main__":
    main()
