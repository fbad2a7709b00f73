import csv

import pandas
import pytest
import torch
import transformers
from checkpoints import TEXTS, save_bert, save_digits, save_jsonl, save_llama, save_resnet
from PIL import Image
from torch.utils.data import DataLoader
from without_module import refuse_import

from zest_fast.integrations.data.images import IMAGENET_MEAN, IMAGENET_STD
from zest_fast.integrations.data.labels import class_names
from zest_fast.integrations.data.loaders import make_loaders
from zest_fast.integrations.data.sources import open_data
from zest_fast.integrations.pretrained import LoadedModel, load_model

LABELS = ["pos", "neg", "pos", "neg", "pos", "pos"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return load_model(str(save_bert(tmp_path_factory.mktemp("bert"))), class_names=["neg", "pos"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_model(str(save_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture
def plain():
    """A model of the user: no transformers, no processor."""
    return LoadedModel(torch.nn.Flatten(), "mine:build", None)


def write_csv(path, texts, labels):
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(zip(texts, labels, strict=True))
    return path


def write_parquet(path, texts, labels):
    pandas.DataFrame({"text": texts, "label": labels}).to_parquet(path)
    return path


def everything(loader):
    """(text ids, label) of every sample, padding cut off."""
    return [
        (tuple(ids[mask == 1].tolist()), int(label))
        for batch in loader
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


@pytest.mark.parametrize(("write", "ending"), [(save_jsonl, "jsonl"), (write_csv, "csv"), (write_parquet, "parquet")])
def test_every_kind_of_table_gives_the_same_labelled_batches(tmp_path, bert, write, ending):
    data = open_data(str(write(tmp_path / f"films.{ending}", TEXTS, LABELS)))
    loaders = make_loaders(data, bert, batch_size=4, label_column="label")
    assert loaders.validation is None
    assert [len(batch["labels"]) for batch in loaders.train] == [4, 2]
    expected = [
        (tuple(bert.processor(text)["input_ids"]), int(label == "pos"))
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    assert sorted(everything(loaders.train)) == sorted(expected)
    batch = next(iter(loaders.train))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.isfinite(bert.model(**batch).loss)


def test_the_order_depends_on_the_seed_alone(tmp_path, bert):
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", TEXTS, LABELS)))
    runs = [
        everything(make_loaders(data, bert, batch_size=4, label_column="label", seed=seed).train) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_the_split_is_disjoint_complete_and_of_the_seed(tmp_path, bert):
    texts = [f"the {'film ' * n}" for n in range(10)]
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", texts, ["a", "b"] * 5)))
    model = LoadedModel(bert.model, "bert", bert.task, bert.processor, ("a", "b"))
    splits = [
        make_loaders(data, model, batch_size=4, label_column="label", validation_share=0.3, seed=seed)
        for seed in (1, 1, 2)
    ]
    train, held_out = everything(splits[0].train), everything(splits[0].validation)
    assert len(held_out) == 3
    assert len({*train, *held_out}) == 10
    assert held_out == everything(splits[1].validation) != everything(splits[2].validation)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "2"], ("2", "9", "10")),
        ([2.0, 1.0], ("1", "2")),
        ([True, False], ("False", "True")),
        (["b", "B", "a"], ("B", "a", "b")),
        ([-1, 1], ("-1", "1")),
    ],
)
def test_classes_are_sorted(labels, expected):
    assert class_names(labels) == expected


def test_given_class_names_decide_the_ids(tmp_path, bert):
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", TEXTS, LABELS)))
    swapped = LoadedModel(bert.model, "bert", bert.task, bert.processor, ("pos", "other", "neg"))
    loaders = make_loaders(data, swapped, batch_size=6, label_column="label")
    assert sorted(next(iter(loaders.train))["labels"].tolist()) == [0, 0, 0, 0, 2, 2]
    with pytest.raises(ValueError, match="label 'pos' is none of the model's classes; nearest: 'poss'"):
        named = LoadedModel(bert.model, "bert", bert.task, bert.processor, ("neg", "poss"))
        make_loaders(data, named, batch_size=6, label_column="label")


def test_texts_alone_have_their_tokens_as_labels_and_no_padding(tmp_path, llama):
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", TEXTS)))
    batch = next(iter(make_loaders(data, llama, batch_size=6).train))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])
    assert torch.isfinite(llama.model(**batch).loss)


def test_long_texts_are_cut_to_what_the_model_takes_or_less(tmp_path, bert):
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", ["the film " * 20], ["pos"])))
    for given, expected in ((None, 16), (5, 5)):
        batch = next(iter(make_loaders(data, bert, batch_size=1, label_column="label", max_length=given).train))
        assert batch["input_ids"].shape == (1, expected)


def test_images_go_through_the_models_processor(tmp_path):
    loaded = load_model(str(save_resnet(tmp_path / "resnet", num_labels=3)))
    data = open_data(str(save_digits(tmp_path / "digits")))
    batch = next(iter(make_loaders(data, loaded, batch_size=12).train))
    assert batch["pixel_values"].shape == (12, 3, 32, 32)
    assert sorted(batch["labels"].tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.isfinite(loaded.model(**batch).loss)
    smaller = next(iter(make_loaders(data, loaded, batch_size=12, image_size=16).train))
    assert smaller["pixel_values"].shape == (12, 3, 16, 16)


def test_images_for_a_model_of_the_user_are_normalised_pairs(tmp_path, plain):
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (5, 7), colour).save(tmp_path / name / "one.png")
    pixels, targets = next(iter(make_loaders(open_data(str(tmp_path)), plain, batch_size=2, image_size=4).train))
    assert pixels.shape == (2, 3, 4, 4)
    for image, target in zip(pixels, targets.tolist(), strict=True):
        for channel in range(3):
            value = float(channel == (2, 0)[target])  # blue is class 0, red class 1
            expected = (value - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
            assert torch.allclose(image[channel], torch.tensor(expected), atol=1e-5)


def test_an_image_of_more_than_8_bits_is_named(tmp_path, plain):
    """Pillow would make all above 255 white."""
    (tmp_path / "a").mkdir()
    Image.new("I;16", (4, 4), 3000).save(tmp_path / "a" / "one.png")
    loaders = make_loaders(open_data(str(tmp_path)), plain, batch_size=1, image_size=2)
    with pytest.raises(ValueError, match=r"one.png cannot be read: it has more than 8 bits a colour .*I"):
        next(iter(loaders.train))


def test_rows_and_columns_of_an_image_are_not_swapped(tmp_path, plain):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image = Image.new("RGB", (2, 2))
        image.putpixel((1, 0), (255, 255, 255))  # x = 1, y = 0: the upper right
        image.save(tmp_path / name / "one.png")
    pixels, _ = next(iter(make_loaders(open_data(str(tmp_path)), plain, batch_size=1, image_size=2).train))
    assert (pixels[0, 0] > 0).tolist() == [[False, True], [False, False]]


def test_loaders_of_the_user_pass_through(tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zest_user_data.py").write_text(
        "from torch.utils.data import DataLoader\n"
        "one, two = DataLoader([1, 2]), DataLoader([3])\n"
        "def single(): return one\n"
        "def pair(): return one, two\n"
        "def wrong(): return [1]\n"
    )
    single = make_loaders(open_data("zest_user_data:single"), plain, batch_size=7)
    assert isinstance(single.train, DataLoader) and single.train.batch_size == 1 and single.validation is None
    pair = make_loaders(open_data("zest_user_data:pair"), plain, batch_size=7)
    assert pair.train is single.train and list(pair.validation) == [torch.tensor([3])]
    with pytest.raises(TypeError, match="returned list; it has to return a DataLoader"):
        open_data("zest_user_data:wrong")
    with pytest.raises(ValueError, match="has no function 'pairs'; nearest: 'pair'"):
        open_data("zest_user_data:pairs")


def refuses(*parts, call=open_data, **named):
    """What `call` says about a bad input: one line with all of `parts`."""
    with pytest.raises(ValueError) as caught:
        call(**named)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_unknown_file_names_the_nearest(tmp_path):
    save_jsonl(tmp_path / "films.jsonl", TEXTS)
    refuses("film.jsonl", "does not exist", "nearest: 'films.jsonl'", source=str(tmp_path / "film.jsonl"))


def test_unknown_ending_names_the_nearest(tmp_path):
    (tmp_path / "films.json").write_text("{}")
    refuses("films.json", "'.jsonl'", source=str(tmp_path / "films.json"))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b', ["line 2", "torn JSON"]),
        ("a.jsonl", '{"text": "a"}\n\n[1]\n', ["line 3", "expected a JSON object, found list"]),
        ("a.jsonl", "\n", ["has no rows"]),
        ("a.csv", "text,label\ngood,1\nbad\n", ["line 3", "1 fields where the header has 2"]),
        ("a.csv", "text,label\ngood,1\nbad,0,0\n", ["line 3", "3 fields where the header has 2"]),
        ("a.csv", 'text,label\n"two\nlines",1\nbad\n', ["line 4", "1 fields"]),
        ("a.csv", 'text,label\ngood,1\n"cut off', ["line 3", "torn row"]),
        ("a.csv", "text,text\na,b\n", ["line 1", "two columns have the same name"]),
        ("a.csv", "text,label\n", ["has no rows"]),
        ("a.csv", "", ["has no rows"]),
        ("a.csv", b"text,label\ngood,1\n\xff\xfe,2\n", ["line 3", "not UTF-8"]),
        ("a.parquet", b"PAR1 and then nothing", ["no whole Parquet file"]),
    ],
)
def test_torn_tables_name_file_and_line(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(tmp_path / name, *parts, source=str(tmp_path / name))


def test_truncated_parquet(tmp_path):
    file = write_parquet(tmp_path / "films.parquet", TEXTS, LABELS)
    file.write_bytes(file.read_bytes()[:-20])
    refuses(file, "no whole Parquet file", source=str(file))


def test_unknown_column_names_the_nearest(tmp_path, bert):
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", TEXTS, LABELS)))
    common = {"call": make_loaders, "data": data, "loaded": bert, "batch_size": 2}
    refuses("films.jsonl", "no column 'lable'", "nearest: 'label'", label_column="lable", **common)
    refuses("films.jsonl", "no column 'txt'", "nearest: 'text'", label_column="label", text_column="txt", **common)


def test_a_row_without_a_value_is_named(tmp_path, bert):
    common = {"call": make_loaders, "loaded": bert, "batch_size": 2, "label_column": "label"}
    file = tmp_path / "films.jsonl"
    file.write_text('{"text": "good", "label": "pos"}\n{"text": "bad"}\n')
    refuses(file, "line 2", "column 'label' is empty", data=open_data(str(file)), **common)
    file = write_parquet(tmp_path / "films.parquet", ["good", None], ["pos", "neg"])
    refuses(file, "row 2", "column 'text' is empty", data=open_data(str(file)), **common)


def test_more_tokens_than_positions(tmp_path, bert):
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", TEXTS, LABELS)))
    common = {"call": make_loaders, "data": data, "loaded": bert, "batch_size": 2, "label_column": "label"}
    refuses("max length 17", "16 tokens at most", max_length=17, **common)


def test_a_tokenizer_with_more_words_than_the_model(tmp_path):
    folder = save_bert(tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["sequel"])
    tokenizer.save_pretrained(folder)
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", ["the sequel"], ["pos"])))
    loaders = make_loaders(data, load_model(str(folder)), batch_size=1, label_column="label")
    refuses("token 'sequel' is beyond the 16", call=lambda: next(iter(loaders.train)))


def test_images_that_the_processor_leaves_unequal(tmp_path):
    folder = save_resnet(tmp_path / "resnet", processor=False)
    transformers.ConvNextImageProcessor(do_resize=False).save_pretrained(folder)
    for name, size in (("a", (8, 8)), ("b", (9, 7))):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", size).save(tmp_path / "images" / name / "one.png")
    loaders = make_loaders(open_data(str(tmp_path / "images")), load_model(str(folder)), batch_size=2)
    refuses(folder, "cannot stack", "pass image_size", call=lambda: next(iter(loaders.train)))


def test_fractions_are_no_classes():
    refuses("label 0.5 is a fraction", call=class_names, labels=[1.0, 0.5])


def test_texts_need_a_tokenizer(tmp_path, plain):
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", TEXTS)))
    refuses("'mine:build' has none", call=make_loaders, data=data, loaded=plain, batch_size=2)


def test_impossible_splits_and_batches(tmp_path, bert):
    data = open_data(str(save_jsonl(tmp_path / "films.jsonl", TEXTS, LABELS)))
    common = {"call": make_loaders, "data": data, "loaded": bert, "label_column": "label"}
    refuses("validation share 1.0", batch_size=2, validation_share=1.0, **common)
    refuses("6 examples are too few for a validation share of 0.05", batch_size=2, validation_share=0.05, **common)
    refuses("batch size 0", batch_size=0, **common)


def test_folders_that_are_no_image_folders(tmp_path):
    refuses(tmp_path, "has no sub-folders", source=str(tmp_path))
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("none yet")
    refuses(tmp_path / "cats", "holds no image", source=str(tmp_path))


@pytest.mark.parametrize("kept", [0, 30, -40])
def test_a_torn_image_is_named(tmp_path, plain, kept):
    file = save_digits(tmp_path / "digits", classes=2, each=1) / "1" / "0.png"
    file.write_bytes(file.read_bytes()[:kept])
    loaders = make_loaders(open_data(str(tmp_path / "digits")), plain, batch_size=2, image_size=8)
    refuses(file, "cannot be read", call=lambda: next(iter(loaders.train)))


def test_without_pillow_the_pip_line(tmp_path, plain, monkeypatch):
    data = open_data(str(save_digits(tmp_path / "digits", classes=2, each=1)))
    refuse_import(monkeypatch, "PIL")
    with pytest.raises(ImportError, match="pip install pillow"):
        make_loaders(data, plain, batch_size=1)


def test_without_an_image_processor_the_configuration_says_the_size(tmp_path):
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    save_digits(tmp_path / "digits")
    data = open_data(str(tmp_path / "digits"))
    loaded = load_model(str(tmp_path / "vit"), class_names=class_names(data.labels))
    batch = next(iter(make_loaders(data, loaded, batch_size=4).train))
    assert batch["pixel_values"].shape == (4, 3, 32, 32) and torch.isfinite(loaded.model(**batch).loss)
    loaded.model.config.image_size = (16, 32)  # no square: the usual size
    assert next(iter(make_loaders(data, loaded, batch_size=2).train))["pixel_values"].shape[-1] == 224
