"""What goes to the hub, and what does not: a fake of its API keeps what it was given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import save_llama
from huggingface_hub import ModelCard

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.integrations.merging import merge_folder
from zest_fast.integrations.sharing.hub import push
from zest_fast.integrations.sharing.lora import delta_to_lora
from zest_fast.integrations.sharing.model_cards import model_card

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "model.layers.1.mlp.up_proj"


class FakeApi:
    """Repositories as they would be: name -> (private, files by name)."""

    def __init__(self):
        self.made, self.commits, self.files = [], [], {}

    def create_repo(self, repo_id, *, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        there = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        self.commits.append((repo_id, commit_message))
        self.files = {file.relative_to(folder_path).as_posix(): file.read_bytes() for file in there}


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "llama")


@pytest.fixture
def delta(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with SelectiveBackward(model, [LAYER]) as tuned:
        with torch.no_grad():
            next(tuned.parameters()).add_(torch.randn(32, 16))
        return tuned.save(
            tmp_path / "d.safetensors",
            ranking={"by": "Ranker", "names": [LAYER], "scores": [1.0], "note": "85 % of it is the layer prior"},
            recipe={"optimizer": "AdamW", "lr": 2e-5, "model": "owner/base", "steps": 7, "masters": None},
            class_names=["<b>", "a|b"],
        )


def test_a_delta_goes_alone_with_its_card(delta):
    api = FakeApi()
    page = push(delta, "me/tuned", scores={"accuracy": 0.875}, license="apache-2.0", api=api)
    assert page == "https://huggingface.co/me/tuned" and api.made == [("me/tuned", None, True)]
    assert api.files.keys() == {"d.safetensors", "README.md"} and api.files["d.safetensors"] == delta.read_bytes()
    assert len(api.commits) == 1
    card = ModelCard(api.files["README.md"].decode())
    assert card.data.base_model == "owner/base" and card.data.license == "apache-2.0"
    assert card.data.library_name == "zest_fast" and "sparse-fine-tuning" in card.data.tags
    for said in (
        "1 layer of `owner/base` trained",
        f"| `{LAYER}` | `weight` | 32 x 16 | float32 |",
        "512 parameters in 1 tensor",
        "By a ranking: Ranker. It said of itself: 85 % of it is the layer prior",
        "| lr | 2e-05 |",
        "| steps | 7 |",
        "| accuracy | 0.875 |",
        'zest_fast.apply_delta(base, "d.safetensors")',
    ):
        assert said in card.text, said
    assert "masters" not in card.text and "`<b>`, `a/b`" in card.text


def test_a_card_says_no_more_than_is_known(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with SelectiveBackward(model, [LAYER]) as tuned:
        record = {"plan": None, "before": None, "curve": {"steps": [1], "losses": [0.123]}}
        recipe = {"note": "# a title | <script>", "model": str(llama), "record": record}
        delta = tuned.save(tmp_path / "d.safetensors", recipe=recipe)
    card = model_card(delta)
    assert "record" not in card and "0.123" not in card
    parsed = ModelCard(card)
    assert parsed.data.base_model is None and parsed.data.license is None
    assert "of `llama` trained" in card and str(tmp_path) not in card
    assert "named, or saved without a ranking" in card and "## Scores" not in card
    assert r"\# a title \| \<script\>" in card
    for hidden in ("./here/llama", "~/llama", "module:function", "C:\\models\\llama", "a/b/c"):
        assert ModelCard(model_card(delta, base=hidden)).data.base_model is None
    with pytest.raises(ValueError, match="no delta that can be read"):
        model_card(llama / "model.safetensors")


def test_whole_weights_go_only_when_that_is_asked_for(llama, delta, tmp_path):
    (llama / "README.md").write_text("of the base")
    merge_folder(str(llama), delta, tmp_path / "merged")
    api = FakeApi()
    with pytest.raises(ValueError, match=r"holds whole weights \(model\.safetensors\).*with_base=True"):
        push(tmp_path / "merged", "me/merged", delta=delta, api=api)
    with pytest.raises(ValueError, match=r"no README\.md that says what was trained.*pass delta="):
        push(tmp_path / "merged", "me/merged", with_base=True, api=api)
    assert not api.made and not api.commits
    (tmp_path / "merged" / ".cache").mkdir()
    (tmp_path / "merged" / ".cache" / "token").write_text("a secret")
    push(tmp_path / "merged", "me/merged", delta=delta, with_base=True, private=True, api=api)
    assert api.made == [("me/merged", True, True)]
    there = {file.name for file in (tmp_path / "merged").iterdir()} - {".cache"}
    assert api.files.keys() == there and "model.safetensors" in there
    assert "This is the whole model" in api.files["README.md"].decode()
    assert (tmp_path / "merged" / "README.md").read_text() == "of the base"
    beside = tmp_path / "beside"  # a delta and its base in one folder are whole weights, too
    shutil.copytree(llama, beside)
    shutil.copy(delta, beside)
    with pytest.raises(ValueError, match=r"holds whole weights \(model\.safetensors\)"):
        push(beside, "me/merged", api=api)


def test_links_out_of_a_folder_are_not_published(llama, delta, tmp_path):
    """A folder from elsewhere may hold one to any file of the user's; the hub's cache is made of links to its own."""
    secret = tmp_path / "id_rsa"
    secret.write_text("a secret")
    merge_folder(str(llama), delta, tmp_path / "merged")
    api = FakeApi()
    for target in (secret, tmp_path / "d.safetensors"):
        link = tmp_path / "merged" / "notes.txt"
        link.symlink_to(target)
        with pytest.raises(ValueError, match=r"notes\.txt' is a link to '.*', outside of the folder"):
            push(tmp_path / "merged", "me/merged", delta=delta, with_base=True, api=api)
        assert not api.made and not api.commits
        link.unlink()
    (tmp_path / "merged" / "again.json").symlink_to("config.json")  # inside
    push(tmp_path / "merged", "me/merged", delta=delta, with_base=True, api=api)
    assert api.files["again.json"] == api.files["config.json"]
    snapshot, blobs = (tmp_path / "models--a--b" / name for name in ("snapshots/0123", "blobs"))
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "merged").rename(snapshot)
    (snapshot / "config.json").rename(blobs / "1")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    push(snapshot, "me/merged", delta=delta, with_base=True, api=api)
    assert api.files["config.json"] == (blobs / "1").read_bytes()
    linked = tmp_path / "linked.safetensors"  # a file that is named is meant
    linked.symlink_to(delta)
    push(linked, "me/tuned", api=api)
    assert api.files["linked.safetensors"] == delta.read_bytes()


def test_an_adapter_brings_its_own_card(llama, delta, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    delta_to_lora(delta, base, tmp_path / "adapter", error=0.5)
    api = FakeApi()
    push(tmp_path / "adapter", "me/adapter", api=api)
    assert api.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = ModelCard(api.files["README.md"].decode())
    assert card.data.library_name == "peft" and "## Ranks and errors" in card.text
    push(tmp_path / "adapter", "me/adapter", delta=delta, base="owner/base", api=api)
    again = ModelCard(api.files["README.md"].decode())
    assert again.data.base_model == "owner/base" and again.data.base_model_relation == "adapter"
    ranks = again.text[again.text.index("## Ranks and errors") : again.text.index("## How the layers")]
    assert ranks in card.text and f"| `{LAYER}` |" in ranks
    shutil.copy(llama / "model.safetensors", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds whole weights \(model\.safetensors\).*with_base=True"):
        push(tmp_path / "adapter", "me/adapter", api=api)
    (tmp_path / "adapter" / "model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not say its ranks and errors \(KeyError\)"):
        push(tmp_path / "adapter", "me/adapter", delta=delta, api=api)


def test_what_is_nothing_to_upload_is_named(delta, tmp_path):
    api = FakeApi()
    (tmp_path / "empty").mkdir()
    for path, match in ((tmp_path / "empty", "holds no weights"), (tmp_path / "missing", "does not exist")):
        with pytest.raises(ValueError, match=match):
            push(path, "me/x", api=api)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "torn.safetensors").write_bytes(delta.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"torn\.safetensors' is torn"):
        push(tmp_path / "folder", "me/x", api=api)
    assert not api.made
