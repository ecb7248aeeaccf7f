"""``/v1/files`` by the official client and by clients that get it wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import FileDeleted, FileObject

from anabranch.api.fine_tuning.rows import MAX_LINE_BYTES, BadRow, check_file, row_of
from anabranch.errors import InvalidRequest
from anabranch.jobs import Workspace
from anabranch.training.tasks.chat import Chat

from .conftest import Api, EchoModel, LiveServer, make
from .test_refusals import check

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    workspace = Workspace.open(tmp_path_factory.mktemp("state"), max_file_bytes=20_000_000)
    with LiveServer(EchoModel(), workspace=workspace) as live:
        yield live
    workspace.close()


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    workspace = Workspace.open(tmp_path / "state")
    yield make(workspace=workspace)
    workspace.close()


def exactly(kind: type[Any], item: Any) -> None:
    """What the client made of the answer is what its types say, literals included."""
    kind.model_validate(item.model_dump(), strict=True)


def test_the_life_of_a_file(client: openai.OpenAI) -> None:
    content = jsonl(ROW, ROW)
    made = client.files.create(file=("my data.jsonl", content), purpose="fine-tune")
    exactly(FileObject, made)
    assert (made.filename, made.bytes, made.purpose) == ("my data.jsonl", len(content), "fine-tune")
    assert client.files.wait_for_processing(made.id).status == "processed"
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    exactly(FileDeleted, client.files.delete(made.id))
    for method in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            method(made.id)
        assert missing.value.code == "file_not_found"


def test_other_purposes_are_kept_as_they_come(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "any.bin"
    path.write_bytes(bytes(range(256)))
    for purpose in ("assistants", "batch", "vision", "user_data"):
        made = client.files.create(file=path, purpose=purpose)  # type: ignore[arg-type]
        exactly(FileObject, made)
        answer = client.files.content(made.id)
        assert answer.read() == path.read_bytes()
        assert answer.response.headers["content-disposition"] == "attachment"
        client.files.delete(made.id)


def test_lists(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{n}", b"x"), purpose="batch").id for n in range(5)]
    other = client.files.create(file=("v", b"x"), purpose="vision").id
    assert [f.id for f in client.files.list(limit=2)] == [other, *ids[::-1]]
    assert [f.id for f in client.files.list(purpose="batch", order="asc", limit=2)] == ids
    page = client.files.list(after=ids[1], order="asc", limit=2)
    assert ([f.id for f in page.data], page.has_more) == (ids[2:4], True)
    with pytest.raises(openai.BadRequestError, match="after"):
        client.files.list(after="file-nothing")
    for id_ in (*ids, other):
        client.files.delete(id_)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1.0", "limit"),
        ("limit=x", "limit"),
        ("limit=1&limit=2", "limit"),
        ("order=up", "order"),
        ("aftr=x", "aftr"),
        ("after=", "after"),
    ],
)
def test_bad_queries(api: Api, path: str, param: str) -> None:
    check(api.get(f"/v1/files?{path}"), 400, param)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"hello\n", "line 1: not valid JSON"),
        (jsonl(ROW) + b'{"messages": [}\n', "line 2: not valid JSON"),
        (b'\n\n{"messages": \xff}\n', "line 3: byte 13 is not valid UTF-8"),
        (jsonl([1]), "line 1: is not a JSON object"),
        (jsonl({}), "line 1: has no 'messages'"),
        (jsonl({"mesages": []}), "unknown key 'mesages' (did you mean 'messages'?)"),
        (jsonl({"messages": {}}), "'messages' is not a list"),
        (jsonl({"messages": []}), "'messages' is empty"),
        (jsonl({"messages": ["hi"]}), "messages[0] is not an object"),
        (jsonl({**ROW, "tools": []}), "unknown key 'tools'"),
        (jsonl({"messages": ROW["messages"][:1]}), "the last message is by 'user'"),
        (jsonl({"messages": [{"content": "x"}]}), "messages[0] has no role"),
        (jsonl({"messages": [{"role": "bot", "content": "x"}]}), "unknown role 'bot'"),
        (jsonl({"messages": [{"role": "tool", "content": "x"}]}), "unknown role 'tool'"),
        (jsonl({"messages": [{"role": "assistant"}]}), "messages[0].content is missing"),
        (jsonl({"messages": [{"role": "assistant", "content": 5}]}), "not text but int"),
        (jsonl({"messages": [{"role": "assistant", "content": [{}]}]}), "not text but list"),
        (
            jsonl({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}),
            "weight is 0.5; it must be 0 or 1",
        ),
        (
            jsonl({"messages": [{"role": "assistant", "content": "x", "weight": True}]}),
            "weight is True",
        ),
        (
            jsonl({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}),
            "nothing to learn",
        ),
        (
            jsonl(
                {"messages": [{"role": "user", "content": "x", "weight": 1}, ROW["messages"][1]]}
            ),
            "only the assistant's",
        ),
        (jsonl({"prompt": "x"}), "'completion' is missing"),
        (jsonl({"prompt": "x", "completion": 3}), "'completion' is not text"),
        (jsonl({"prompt": "x", "completion": "y", "weight": 1}), "unknown key 'weight'"),
        (b'{"prompt": "\\ud800", "completion": ""}\n', "lone surrogate"),
        (b'{"prompt": NaN, "completion": ""}\n', "NaN"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_stored(api: Api, content: bytes, words: str) -> None:
    answer = upload(api, content)
    check(answer, 400, "file", words)
    assert api.get("/v1/files").json()["data"] == []


def test_the_first_twenty_bad_lines_and_how_many_more(api: Api) -> None:
    content = b"".join(jsonl(ROW) + b"oops\n" for _ in range(25))
    message = check(upload(api, content), 400, "file")["message"]
    assert message.startswith("file: 25 lines are not valid: line 2: ")
    assert "line 40: " in message
    assert "line 42" not in message
    assert message.endswith("; and 5 more")


def test_blank_lines_a_mark_and_no_last_newline_are_no_defects(api: Api) -> None:
    row = jsonl(ROW)
    for content in (
        b"\xef\xbb\xbf" + row,
        b"\n\r\n" + row + b" \n",
        row.rstrip(),
        row[:-1] + b"\r\n",
    ):
        assert upload(api, content).status_code == 200


def test_an_endless_line_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(b'{"prompt": "' + b"x" * (3 * MAX_LINE_BYTES) + b'"}\n' + jsonl(ROW, 5))
    with pytest.raises(InvalidRequest, match=r"2 lines are.*line 1: is longer.*line 3: is not"):
        check_file(path)


def upload(api: Api, content: bytes, purpose: str = "fine-tune", **more: Any) -> httpx.Response:
    files = {"file": ("a.jsonl", io.BytesIO(content))}
    return api.request("POST", "/v1/files", files=files, data={"purpose": purpose, **more})


@pytest.mark.parametrize(
    ("options", "status", "param"),
    [
        ({"json": {}}, 415, None),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, None),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            400,
            None,
        ),
        ({"files": {"file": b"x"}}, 400, "purpose"),
        ({"files": {"file": b"x"}, "data": {"purpose": "evals"}}, 400, "purpose"),
        ({"files": {"file": b"x"}, "data": {"purpose": ["batch", "vision"]}}, 400, "purpose"),
        ({"files": {"file": b"x"}, "data": {"purpose": "batch", "prupose": "x"}}, 400, "prupose"),
        (
            {"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[seconds]": "9"}},
            400,
            "expires_after",
        ),
        ({"files": {"fle": b"x"}, "data": {"purpose": "batch"}}, 400, "fle"),
        ({"files": {"purpose": b"x"}}, 400, "purpose"),
    ],
)
def test_bad_forms(api: Api, options: dict[str, Any], status: int, param: str | None) -> None:
    check(api.request("POST", "/v1/files", **options), status, param)
    assert api.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\y.jsonl", "y.jsonl"),
        ("a\u200bb", "ab"),
        ("..", ".."),
    ],
)
def test_a_filename_is_only_a_name(api: Api, given: str, kept: str) -> None:
    files = {"file": (given, b"x")}
    answer = api.request("POST", "/v1/files", files=files, data={"purpose": "batch"})
    assert answer.json()["filename"] == kept


def test_a_file_that_is_too_large(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="20000000") as refused:
        client.files.create(file=("a", bytes(20_000_001)), purpose="batch")
    assert refused.value.status_code == 413
    assert list(client.files.list()) == []


def test_without_a_state_folder_there_are_no_such_routes() -> None:
    check(make().get("/v1/files"), 404, None, "there is no GET /v1/files")


def test_a_key_sees_only_its_own_files(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)
    with LiveServer(EchoModel(), workspace=workspace, api_keys=("a", "b")) as live:
        mine, theirs = (
            openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) for key in "ab"
        )
        made = mine.files.create(file=("x", b"x"), purpose="batch")
        assert [f.id for f in mine.files.list()] == [made.id]
        assert list(theirs.files.list()) == []
        for method in (theirs.files.retrieve, theirs.files.content, theirs.files.delete):
            with pytest.raises(openai.NotFoundError):
                method(made.id)
        with pytest.raises(openai.BadRequestError):
            theirs.files.list(after=made.id)
        assert mine.files.content(made.id).read() == b"x"
    workspace.close()


roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "", None, 5])
contents = st.one_of(st.text(), st.none(), st.integers(), st.lists(st.text(), max_size=2))
weights = st.sampled_from([0, 1, 0.0, 1.0, 2, None, True, "1", []])
messages = st.fixed_dictionaries(
    {}, optional={"role": roles, "content": contents, "weight": weights, "name": st.text()}
)
good = st.fixed_dictionaries({"role": roles, "content": st.text()})
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)
rows = st.one_of(
    values,
    st.fixed_dictionaries({"messages": st.lists(st.one_of(messages, good, values), max_size=4)}),
    st.fixed_dictionaries({"messages": st.lists(good, min_size=1, max_size=3)}),
    st.fixed_dictionaries({}, optional={"prompt": contents, "completion": contents}),
)


@given(st.one_of(rows.map(lambda row: json.dumps(row).encode()), st.binary()))
@settings(max_examples=400)
def test_a_row_is_refused_or_can_be_rendered(raw: bytes) -> None:
    try:
        row = row_of(raw)
    except BadRow as defect:
        assert str(defect)
        return
    (rendered,) = Chat().render(row)
    assert rendered.messages[-1]["role"] == "assistant"
    answers = {i for i, m in enumerate(rendered.messages) if m["role"] == "assistant"}
    assert answers - rendered.untrained


@given(st.lists(st.sampled_from([b"", b"  ", b"oops", b"[]", jsonl(ROW)[:-1]]), max_size=60))
@settings(max_examples=100)
def test_every_bad_line_is_counted(tmp_path_factory: Any, content: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(b"\n".join(content))
    bad = [n for n, line in enumerate(content, start=1) if line in (b"oops", b"[]")]
    good_rows = content.count(jsonl(ROW)[:-1])
    if not bad and good_rows:
        check_file(path)
        return
    with pytest.raises(InvalidRequest) as refused:
        check_file(path)
    message = str(refused.value)
    assert all(f"line {line}:" in message for line in bad[:20])
    assert message.count("line ") - message.startswith("file: 1 line ") == min(20, len(bad))
    assert ("more" in message) == (len(bad) > 20)


MEASURE = """
import io, json, resource, sys
from pathlib import Path
from anabranch.api.fine_tuning.rows import check_file
from anabranch.jobs import Workspace
row = json.dumps({"prompt": "x" * 900, "completion": "y" * 80}).encode() + b"\\n"
size = 50_000_000
with open("big.jsonl", "wb") as file:
    for _ in range(size // len(row)):
        file.write(row)
workspace = Workspace.open(Path("state"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("big.jsonl", "rb") as source:
    kept = workspace.files.save(source, "big", "fine-tune", check=check_file)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(kept.size, after - before)
"""


def test_fifty_megabytes_are_checked_in_little_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    size, grown = map(int, done.stdout.split())
    assert size > 49_000_000
    scale = 1 if sys.platform != "darwin" else 1024
    assert grown / scale < 20_000, f"grew by {grown} KiB"
