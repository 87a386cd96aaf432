"""Claims about sequence lengths and the cost of max_length: the statistics, the sample of a dataset, the command."""

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
from hf_bsopt.datasets.lengths import Cost, Lengths, advice, costs, max_lengths_to_compare
from hf_bsopt.datasets.sampling import draw_sample, load_rows, load_tokenizer
from hf_bsopt.errors import UsageError

Capture = pytest.CaptureFixture[str]
some_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=6)


# ---- statistics


def test_a_percentile_is_a_length_in_the_sample() -> None:
    lengths = Lengths(range(1, 201))
    assert [lengths.percentile(percent) for percent in (50, 95, 99, 100)] == [100, 190, 198, 200]
    assert Lengths([7]).percentile(50) == 7


def test_fractions_truncated_lost_and_padded() -> None:
    lengths = Lengths([2, 4, 10])
    assert (lengths.longest, lengths.tokens, lengths.mean) == (10, 16, 16 / 3)
    assert (lengths.cut(4), lengths.cut(10)) == (1 / 3, 0)
    assert lengths.lost(4) == 6 / 16
    assert lengths.padding(10) == pytest.approx(1 - 16 / 30)
    assert lengths.padding(4) == pytest.approx(1 - 10 / 12)


@given(counts=some_lengths, max_length=st.integers(1, 70), batch_size=st.integers(1, 3))
def test_padding_in_batches_is_the_mean_over_all_possible_batches(
    counts: list[int], max_length: int, batch_size: int
) -> None:
    kept = [min(count, max_length) for count in counts]
    batches = list(itertools.product(kept, repeat=batch_size))
    computed = sum(max(batch) * batch_size for batch in batches)
    expected = 1 - sum(map(sum, batches)) / computed
    assert Lengths(counts).padding_in_batches(max_length, batch_size) == pytest.approx(expected, abs=1e-9)


@given(counts=some_lengths, max_length=st.integers(1, 70))
def test_batches_are_padded_less_than_to_max_length_and_single_sequences_not_at_all(
    counts: list[int], max_length: int
) -> None:
    lengths = Lengths(counts)
    assert lengths.padding_in_batches(max_length, 1) == pytest.approx(0, abs=1e-9)
    assert lengths.padding_in_batches(max_length, 8) <= lengths.padding(max_length) + 1e-9


def test_an_empty_sample_is_an_error() -> None:
    with pytest.raises(UsageError, match="no sequences"):
        Lengths([])


def test_no_max_length_above_the_models_limit_is_compared() -> None:
    lengths = Lengths([30] * 98 + [90, 700])
    assert max_lengths_to_compare(lengths, 512, 512) == {512: ("now",), 256: (), 96: ("p99",)}
    assert max_lengths_to_compare(lengths, 256, None) == {512: (), 256: ("now",), 96: ("p99",)}
    assert max_lengths_to_compare(lengths, 512, 4096) == {704: ("max",), 512: ("now",), 256: (), 96: ("p99",)}
    assert max_lengths_to_compare(lengths, 96, 128) == {96: ("now", "p99")}


def compared(counts: Sequence[int], now: int, sizes: dict[int, int | None]) -> tuple[Lengths, tuple[Cost, ...]]:
    lengths = Lengths(counts)
    return lengths, costs(lengths, max_lengths_to_compare(lengths, now, 512), sizes)


def test_shorter_lengths_that_truncate_nothing_or_little_are_advised() -> None:
    lengths, found = compared([20] * 995 + [100] * 5, 512, {512: 48, 104: 264, 24: 1000})
    enough, little = advice(lengths, found, 512)
    assert "--max_length 104 is enough" in enough and "a batch of 264 fits in place of 48" in enough
    assert "--max_length 24 truncates 0.5 % of the sequences and loses 1.9 % of the tokens" in little


def test_truncated_sequences_are_mentioned_and_no_shorter_length_is_advised() -> None:
    lengths, found = compared([600] * 20 + [500] * 80, 512, {512: 48})
    (sentence,) = advice(lengths, found, 512)
    assert sentence.startswith("20 % of the sequences are longer than 512")


def test_a_suitable_length_gets_no_advice() -> None:
    lengths, found = compared([510] * 50 + [300] * 50, 512, {512: 48})
    assert advice(lengths, found, 512) == ()


def test_a_length_at_which_nothing_fits_has_no_batch_size() -> None:
    _, (cost, *_) = compared([500], 512, {})
    assert (cost.batch_size, cost.padding_in_batches, cost.tokens_in_batch) == (None, None, None)
    _, (cost, *_) = compared([256, 512], 512, {512: 4})
    assert cost.tokens_in_batch == 4 * 384


# ---- a sample of a dataset

WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a tokenizer that makes each word a token, between [CLS] and [SEP], and return its folder."""
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
def test_files_of_all_formats_are_read(kind: str, tmp_path: Path, tokenizer: str) -> None:
    sample = draw_sample([written(tmp_path, kind, [1, 5, 9])], tokenizer)
    assert sample.lengths.counts == (3, 7, 11)
    assert (sample.rows, sample.source) == (3, f"train.{kind}")


def test_tokens_of_words_pairs_and_missing_texts_are_counted(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "ner.jsonl"
    rows = [{"tokens": WORDS[:4], "a": text(2), "b": text(3)}, {"tokens": WORDS[:1], "a": None, "b": text(1)}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert draw_sample([str(path)], tokenizer, text_columns=["tokens"]).lengths.counts == (3, 6)
    assert draw_sample([str(path)], f"{tokenizer}/tokenizer.json", text_columns=["a", "b"]).lengths.counts == (4, 8)


def test_the_sample_is_the_same_each_time(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK", 3)
    path = written(tmp_path, "jsonl", [*range(1, 41)])
    first, second = (draw_sample([path], tokenizer, max_rows=10) for _ in range(2))
    assert first.lengths.counts == second.lengths.counts
    assert (len(first.lengths), first.rows) == (10, 40)


def test_the_split_of_a_saved_dataset_is_read(tmp_path: Path, tokenizer: str) -> None:
    rows = datasets.Dataset.from_dict({"text": [text(3)]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    assert draw_sample([str(tmp_path / "saved")], tokenizer, split="test").rows == 1
    with pytest.raises(UsageError, match="train, test"):
        load_rows([str(tmp_path / "saved")], "validation")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "text\n"), ("b.csv", ""), ("a.txt", "")],
)
def test_the_error_on_a_dataset_without_rows_says_so(
    name: str, content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="has no rows"):
        load_rows([str(tmp_path / name)], "train")
    assert capfd.readouterr().err == ""


def test_the_tokenizer_is_loaded_by_the_models_full_name(monkeypatch: pytest.MonkeyPatch) -> None:
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
        ([], "no dataset"),
        (["a.csv", "b.jsonl"], "same format"),
        (["c.docx"], "one of .csv"),
        (["broken.jsonl"], "broken.jsonl cannot be read"),
    ],
)
def test_an_invalid_dataset_is_an_error(
    names: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.jsonl", "c.docx"):
        (tmp_path / name).write_text("text\nx\n")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(UsageError, match=named):
        load_rows(names, "train")


def test_a_column_that_is_missing_or_not_text_is_an_error(tmp_path: Path, tokenizer: str) -> None:
    path = written(tmp_path, "csv", [3])
    with pytest.raises(UsageError, match="one of text, label"):
        draw_sample([path], tokenizer, text_columns=["sentence"])
    with pytest.raises(UsageError, match="'label' contains int"):
        draw_sample([path], tokenizer, text_columns=["label"])


def test_the_error_on_a_tokenizer_that_cannot_be_loaded_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--tokenizer names a folder"):
        load_tokenizer("dmis-lab/biobert-v1.1")
    with pytest.raises(UsageError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


# ---- the command


@pytest.mark.slow
def test_the_command_prints_the_lengths_and_then_the_answer(tmp_path: Path, tokenizer: str, capsys: Capture) -> None:
    path = written(tmp_path, "jsonl", [*[10] * 300, 40])
    saved = tmp_path / "report.json"
    flags = ["--model", "bert-tiny", "--gpu", "2GiB", "--device", "predict", "--evaluation", "False"]
    flags += ["--dataset", path, "--tokenizer", tokenizer, "--max_length", "128", "--json", str(saved)]
    assert main(flags) == FOUND
    out = capsys.readouterr().out
    lengths, answer = out.split("─" * 78)
    assert "p50 12   p95 12   p99 12   max 42" in lengths
    assert "--max_length 48 is enough" in lengths and "--max_length 16 truncates 0.3 %" in lengths
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
def test_a_usage_error_is_one_line(more: list[str], named: str, capsys: Capture) -> None:
    assert main(["--model", "bert-tiny", *more]) == USAGE
    streams = capsys.readouterr()
    assert named in streams.err and len(streams.err.splitlines()) == 1
