"""A trained LoRA adapter merged into its base model, saved as a plain model, and opened again without siliang."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siliang import PeftModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="the base model's folder")
parser.add_argument("--adapter", default="./lora/checkpoint-100", help="a checkpoint of train.py")
parser.add_argument("--output", default="./merge_model")
parser.add_argument("--question", default="考试有哪些技巧？")
parser.add_argument("--new-tokens", type=int, default=100)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
ipt = tokenizer("Human: {}\n{}".format(options.question, "").strip() + "\n\nAssistant: ", return_tensors="pt")


def answer(model: torch.nn.Module) -> tuple[torch.Tensor, str]:
    """The logits at the question, and what the model makes of it."""
    with torch.no_grad():
        logits = model(**ipt).logits
    written = model.generate(**ipt, max_new_tokens=options.new_tokens, do_sample=False)[0]  # type: ignore[operator]
    return logits, tokenizer.decode(written, skip_special_tokens=True)


model = AutoModelForCausalLM.from_pretrained(options.model)
peft_model = PeftModel.from_pretrained(model=model, model_id=options.adapter)
logits, before = answer(peft_model)

merge_model = peft_model.merge_and_unload()
merge_model.save_pretrained(options.output)
tokenizer.save_pretrained(options.output)

merged_logits, after = answer(AutoModelForCausalLM.from_pretrained(options.output).eval())
print(f"with the adapter: {before}")
print(f"merged:           {after}")
print(f"the logits differ by at most {(merged_logits - logits).abs().max().item():.2e}")
