"""choose(): layers of equal score are exchanged for those with a cheaper cut, and the counts behind it are right."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pandas
import pytest
import torch
from profiles import make_profile
from small_models import Mlp, Recurrent, conv_net, images, llama
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from untouched import state_of

import zest_fast
from bench import choose as bench_choose
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.planning import choose as choose_module
from zest_fast.planning.batches import stand_in_batch
from zest_fast.planning.choose import Choice
from zest_fast.planning.dry_run import faked
from zest_fast.planning.flop_formulas import flop_counter
from zest_fast.planning.plan import planned_peak
from zest_fast.planning.step_costs import costs_of_ranking, measured_costs
from zest_fast.profiling.loss import loss_of

LAYERS = {f"layer.{place}": score for place, score in enumerate([10.0, 3.0, 9.9, 9.8, 2.0, 9.7, 1.0])}


def ranking_of(scores, sigma=None, **kwargs):
    """A ranking whose 80 % intervals are those of a normal error; None: it knows no intervals."""
    ranking = zest_fast.rank(make_profile(scores, **kwargs), by="snip")
    if sigma is not None:
        half = 1.2815515655446004 * sigma
        ranking.intervals = np.stack([ranking.scores - half, ranking.scores + half], axis=1)
    return ranking


def bert(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes, **config))


def small_resnet(**config):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4}
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    model.config.image_size = config.get("image_size")
    return model


def tokens(**labels):
    ids = torch.randint(1, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": labels.get("labels", ids)}


def conv_batch():
    return images(), torch.zeros(5, dtype=torch.long)


# What is chosen


def test_score_is_the_top_of_the_ranking():
    ranking = ranking_of(LAYERS, sigma=1.0)
    choice = zest_fast.choose(ranking, 2)
    assert choice == ranking.top(2) == ("layer.0", "layer.2")
    assert isinstance(choice, tuple) and choice.given_up == choice.taken == ()
    assert choice.step == choice.step_of_top < 1 and choice.peak_bytes is None


def test_a_cheap_cut_exchanges_what_is_equal_within_the_intervals():
    choice = zest_fast.choose(ranking_of(LAYERS, sigma=1.0), 2, prefer="cheap-cut")
    assert choice == ("layer.3", "layer.5")  # not layer.6, whose score is far lower
    assert set(choice.given_up) == {"layer.0", "layer.2"} and set(choice.taken) == {"layer.3", "layer.5"}
    assert choice.step < choice.step_of_top
    assert "layer.5 (9.7 ± 1.3) for layer.2 (9.9 ± 1.3): equal within the uncertainty" in choice.explanation
    assert "backward ends at layer.3 instead of layer.0" in choice.explanation


def test_what_the_ranking_tells_apart_stays():
    assert zest_fast.choose(ranking_of(LAYERS, sigma=0.01), 2, prefer="cheap-cut") == ("layer.0", "layer.2")


def test_what_saves_too_little_for_its_score_stays():
    """However uncertain: half the lead over the average layer is more than the FLOPs of the layers below are worth."""
    scores = {"a": 4.0, "b": 2.0, "c": 0.0, "d": 0.0}
    assert zest_fast.choose(ranking_of(scores, sigma=10.0), 1, prefer="cheap-cut") == ("a",)
    assert zest_fast.choose(ranking_of(scores | {"b": 3.9}, sigma=10.0), 1, prefer="cheap-cut") == ("b",)


def test_without_intervals_only_the_same_score_is_equal():
    choice = zest_fast.choose(ranking_of(LAYERS), 2, prefer="cheap-cut")
    assert choice == ("layer.0", "layer.2") and "gives no intervals" in choice.explanation
    ties = ranking_of({"low": 1.0, "middle": 0.0, "high": 1.0})
    assert zest_fast.choose(ties, 1, prefer="cheap-cut") == ("high",)


def test_the_head_and_layers_without_a_score_are_never_taken():
    scores = {"a": 1.0, "b": 1.0, "c": float("nan"), "head": 1.0}
    ranking = ranking_of(scores, sigma=1.0, heads=("head",))
    assert zest_fast.choose(ranking, 1, prefer="cheap-cut") == ("b",)


def test_the_order_of_use_counts_not_that_of_registration():
    model = Mlp()  # runs c, a, b, head
    batch = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    ranking = ranking_of({"a": 1.0, "b": 1.0, "c": 1.0}, depths={"a": 0, "b": 1, "c": 2})
    assert zest_fast.choose(ranking, 1, model=model, batch=batch, prefer="cheap-cut") == ("b",)


# What it costs


@pytest.mark.parametrize(
    ("model", "batch"),
    [(llama(), tokens()), (bert(), tokens(labels=torch.tensor([0, 1]))), (conv_net(), conv_batch())],
    ids=["llama", "bert", "conv"],
)
def test_step_costs_are_what_torch_counts(model, batch):
    costs = measured_costs(model, batch)
    rows = [name for name, layer in costs.layers.items() if layer.flops and name not in costs.head]
    for chosen in ([rows[0]], rows[len(rows) // 2 :][:2], [rows[-1]]):
        with SelectiveBackward(model, chosen, head=costs.head or None, lean=False), flop_counter() as counter:
            loss_of(model, batch, None, None)().backward()
        too_much = costs.step(chosen) - counter.get_total_flops()
        # Layers side by side count as one above the other, so do the halves of attention's gradients; flash attention
        # computes its forward again.
        beside = max(
            (costs.layers[name].flops for name in rows if re.search("q_proj|gate_proj|query", name)), default=0
        )
        attention = sum(costs.between.values())
        assert -attention / 2 <= too_much <= 2 * beside + attention / 3


def test_the_weights_of_an_lstm_share_its_rank():
    costs = measured_costs(Recurrent(), (torch.randn(2, 5, 3), torch.zeros(2, dtype=torch.long)))
    gates = [layer for name, layer in costs.layers.items() if name.startswith("rnn.")]
    assert len({layer.rank for layer in gates}) == 1 and len(gates) == 4


def test_a_weight_shared_with_the_embedding_cuts_there():
    costs = measured_costs(llama(tie_word_embeddings=True), tokens())
    assert costs.layers["lm_head"].cut == costs.layers["model.embed_tokens"].rank < costs.layers["lm_head"].rank


def test_the_profile_alone_orders_the_costs_of_a_transformer_as_the_model_does():
    model, batch = bert(), tokens(labels=torch.tensor([0, 1]))
    ranking = zest_fast.rank(zest_fast.profile(model, batch), by="snip")
    ours = zest_fast.choose(ranking, 3)
    counted = zest_fast.choose(ranking, 3, model=model, batch=batch)
    assert ours == counted and ours.step == pytest.approx(counted.step, rel=0.1)
    assert "as many positions" in ours.explanation and "as many positions" not in counted.explanation


def test_a_dry_run_leaves_model_and_random_state_as_they_were():
    model = conv_net().eval()
    model[0].weight.requires_grad_(False)
    batch = conv_batch()
    before = state_of(model)
    measured_costs(model, batch)
    with pytest.raises(RuntimeError, match="interrupted"), faked(model, batch) as compute_loss:
        compute_loss()
        raise RuntimeError("interrupted")
    assert state_of(model) == before


class Peeking(nn.Module):
    """Its forward asks for the value of a tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_a_model_that_reads_values_is_refused_and_left_as_it_was():
    model = Peeking()
    before = state_of(model)
    with pytest.raises(ValueError, match="asks for values of tensors"):
        measured_costs(model, (torch.ones(2, 4), torch.zeros(2, dtype=torch.long)))
    assert state_of(model) == before


class Own(BertForSequenceClassification):
    """A classifier whose name says nothing."""


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (llama(), {"input_ids": (1, 512), "labels": (1, 512)}),
        (bert(), {"input_ids": (1, 512), "labels": (1,)}),
        (bert(max_position_embeddings=40), {"input_ids": (1, 40), "labels": (1,)}),
        (Own(bert().config), {"input_ids": (1, 512), "labels": (1,)}),
        (BertForTokenClassification(bert().config), {"input_ids": (1, 512), "labels": (1, 512)}),
        (small_resnet(), {"pixel_values": (32, 3, 224, 224), "labels": (32,)}),
        (small_resnet(image_size=(40, 64)), {"pixel_values": (32, 3, 40, 64), "labels": (32,)}),
        (small_resnet().to(torch.bfloat16), {"pixel_values": (32, 3, 224, 224), "labels": (32,)}),
    ],
    ids=["llama", "bert", "short", "own", "tokens", "images", "wide", "bfloat16"],
)
def test_a_stand_in_batch_is_what_the_model_takes(model, shapes):
    batch = stand_in_batch(model)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == shapes
    assert measured_costs(model, batch).forward > 0


# What fits


def test_max_memory_raises_the_cut_until_a_step_fits():
    model, batch = llama(), tokens()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    ranking = ranking_of({name: float(-place) for place, name in enumerate(names)})
    best = zest_fast.choose(ranking, 2, model=model, batch=batch, max_memory="1GB")
    assert best == ranking.top(2) and best.given_up == ()
    tight = best.peak_bytes - 4096
    choice = zest_fast.choose(ranking, 2, model=model, batch=batch, max_memory=tight)
    assert choice.peak_bytes <= tight and choice != best
    assert choice.peak_bytes == planned_peak(model, batch, choice)
    assert min(map(names.index, choice)) > 0
    with pytest.raises(
        ValueError, match=r"no 2 layers fit into 0\.001 MB; with those that need the least, a step of AdamW holds"
    ):
        zest_fast.choose(ranking, 2, model=model, batch=batch, max_memory="1KB")


def test_a_transformers_model_needs_no_batch():
    model = llama()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    choice = zest_fast.choose(ranking_of(dict.fromkeys(names, 1.0)), 1, model=model, prefer="cheap-cut")
    assert choice == (names[-1],)
    assert "counted on a batch of [1, 512]; pass batch= for yours" in choice.explanation


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prefer": "cheap"}, ValueError, "prefer='cheap' is unknown; nearest: 'cheap-cut'"),
        ({"n": 8}, ValueError, "n=8, but there are only 7 layers"),
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"max_memory": "16GB"}, ValueError, "max_memory needs model="),
        ({"batch": {}}, ValueError, "batch needs model="),
        ({"model": Mlp()}, ValueError, "what Mlp takes is not known; pass batch="),
        ({"model": llama()}, ValueError, "the ranking has the layer 'layer.0', the model has not"),
        ({"model": llama(), "max_memory": "16 apples"}, ValueError, "max_memory='16 apples' is no size"),
        ({"ranking": ("a",)}, TypeError, "ranking must be a Ranking"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    arguments = {"ranking": ranking_of(LAYERS), "n": 2, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        zest_fast.choose(arguments.pop("ranking"), arguments.pop("n"), **arguments)


# On records


class DepthRanker:
    """Later layers are better, as the records below have it; every score is uncertain by half a layer."""

    def fit(self, records):
        assert records.family.nunique() == 2  # of three: the third is held out
        return self

    def predict(self, profile):
        return np.array([profile.info[name]["depth"] for name in profile.names], dtype=float)

    def intervals(self, profile):
        return self.predict(profile)[:, None] + np.array([-0.5, 0.5])


def synthetic_records():
    rows = []
    for family in ("one", "two", "three"):
        for seed in (0, 1):
            for depth in range(6):
                leading = {"model": "tiny", "dataset": f"{family}-set", "family": family, "seed": seed}
                info = {"numel": 6, "kind": "linear", "depth": depth, "shape": [2, 3], "head": False}
                loss = {"loss": 1 - depth / 10 + seed / 100, "head_loss": 1.0, "head_state": "fresh"}
                rows.append({**leading, "layer": f"layer.{depth}", **loss, "snip": 1.0, **info})
    return pandas.DataFrame(rows)


def test_bench_choose_compares_gain_and_flops_out_of_fold(tmp_path):
    costs = costs_of_ranking(ranking_of({f"layer.{depth}": 0.0 for depth in range(6)}))
    rows = list(bench_choose.evaluate(synthetic_records(), DepthRanker, lambda model: costs, [2, 9]))
    assert {row["dataset"] for row in rows} == {"one-set", "two-set", "three-set"}
    assert {row["n"] for row in rows} == {2}  # there are no nine layers
    for row in rows:
        assert row["recovered_top"] == pytest.approx(1.0)  # the ranker is right
        assert row["flops_saved"] >= 0 and row["recovered_cheap"] <= row["recovered_top"]
    assert bench_choose.summary(rows, 2, choose_module.PRICE)["recovered_top"] == 1.0


def test_max_memory_finds_a_set_where_the_higher_layers_are_the_larger_ones():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 400), nn.Linear(400, 8), nn.Linear(8, 2))
    batch = (torch.randn(4, 8), torch.zeros(4, dtype=torch.long))
    scores = {str(place): 1 - place / 10 for place in range(7)}
    best = zest_fast.choose(ranking_of(scores), 2, model=model, batch=batch, max_memory="1GB")
    again = zest_fast.choose(ranking_of(scores), 2, model=model, batch=batch, max_memory=best.peak_bytes)
    assert again == best == ("0", "1")
    assert planned_peak(model, batch, ("4", "5")) > best.peak_bytes  # the highest cut needs more
    with pytest.raises(ValueError, match=r"no 2 layers fit into 0\.001 MB"):
        zest_fast.choose(ranking_of(scores), 2, model=model, batch=batch, max_memory=1000)


def test_no_choice_saves_more_than_is_possible():
    """Half of the rankings lose 0.1 of the gain for 0.2 of full fine-tuning, the others all of it for as much."""
    good, bad = np.array([(0.5, 1.0), (0.3, 0.9)]), np.array([(0.5, 1.0), (0.3, 0.0)])
    rows = [{"n": 5, "price": choose_module.PRICE, "sets": [sets] * 3} for sets in (good, bad)]
    assert bench_choose.possible_saving(rows, 5, 0.05) == pytest.approx(0.2, rel=0.02)  # the good half: 0.2 / 0.5 / 2
    assert bench_choose.possible_saving(rows, 5, 0.0) == pytest.approx(0.0, abs=1e-9)
    assert bench_choose.possible_saving(rows, 5, 1.0) == pytest.approx(0.4, rel=0.02)


def test_recovered_is_zero_at_random_and_one_at_best():
    gain = pandas.Series({"a": 0.0, "b": 1.0, "c": 2.0, "d": 5.0})
    assert bench_choose.recovered(("d",), gain) == 1.0
    assert bench_choose.recovered(("c",), gain) == pytest.approx(0.0)  # the mean gain


def test_a_choice_is_made_whole_and_copies_with_all_it_says() -> None:
    choice = Choice(
        ("a", "b"), explanation="two", given_up=("c",), taken=("b",), step=0.5, step_of_top=0.6, peak_bytes=7
    )
    for copied in (copy.copy(choice), copy.deepcopy(choice), pickle.loads(pickle.dumps(choice))):
        assert copied == ("a", "b") and vars(copied) == vars(choice)
    with pytest.raises(TypeError, match="unexpected keyword"):
        Choice(("a",), steps=1)
