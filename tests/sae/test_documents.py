import bz2
import gzip
import json
import lzma
import re
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import mlx.core as mx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxterp.sae import documents
from mlxterp.sae.documents import document, find_column, read, read_files, read_huggingface

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEXTS = ["First ä\nline.", "二", "x" * 300]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def fails(message: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=message)


# --- one document


@pytest.mark.parametrize(
    "value",
    ["text", "", [], CHAT, [{**CHAT[0], "from": "Ann"}], [3, 0, 2**31], (1, 2), range(3)],
    ids=repr,
)
def test_a_document_comes_back_as_it_is(value):
    assert document(value, "here") == value


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.int64])
def test_arrays_of_whole_numbers_are_token_ids(kind):
    assert document(np.array([0, 2], kind), "here").tolist() == [0, 2]
    assert document([kind(0), kind(2)], "here") == [0, 2]
    assert document(np.array([], kind), "here").tolist() == []
    found = document(mx.array([1, 2]), "here")
    assert isinstance(found, np.ndarray) and found.tolist() == [1, 2]


@pytest.mark.parametrize(
    "value",
    [
        None, 0.5, 3, True, b"bytes", {"text": "x"}, {1, 2}, [0.5], [1.0], [1, None], [1, -1],
        [True], ["a"], [[1]], [CHAT], [CHAT[0], "x"], np.array([0.5]), np.array([-1]),
        np.array([[1]]), np.array([True]), np.array(3), mx.array([0.5]),
        mx.array([[1]]), bytearray(b"x"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_document_is_an_error_that_names_its_place(value):
    with fails(r"^item 3 must be text, a list of messages .* token ids .*, not .* \(.+\)\."):
        document(value, "item 3")


def test_errors_show_no_more_than_the_beginning():
    with fails(r"not \['y") as raised:
        document(["y" * 10_000] * 1000, "here")
    assert len(str(raised.value)) < 400


def test_the_names_of_sharegpt_are_turned_into_those_of_chat_templates():
    chat = [("system", "S"), ("human", "H"), ("gpt", "G"), ("tool", "T")]
    found = document([{"from": name, "value": text, "weight": 1} for name, text in chat], "here")
    roles = ["system", "user", "assistant", "tool"]
    assert found == [
        {"role": role, "content": text} for role, (_, text) in zip(roles, chat, strict=True)
    ]


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"content": "x"}, "role"),
        ({"from": ["human"], "value": "x"}, "role"),
        ({"from": "human"}, "content"),
        ({}, "role"),
    ],
)
def test_a_message_needs_a_role_and_text(message, key):
    with fails(f"^row 2 has a message whose {key!r} must be text: {{"):
        document([CHAT[0], message], "row 2")


def test_half_a_character_is_found_before_a_tokenizer_breaks_on_it():
    with fails(r"^line 4 is text with half a character \('\\ud83d'\) at 2: "):
        document("ok\ud83d", "line 4")


# --- columns


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["tokens", "id", "input_ids"], "input_ids"),
        (["tokens", "id"], "tokens"),
        (["conversations", "conversation", "messages"], "messages"),
        (["input_ids", "conversation"], "conversation"),
        (["conversation", "conversations"], "conversations"),
        (["messages", "content"], "content"),
        (["role", "content", "text"], "text"),
        (["story"], "story"),
    ],
)
def test_known_columns_come_in_an_order_and_a_single_one_is_taken(names, found):
    assert find_column(names, None, "here") == found


def test_the_column_asked_for_is_taken_or_the_others_are_listed():
    assert find_column(["text", "story"], "story", "here") == "story"
    with fails(r"^a.parquet has no column 'body'; it has \['text', 'story'\]\.$"):
        find_column(["text", "story"], "body", "a.parquet")
    with fails(r"^a.parquet: column must say which one holds the documents: \['x', 'y'\]\.$"):
        find_column(["x", "y"], None, "a.parquet")
    with fails("column must say"):
        find_column([], None, "here")


@pytest.mark.parametrize("names", [["content", "role"], ["from", "value"]])
def test_a_lone_message_is_not_taken_for_a_document(names):
    alone = "content" if "content" in names else "value"
    with fails(f"^item 0 is one message of a chat.*column='{alone}'"):
        find_column(names, None, "item 0")
    assert find_column(names, alone, "item 0") == alone


# --- files


def test_a_text_file_is_one_document_whatever_its_suffix(tmp_path):
    for name in ("a.txt", "b.PY", "c.log", "d", "e.LOG.gz"):
        content = TEXTS[0].encode()
        content = gzip.compress(content) if name.endswith("gz") else content
        assert list(read_files(write(tmp_path / name, content))) == [TEXTS[0]]
    assert list(read_files(write(tmp_path / "bom.txt", "\ufeffx\r\n"))) == ["x\r\n"]
    assert list(read_files(tmp_path / "a.txt", column="text")) == [TEXTS[0]]


def test_a_line_is_a_document_and_blank_lines_are_none(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    path = write(
        tmp_path / "a.jsonl", "\ufeff" + lines(*rows) + "\n  \n" + lines({"text": "\u2028"})
    )
    assert list(read_files(path)) == [*TEXTS, "\u2028"]
    bare = write(tmp_path / "b.jsonl", lines("text", [1, 2], CHAT).rstrip("\n"))
    assert list(read_files(bare)) == ["text", [1, 2], CHAT]


def test_a_json_file_is_a_list_of_documents(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(["text", [1, 2], CHAT]))
    assert list(read_files(path)) == ["text", [1, 2], CHAT]
    path = write(tmp_path / "b.json", json.dumps([{"id": 1, "messages": CHAT}], indent=1))
    assert list(read_files(path)) == [CHAT]


def test_parquet_is_read_row_by_row_from_its_column(tmp_path):
    path = table(tmp_path / "a.parquet", id=[1, 2, 3], text=TEXTS, story=["a", "b", "c"])
    assert list(read_files(path)) == TEXTS
    assert list(read_files(path, "story")) == ["a", "b", "c"]
    path = table(tmp_path / "b.parquet", messages=[CHAT, CHAT[:1]], tokens=[[1], [2, 3]])
    assert list(read_files(path)) == [CHAT, CHAT[:1]]
    assert list(read_files(path, "tokens")) == [[1], [2, 3]]
    path = table(tmp_path / "c.parquet", **{"the.text": ["a"], "the": ["b"]})
    assert list(read_files(path, "the.text")) == ["a"]
    assert list(read_files(path, "the")) == ["b"]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_files_are_unpacked_while_they_are_read(tmp_path, suffix, pack):
    rows = lines(*({"text": text} for text in TEXTS)).encode()
    for name in (f"a.jsonl.{suffix}", f"B.JSONL.{suffix.upper()}"):
        assert list(read_files(write(tmp_path / name, pack.compress(rows)))) == TEXTS
    packed = pack.compress(TEXTS[0].encode())
    assert list(read_files(write(tmp_path / f"a.txt.{suffix}", packed))) == [TEXTS[0]]
    cut = write(tmp_path / f"cut.jsonl.{suffix}", pack.compress(rows * 50)[:-12])
    with fails(rf"cut\.jsonl\.{suffix} is damaged or cut short: "):
        list(read_files(cut))
    whole = pack.compress(np.random.default_rng(0).bytes(1000).hex().encode())
    wrong = whole[:200] + bytes(200) + whole[400:]
    with fails(rf"wrong\.txt\.{suffix} is damaged or cut short: "):
        list(read_files(write(tmp_path / f"wrong.txt.{suffix}", wrong)))
    with fails(rf"no\.txt\.{suffix} is damaged or cut short: "):
        list(read_files(write(tmp_path / f"no.txt.{suffix}", "not compressed at all")))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python can unpack it")
def test_zstandard_names_what_it_needs_of_an_older_python(tmp_path):
    with fails(r"a\.jsonl\.zst needs Python 3.14 .* 'zstd -d .*a\.jsonl\.zst'", ImportError):
        read_files(write(tmp_path / "a.jsonl.zst", b""))


def test_zstandard_is_unpacked_and_its_errors_named(tmp_path, monkeypatch):
    class ZstdError(Exception):
        pass

    def unpack(path, mode):
        if path.stem == "wrong.txt":
            raise ZstdError("Data corruption detected")
        return gzip.open(path, mode)

    module = SimpleNamespace(open=unpack, ZstdError=ZstdError)
    monkeypatch.setitem(sys.modules, "compression.zstd", module)
    monkeypatch.setattr(documents, "sys", SimpleNamespace(version_info=(3, 14)))
    packed = gzip.compress(lines(*TEXTS).encode())
    assert list(read_files(write(tmp_path / "a.jsonl.zst", packed))) == TEXTS
    with fails(r"wrong\.txt\.zst is damaged or cut short: Data corruption"):
        list(read_files(write(tmp_path / "wrong.txt.zst", packed)))


def test_a_directory_is_read_in_the_order_of_names_without_hidden_and_unknown_files(tmp_path):
    for name in (
        "b.txt",
        "a/z.md",
        "a/c.txt",
        "c/d.jsonl.gz",
        ".git/x.txt",
        "._b.txt",
        "x.bin",
        "n",
    ):
        content = lines(name) if "jsonl" in name else name
        write(tmp_path / "d" / name, gzip.compress(content.encode()) if "gz" in name else content)
    (tmp_path / "d" / "e.txt").mkdir()
    table(tmp_path / "d" / "B.parquet", text=["B.parquet"])
    names = ["B.parquet", "a/c.txt", "a/z.md", "b.txt", "c/d.jsonl.gz"]
    assert list(read_files(tmp_path / "d")) == names
    assert list(read_files([str(tmp_path / "d"), tmp_path / "d" / "n"])) == [*names, "n"]


def test_a_directory_below_a_hidden_one_is_read(tmp_path):
    write(tmp_path / ".cache" / "data" / "a.txt", "a")
    assert list(read_files(tmp_path / ".cache" / "data")) == ["a"]


def test_a_glob_names_the_files_it_matches(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.log", "x/d.txt", "x/y/e.txt"):
        write(tmp_path / name, name)
    assert list(read_files(f"{tmp_path}/*")) == ["a.txt", "b.txt", "c.log"]
    assert list(read_files(tmp_path / "*.txt")) == ["a.txt", "b.txt"]
    found = list(read_files(f"{tmp_path}/**/*.txt"))
    assert found == ["a.txt", "b.txt", "x/d.txt", "x/y/e.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(read_files("~/[ab].txt")) == ["a.txt", "b.txt"]
    assert list(read_files("~/b.txt")) == ["b.txt"]


def test_a_file_whose_name_is_also_a_glob_is_that_file(tmp_path):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "[a].txt", "[a]")
    assert list(read_files(tmp_path / "[a].txt")) == ["[a]"]


def test_missing_files_are_errors_at_once(tmp_path):
    present = write(tmp_path / "a.txt", "a")
    with fails(r"none\.txt does not exist, and as a glob it matches no file", FileNotFoundError):
        read_files([present, tmp_path / "none.txt"])
    with fails(r"\*\.md does not exist, and as a glob it matches no file", FileNotFoundError):
        read_files(tmp_path / "*.md")
    write(tmp_path / "d" / "a.bin", "a")
    with fails(r"/d holds no file of a known kind: \.jsonl, \.json, ", FileNotFoundError):
        read_files(tmp_path / "d")
    with fails(r"^paths must name at least one file, not \[\]"):
        read_files([])


def test_kinds_that_cannot_be_read_are_errors_at_once(tmp_path):
    with fails(r"a\.csv is a table: turn it into .parquet or .jsonl"):
        read_files([write(tmp_path / "a.txt", "a"), write(tmp_path / "a.csv", "a,b")])
    with fails(r"a\.parquet\.gz must be unpacked first"):
        read_files(write(tmp_path / "a.parquet.gz", b""))


def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", text=TEXTS)
    for package in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    with fails(r"^pyarrow is missing: pip install 'mlxterp\[data\]'$", ImportError):
        read_files(path)
    with fails(r"^datasets is missing: pip install 'mlxterp\[data\]'$", ImportError):
        read_huggingface("org/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8 text, at byte 2: "),
        ("a.json", b'["\xff"]', r"a\.json is not UTF-8 text, at byte 2: "),
        ("a.jsonl", b'"ok"\n"\xff"\n', r"a\.jsonl, line 2 is not UTF-8 text, at byte 1: "),
        ("a.jsonl", b'"ok"\n\n{"a": \n', r"a\.jsonl, line 3 is not JSON: .* at column \d+\.$"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON: .*recursion"),
        ("a.jsonl", b"1" * 5000, r"a\.jsonl, line 1 is not JSON: .*digits"),
        ("a.jsonl", b'"ok"\nnull\n', r"a\.jsonl, line 2 must be text, .*, not None"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}',
            r"a\.jsonl, line 2 has no column 'text'; it has",
        ),
        ("a.jsonl", b'{"x": "x", "y": "y"}', r"a\.jsonl, line 1: column must say which"),
        (
            "a.json",
            b'{"data": []}',
            r"a\.json must hold a list of documents, not an object of \['da",
        ),
        ("a.json", b'"text"', r"a\.json must hold a list of documents, not 'text'"),
        ("a.json", b'["a"]\n["b"]', r"a\.json is not JSON: .* at line 2, column 1\. .*\.jsonl"),
        ("a.json", b'["a", [0.5]]', r"a\.json, item 1 must be text"),
        ("a.json", json.dumps(CHAT).encode(), r"a\.json, item 0 is one message of a chat"),
        ("a.parquet", b"PAR1 no PAR1", r"a\.parquet is damaged or cut short: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(tmp_path, name, content, message):
    with fails(message):
        list(read_files(write(tmp_path / name, content)))


def test_the_first_row_decides_on_the_column_of_each_file(tmp_path):
    first = write(tmp_path / "a.jsonl", lines({"content": "a"}, {"text": "no", "content": "b"}))
    second = write(tmp_path / "b.jsonl", lines({"text": "c"}))
    assert list(read_files([first, second])) == ["a", "b", "c"]
    with fails(r"b\.jsonl, line 1 has no column 'content'; it has \['text'\]"):
        list(read_files([first, second], "content"))


def test_parquet_that_is_no_documents_or_cut_is_named(tmp_path):
    path = table(tmp_path / "a.parquet", text=["a", "b", None])
    with fails(r"a\.parquet, row 2 must be text, .*, not None"):
        list(read_files(path))
    with fails(r"a\.parquet has no column 'body'; it has \['text'\]"):
        list(read_files(path, "body"))
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])
    with fails(r"a\.parquet is damaged or cut short: "):
        list(read_files(path))
    with fails("one message of a chat"):
        list(read_files(table(tmp_path / "b.parquet", role=["user"], content=["Hi"])))


def test_what_comes_before_the_damage_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", lines("a", "b") + "{")
    other = write(tmp_path / "b.txt", b"\xff")
    found = read_files([path, other])
    assert [next(found), next(found)] == ["a", "b"]
    with fails("line 3 is not JSON"):
        next(found)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    found = read_files(path)
    path.unlink()
    with fails("No such file", FileNotFoundError):
        next(found)


@pytest.mark.parametrize("rows_per_group", [500, 24_000])
def test_of_a_large_parquet_file_only_a_part_is_in_memory(tmp_path, rows_per_group):
    random = np.random.default_rng(0)
    columns = {
        "text": [random.bytes(500).hex() for _ in range(24_000)],
        "other": [random.bytes(200) for _ in range(24_000)],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    before, most, found = pa.total_allocated_bytes(), 0, []
    for text in read_files(path):
        found.append(text)
        most = max(most, pa.total_allocated_bytes() - before)
    assert found == columns["text"]
    assert 0 < most < 8e6 < path.stat().st_size / 2


# --- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """No network, no waiting, and a cache of the test's own."""

    def unreachable(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    datasets.disable_progress_bars()
    yield tmp_path / "data"
    datasets.enable_progress_bars()


@pytest.fixture
def copy(hub):
    write(hub / "train.jsonl", lines(*({"id": i, "text": text} for i, text in enumerate(TEXTS))))
    write(hub / "test.jsonl", lines({"id": 9, "text": "test"}))
    return str(hub)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_gives_its_documents_streamed_or_loaded(copy, streaming):
    assert list(read_huggingface(copy, streaming=streaming)) == TEXTS
    assert list(read_huggingface(copy, split="test", streaming=streaming)) == ["test"]
    with fails(r"data, row 0 must be text, .*, not 0 \(int\)"):
        next(read_huggingface(copy, column="id", streaming=streaming))
    with fails(r"data.* has no column 'body'; it has \['id', 'text'\]"):
        next(read_huggingface(copy, column="body", streaming=streaming))
    with fails(r"^split of .*data must be one of \[.*'train'.*\], not 'valid'\.$"):
        read_huggingface(copy, split="valid", streaming=streaming)
    with fails(r"^subset of .*data must be one of \['default'\], not 'fr'\.$"):
        read_huggingface(copy, subset="fr", streaming=streaming)


def test_subsets_are_chosen_or_listed(hub):
    write(hub / "README.md", "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n"
          "- config_name: de\n  data_files: de.jsonl\n---\n")  # fmt: skip
    for name in ("en", "de"):
        write(hub / f"{name}.jsonl", lines({"text": name}))
    assert list(read_huggingface(str(hub), subset="de")) == ["de"]
    with fails(r"^subset of .*data must be one of \['en', 'de'\], not None\.$") as raised:
        read_huggingface(str(hub))
    assert raised.value.__cause__ is not None


def test_parts_of_a_split_need_loading(copy):
    assert list(read_huggingface(copy, split="train[1:2]", streaming=False)) == TEXTS[1:2]
    with fails(r"must be one of \['t[^\]]*\], not 'train\[:1\]'\. .* need streaming=False"):
        read_huggingface(copy, split="train[:1]")


@pytest.mark.parametrize("streaming", [True, False])
def test_chats_and_token_ids_come_from_a_dataset_as_from_a_file(hub, streaming):
    hub.mkdir()
    table(hub / "a.parquet", messages=[CHAT], input_ids=[[1, 2]])
    assert list(read_huggingface(str(hub), streaming=streaming)) == [CHAT]
    found = list(read_huggingface(str(hub), column="input_ids", streaming=streaming))
    assert found == [[1, 2]]


def test_other_columns_are_not_decoded_where_they_are_known(hub, monkeypatch):
    hub.mkdir()
    table(hub / "a.parquet", text=TEXTS, image=[b"no", b"image", b"."])
    seen = []
    watch = documents._documents
    monkeypatch.setattr(documents, "_documents", lambda rows, column: watch(spy(rows), column))

    def spy(rows):
        for where, row in rows:
            seen.append(list(row))
            yield where, row

    assert list(read_huggingface(str(hub))) == TEXTS
    assert seen == [["text"]] * 3


def test_a_dataset_without_files_is_an_error(hub):
    hub.mkdir()
    with fails(r"data cannot be opened \(EmptyDatasetError\): ", FileNotFoundError):
        read_huggingface(str(hub))


def test_a_kind_of_file_is_no_dataset_though_the_library_would_read_what_lies_around(
    tmp_path, monkeypatch
):
    write(tmp_path / "a.txt", "a")
    monkeypatch.chdir(tmp_path)
    with fails("^text is a kind of file, not a data set: pass the path of the files"):
        read("text")


def test_without_a_connection_the_error_says_so_and_what_else_there_is(hub):
    message = (
        r"^no-such-org/no-such-name cannot be read from the Hub: there is no connection\. .*"
        r"'hf download --repo-type dataset no-such-org/no-such-name --local-dir DIR'"
    )
    with fails(message, ConnectionError) as raised:
        read_huggingface("no-such-org/no-such-name")
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_offline_mode_is_named_as_the_reason(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with fails("from the Hub: HF_HUB_OFFLINE is set. Unset it, or download it", ConnectionError):
        read_huggingface("no-such-org/no-such-name")


def test_a_name_that_does_not_exist_is_an_error_with_the_remedies(hub, monkeypatch):
    def refuse(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."
        )

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with fails("^a/b cannot be read from the Hub: .*doesn't exist.* spelling .*'hf auth login'"):
        read_huggingface("a/b")


def test_any_other_failure_is_passed_on_with_its_kind(hub, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with fails(r"^a/b cannot be opened \(RuntimeError\): Dataset scripts are no") as raised:
        read_huggingface("a/b")
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_all_choices_reach_the_library(hub, monkeypatch):
    calls = []

    def load(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["a"], "body": ["b"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    chosen = {"split": "test", "revision": "v1", "streaming": False}
    assert list(read_huggingface("a/b", subset="en", column="body", **chosen)) == ["b"]
    assert calls == [(("a/b", "en"), chosen)]
    assert list(read_huggingface("a/b")) == ["a"]
    assert calls[1] == (("a/b", None), {"split": "train", "revision": None, "streaming": True})


def test_a_stream_that_breaks_says_after_how_many_documents(hub):
    write(hub / "a.jsonl", lines({"text": "a"}, {"text": "b"}))
    write(hub / "b.jsonl", '{"text": \n')
    found = read_huggingface(str(hub))
    assert [next(found), next(found)] == ["a", "b"]
    with fails(r"data broke off after 2 documents \(\w+\): ", OSError) as raised:
        next(found)
    assert raised.value.__cause__ is not None


def test_a_row_that_is_no_document_is_not_a_broken_stream(hub):
    write(hub / "a.jsonl", lines({"text": "a"}, {"text": None}))
    found = read_huggingface(str(hub))
    assert next(found) == "a"
    with fails(r"data, row 1 must be text, .*, not None"):
        next(found)


# --- whatever a user passes


def test_an_iterable_gives_its_documents_one_by_one():
    taken = []

    def source():
        for value in ("text", [1, 2], CHAT, None):
            taken.append(value)
            yield value

    found = read(source())
    assert taken == []
    assert [next(found), next(found), next(found)] == ["text", [1, 2], CHAT]
    with fails("^item 3 must be text"):
        next(found)
    assert list(read(np.array([[1, 2], [3, 4]])))[1].tolist() == [3, 4]
    assert list(read(mx.array([[1, 2], [3, 4]])))[1].tolist() == [3, 4]
    assert list(read([])) == []


def test_rows_of_a_dataset_that_is_open_give_their_column():
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "body": ["c", "d"]})
    assert list(read(data)) == ["a", "b"]
    assert list(read(data, "body")) == ["c", "d"]
    assert list(read(data["body"])) == ["c", "d"]
    assert list(read(data.to_iterable_dataset(), "body")) == ["c", "d"]


def test_splits_and_columns_are_to_be_chosen_from():
    data = datasets.Dataset.from_dict({"text": ["a"], "body": ["c"]})
    with fails(
        r"^dataset must .* not a DatasetDict of \['train'\]: .* such as dataset\['train'\]\."
    ):
        read(datasets.DatasetDict(train=data))
    with fails(
        r"not a DataFrame of \['text', 'body'\]: pass one of them, such as dataset\['text'\]"
    ):
        read(data.to_pandas())
    with fails(r"not a dict of \[\]: pass one of them\.$"):
        read({})
    assert list(read(data.to_pandas()["body"])) == ["c"]


@pytest.mark.parametrize("source", [None, 3, b"text", bytearray(b"text"), object()])
def test_what_holds_no_documents_is_an_error_at_once(source):
    with fails("^dataset must be documents, a path or the name of a data set on the Hub, not "):
        read(source)


def test_token_ids_that_are_not_in_a_list_are_an_error():
    with fails(r"^item 0 must be .*, not 5 \(int\)"):
        next(read([5, 6]))


def test_paths_globs_and_directories_are_files(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "read_huggingface", None)
    for name in ("my data/a.jsonl", "my data/b.jsonl", "org/name/a.jsonl"):
        write(tmp_path / name, lines({"text": name, "body": "x"}))
    both = ["my data/a.jsonl", "my data/b.jsonl"]
    assert list(read(tmp_path / "my data")) == both
    monkeypatch.chdir(tmp_path)
    assert list(read("my data")) == both
    assert list(read("my data/*.jsonl")) == both
    assert list(read("my data/b.jsonl", "body")) == ["x"]
    assert list(read("org/name")) == ["org/name/a.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(read("~/my data")) == both


@pytest.mark.parametrize(
    "name", ["texts.jsonl", "my.txt.gz", "./x", "~/x", "/no/x", "a/b/c.parquet"]
)
def test_what_looks_like_a_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(documents, "read_huggingface", None)
    with fails(re.escape(Path(name).name) + " does not exist", FileNotFoundError):
        read(name)
    with fails("does not exist", FileNotFoundError):
        read(Path("org/name"))


@pytest.mark.parametrize("name", ["roneneldan/TinyStories", "wikitext", "a/b-c_d.e", "org/v1.5"])
def test_other_names_are_those_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "read_huggingface", lambda name, column: iter([name, column]))
    assert list(read(name, "body")) == [name, "body"]


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat.", "two words", "line\nline", "", "x" * 200, "x" * 9000, "a/b/c", "a--b",
        "nul\0", "/ a\nb", "See notes.txt", "word.", "[1, 2]*",
    ],
    ids=lambda text: text[:12].encode("unicode_escape").decode(),
)  # fmt: skip
def test_a_single_text_is_to_be_put_in_a_list(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with fails(r"no path that exists and no such name\. If it is a text, put it in a list\.$"):
        read(text)
    assert list(read([text])) == [text]
