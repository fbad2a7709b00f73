"""What the columns of a table are taken for, and the labels of every form, token by token, against those by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
import torch
import transformers
from checkpoints import MARKED_TURNS, SPECIAL, TURNS, byte_tokenizer, save_bert, save_chat, save_rows, save_t5
from tokenizers import pre_tokenizers, processors

from zest_fast.integrations.data.conversations import Conversation, encode_conversations, messages_of
from zest_fast.integrations.data.forms import recognise
from zest_fast.integrations.data.labels import sets_of_columns, sets_of_lists
from zest_fast.integrations.data.loaders import make_loaders
from zest_fast.integrations.data.prompts import Prompt, alpaca_prompt, encode_prompts
from zest_fast.integrations.data.sources import digest_of_data, open_data
from zest_fast.integrations.data.tables import Table
from zest_fast.integrations.data.tags import encode_tags, tag_names
from zest_fast.integrations.data.tokens import IGNORED, Tokens, cut, token_collate
from zest_fast.integrations.pretrained import LoadedModel, load_model

pytestmark = pytest.mark.usefixtures("one_thread")
SYSTEM, USER, ASSISTANT, END, _ = range(5)  # ids of SPECIAL


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_model(str(save_chat(tmp_path_factory.mktemp("chat"))))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return load_model(str(save_bert(tmp_path_factory.mktemp("bert"))), class_names=["neg", "pos"])


def table(**columns):
    count = len(next(iter(columns.values())))
    return Table(Path("data.jsonl"), columns, [f"line {n}" for n in range(1, count + 1)])


def refuses(*parts, call, **named):
    with pytest.raises(ValueError) as caught:
        call(**named)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def tokens(tokenizer, *parts):
    """(ids, labels) of pieces: a text, learnt where it is in a tuple; a number of a special token."""
    ids, labels = [], []
    for part in parts:
        learnt = isinstance(part, tuple)
        part = part[0] if learnt else part
        found = [part] if isinstance(part, int) else tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += found
        labels += found if learnt else [IGNORED] * len(found)
    return Tokens(ids, labels)


# --- What is taken for what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (("text",), {"made_for": "causal-lm"}, ("causal-lm", "texts", ("text",), ())),
        (("messages", "id"), {"made_for": "causal-lm"}, ("causal-lm", "chat", ("messages",), ())),
        (("conversations",), {"made_for": "causal-lm"}, ("causal-lm", "chat", ("conversations",), ())),
        (("prompt", "completion"), {"made_for": "causal-lm"}, ("causal-lm", "prompts", ("prompt", "completion"), ())),
        (
            ("instruction", "input", "output"),
            {"made_for": "causal-lm"},
            ("causal-lm", "instructions", ("instruction", "input", "output"), ()),
        ),
        (
            ("instruction", "output"),
            {"made_for": "causal-lm", "text_column": "instruction,output"},
            ("causal-lm", "instructions", ("instruction", "output"), ()),
        ),
        (
            ("instruction", "context", "response", "category"),
            {"made_for": "causal-lm"},
            ("causal-lm", "instructions", ("instruction", "context", "response"), ()),
        ),
        (("a", "b"), {"made_for": "causal-lm", "text_column": "a,b"}, ("causal-lm", "prompts", ("a", "b"), ())),
        (
            ("premise", "hypothesis", "label"),
            {"made_for": "text-classification"},
            ("text-classification", "texts", ("premise", "hypothesis"), ("label",)),
        ),
        (("text", "label"), {}, ("text-classification", "texts", ("text",), ("label",))),
        (("tokens", "ner_tags"), {}, ("token-classification", "tags", ("tokens",), ("ner_tags",))),
        (("text", "entities"), {}, ("token-classification", "spans", ("text",), ("entities",))),
        (("text", "summary"), {"made_for": "seq2seq-lm"}, ("seq2seq-lm", "sequences", ("text",), ("summary",))),
        (
            ("en", "de"),
            {"made_for": "seq2seq-lm", "text_column": "en", "label_column": "de"},
            ("seq2seq-lm", "sequences", ("en",), ("de",)),
        ),
        (("a,b", "label"), {"made_for": "text-classification", "text_column": "a,b"},
         ("text-classification", "texts", ("a,b",), ("label",))),
    ],
)  # fmt: skip
def test_the_columns_and_the_head_tell(columns, options, expected):
    values = {
        "tokens": ["a", "b"],
        "ner_tags": ["O", "O"],
        "messages": [{}],
        "conversations": [{}],
        "entities": [[0, 1, "a"]],
    }
    found = recognise(table(**{name: [values.get(name, "words")] for name in columns}), **options)
    assert (found.task, found.kind, found.texts, found.labels) == expected


@pytest.mark.parametrize(
    ("labels", "made_for", "task"),
    [
        (["a", "b"], "text-classification", "text-classification"),
        ([1, 2], "text-classification", "text-classification"),
        ([1.0, 2.0], "text-classification", "text-classification"),  # gaps in integers
        ([1.0, 2.5], "text-classification", "regression"),
        (["1.0", "2.5"], "text-classification", "regression"),  # CSV
        ([1, 2], "regression", "regression"),
        (["a", "b"], "regression", "text-classification"),
        ([["a"], []], "text-classification", "multi-label"),
    ],
)
def test_labels_tell_which_head(labels, made_for, task):
    assert recognise(table(text=["x", "y"], label=labels), made_for=made_for).task == task


def test_what_could_be_two_things_is_refused():
    both = table(text=["x"], messages=[[{}]])
    refuses(
        "'text', 'messages'",
        "text_column=messages or text_column=text",
        call=recognise,
        table=both,
        made_for="causal-lm",
    )
    alpaca = table(instruction=["x"], input=["y"], output=["z"], text=["xyz"])
    refuses(
        "read in 2 ways", "text_column=instruction,input,output", call=recognise, table=alpaca, made_for="causal-lm"
    )
    tags = table(tokens=[["a"]], ner_tags=[["O"]], pos_tags=[["N"]])
    refuses("label_column=ner_tags or label_column=pos_tags", call=recognise, table=tags)
    whole = table(text=["x", "y"], label=[1, 2])
    refuses(
        "one output", "task=regression", call=recognise, table=whole, made_for="text-classification", single_output=True
    )
    pairs = table(text=["x"], question=["y"], answer=["z"], label=[1])
    refuses("text_column=text or", call=recognise, table=pairs, made_for="text-classification")


def test_what_is_not_known_is_named_with_what_is():
    odd = table(query=["x"], reply=["y"])
    refuses(
        "'query', 'reply'", "messages or conversations", "text_column=", call=recognise, table=odd, made_for="causal-lm"
    )
    refuses("no column 'quer'; nearest: 'query'", call=recognise, table=odd, made_for="causal-lm", text_column="quer")
    refuses("has no column", call=recognise, table=odd, made_for="causal-lm", text_column="query,replies")
    refuses("source, target", call=recognise, table=odd, made_for="seq2seq-lm")
    words = table(tokens=[["a"]], tags=[["O"]])
    known = "name others with text_column=, or say task=token-classification, which knows these"
    refuses(known, call=recognise, table=words, made_for="text-classification")
    refuses("name one twice", call=recognise, table=odd, made_for="causal-lm", text_column="query,query")
    three = {"text_column": "query,reply,more", "label_column": "label", "task": "text-classification"}
    more = table(query=["x"], reply=["y"], more=["z"], label=[1])
    refuses("names 3 columns", call=recognise, table=more, **three)


def test_preferences_are_not_trained_on_silently():
    pairs = table(prompt=["x"], chosen=["y"], rejected=["z"])
    for made_for in ("causal-lm", "text-classification"):
        refuses("'chosen' and 'rejected'", "DPOTrainer", "ZestCallback", call=recognise, table=pairs, made_for=made_for)
    unpaired = table(prompt=["x"], completion=["y"], label=[True])
    refuses("KTOTrainer", call=recognise, table=unpaired, made_for="causal-lm")
    assert recognise(pairs, made_for="causal-lm", text_column="prompt,chosen").kind == "prompts"  # who says so, may


# --- Chat ------------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "es"},
    {"role": "assistant", "content": "a yes"},
]


@pytest.mark.parametrize("template", [TURNS, MARKED_TURNS], ids=["prefixes", "marks"])
def test_the_assistants_tokens_are_learnt_and_no_others(template):
    tokenizer = byte_tokenizer(template)
    (found,) = encode_conversations([Conversation("line 1", CHAT)], tokenizer)
    newline = ("\n",) if template == TURNS else "\n"  # prefixes end where the turn does, marks where they say
    assert found == tokens(
        tokenizer,
        *(SYSTEM, "be brief", END, "\n"),
        *(USER, "hi", END, "\n"),
        *(ASSISTANT, ("yes",), (END,), newline),
        *(USER, "es", END, "\n"),
        *(ASSISTANT, ("a yes",), (END,), newline),
    )  # fmt: skip
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert found.ids == whole["input_ids"]
    if template == MARKED_TURNS:
        assert [label != IGNORED for label in found.labels] == [bool(said) for said in whole["assistant_masks"]]


@pytest.mark.parametrize("template", [TURNS, MARKED_TURNS], ids=["prefixes", "marks"])
def test_a_conversation_as_prompt_is_not_learnt(template):
    tokenizer = byte_tokenizer(template)
    (found,) = encode_conversations([Conversation("line 1", CHAT, first=3)], tokenizer)
    learnt = [token for token in found.labels if token != IGNORED]
    expected = tokens(tokenizer, "a yes", END, *(["\n"] if template == TURNS else [])).ids
    assert learnt == expected


def test_a_template_that_writes_the_past_otherwise_is_refused():
    """As templates do that leave out what was thought in earlier turns."""
    forgetful = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}..."
        "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = byte_tokenizer(forgetful)
    one = {"call": encode_conversations, "tokenizer": tokenizer}
    refuses(
        "line 7, message 3",
        "writes the beginning",
        "{% generation %}",
        conversations=[Conversation("line 7", CHAT)],
        **one,
    )
    assert encode_conversations([Conversation("line 7", CHAT[:3])], tokenizer)  # of one turn


def test_conversations_that_teach_nothing_or_are_none_are_named():
    tokenizer = byte_tokenizer(TURNS)
    call = {"call": encode_conversations, "tokenizer": tokenizer}
    refuses("line 2 has no turn of the assistant", conversations=[Conversation("line 2", CHAT[:2])], **call)
    strict = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    refuses("line 3", "roles must alternate", call=encode_conversations, tokenizer=strict,
            conversations=[Conversation("line 3", CHAT)])  # fmt: skip
    unmarked = byte_tokenizer(TURNS + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    refuses("line 4", "marks no token", call=encode_conversations, tokenizer=unmarked,
            conversations=[Conversation("line 4", CHAT)])  # fmt: skip
    for value, part in (
        ("hi", "is no list of messages"),
        ([], "is no list of messages"),
        (["hi"], "message 1 is 'hi'"),
        ([{"role": "user"}], "has the content None"),
        ([{"content": "hi"}], "a message has a role"),
        ([{"from": "gtp", "value": "hi"}], "from 'gtp'; nearest: 'gpt'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part 'image'"),
        ([{"role": "assistant", "content": "a", "weight": 0}], "'weight' of its own"),
    ):
        refuses("line 1", part, call=messages_of, value=value, place="line 1")


@pytest.mark.parametrize("what", ["tools", "tool_calls", "reasoning_content"])
def test_what_the_template_leaves_out_is_named(what):
    said = {"role": "assistant", "content": "", what: [{"function": {"name": "es"}}]}
    if what == "tools":
        said = {"role": "assistant", "content": "yes"}
    tools = [{"name": "es"}] if what == "tools" else None
    one = Conversation("line 4", [{"role": "user", "content": "hi"}, said], tools=tools)
    written = "{% if tools %}{{ tools }}{% endif %}" + TURNS.replace("<|end|>", "{{ m." + what + " or '' }}<|end|>")
    refuses(
        f"line 4: the chat template writes nothing of the {what}",
        call=encode_conversations,
        conversations=[one],
        tokenizer=byte_tokenizer(TURNS),
    )
    (found,) = encode_conversations([one], byte_tokenizer(written))
    assert "es" in byte_tokenizer().decode(found.ids)
    nothing = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", what: []}]
    assert encode_conversations([Conversation("line 5", nothing)], byte_tokenizer(TURNS))


def test_sharegpt_and_parts_of_text_are_the_same_messages():
    share = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes", "weight": None}]
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in plain]
    assert messages_of(share, "") == messages_of(parts, "") == messages_of(plain, "") == plain


def test_tools_and_a_system_column_reach_the_template(tmp_path, chat):
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + TURNS
    rows = [{"conversations": CHAT[1:3], "system": "be", "tools": json.dumps([{"name": "es"}])}]
    data = open_data(str(save_rows(tmp_path / "a.jsonl", rows)))
    tokenizer = byte_tokenizer()
    loaded = LoadedModel(chat.model, "chat", "causal-lm", tokenizer)
    loaders = make_loaders(data, loaded, batch_size=1, chat_template=template)
    batch = next(iter(loaders.train))
    expected = tokens(
        tokenizer, "es", SYSTEM, "be", END, "\n", USER, "hi", END, "\n", ASSISTANT, ("yes",), (END,), ("\n",)
    )
    assert batch["input_ids"][0].tolist() == expected.ids and batch["labels"][0].tolist() == expected.labels
    assert tokenizer.chat_template == template  # so that it is saved with the model
    assert "loss on the assistant's tokens" in loaders.taken


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": CHAT, "system": "be"}, "line 1 has a column 'system' and a message of the system"),
        ({"prompt": "a", "completion": [CHAT[2]]}, "line 1: a list stands where a text is needed"),
        ({"prompt": CHAT[:2], "completion": "a"}, "line 1: 'a' is no list of messages"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "a history is a list of pairs"),
        ({"instruction": "a", "output": ["b"]}, "a list stands where a text is needed"),
    ],
)
def test_rows_that_are_two_things_are_named(tmp_path, chat, row, part):
    data = open_data(str(save_rows(tmp_path / "a.jsonl", [row])))
    refuses(part, call=make_loaders, data=data, loaded=chat, batch_size=1)


def test_padding_is_no_label_although_it_is_the_token_that_ends_a_turn(tmp_path, chat):
    rows = [{"messages": CHAT[1:3]}, {"messages": CHAT}]
    data = open_data(str(save_rows(tmp_path / "a.jsonl", rows)))
    assert chat.processor.pad_token_id == chat.processor.eos_token_id == END
    (batch,) = make_loaders(data, chat, batch_size=2).train
    short = int(batch["attention_mask"].sum(1).argmin())
    length = int(batch["attention_mask"][short].sum())
    assert (batch["input_ids"][short, length:] == END).all() and (batch["labels"][short, length:] == IGNORED).all()
    assert (batch["labels"][short, :length] == END).sum() == 1  # the one that the assistant's turn ends with


def test_a_tokenizer_without_a_template_is_named(tmp_path, chat):
    data = open_data(str(save_rows(tmp_path / "a.jsonl", [{"messages": CHAT}])))
    loaded = LoadedModel(chat.model, "chat", "causal-lm", byte_tokenizer())
    call = {"call": make_loaders, "data": data, "loaded": loaded, "batch_size": 1}
    refuses("tokenizer of 'chat' has no chat template", "chat_template=FILE", **call)


# --- Prompts ---------------------------------------------------------------------------------------------------------


def test_completions_are_learnt_with_the_end_and_prompts_are_not():
    tokenizer = byte_tokenizer()
    found, notes = encode_prompts([Prompt("line 1", "A:", " yes"), Prompt("line 2", "A: ", "yes")], tokenizer)
    assert found[0] == tokens(tokenizer, "A:", (" yes",), (END,))
    # " y" is one token of the whole text; read apart, as when the model is asked with the blank and answers.
    assert found[1] == tokens(tokenizer, "A: ", ("yes",), (END,))
    assert notes == ["1 of 2 completions begin within a token of the prompt: both are read apart"]
    (ended,), _ = encode_prompts([Prompt("line 1", "A:", " yes<|end|>")], tokenizer)
    assert ended == found[0]
    refuses(
        "line 9: the completion is empty", call=encode_prompts, prompts=[Prompt("line 9", "A", "")], tokenizer=tokenizer
    )


def test_special_tokens_of_a_tokenizer_stay_where_they_belong(bert):
    """[CLS] before the prompt, [SEP] behind the completion alone."""
    (found,), _ = encode_prompts([Prompt("line 1", "the film", " was good")], bert.processor)
    assert found.ids == bert.processor("the film was good")["input_ids"]
    assert found.labels == [IGNORED] * 3 + found.ids[3:]


def test_the_token_before_each_text_comes_once_where_it_is_written_too(chat):
    """As in texts that somebody has made by a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = SPECIAL[SYSTEM]
    put = processors.TemplateProcessing(single=f"{SPECIAL[SYSTEM]} $A", special_tokens=[(SPECIAL[SYSTEM], SYSTEM)])
    tokenizer.backend_tokenizer.post_processor = put
    written, plain = (encode_prompts([Prompt("1", f"{s}hi", " no")], tokenizer) for s in (SPECIAL[SYSTEM], ""))
    assert written == plain and plain[0][0].ids[:2] != [SYSTEM, SYSTEM]
    loaded = LoadedModel(chat.model, "chat", "causal-lm", tokenizer)
    (batch,) = make_loaders(table(text=[f"{SPECIAL[SYSTEM]}hi", "hi"]), loaded, batch_size=2).train
    assert batch["input_ids"][0].tolist() == batch["input_ids"][1].tolist() == tokenizer("hi")["input_ids"]


def test_padding_moves_no_text_although_the_tokenizer_pads_on_the_left(tmp_path):
    """Saved so to generate. Positions of GPT-2 are those in the row, and its classifier reads the last token."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    config = transformers.GPT2Config(vocab_size=300, bos_token_id=END, eos_token_id=END, num_labels=2, **sizes)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "padding_side": "left"}))
    loaded = load_model(str(tmp_path), class_names=["0", "1"])
    assert loaded.processor.padding_side == "left"
    (batch,) = make_loaders(table(text=["a", "a longer text"], label=[0, 1]), loaded, batch_size=2).train
    alone = [loaded.processor(text, return_tensors="pt") for text in ("a", "a longer text")]
    for row, label in zip(loaded.model(**batch).logits, batch["labels"].tolist(), strict=True):
        assert torch.allclose(row, loaded.model(**alone[label]).logits[0], atol=1e-5)


def test_instructions_are_a_conversation_where_there_is_a_template_else_alpacas_words(tmp_path, chat, monkeypatch):
    rows = [
        {"instruction": "say", "input": "es", "output": "yes"},
        {"instruction": "say", "input": "", "output": "a"},
    ]
    data = open_data(str(save_rows(tmp_path / "a.jsonl", rows)))
    loaders = make_loaders(data, chat, batch_size=2)
    (batch,) = loaders.train
    expected = [
        tokens(chat.processor, USER, "say\n\nes", END, "\n", ASSISTANT, ("yes",), (END,), ("\n",)).labels,
        tokens(chat.processor, USER, "say", END, "\n", ASSISTANT, ("a",), (END,), ("\n",)).labels,
    ]
    assert sorted(unpadded(batch)) == sorted(expected) and "chat template" in loaders.taken
    plain = LoadedModel(chat.model, "chat", "causal-lm", byte_tokenizer())
    monkeypatch.setattr(chat.model.config, "max_position_embeddings", 1024)
    loaders = make_loaders(data, plain, batch_size=2)
    (batch,) = loaders.train
    words = [alpaca_prompt(row["instruction"], row["input"]) for row in rows]
    expected = [tokens(plain.processor, w, (r["output"],), (END,)).labels for w, r in zip(words, rows, strict=True)]
    assert sorted(unpadded(batch)) == sorted(expected) and "Alpaca's words" in loaders.taken
    assert words[0].endswith("### Instruction:\nsay\n\n### Input:\nes\n\n### Response:\n")


def unpadded(batch):
    return [labels[mask == 1].tolist() for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True)]


def test_what_is_cut_off_is_counted_and_most_is_refused():
    samples = [Tokens([1] * 9, [IGNORED] * 6 + [1] * 3), Tokens([1] * 3, [1] * 3), Tokens([1] * 2, [1] * 2)]
    kept, notes = cut(samples, 5, shifted=True)
    assert kept == samples[1:] and "1 of 3 samples are longer than 5" in notes[0] and "are left out" in notes[1]
    first_alone = Tokens([1, 2], [1, IGNORED])  # the first token is predicted by none
    assert cut([first_alone, *samples[1:]], 5, shifted=True)[0] == samples[1:]
    assert cut([first_alone], 5, shifted=False)[0] == [first_alone]
    most = [samples[0], samples[0], samples[1]]
    refuses("2 of 3 samples have nothing left", "max_length=", call=cut, samples=most, length=5, shifted=True)


def test_whole_texts_that_are_cut_are_counted_in_the_first_ones(bert):
    data = table(text=["a joy"] * 3 + ["a joy " * 9], label=["pos", "neg"] * 2)
    notes = make_loaders(data, bert, batch_size=2).notes
    assert notes == ("1 of the first 4 texts are longer than 16 tokens and are cut",)
    assert make_loaders(data, bert, batch_size=2, text_column="text", max_length=3).notes[-1].startswith("4 of the")


@pytest.mark.slow
@pytest.mark.parametrize("template", [TURNS, MARKED_TURNS], ids=["prefixes", "marks"])
def test_the_labels_are_those_of_trl(template, chat, tmp_path):
    """Where both can tell: TRL needs marks, and masks elsewhere where a completion begins in a token of its prompt."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = byte_tokenizer(template)

    def theirs(row, **settings):
        arguments = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **settings)
        rows = datasets.Dataset.from_list([row])
        trainer = trl.SFTTrainer(model=chat.model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        return Tokens(trainer.train_dataset[0]["input_ids"], trainer.train_dataset[0]["labels"])

    if template == MARKED_TURNS:
        (ours,) = encode_conversations([Conversation("line 1", CHAT)], tokenizer)
        assert ours == theirs({"messages": CHAT}, assistant_only_loss=True)
    else:
        (ours,) = encode_conversations([Conversation("line 1", CHAT, first=4)], tokenizer)
        assert ours == theirs({"prompt": CHAT[:4], "completion": CHAT[4:]})
    (ours,), _ = encode_prompts([Prompt("line 1", "A:", " yes")], tokenizer)
    assert ours == theirs({"prompt": "A:", "completion": " yes"})


# --- Tags and sequences ----------------------------------------------------------------------------------------------


def test_the_first_token_of_a_word_has_its_tag(bert):
    data = table(tokens=[["films", "was", "good"], ["bore"]], tags=[["B-a", "O", "O"], ["I-a"]])
    names = tag_names(data, "tags", "tags")
    assert names == ("B-a", "I-a", "O")
    (first, second), notes = encode_tags(data, "tokens", "tags", "tags", bert.processor, names, 16)
    assert bert.processor.convert_ids_to_tokens(first.ids) == ["[CLS]", "film", "##s", "was", "good", "[SEP]"]
    assert first.labels == [IGNORED, 0, IGNORED, 2, 2, IGNORED] and second.labels == [IGNORED, 1, IGNORED] and not notes
    (short, _), notes = encode_tags(data, "tokens", "tags", "tags", bert.processor, names, 4)
    assert short.labels == [IGNORED, 0, IGNORED, IGNORED] and "2 words have no token" in notes[0]


def test_spans_are_tags_of_the_words_they_cover(bert):
    text = "The films was a joy"
    data = table(text=[text], spans=[[{"start": 4, "end": 13, "label": "x"}, {"start": 16, "end": 19, "label": "y"}]])
    names = tag_names(data, "spans", "spans")
    assert names == ("B-x", "B-y", "I-x", "I-y", "O")
    (found,), notes = encode_tags(data, "text", "spans", "spans", bert.processor, names, 16)
    tags = ["" if label == IGNORED else names[label] for label in found.labels]
    assert tags == ["", "O", "B-x", "", "I-x", "O", "B-y", ""] and not notes
    (partly,), notes = encode_tags(
        table(text=[text], spans=[[[4, 6, "x"]]]), "text", "spans", "spans", bert.processor, names, 16
    )
    assert names[partly.labels[2]] == "B-x" and "1 spans begin or end within a word" in notes[0]


def test_blanks_of_a_span_are_none_of_the_next_words():
    """Bytes of GPT-2 have the blank in the word behind it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    data, names = table(text=["I saw the film"], spans=[[[1, 6, "x"], [6, 9, "y"]]]), ("B-x", "B-y", "I-x", "I-y", "O")
    (found,), notes = encode_tags(data, "text", "spans", "spans", tokenizer, names, 64)
    assert [names[label] for label in found.labels if label != IGNORED] == ["O", "B-x", "B-y", "O"] and not notes


def test_spans_need_a_tokenizer_that_knows_words():
    """LLaMA's takes a text for one, whose first token would have the tag of any span in it."""
    data = table(text=["the film was good"], spans=[[[4, 8, "x"]]])
    refuses(
        "line 1: the tokenizer takes 'the film was good' for one word",
        call=encode_tags,
        table=data,
        texts="text",
        column="spans",
        kind="spans",
        tokenizer=byte_tokenizer(),
        names=("B-x", "I-x", "O"),
        length=64,
    )


def test_tags_and_spans_that_are_none_are_named(bert):
    def encode(texts, labels, kind):
        data = table(text=[texts], tags=[labels])
        return encode_tags(data, "text", "tags", kind, bert.processor, ("B-x", "I-x", "O"), 16)

    refuses("line 1: 2 words and 1 tags", call=encode, texts=["a", "joy"], labels=["O"], kind="tags")
    refuses("is no list of words", call=encode, texts="a joy", labels=["O"], kind="tags")
    refuses("'B-y' is none of the model's classes", call=encode, texts=["a"], labels=["B-y"], kind="tags")
    refuses("not within the 5 characters", call=encode, texts="a joy", labels=[[2, 9, "x"]], kind="spans")
    refuses("overlaps another", call=encode, texts="a joy", labels=[[0, 3, "x"], [2, 5, "x"]], kind="spans")
    refuses(
        "two spans lie in the word 'joy'", call=encode, texts="a joy", labels=[[2, 3, "x"], [3, 5, "x"]], kind="spans"
    )
    refuses("covers no word", call=encode, texts="a  joy", labels=[[1, 2, "x"]], kind="spans")
    refuses("is no span", call=encode, texts="a joy", labels=[{"start": 0}], kind="spans")


def test_targets_of_sequences_are_labels_without_their_padding(tmp_path):
    loaded = load_model(str(save_t5(tmp_path / "t5")))
    rows = [{"source": "the film was good", "target": "a joy"}, {"source": "bad", "target": "a bore and dull"}]
    data = open_data(str(save_rows(tmp_path / "a.jsonl", rows)))
    (batch,) = make_loaders(data, loaded, batch_size=2).train
    order = [0, 1] if batch["attention_mask"][0].sum() > batch["attention_mask"][1].sum() else [1, 0]
    for place, row in zip(order, rows, strict=True):
        wanted = loaded.processor(text_target=row["target"])["input_ids"]
        labels = batch["labels"][place].tolist()
        assert labels[: len(wanted)] == wanted and set(labels[len(wanted) :]) <= {IGNORED}
        ids = batch["input_ids"][place][batch["attention_mask"][place] == 1].tolist()
        assert ids == loaded.processor(row["source"])["input_ids"]
    assert torch.isfinite(loaded.model(**batch).loss)
    short = make_loaders(data, loaded, batch_size=2, max_length=3)
    (batch,) = short.train
    assert batch["labels"].shape[1] == 3 and set(batch["labels"][:, -1].tolist()) == {3}  # [SEP] still ends them
    assert "2 of 2 samples are longer than 3" in short.notes[0]


def test_a_padded_width_can_be_that_of_all_samples(chat):
    samples = [Tokens([1, 2, 3], [1, 2, 3]), Tokens([4], [4])]
    batch = token_collate(chat, samples, same_length=True)(samples[1:])
    assert batch["input_ids"].tolist() == [[4, END, END]] and batch["labels"].tolist() == [[4, IGNORED, IGNORED]]


# --- Several labels a row -------------------------------------------------------------------------------------------


def test_several_labels_are_lists_of_names_or_of_flags_or_columns():
    places = ["line 1", "line 2"]
    named = sets_of_lists([["b", "a"], []], places, "label")
    assert named.names == ("a", "b") and named.encoded(None) == [[1.0, 1.0], [0.0, 0.0]]
    assert named.encoded(["b", "c", "a"]) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    flags = sets_of_lists([[0, 1, 1], [1, 0, 0]], places, "label")
    assert flags.names == ("0", "1", "2") and flags.encoded(None) == [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    columns = sets_of_columns({"x": ["1", "0"], "y": [False, True]}, places)
    assert columns.names == ("x", "y") and columns.encoded(None) == [[1.0, 0.0], [0.0, 1.0]]
    refuses("'b' is none of the model's", call=named.encoded, names=["a", "c"])
    refuses("may be names of labels or say", call=sets_of_lists, values=[[0, 1], [1, 0]], places=places, column="label")
    refuses("line 2", "a list of names", call=sets_of_lists, values=[["a"], "a"], places=places, column="label")
    refuses("line 2", "0 and 1 alone", call=sets_of_columns, columns={"x": [1, 2]}, places=places)


def test_a_label_of_the_model_that_no_column_has_is_named(tmp_path):
    """It would be learnt as absent."""
    names = dict(enumerate(("odd", "dull", "fine")))
    problem = {"problem_type": "multi_label_classification", "id2label": names, "label2id": {}}
    loaded = load_model(str(save_bert(tmp_path, **problem)), class_names=["dull", "odd"], task="multi-label")
    refuses(
        "the model has the labels fine, of which no column says",
        call=make_loaders,
        data=table(text=["a joy", "a bore"], odd=[0, 1], dull=[1, 0]),
        loaded=loaded,
        batch_size=2,
        label_column="odd,dull",
    )
    lists = make_loaders(table(text=["a joy"], label=[["dull"]]), loaded, batch_size=1)
    assert next(iter(lists.train))["labels"].tolist() == [[0.0, 1.0, 0.0]]


# --- Parts ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_parts_trains_one_and_scores_the_other(tmp_path, bert):
    folder = tmp_path / "films"
    folder.mkdir()
    save_rows(folder / "train.jsonl", [{"text": "a joy", "label": "pos"}, {"text": "a bore", "label": "neg"}])
    pandas.DataFrame({"text": ["the film"], "label": ["pos"]}).to_parquet(folder / "val.parquet")
    save_rows(folder / "test.jsonl", [{"text": "dull", "label": "neg"}] * 3)
    loaders = make_loaders(open_data(str(folder)), bert, batch_size=4, validation_share=0.5)
    assert len(loaders.train.dataset) == 2 and len(loaders.validation.dataset) == 1
    assert "val.parquet scores" in loaders.taken
    tested = make_loaders(open_data(str(folder), split="train,test"), bert, batch_size=4)
    assert len(tested.validation.dataset) == 3
    alone = make_loaders(open_data(str(folder), split="test"), bert, batch_size=4)
    assert len(alone.train.dataset) == 3 and alone.validation is None
    refuses("no part 'dev'", "train", call=open_data, source=str(folder), split="train,dev")
    digests = {digest_of_data(str(folder)), digest_of_data(str(folder), split="test")}
    (folder / "val.parquet").rename(folder / "dev.parquet")
    assert len({*digests, digest_of_data(str(folder))}) == 3
    save_rows(folder / "more.jsonl", [{"text": "a"}])
    refuses("more.jsonl", "its parts", call=open_data, source=str(folder))
    (folder / "more.jsonl").rename(folder / "test.csv")
    refuses("which is it", call=open_data, source=str(folder))
    refuses("split=train", "leave it out", call=open_data, source=str(folder / "train.jsonl"), split="train")


def test_a_class_that_only_the_scored_part_has_is_named(tmp_path):
    from zest_fast.integrations.data.loaders import names_of

    for part, label in (("train", "pos"), ("test", "odd")):
        save_rows(tmp_path / f"{part}.jsonl", [{"text": "a", "label": "neg"}, {"text": "b", "label": label}])
    data = open_data(str(tmp_path))
    refuses("test.jsonl has the classes odd", call=names_of, data=data, form=recognise(data))


def test_special_tokens_of_these_tests_are_the_first():
    assert byte_tokenizer().convert_tokens_to_ids(list(SPECIAL)) == [SYSTEM, USER, ASSISTANT, END, 4]
    assert isinstance(byte_tokenizer(), transformers.PreTrainedTokenizerFast)
