"""Sets of questions in lmms-lab's layouts, written small by the test: from a directory and from a hub on 127.0.0.1."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench.questions.datasets import LAYOUTS, load_dataset
from bench.questions.tasks import grade, score
from tests.support.small_hub import SmallHub, _Handler
from toolkit.errors import HubError, ManifestError, MediaError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = pa.list_(pa.string())
MMMU_IMAGES = [f"image_{number}" for number in range(1, 8)]

SCHEMAS = {
    "docvqa": pa.schema(
        [
            ("questionId", pa.string()),
            ("question", pa.string()),
            ("question_types", TEXTS),
            ("image", IMAGE),
            ("docId", pa.int64()),
            ("ucsf_document_id", pa.string()),
            ("ucsf_document_page_no", pa.string()),
            ("answers", TEXTS),
            ("data_split", pa.string()),
        ]
    ),
    "chartqa": pa.schema([("type", pa.string()), ("question", pa.string()), ("answer", pa.string()), ("image", IMAGE)]),
    "textvqa": pa.schema(
        [
            ("image_id", pa.string()),
            ("question_id", pa.int32()),
            ("question", pa.string()),
            ("question_tokens", TEXTS),
            ("image", IMAGE),
            ("image_width", pa.int32()),
            ("image_height", pa.int32()),
            ("flickr_original_url", pa.string()),
            ("flickr_300k_url", pa.string()),
            ("answers", TEXTS),
            ("image_classes", TEXTS),
            ("set_name", pa.string()),
            ("ocr_tokens", TEXTS),
        ]
    ),
    "mmmu": pa.schema(
        [
            *((name, pa.string()) for name in ("id", "question", "options", "explanation")),
            *((name, IMAGE) for name in MMMU_IMAGES),
            *((name, pa.string()) for name in ("img_type", "answer", "topic_difficulty", "question_type", "subfield")),
        ]
    ),
}


def image(colour: str, kind: str = "PNG") -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": f"{colour}.{kind.lower()}"}


def docvqa(number: int, colour: str = "red", **changes: Any) -> dict[str, Any]:
    row = {
        "questionId": str(number),
        "question": "What is the date?",
        "image": image(colour),
        "docId": 14000 + number // 2,
        "answers": ["1/8/93", "January 8, 1993"],
        "data_split": "val",
    }
    return row | changes


def textvqa(number: int, **changes: Any) -> dict[str, Any]:
    people = ["nokia"] * 8 + ["the nokia", "toyota"]
    row = {"image_id": "003a8ae2ef43b901", "question_id": number, "question": "what is the brand?", "answers": people}
    return row | {"image": image("blue", "JPEG")} | changes


def mmmu(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": f"validation_Art_{number}",
        "question": "Which is shown in <image 1>?",
        "options": "['a dog', \"a cat's tail\", '<image 2>']",
        "image_1": image("red"),
        "image_2": image("green"),
        "answer": "B",
        "question_type": "multiple-choice",
    }
    return row | changes


def chartqa(kind: str, answer: str, colour: str = "red") -> dict[str, Any]:
    return {"type": f"{kind}_test", "question": "How many?", "answer": answer, "image": image(colour)}


def write(directory: Path, name: str, *parts: list[dict[str, Any]], split: str | None = None) -> Path:
    """Write the rows as lmms-lab's repository would hold them, two rows a row group."""
    layout = LAYOUTS[name]
    folder = directory / layout.folder
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(parts):
        file = folder / f"{split or layout.split}-{number:05}-of-{len(parts):05}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMAS[name]), file, row_group_size=2)
    return directory


def test_docvqa(tmp_path: Path) -> None:
    rows = [docvqa(0), docvqa(1), docvqa(2, "blue")]
    source = write(tmp_path, "docvqa", rows, [docvqa(3, "blue"), docvqa(4, "green")])
    (tmp_path / "InfographicVQA").mkdir()
    (tmp_path / "InfographicVQA" / "validation-00000-of-00001.parquet").write_bytes(b"of another set")
    found = load_dataset("docvqa", source)
    assert [question.id for question in found] == [f"docvqa-{number}" for number in range(5)]
    first = found[0]
    assert (first.task, first.metric, first.answers) == ("docvqa", "anls", ("1/8/93", "January 8, 1993"))
    assert first.question == "What is the date?\nAnswer the question using a single word or phrase."
    assert [q.cluster_id for q in found] == [f"docvqa {doc}" for doc in (14000, 14000, 14001, 14001, 14002)]
    assert first.images[0].data == rows[0]["image"]["bytes"]
    assert first.images[0].mime == "image/png"
    assert first.images[0] is found[1].images[0]
    assert found[3].images == found[2].images != found[4].images
    assert score(first, "January 8, 1993") == 1.0


def test_chartqa(tmp_path: Path) -> None:
    rows = [chartqa("human", "14"), chartqa("human", "Yes", "blue"), chartqa("augmented", "0.57")]
    found = load_dataset("chartqa", write(tmp_path, "chartqa", rows))
    assert [question.task for question in found] == ["chartqa-human", "chartqa-human", "chartqa-augmented"]
    assert [question.id for question in found] == ["chartqa-0", "chartqa-1", "chartqa-2"]
    assert [score(question, answer) for question, answer in zip(found, ("14.5", "yes", "57%"), strict=True)] == [1] * 3
    # One chart, asked about in both halves, is one cluster.
    assert found[0].cluster_id == found[2].cluster_id != found[1].cluster_id


def test_textvqa(tmp_path: Path) -> None:
    found = load_dataset("textvqa", write(tmp_path, "textvqa", [textvqa(34602), textvqa(34603)]))
    assert found[0].question == "What is the brand?\nAnswer the question using a single word or phrase."
    assert (found[0].metric, len(found[0].answers), found[0].images[0].mime) == ("vqa", 10, "image/jpeg")
    assert {question.cluster_id for question in found} == {"textvqa 003a8ae2ef43b901"}
    assert [score(found[0], answer) for answer in ("Nokia.", "Toyota", "sony")] == [1.0, pytest.approx(0.3), 0.0]


def test_mmmu(tmp_path: Path) -> None:
    rows = [
        mmmu(1),
        mmmu(2, options="[]", answer="['1/2', '0.5']", question_type="open", image_2=None),
        mmmu(3, options="['$x_1$', '{2}']", answer="A"),
    ]
    choice, opened, third = load_dataset("mmmu", write(tmp_path, "mmmu", rows))
    assert (choice.id, choice.answers) == ("mmmu-validation_Art_1", ("B",))
    assert choice.choices == ("a dog", "a cat's tail", "<image 2>")
    assert choice.question == (
        "Which is shown in <image 1>?\nA. a dog\nB. a cat's tail\nC. <image 2>\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [p.data for p in choice.images] == [rows[0][column]["bytes"] for column in ("image_1", "image_2")]
    assert [score(choice, answer) for answer in ("(B)", "A", "a cat's tail")] == [1.0, 0.0, 1.0]
    assert "ambiguous" in (grade(choice, "A or B").note or "")
    assert (opened.answers, opened.choices, len(opened.images)) == (("1/2", "0.5"), (), 1)
    assert [score(opened, answer) for answer in ("It is 0.5.", "0.51")] == [1.0, 0.0]
    assert third.choices == ("$x_1$", "{2}")


def test_options_may_be_a_real_list(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "q", "options": ["x", "y"], "answer": "A", "question_type": "multiple-choice"}]
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("id", "question", "answer", "question_type")),
            ("options", TEXTS),
            ("image_1", IMAGE),
        ]
    )
    table = pa.Table.from_pylist([rows[0] | {"image_1": image("red")}], schema=schema)
    pq.write_table(table, tmp_path / "validation-00000-of-00001.parquet")
    assert load_dataset("mmmu", tmp_path)[0].choices == ("x", "y")


def test_a_sample_reads_only_its_images(tmp_path: Path) -> None:
    rows = [docvqa(number) for number in range(10)]
    whole = load_dataset("docvqa", write(tmp_path, "docvqa", rows), per_task=3, seed=4)
    kept = {question.id for question in whole}
    assert len(kept) == 3
    broken = [row if f"docvqa-{row['questionId']}" in kept else row | {"image": None} for row in rows]
    write(tmp_path, "docvqa", broken)
    assert load_dataset("docvqa", tmp_path, per_task=3, seed=4) == whole
    with pytest.raises(MediaError):
        load_dataset("docvqa", tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("docvqa", docvqa(0, answers=[]), "no answers; those of split"),
        ("docvqa", docvqa(0, answers=None), "no answers"),
        ("docvqa", docvqa(0, question=" "), "question is ' ' instead of a text"),
        ("textvqa", textvqa(0, answers=[""] * 10), "no answers"),
        ("textvqa", textvqa(0, answers=["a", "b"]), "2 answers instead of ten"),
        ("mmmu", mmmu(0, answer="?"), "no answers"),
        ("mmmu", mmmu(0, answer="D"), "not the letter of one of 3 options"),
        ("mmmu", mmmu(0, answer="AB"), "not the letter"),
        ("mmmu", mmmu(0, options="['a"), "is no question of mmmu"),
        ("mmmu", mmmu(0, options="7"), "is no list"),
        ("chartqa", {"type": "human_test", "question": "q", "answer": None, "image": image("red")}, "answer is None"),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path: Path, name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_dataset(name, write(tmp_path, name, [row]))
    assert words in str(caught.value)
    assert "-00000-of-00001.parquet: row 0" in str(caught.value)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "no image"),
        ({"bytes": None, "path": "a.png"}, "has no bytes"),
        ({"bytes": image("red")["bytes"][:60], "path": None}, "truncated or damaged"),
    ],
)
def test_a_bad_image_is_named(tmp_path: Path, image: Any, words: str) -> None:
    source = write(tmp_path, "docvqa", [docvqa(0), docvqa(1), docvqa(2, image=image)])
    with pytest.raises(MediaError, match=words) as caught:
        load_dataset("docvqa", source)
    assert "parquet: row 2" in str(caught.value)


def test_what_is_no_such_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="unknown set of questions 'vqav9'; choose one of docvqa, chartqa"):
        load_dataset("vqav9", tmp_path)
    with pytest.raises(ManifestError, match=r"no files DocVQA/validation-\*\.parquet"):
        load_dataset("docvqa", tmp_path)
    write(tmp_path, "textvqa", [textvqa(0)])
    with pytest.raises(ManifestError, match="no column questionId, docId in it, only image_id"):
        load_dataset("docvqa", tmp_path)
    with pytest.raises(ManifestError, match=r"data/test-\*"):
        load_dataset("textvqa", tmp_path, split="test")
    write(tmp_path, "textvqa", [textvqa(0), textvqa(0)])
    with pytest.raises(ManifestError, match="'textvqa-0' is there twice"):
        load_dataset("textvqa", tmp_path)
    write(tmp_path, "textvqa", [])
    with pytest.raises(ManifestError, match="no questions in it"):
        load_dataset("textvqa", tmp_path)


def test_a_part_that_is_missing_or_cut_short_is_said(tmp_path: Path) -> None:
    source = write(tmp_path, "docvqa", [docvqa(0)], [docvqa(1)])
    last = source / "DocVQA" / "validation-00001-of-00002.parquet"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ManifestError, match=r"validation-00001-of-00002\.parquet: not a parquet file, or cut short"):
        load_dataset("docvqa", source)
    last.unlink()
    with pytest.raises(ManifestError, match=r"validation-00001-of-00002\.parquet is missing"):
        load_dataset("docvqa", source)


# --- from a hub


class _DatasetHandler(_Handler):
    """The hub's pages of data sets are those of models under another name."""

    def _answer(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        super()._answer()


@contextmanager
def serving(hub: SmallHub) -> Iterator[SmallHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_DatasetHandler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    from huggingface_hub import constants

    repository = write(tmp_path / "repository", "docvqa", [docvqa(0)], [docvqa(1, "blue")])
    write(repository, "docvqa", [docvqa(9, answers=[])], split="test")
    files = {str(path.relative_to(repository)): path.read_bytes() for path in repository.rglob("*.parquet")}
    files |= {"README.md": b"# card", "InfographicVQA/validation-00000-of-00001.parquet": b"of another set"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with serving(SmallHub("lmms-lab/DocVQA", files)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def test_a_set_comes_from_the_hub_one_split_of_it_and_once(hub: SmallHub) -> None:
    found = load_dataset("docvqa")
    assert [question.id for question in found] == ["docvqa-0", "docvqa-1"]
    assert hub.fetched() == [f"DocVQA/validation-0000{number}-of-00002.parquet" for number in (0, 1)]
    assert load_dataset("docvqa", "lmms-lab/DocVQA") == found
    assert len(hub.downloads) == 2
    with pytest.raises(ManifestError, match="split 'test' may not be public"):
        load_dataset("docvqa", split="test")


def test_what_the_hub_does_not_have_is_said(hub: SmallHub) -> None:
    with pytest.raises(HubError, match="someone/else is neither a directory here nor a data set on"):
        load_dataset("docvqa", "someone/else")
    with pytest.raises(HubError, match="neither a directory here"):
        load_dataset("docvqa", "no/such/place")
    with pytest.raises(ManifestError, match=r"no files DocVQA/dev-\*"):
        load_dataset("docvqa", split="dev")
    hub.gated_for = "token"
    with pytest.raises(HubError, match="is gated"):
        load_dataset("docvqa")


def test_a_hub_out_of_reach_is_said(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="can't be reached"):
        load_dataset("docvqa")
