"""Downloads: against a local server that speaks as both hubs do, and misbehaves on request.

`server.plan[name]` says what happens to the next requests for a file, one entry each.
"""

import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.config import lock, parse
from babyllama.errors import ConfigError, DataError
from data_process import fetch
from data_process.fetch import PAGE, FetchConfig, is_inside, places
from data_process.registry import Source, catalog, data_sets

REPO = "owner/set"
OLD = bytes(range(256)) * 20
NEW = OLD[::-1] + b"new"
SAFE = {"train.jsonl": OLD, "data/测试 1#%20.json": b"{}\n" * 99, "data/empty.txt": b""}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        """What huggingface_hub asks for first: the version, and where the bytes lie."""
        state, path = self.server.state, unquote(urlsplit(self.path).path)
        state.asked.append((path, dict(self.headers)))
        name = path.removeprefix(f"/datasets/{REPO}/resolve/main/")
        if state.plan[name] and state.plan[name][0][0] == "status":
            return self.answer(state.plan[name].pop(0)[1], b"", {"X-Error-Message": state.said})
        if name not in state.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        tag = state.hashes.get(name, "").removeprefix("sha256:") or hashlib.sha1(
            state.files[name]).hexdigest()  # fmt: skip
        self.answer(302, b"", {
            "Location": f"http://localhost:{state.port}/cdn/{quote(name)}", "ETag": f'"{tag}"',
            "X-Repo-Commit": "0" * 40, "X-Linked-Size": len(state.files[name]),
            "X-Linked-ETag": f'"{tag}"',
        })  # fmt: skip
        return None

    def do_GET(self) -> None:
        state, address = self.server.state, urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        state.asked.append((path, dict(self.headers)))
        if path == f"/api/datasets/{REPO}":
            self.huggingface()
        elif path == f"/api/v1/datasets/{REPO}/repo/tree":
            self.modelscope(int(query["PageNumber"][0]), int(query["PageSize"][0]))
        elif path.startswith(place := f"/datasets/{REPO}/resolve/main/"):
            # As the hub does: another host has the bytes, and gives them no ETag.
            name = quote(path.removeprefix(place))
            self.answer(302, b"", {"Location": f"http://localhost:{state.port}/cdn/{name}"})
        elif path == f"/api/v1/datasets/{REPO}/repo":
            self.file(query["FilePath"][0], {})
        elif path.startswith("/odd/"):
            self.answer(302, b"x" * 10, {"Location": state.location})
        elif path.startswith("/cdn/"):
            self.file(path.removeprefix("/cdn/"), {})
        else:
            self.file(path.rsplit("/", 1)[-1], state.validators)

    def huggingface(self) -> None:
        state = self.server.state
        files = [
            {"rfilename": name, "size": state.sizes.get(name, len(data)), "blobId": "git"}
            | ({"lfs": {"sha256": state.hashes[name], "size": 0, "pointerSize": 0}}
               if name in state.hashes else {})
            for name, data in state.files.items()
        ]  # fmt: skip
        known = {"id": REPO, "private": False, "disabled": False, "downloads": 0, "likes": 0,
                 "gated": False, "tags": [], "siblings": files}  # fmt: skip
        self.answer(state.status, json.dumps(state.listing or known).encode(), {})

    def modelscope(self, number: int, size: int) -> None:
        state = self.server.state
        entries = [{"Path": "data", "Type": "tree", "Size": 0}]
        entries += [
            {"Path": name, "Type": "blob", "Size": len(data), "Sha256": state.hashes.get(name, "")}
            for name, data in state.files.items()
        ]
        page = entries[(number - 1) * size : number * size]
        self.answer(200, json.dumps({"Code": 200, "Data": {"Files": page}}).encode(), {})

    def file(self, name: str, headers: dict[str, str]) -> None:
        """The bytes of a file, and what the plan has in store for this request."""
        state = self.server.state
        if name not in state.files:
            return self.answer(404, b"", {})
        event, n = state.plan[name].pop(0) if state.plan[name] else ("", 0)
        if event == "change":
            state.files[name], headers["ETag"] = (NEW, '"new"') if n else (OLD, '"old"')
            state.validators = {"ETag": headers["ETag"]} if state.validators else {}
        if event == "status":
            told = {"X-Error-Message": state.said}
            return self.answer(n, b"no", told)
        if event == "page":
            return self.answer(200, b"<html>log in</html>", {"Content-Type": "text/html; x"})
        data, headers = state.files[name], dict(state.validators if headers else {})
        if event == "packed":
            return self.answer(200, gzip.compress(data), {"Content-Encoding": "gzip"} | headers)
        asked = self.headers.get("Range", "")
        valid = self.headers.get("If-Range") in (None, *headers.values())
        start = int(asked[6:-1]) if asked and valid and event != "no range" else 0
        if start > len(data) or (start and event == "416"):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        start += 5 if start and event == "wrong start" else 0
        if start:
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            headers |= {} if event == "bare" else {"Content-Range": span}
        cut = n if event == "drop" else None
        self.answer(206 if start else 200, data[start:], headers, cut)

    def answer(self, status: int, body: bytes, headers: dict, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def running() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "BLOCK", 100)
        patch.setattr(fetch, "WAIT_S", 0.0)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)  # as the benchmarks set it
        for name, value in {"NO_PROXY": "127.0.0.1,localhost", "HF_TOKEN": ""}.items():
            patch.setenv(name, value)
        patch.delenv("HF_ENDPOINT", raising=False)
        yield server
    server.shutdown()
    server.server_close()


def fresh(server: ThreadingHTTPServer) -> SimpleNamespace:
    """A server that behaves, with the files of SAFE and their hashes."""
    server.state = SimpleNamespace(
        files=dict(SAFE), hashes={"train.jsonl": sha(OLD)}, sizes={}, listing=None,
        status=200, said="", location="",
        validators={"ETag": '"old"'}, plan=defaultdict(list), asked=[],
        port=server.server_port,
        url=f"http://127.0.0.1:{server.server_port}",
    )  # fmt: skip
    return server.state


@pytest.fixture
def server(running: ThreadingHTTPServer) -> SimpleNamespace:
    return fresh(running)


def bring(server: SimpleNamespace, out: Path, place: str = "url", **settings: object) -> Path:
    """Fetch a set that is at all three places; returns its directory."""
    known = {"sha256": settings.pop("sha256", {}), "files": settings.pop("patterns", ())}
    urls = tuple(f"{server.url}/files/{name}" for name in settings.pop("urls", ["train.jsonl"]))
    source = Source("home", huggingface=REPO, modelscope=REPO, urls=urls, **known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "TRIES", settings.pop("tries", 3))
        endpoint = settings.pop("endpoint", server.url)
        patch.setattr(fetch, "ENDPOINTS", dict.fromkeys(fetch.ENDPOINTS, endpoint))
        cfg = FetchConfig(from_=place, out=out, **settings)
        fetch.fetch(replace(data_sets("csl")[0], name="set", source=source), cfg)
    return out / "set"


def contents(root: Path) -> dict[str, bytes]:
    """Every file but the lock, and what huggingface_hub notes."""
    paths = [p for p in root.rglob("*") if p.is_file() and p.name not in ("lock", "lock.txt")]
    paths = [path for path in paths if ".hub" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def ranges(server: SimpleNamespace) -> list[str]:
    """The Range header of every request for a file's bytes."""
    return [h.get("Range", "") for path, h in server.asked if path.startswith(("/cdn", "/files"))]


@pytest.mark.parametrize("place", ["huggingface", "modelscope"])
def test_all_that_a_hub_lists_arrives_and_is_not_fetched_twice(server, tmp_path, place):
    server.files[".gitattributes"] = server.files["dataset_infos.json"] = b"no data"
    assert contents(bring(server, tmp_path, place)) == SAFE
    before = len(server.asked)
    bring(server, tmp_path, place)
    assert all(path.startswith("/api") and "cdn" not in path for path, _ in server.asked[before:])


def test_direct_addresses_arrive(server, tmp_path):
    hashes = {"train.jsonl": sha(OLD)}
    assert contents(bring(server, tmp_path, sha256=hashes)) == {"train.jsonl": OLD}


def test_every_page_of_a_long_listing_counts(server, tmp_path):
    server.files = {f"{n:03}.txt": b"%d" % n for n in range(PAGE + 1)}
    for place in ("huggingface", "modelscope"):
        target = bring(server, tmp_path / place, place, files="001.txt,200.txt")
        assert contents(target) == {"001.txt": b"1", "200.txt": b"200"}


@pytest.mark.parametrize("place", ["huggingface", "modelscope", "url"])
def test_a_connection_that_breaks_again_and_again_is_taken_up_where_it_broke(
    server, tmp_path, place
):
    server.plan["train.jsonl"] = [("", 0)] * (place == "url") + [("drop", 1000)] * 5
    known = {"train.jsonl": sha(OLD)}
    found = contents(bring(server, tmp_path, place, tries=2, sha256=known))
    assert found["train.jsonl"] == OLD
    if place != "modelscope":
        starts = [int(asked[6:-1]) for asked in ranges(server) if asked and asked != "bytes=0-"]
        assert starts == [1000, 2000, 3000, 4000, 5000]


def test_what_has_no_known_hash_starts_anew_and_is_one_version(server, tmp_path):
    server.plan["train.jsonl"] = [("", 0), ("drop", 700), ("change", 1)]
    with pytest.raises(DataError, match="wanted 5,120 bytes, found"):  # as was stated before
        bring(server, tmp_path)
    assert contents(bring(server, tmp_path)) == {"train.jsonl": NEW}


def test_a_new_version_on_the_hub_does_not_go_on_from_the_old_one(server, tmp_path):
    server.plan["train.jsonl"] = [("drop", 700)]
    with pytest.raises(DataError):
        bring(server, tmp_path, "huggingface", tries=1)
    server.files["train.jsonl"], server.hashes["train.jsonl"] = NEW, sha(NEW)
    assert contents(bring(server, tmp_path, "huggingface"))["train.jsonl"] == NEW
    assert not any(asked.removeprefix("bytes=0-") for asked in ranges(server))


@pytest.mark.parametrize("event", ["no range", "416", "packed"])
def test_where_the_server_cannot_go_on_the_file_starts_anew(server, tmp_path, event):
    server.plan["train.jsonl"] = [("", 0), ("drop", 700), (event, 0)]
    found = contents(bring(server, tmp_path, sha256={"train.jsonl": sha(OLD)}))
    assert found == {"train.jsonl": OLD}


def test_a_wrong_hash_leaves_no_file(server, tmp_path):
    server.hashes["train.jsonl"] = sha(b"other")
    for place in ("huggingface", "modelscope"):
        with pytest.raises(DataError, match=rf"SHA-256 {sha(b'other')[:16]}.*{sha(OLD)[:16]}"):
            bring(server, tmp_path, place, files="train.jsonl")
    assert contents(tmp_path) == {}
    server.hashes["train.jsonl"] = sha(OLD)
    with pytest.raises(DataError, match="SHA-256 9999"):
        bring(server, tmp_path, "huggingface", sha256={"empty.txt": "9999"})


EVENTS = st.one_of(
    st.tuples(st.just("drop"), st.integers(0, 6000)),
    st.tuples(st.just("change"), st.booleans()),
    st.sampled_from([(e, 0) for e in ("no range", "416", "wrong start", "bare", "packed", "")]),
    st.just(("status", 503)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(EVENTS, max_size=12), st.booleans())
def test_whatever_happens_a_file_is_one_whole_version_or_not_there(
    running, tmp_path_factory, events, is_hashed
):
    server, out = fresh(running), tmp_path_factory.mktemp("any")
    server.plan["train.jsonl"] = events
    hashes = {"train.jsonl": sha(OLD)} if is_hashed else {}
    for _ in range(2):
        try:
            found = contents(bring(server, out, tries=2, sha256=hashes)).get("train.jsonl")
        except DataError:
            found = contents(out).get("set/train.jsonl")
        assert found in ([OLD, None] if is_hashed else [OLD, NEW, None])


@pytest.mark.parametrize("status, n_requests", [(404, 1), (403, 1), (401, 1), (500, 3), (429, 3)])
def test_a_refusal_is_final_and_a_busy_server_is_asked_again(server, tmp_path, status, n_requests):
    server.plan["train.jsonl"] = [("status", status)] * 9
    with pytest.raises(DataError, match=rf"^set: .*train.jsonl.*{status}.*--from modelscope"):
        bring(server, tmp_path)
    assert len(ranges(server)) == n_requests and contents(tmp_path) == {}
    server.plan["train.jsonl"] = [("status", 500), ("status", 429)]
    assert contents(bring(server, tmp_path)) == {"train.jsonl": OLD}


BAD_PATHS = [
    "../evil",
    "/evil",
    "a/../../evil",
    "a\\..\\evil",
    "C:evil",
    "a//b",
    "",
    "a\0b",
    ".. /x",
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_outside_the_set_is_refused_before_anything_is_written(server, tmp_path, path):
    assert not is_inside(path)
    server.files = {"good.txt": b"good", path: b"evil"}
    for place in ("huggingface", "modelscope"):
        with pytest.raises(DataError, match="wanted file names inside the set"):
            bring(server, tmp_path / "raw", place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listing", [{"error": "x"}, [{}], ["x"], {"id": "x", "siblings": [7]},
                                     {"id": "x", "siblings": [{"rfilename": 7}]}])  # fmt: skip
def test_a_listing_of_another_shape_is_one_clear_message(server, tmp_path, listing):
    server.listing = listing
    with pytest.raises(DataError, match="wanted a listing as Hugging Face sends it"):
        bring(server, tmp_path, "huggingface")


def test_the_token_goes_to_the_hub_alone(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    for place in ("huggingface", "modelscope", "url"):
        bring(server, tmp_path / place, place)
    told = {path.split("/")[1] for path, h in server.asked if "hf_secret" in str(h)}
    silent = {path.split("/")[1] for path, h in server.asked if "hf_secret" not in str(h)}
    assert told == {"api", "datasets"} and {"cdn", "files"} <= silent
    assert not any("/v1/" in path for path, h in server.asked if "hf_secret" in str(h))


def test_too_little_space_is_found_before_anything_is_written(server, tmp_path):
    server.sizes["train.jsonl"] = 10**18
    with pytest.raises(DataError, match=r"wanted 1\.\d+EB of space, found .*--out"):
        bring(server, tmp_path, "huggingface")
    assert list(tmp_path.iterdir()) == []


ODD = ["http://[", "http://a" + "a" * 70 + ".invalid/", "file:///etc/passwd", "//", "http://\x00/x",
       "ftp://a/b", "http://xn--/"]  # fmt: skip


@pytest.mark.parametrize("location", [*ODD, "/odd/again"])
def test_an_odd_redirect_is_one_clear_message(server, tmp_path, monkeypatch, location):
    monkeypatch.setattr(fetch, "TRIES", 1)
    monkeypatch.setattr(fetch, "TIMEOUT_S", 2)
    server.location = location
    source = Source("home", urls=(f"{server.url}/odd/train.jsonl",))
    cfg = FetchConfig(from_="url", out=tmp_path)
    with pytest.raises(DataError, match=r"^set: .*train\.jsonl"):
        fetch.fetch(replace(data_sets("csl")[0], name="set", source=source), cfg)


def test_a_listing_of_lists_in_lists_is_refused(server, tmp_path):
    server.listing = json.loads("[" * 400 + "]" * 400)
    with pytest.raises(DataError, match="wanted a listing"):
        bring(server, tmp_path, "huggingface")


@pytest.mark.parametrize("place", ["huggingface", "url"])
def test_what_a_server_says_does_not_steer_the_terminal(server, tmp_path, place):
    server.said = "\x1b[2Jgone"
    server.plan["train.jsonl"] = [("", 0)] * (place == "url") + [("status", 403)]
    with pytest.raises(DataError, match=r"403 .*x1b\[2Jgone") as error:
        bring(server, tmp_path, place, files="train.jsonl")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("size", [len(OLD) - 1, len(OLD) + 1])
def test_a_size_other_than_listed_leaves_no_file(server, tmp_path, size):
    server.sizes["train.jsonl"] = size
    server.hashes = {}
    with pytest.raises(DataError, match=r"wanted 5,1\d\d bytes, found 5,120"):
        bring(server, tmp_path, "huggingface", files="train.jsonl")
    assert "train.jsonl" not in contents(tmp_path / "set")


def test_what_stands_in_for_the_data_is_refused(server, tmp_path):
    server.plan["train.jsonl"] = [("", 0), ("page", 0)]
    with pytest.raises(DataError, match="found a web page"):
        bring(server, tmp_path)
    server.files["train.jsonl"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    with pytest.raises(DataError, match="git-lfs"):
        bring(server, tmp_path)
    assert contents(tmp_path) == {}


def test_an_old_file_stays_until_the_new_one_is_whole(server, tmp_path, capsys):
    path = tmp_path / "set" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(OLD[:-1] + b"?")
    server.plan["train.jsonl"] = [("drop", 700)]
    with pytest.raises(DataError):
        bring(server, tmp_path, "huggingface", tries=1)
    assert path.read_bytes() == OLD[:-1] + b"?"
    bring(server, tmp_path, "huggingface")
    assert path.read_bytes() == OLD
    assert "wanted SHA-256" in capsys.readouterr().err


def test_patterns_choose_files_and_one_that_fits_nothing_is_told(server, tmp_path, capsys):
    patterns = ("*.json", "dev*")
    target = bring(server, tmp_path, "huggingface", patterns=patterns)
    assert set(contents(target)) == {"data/测试 1#%20.json"}
    assert "no file like dev*" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"wanted files like dev\*, found 3 others: train.jsonl"):
        bring(server, tmp_path, "huggingface", files="train.jsonl, dev*")


def test_a_dry_run_shows_sizes_and_writes_nothing(server, tmp_path, capsys):
    for place in ("huggingface", "url"):
        bring(server, tmp_path, place, dry_run=True)
        assert "5.12kB  train.jsonl" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_two_downloads_into_one_directory_exclude_each_other(server, tmp_path):
    (tmp_path / "set").mkdir()
    with lock(tmp_path / "set"), pytest.raises(ConfigError, match=r"in use .*--out"):
        bring(server, tmp_path)
    assert contents(bring(server, tmp_path)) == {"train.jsonl": OLD}


def test_a_hub_that_is_set_offline_is_told(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"found HF_HUB_OFFLINE .* set; unset them"):
        bring(server, tmp_path, "huggingface")


def test_no_network_is_one_clear_message(server, tmp_path):
    with pytest.raises(DataError, match=r"no connection .* 2 times in a row.*--from modelscope"):
        bring(server, tmp_path, "huggingface", endpoint="http://127.0.0.1:9", tries=2)


@pytest.mark.parametrize(
    "words, message",
    [
        (["nosuchset"], "wanted a data set, found 'nosuchset'"),
        (["csl", "--from", "there"], "from_"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(script, words, message):
    assert message in script("data_process/fetch.py", *words).error


def test_an_address_without_scheme_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(ConfigError, match="HF_ENDPOINT: wanted an address such as http"):
        bring(server, tmp_path, "huggingface")


def test_a_package_needs_no_download(script):
    outcome = script("data_process/fetch.py", "sample")
    assert outcome.code == 0 and outcome.out.count("which is installed") == 3


def test_what_must_be_fetched_by_hand_is_told_how_and_where_to(script, tmp_path):
    by_hand = [name for name in catalog() if data_sets(name)[0].source.manual]
    name = next(
        n for n in by_hand if not (data_sets(n)[0].package or places(data_sets(n)[0].source))
    )
    error = script("data_process/fetch.py", name, "--out", tmp_path).error
    assert data_sets(name)[0].source.manual in error
    assert f"into {tmp_path}/{name}, then run" in error and f"--raw {tmp_path}/{name}" in error


def test_from_is_a_word_of_the_command_line():
    for words in (["x", "--from", "url"], ["--from=url", "x"], ["x", "--from_", "url"]):
        cfg = parse(FetchConfig, "", words, positional=("dataset",))
        assert (cfg.dataset, cfg.from_) == ("x", "url")


@pytest.mark.parametrize("name", catalog())
def test_every_set_says_where_it_comes_from(name):
    source = data_sets(name)[0].source
    repos = [repo for repo in (source.huggingface, source.modelscope) if repo]
    names = [urlsplit(url).path.rsplit("/", 1)[-1] for url in source.urls]
    assert repos or names or source.manual or source.home
    assert all(repo.count("/") == 1 and repo.strip("/") == repo for repo in repos)
    assert all(names) and len(set(names)) == len(names)
    assert all(url.startswith("https://") for url in source.urls)
    assert all(len(value) == 64 for value in source.sha256.values())
    assert not isinstance(source.files, str) and not isinstance(source.urls, str)
