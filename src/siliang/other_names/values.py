"""What others write as the value of `method` and of `task`."""

from __future__ import annotations

from siliang.other_names.model import QLORA

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
    "dpo": "preference", "orpo": "preference", "simpo": "preference", "cpo": "preference", "ipo": "preference",
    "rlhf": "preference", "preferences": "preference", "rm": "reward", "reward_model": "reward",
    "reward_modeling": "reward",
    "embeddings": "embedding", "sentence_embedding": "embedding", "feature_extraction": "embedding",
    "retrieval": "embedding", "sts": "embedding", "biencoder": "embedding", "bi_encoder": "embedding",
    "rerank": "reranker", "reranking": "reranker", "crossencoder": "reranker", "cross_encoder": "reranker",
    "generative_reranker": "reranker",
}  # fmt: skip
