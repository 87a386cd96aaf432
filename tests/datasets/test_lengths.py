"""How long sequences are, and what max_length costs: the statistics, a sample of a dataset, and the command."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_bsopt.cli.main import FOUND, USAGE, main
from hf_bsopt.datasets import sampling
from hf_bsopt.datasets.length_report import dataset_lengths
from hf_bsopt.datasets.lengths import Cost, Lengths, advice, candidates, costs
from hf_bsopt.datasets.sampling import draw_sample, load_rows, load_tokenizer
from hf_bsopt.errors import UsageError

Capture = pytest.CaptureFixture[str]
some_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=6)


# ---- statistics


def test_a_percentile_is_a_length_that_occurs() -> None:
    lengths = Lengths(range(1, 201))
    assert [lengths.percentile(share) for share in (50, 95, 99, 100)] == [100, 190, 198, 200]
    assert Lengths([7]).percentile(50) == 7


def test_what_is_cut_lost_and_padded() -> None:
    lengths = Lengths([2, 4, 10])
    assert (lengths.longest, lengths.tokens, lengths.mean) == (10, 16, 16 / 3)
    assert (lengths.cut(4), lengths.cut(10)) == (1 / 3, 0)
    assert lengths.lost(4) == 6 / 16
    assert lengths.padding(10) == pytest.approx(1 - 16 / 30)
    assert lengths.padding(4) == pytest.approx(1 - 10 / 12)


@given(counts=some_lengths, max_length=st.integers(1, 70), batch_size=st.integers(1, 3))
def test_padding_in_batches_is_that_of_all_batches_there_are(
    counts: list[int], max_length: int, batch_size: int
) -> None:
    kept = [min(count, max_length) for count in counts]
    batches = list(itertools.product(kept, repeat=batch_size))
    computed = sum(max(batch) * batch_size for batch in batches)
    expected = 1 - sum(map(sum, batches)) / computed
    assert Lengths(counts).padding_in_batches(max_length, batch_size) == pytest.approx(expected, abs=1e-9)


@given(counts=some_lengths, max_length=st.integers(1, 70))
def test_a_batch_is_padded_less_than_to_the_limit_and_one_sequence_not_at_all(
    counts: list[int], max_length: int
) -> None:
    lengths = Lengths(counts)
    assert lengths.padding_in_batches(max_length, 1) == pytest.approx(0, abs=1e-9)
    assert lengths.padding_in_batches(max_length, 8) <= lengths.padding(max_length) + 1e-9


def test_no_sequence_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="not one sequence"):
        Lengths([])


def test_what_is_compared_goes_no_further_than_the_model() -> None:
    lengths = Lengths([30] * 98 + [90, 700])
    assert candidates(lengths, 512, 512) == {512: ("now",), 256: (), 96: ("p99",)}
    assert candidates(lengths, 256, None) == {512: (), 256: ("now",), 96: ("p99",)}
    assert candidates(lengths, 512, 4096) == {704: ("max",), 512: ("now",), 256: (), 96: ("p99",)}
    assert candidates(lengths, 96, 128) == {96: ("now", "p99")}


def compared(counts: Sequence[int], now: int, sizes: dict[int, int | None]) -> tuple[Lengths, tuple[Cost, ...]]:
    lengths = Lengths(counts)
    return lengths, costs(lengths, candidates(lengths, now, 512), sizes)


def test_a_shorter_length_is_advised_where_it_cuts_nothing_and_where_it_cuts_little() -> None:
    lengths, found = compared([20] * 995 + [100] * 5, 512, {512: 48, 104: 264, 24: 1000})
    enough, little = advice(lengths, found, 512)
    assert "--max_length 104 is enough" in enough and "a batch of 264 fits in place of 48" in enough
    assert "--max_length 24 cuts 0.5 % of the sequences and loses 1.9 % of the tokens" in little


def test_what_is_cut_is_said_and_no_shorter_length_is_advised() -> None:
    lengths, found = compared([600] * 20 + [500] * 80, 512, {512: 48})
    (sentence,) = advice(lengths, found, 512)
    assert sentence.startswith("20 % of the sequences are longer than 512")


def test_a_length_that_is_right_gets_no_advice() -> None:
    lengths, found = compared([510] * 50 + [300] * 50, 512, {512: 48})
    assert advice(lengths, found, 512) == ()


def test_where_nothing_fits_there_is_no_number() -> None:
    _, (cost, *_) = compared([500], 512, {})
    assert (cost.batch_size, cost.padding_in_batches, cost.tokens_in_batch) == (None, None, None)
    _, (cost, *_) = compared([256, 512], 512, {512: 4})
    assert cost.tokens_in_batch == 4 * 384


# ---- a sample of a dataset

WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer that makes a token of each word, between [CLS] and [SEP]."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def text(words: int) -> str:
    return " ".join(WORDS[:words])


def written(folder: Path, kind: str, counts: Sequence[int]) -> str:
    path = folder / f"train.{kind}"
    if kind == "csv":
        path.write_text("text,label\n" + "".join(f"{text(count)},0\n" for count in counts))
    elif kind == "txt":
        path.write_text("".join(text(count) + "\n" for count in counts))
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": [text(count) for count in counts]}).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps({"text": text(count)}) + "\n" for count in counts))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "txt", "parquet"])
def test_files_of_all_kinds_are_read(kind: str, tmp_path: Path, tokenizer: str) -> None:
    sample = draw_sample([written(tmp_path, kind, [1, 5, 9])], tokenizer)
    assert sample.lengths.counts == (3, 7, 11)
    assert (sample.rows, sample.source) == (3, f"train.{kind}")


def test_words_pairs_and_missing_texts_are_counted(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "ner.jsonl"
    rows = [{"tokens": WORDS[:4], "a": text(2), "b": text(3)}, {"tokens": WORDS[:1], "a": None, "b": text(1)}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert draw_sample([str(path)], tokenizer, text_columns=["tokens"]).lengths.counts == (3, 6)
    assert draw_sample([str(path)], f"{tokenizer}/tokenizer.json", text_columns=["a", "b"]).lengths.counts == (4, 8)


def test_a_sample_is_drawn_the_same_each_time(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK", 3)
    path = written(tmp_path, "jsonl", [*range(1, 41)])
    first, second = (draw_sample([path], tokenizer, most=10) for _ in range(2))
    assert first.lengths.counts == second.lengths.counts
    assert (len(first.lengths), first.rows) == (10, 40)


def test_a_saved_dataset_is_read_by_its_split(tmp_path: Path, tokenizer: str) -> None:
    rows = datasets.Dataset.from_dict({"text": [text(3)]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    assert draw_sample([str(tmp_path / "saved")], tokenizer, split="test").rows == 1
    with pytest.raises(UsageError, match="train, test"):
        load_rows([str(tmp_path / "saved")], "validation")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "text\n"), ("b.csv", ""), ("a.txt", "")],
)
def test_a_dataset_without_rows_is_told_in_words(
    name: str, content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="no rows in it"):
        load_rows([str(tmp_path / name)], "train")
    assert capfd.readouterr().err == ""


def test_the_tokenizer_is_that_of_the_model_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str) -> None:
        asked.append(name)
        raise UsageError("there is none")

    monkeypatch.setattr(sampling, "load_tokenizer", load)
    for model in ("biobert", "dmis-lab/biobert-v1.1"):
        with pytest.raises(UsageError, match="there is none"):
            dataset_lengths(model, ["train.jsonl"])
    assert asked == ["dmis-lab/biobert-v1.1"] * 2


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["missing.csv"], "no file missing.csv"),
        (["somebody/something"], "hub does not answer"),
        ([], "which dataset"),
        (["a.csv", "b.jsonl"], "of one kind"),
        (["c.docx"], "one of .csv"),
        (["broken.jsonl"], "broken.jsonl can't be read"),
    ],
)
def test_what_is_no_dataset_is_refused(
    names: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.jsonl", "c.docx"):
        (tmp_path / name).write_text("text\nx\n")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(UsageError, match=named):
        load_rows(names, "train")


def test_a_column_that_is_not_there_or_no_text_is_refused(tmp_path: Path, tokenizer: str) -> None:
    path = written(tmp_path, "csv", [3])
    with pytest.raises(UsageError, match="one of text, label"):
        draw_sample([path], tokenizer, text_columns=["sentence"])
    with pytest.raises(UsageError, match="'label' holds a int"):
        draw_sample([path], tokenizer, text_columns=["label"])


def test_a_tokenizer_that_can_not_be_had_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--tokenizer names a folder"):
        load_tokenizer("dmis-lab/biobert-v1.1")
    with pytest.raises(UsageError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="can't be loaded"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


# ---- the command


def test_the_command_tells_lengths_then_the_answer(tmp_path: Path, tokenizer: str, capsys: Capture) -> None:
    path = written(tmp_path, "jsonl", [*[10] * 300, 40])
    saved = tmp_path / "report.json"
    flags = ["--model", "bert-tiny", "--gpu", "2GiB", "--device", "predict", "--evaluation", "False"]
    flags += ["--dataset", path, "--tokenizer", tokenizer, "--max_length", "128", "--json", str(saved)]
    assert main(flags) == FOUND
    out = capsys.readouterr().out
    lengths, answer = out.split("─" * 78)
    assert "p50 12   p95 12   p99 12   max 42" in lengths
    assert "--max_length 48 is enough" in lengths and "--max_length 16 cuts 0.3 %" in lengths
    assert "OPTIMAL BATCH SIZE" in answer
    assert max(map(len, out.splitlines())) <= 78
    values = json.loads(saved.read_text())
    size = values["batch_configuration"]["per_gpu_batch_size"]
    assert {cost["max_length"]: cost["batch_size"] for cost in values["lengths"]["max_lengths"]}[128] == size
    assert any(line.split()[:1] == ["128"] and str(size) in line.split() for line in lengths.splitlines())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--tokenizer", "x"], "--dataset"),
        (["--dataset", "x.csv", "--device", "cpu"], "--device cpu"),
        (["--dataset", "x.csv"], "tokenizer"),
    ],
)
def test_what_is_missing_is_one_sentence(more: list[str], named: str, capsys: Capture) -> None:
    assert main(["--model", "bert-tiny", *more]) == USAGE
    streams = capsys.readouterr()
    assert named in streams.err and len(streams.err.splitlines()) == 1
