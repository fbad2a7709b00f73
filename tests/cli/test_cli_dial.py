"""`finetune --max-memory`: the fastest way to save memory that fits, what is settled stays, and layers come last."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
import transformers
from checkpoints import TEXTS, WORDS, save_bert, save_jsonl, save_tokenizer
from command_results import document, done, refused
from typer.testing import CliRunner

from zest_fast import SelectiveBackward, pack, plan, profile
from zest_fast.cli import app
from zest_fast.cli.jobs import choosing, dial, finetuning, scores
from zest_fast.cli.jobs.training import train
from zest_fast.finetuning.delta_files import read_delta
from zest_fast.finetuning.run_state import read_run
from zest_fast.integrations.pretrained import Streamed, load_model
from zest_fast.planning import savings
from zest_fast.planning.counted_memory import held_bytes, peak_bytes
from zest_fast.planning.savings import Savings

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = ("--layers", "model.layers.1.mlp.down_proj,model.layers.2.self_attn.q_proj")
WORDS_OF = ("finetune", "llama", "texts.jsonl", "--task", "causal-lm", "--batch-size", 4, "--validation-share", 0)

USER_MODULE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def net():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))

class Looks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x) if x.sum().item() < 1e9 else x

def looks():
    return Looks()

def batches():
    return DataLoader(TensorDataset(torch.randn(16, 4), torch.arange(16) % 2), batch_size=4, shuffle=True)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Weights of a block are 1 MiB and more, so that a folder that is mapped keeps them on disk."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=512, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    save_tokenizer(folder / "llama")
    pack(folder / "llama", folder / "packed", frozen="int8")
    save_bert(folder / "bert", num_labels=2)
    save_jsonl(folder / "texts.jsonl", [f"{word} {TEXTS[0]}" for word in WORDS[:8]] * 2)
    save_jsonl(folder / "uneven.jsonl", [*TEXTS * 4, f"{TEXTS[0]} {TEXTS[1]}"])
    save_jsonl(folder / "films.jsonl", TEXTS * 4, ["pos", "neg", "pos", "neg", "pos", "pos"] * 4)
    return folder


@pytest.fixture
def home(models, tmp_path, monkeypatch):
    for entry in models.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "zest_dial_user.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(savings, "TAKING_UP", 0.0)  # so small are these steps
    monkeypatch.setattr(savings, "LEARNING", 0.0)
    monkeypatch.setattr(dial, "find_spec", lambda name: None)  # bitsandbytes: int8 stands for it
    yield tmp_path
    sys.modules.pop("zest_dial_user", None)


@pytest.fixture
def run(home):
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def fits(monkeypatch):
    """Every Fit that the command finds."""
    found = []

    def noted(*arguments, **options):
        found.append(savings.fit_memory(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(dial, "fit_memory", noted)
    return found


def options_of(way: Savings) -> tuple[str, ...]:
    """The same by hand."""
    words = ("--checkpoint", way.checkpoint) if way.checkpoint else ()
    words += ("--frozen", way.frozen) if way.frozen and not way.stream else ()
    return words + (("--stream",) if way.stream else ()) + (("--cache", "kept") if way.cache else ())


def way_of(found) -> Savings:
    return Savings(**{name: found["saving"][name] for name in ("checkpoint", "frozen", "stream", "cache")})


BERT = ("finetune", "bert", "films.jsonl", "--label-column", "label", "--validation-share", 0)


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        pytest.param((*WORDS_OF, *LAYERS, "--epochs", 3), {"stream", "cache"}, marks=pytest.mark.slow),
        ((*BERT, "--layers", "bert.encoder.layer.0.output.dense"), {"checkpoint", "frozen"}),
    ],
)
def test_each_budget_has_the_fastest_way_that_fits_and_trains_as_by_hand(run, home, fits, words, ways):
    """The budgets are the planned peaks of the ways themselves."""
    run(*words, "--max-memory", "1GB", "--dry-run")
    rows = fits[0].to_pandas()
    assert rows.cost.is_monotonic_increasing and len(rows) >= 4
    met = set()
    for limit in sorted({int(peak) for peak in rows.peak_bytes}, reverse=True):
        cheapest = rows[rows.peak_bytes <= limit].iloc[0]
        expected = Savings(
            cheapest.checkpoint if isinstance(cheapest.checkpoint, str) else None,
            cheapest.frozen if isinstance(cheapest.frozen, str) else None,
            bool(cheapest.stream),
            bool(cheapest.cache),
        )
        if expected in met:
            continue
        met.add(expected)
        found = document(run(*words, "--max-memory", limit, "--json"))
        assert way_of(found) == expected and found["saving"]["peak_bytes"] <= limit
        assert found["plan"]["peak_bytes"] == found["saving"]["peak_bytes"]
        recipe = read_delta(home / "delta.safetensors").recipe["saving"]
        assert recipe == {name: value for name, value in found["saving"].items() if name != "own_cache"}
        by_hand = document(run(*words, *options_of(expected), "--json"))
        assert found["training_loss"] == by_hand["training_loss"] and found["verified"]
        assert not (home / "delta.activations").exists()
    assert all(any(getattr(way, name) for way in met) for name in ways)


@pytest.mark.parametrize(
    ("settled", "name", "value"),
    [
        (("--frozen", "int8"), "frozen", "int8"),
        (("--checkpoint", "above-cut"), "checkpoint", "above-cut"),
        (("--stream",), "stream", True),
        (("--cache", "mine"), "cache", True),
    ],
)
def test_what_an_option_says_stays(run, home, fits, settled, name, value):
    words = (*WORDS_OF, *LAYERS, "--epochs", 3, "--dry-run", "--max-memory", "1GB", *settled)
    found = document(run(*words, "--json"))
    assert found["saving"][name] == value
    assert name != "cache" or found["saving"]["own_cache"] is None  # the folder is the user's
    rows = fits[0].to_pandas()
    assert (rows[name] == value).all() and len(rows) > 1


def test_a_dry_run_says_what_was_chosen_and_what_more_would_buy(run, home, fits):
    words = (*WORDS_OF, *LAYERS, "--dry-run")
    run(*words, "--max-memory", "1GB")
    least = int(fits[0].to_pandas().peak_bytes.min())
    result = done(run(*words, "--max-memory", least))
    text = " ".join(result.stderr.split())
    assert f"--max-memory {least}: " in text and "more would buy" in text and "weights on disk" in text
    assert "dry run: nothing was trained" in result.stdout
    assert not (home / "delta.safetensors").exists() and not (home / "delta.activations").exists()


def test_nothing_fits(run, home, fits):
    words = (*WORDS_OF, *LAYERS, "--dry-run")
    run(*words, "--max-memory", "1GB")
    least = int(fits[0].to_pandas().peak_bytes.min())
    refused(run(*words, "--max-memory", least - 1), "no way to save memory makes a step", "KiB would do")
    done(run(*words, "--max-memory", f"{-(-least // 1024)}KiB"))


def test_layers_are_exchanged_only_where_no_way_fits(run, home, fits):
    words = (*BERT, "--by", "weight_mean", "--dry-run", "--frozen", "int8")
    best = document(run(*words, "--top", 2, "--max-memory", "1GB", "--json"))
    least = int(fits[0].to_pandas().peak_bytes.min())
    kept = document(run(*words, "--top", 2, "--max-memory", least, "--json"))
    assert kept["layers"] == best["layers"] and way_of(kept) == Savings("above-cut", "int8")
    other = document(run(*words, "--top", 2, "--max-memory", least - 1, "--json"))
    assert other["layers"] != best["layers"] and "not the best 2" in other["choice"]
    assert other["saving"]["peak_bytes"] < least
    refused(run(*words, "--top", 2, "--max-memory", "60KiB"), "KiB would do", ", or --batch-size ")


def test_a_profile_beyond_the_budget_is_refused_before_it_runs(run, home, monkeypatch):
    words = (*BERT, "--top", 1, "--dry-run", "--max-memory")
    profiled = []
    monkeypatch.setattr(
        choosing, "profile", lambda *given, **options: profiled.append(given) or profile(*given, **options)
    )
    result = run(*words, "180KiB")
    refused(
        result, "--max-memory '180KiB': to rank the layers takes a profile of the whole model, which holds", "--layers"
    )
    assert not profiled
    done(run(*words, "180KiB", "--by", "weight_std", "--frozen", "int8", "--checkpoint", "above-cut"))
    done(run(*words, "1GB"))
    assert len(profiled) == 2


def test_nf4_is_taken_where_nothing_else_fits_and_trains_as_by_hand(run, home, fits, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(dial, "find_spec", find_spec)
    words = (*BERT, "--layers", "bert.encoder.layer.0.output.dense")
    run(*words, "--max-memory", "1GB", "--dry-run")
    rows = fits[0].to_pandas()
    least = rows.loc[rows.peak_bytes.idxmin()]
    assert least.frozen == "nf4" and (rows[rows.frozen != "nf4"].peak_bytes > least.peak_bytes).all()
    found = document(run(*words, "--max-memory", int(least.peak_bytes), "--json"))
    assert way_of(found).frozen == "nf4" and found["verified"]
    assert read_delta(home / "delta.safetensors").data["frozen"] == "nf4"
    by_hand = document(run(*words, *options_of(way_of(found)), "--json"))
    assert found["training_loss"] == by_hand["training_loss"]


def test_weights_on_disk_are_no_way_of_a_model_that_is_no_folder(run, home):
    words = ("finetune", "zest_dial_user:net", "zest_dial_user:batches", "--layers", "2", "--max-memory")
    found = document(run(*words, "1MB", "--json"))
    again = document(run(*words[:-1], "--json"))
    assert found["training_loss"] == again["training_loss"]  # looking at a batch does not move the loader on
    refused(run(*words, "1KB"), "weights on disk are no way here: zest_dial_user:net is no folder of safetensors")
    assert "--batch-size" not in run(*words, "1KB").stderr  # which that loader does not ask


def test_a_model_that_cannot_be_planned_is_named(run, home):
    words = ("finetune", "zest_dial_user:looks", "zest_dial_user:batches", "--layers", "net.2")
    refused(run(*words, "--max-memory", "1MB"), "--max-memory needs a plan, and none can be made here", "--checkpoint")
    done(run(*words))


def test_a_folder_with_the_name_of_an_architecture_is_planned_as_it_is(run, home):
    (home / "llama-7b").symlink_to(home / "llama")
    found = document(run("finetune", "llama-7b", *WORDS_OF[2:], *LAYERS, "--max-memory", "1GB", "--dry-run", "--json"))
    assert found["saving"]["peak_bytes"] < 2**28


def test_a_packed_folder_stays_on_disk(run, home):
    words = ("finetune", "packed", *WORDS_OF[2:], *LAYERS, "--max-memory", "1GB", "--json")
    found = document(run(*words))
    assert way_of(found) == Savings(frozen="int8", stream=True)
    assert read_delta(home / "delta.safetensors").data["frozen"] == "int8"
    by_hand = document(run("finetune", "packed", *WORDS_OF[2:], *LAYERS, "--stream", "--json"))
    assert found["training_loss"] == by_hand["training_loss"]


def test_a_cache_is_left_out_where_it_cannot_pay(run, home):
    words = ("finetune", "llama", "uneven.jsonl", *WORDS_OF[3:], *LAYERS, "--max-memory", "1GB", "--epochs", 3)
    found = document(run(*words, "--dry-run", "--json"))
    assert not found["saving"]["cache"] and "texts differ in length" in found["saving"]["explanation"]
    words = (*WORDS_OF, *LAYERS, "--max-memory", "1GB", "--dry-run", "--json")
    assert not document(run(*words, "--epochs", 1))["saving"]["cache"]
    tight = document(run(*words, "--epochs", 9, "--cache-limit", "1KB"))
    assert not tight["saving"]["cache"] and "--cache-limit is 1KB" in tight["saving"]["explanation"]


def test_accumulation_is_planned_and_its_passes_are_counted(run, home, fits):
    """16 texts are 4 batches: a step of three and one of one, and no sample comes twice."""
    words = (*WORDS_OF, *LAYERS, "--max-memory", "1GB", "--dry-run", "--json", "--accumulate")
    assert not document(run(*words, 3))["saving"]["cache"]
    assert document(run(*words, 3, "--steps", 4))["saving"]["cache"]  # twelve batches
    document(run(*words, 1))
    assert [fit.plan.setting.accumulating for fit in fits] == [True, True, False]


def test_weights_on_disk_are_no_way_where_they_have_to_be_loaded(run, home, fits):
    words = (*WORDS_OF, *LAYERS, "--dry-run", "--max-memory")
    run(*words, "1GB")
    table = fits[0].to_pandas()
    on_disk = int(table[table.stream].peak_bytes.min()) // 2  # in bfloat16
    refused(run(*words, on_disk, "--dtype", "bfloat16"), "weights on disk are no way here: --dtype")
    assert not fits[1:]  # none fitted


def test_training_and_scoring_hold_no_more_than_the_plan_says(home):
    """Of a large vocabulary, whose logits lean saving never has whole. Books: see tests/bench/test_bench.py."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=8000, use_cache=False, **sizes)
    model, layers, cpu = transformers.LlamaForCausalLM(config), ["model.layers.2.mlp.down_proj"], torch.device("cpu")
    ids = torch.randint(500, (8, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    planned = plan(model, layers, batch=batch).peak_bytes
    with SelectiveBackward(model, layers) as tuned:
        optimizer = torch.optim.AdamW(list(tuned.parameters()), foreach=False)

        def trained():
            train(model, optimizer, [batch], epochs=1, steps=1, lr=0.1, device=cpu, report=lambda *_: None, losses=[])

        trained()
        states = [value for state in optimizer.state.values() for value in state.values()]
        there = held_bytes([*model.parameters(), *model.buffers(), *states, *batch.values()])
        assert there + peak_bytes(trained) <= 1.01 * planned
        assert there + peak_bytes(lambda: scores.evaluate(model, [batch], cpu, one_by_one=True)) <= planned
        at_once, one_by_one = (scores.evaluate(model, [batch], cpu, one_by_one=way) for way in (False, True))
        assert one_by_one.predictions == at_once.predictions and one_by_one.loss == pytest.approx(at_once.loss)


def test_a_folder_that_was_there_stays_and_is_not_used(run, home, monkeypatch):
    theirs = home / "delta.activations"
    theirs.mkdir()
    (theirs / "letter.txt").write_text("mine")
    words = (*WORDS_OF, *LAYERS, "--epochs", 4, "--max-memory", "1GB")
    train = finetuning.train

    def interrupted(*arguments, **options):
        train(*arguments, **{**options, "steps": 6})
        raise RuntimeError("the lights went out")

    monkeypatch.setattr(finetuning, "train", interrupted)
    assert run(*words, "--save-every", 5).exit_code == 2
    monkeypatch.setattr(finetuning, "train", train)
    assert (home / "delta.activations.2").is_dir()
    done(run(*WORDS_OF[:3], "--resume", "delta.run.pt"))
    assert not (home / "delta.activations.2").exists()
    assert [file.name for file in theirs.iterdir()] == ["letter.txt"]


def test_a_run_goes_on_with_what_was_chosen(run, home, monkeypatch):
    words = (*WORDS_OF, *LAYERS, "--epochs", 4, "--max-memory", "1GB", "--json")
    whole = document(run(*words))
    assert way_of(whole) == Savings(cache=True)
    train = finetuning.train

    def stopped(*arguments, **options):
        report = options["report"]

        def until(step, loss, place):
            report(step, loss, place)
            if step == 6:
                raise RuntimeError("the lights went out")

        return train(*arguments, **{**options, "report": until})

    monkeypatch.setattr(finetuning, "train", stopped)
    assert run(*words, "--save-every", 5).exit_code == 2
    monkeypatch.setattr(finetuning, "train", train)
    assert (home / "delta.activations").is_dir()  # which the run goes on with
    assert read_run(home / "delta.run.pt").progress["saving"]["cache"] is True
    refused(run(*WORDS_OF[:3], "--resume", "delta.run.pt", "--max-memory", "1GB"), "--max-memory is about choosing")
    again = document(run(*WORDS_OF[:3], "--resume", "delta.run.pt", "--json"))
    assert again["training_loss"] == whole["training_loss"]
    assert again["saving"] == whole["saving"] and again["cache"] is not None
    assert not (home / "delta.activations").exists()


def test_a_hub_id_that_is_downloaded_can_stay_on_disk(run, home, models, monkeypatch):
    snapshot = home / "hub" / "models--owner--llama" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(models / "llama")
    (home / "hub" / "models--owner--llama" / "refs").mkdir()
    (home / "hub" / "models--owner--llama" / "refs" / "main").write_text("abc")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    assert dial.downloaded_folder("owner/llama") == snapshot
    assert dial.downloaded_folder("owner/none") is None
    loaded = load_model("owner/llama", task="causal-lm", streamed=Streamed(("model.layers.2.mlp.down_proj",)))
    assert "frozen weights stay on disk" in loaded.notes[-1]
    with pytest.raises(ValueError, match=r"download the hub's first"):
        load_model("owner/none", task="causal-lm", streamed=Streamed(()))
