import errno
import importlib
import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from teal_jax import hub
from teal_jax.errors import ModelNotFoundError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MISTRAL = "mistralai/Mistral-7B-v0.1"
WHOLE = ("config.json", "model.safetensors", "tokenizer.json")


def put(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text("{}")
    return directory


def cached(cache: Path, repo: str, *names: str, ref: str = "main") -> Path:
    """A snapshot as the hub library lays it out: files are links into blobs."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = put(storage / "snapshots" / COMMIT)
    put(storage / "blobs", *names)
    for name in names:
        (snapshot / name).symlink_to(storage / "blobs" / name)
    put(storage / "refs")
    (storage / "refs" / ref).write_text(COMMIT)
    return snapshot


def sharded(snapshot: Path, *shards: str) -> None:
    (snapshot / hub.INDEX).unlink(missing_ok=True)
    (snapshot / hub.INDEX).write_text(json.dumps({"weight_map": {f"w{i}": s for i, s in enumerate(shards)}}))


@pytest.fixture
def online(monkeypatch):
    """`online(error or function)`: the hub can be reached, and what a download does."""
    local = huggingface_hub.snapshot_download

    def install(outcome):
        calls = []

        def snapshot_download(repo, *, local_files_only, **options):
            if local_files_only:
                return local(repo, local_files_only=True, **options)
            calls.append((repo, options))
            if isinstance(outcome, Exception):
                raise outcome
            return str(outcome())

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return install


def http_error(kind):
    httpx = importlib.import_module(errors.HTTPError.__module__.split(".")[0])  # the hub library's: httpx or httpx2
    request = httpx.Request("GET", "https://hub.invalid/api")
    return kind("401 Client Error.\nmore", response=httpx.Response(401, request=request))


def refused(*args, **options) -> ModelNotFoundError:
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve(*args, **options)
    assert caught.value.hint, "an error says what to do"
    return caught.value


# Directories


@pytest.mark.parametrize("marker", ["config.json", "teal.json"])
@pytest.mark.parametrize("kind", [str, Path])
def test_directory_is_taken_as_it_is(tmp_path, marker, kind):
    model = put(tmp_path / "model", marker)
    assert hub.resolve(kind(model)) == model


def test_relative_directory_comes_before_an_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "mistral-7b", "config.json")
    assert hub.resolve("mistral-7b") == tmp_path / "mistral-7b"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "model", "config.json")
    assert hub.resolve("~/model") == tmp_path / "model"


def test_directory_without_a_model(tmp_path):
    error = refused(put(tmp_path / "m", "pytorch_model.bin"))
    assert "pytorch_model.bin but neither config.json" in error.message


def test_file_instead_of_directory(tmp_path):
    error = refused(put(tmp_path, "config.json") / "config.json")
    assert "is a file" in error.message
    assert str(tmp_path) in error.hint


@pytest.mark.parametrize(
    "name", ["./nowhere", "nowhere/", "/no/where", "a/b/c", "~no-such-user/model", "C:\\models\\m"]
)
def test_path_that_does_not_exist(name):
    assert "no directory" in refused(name).message


def test_missing_path_lists_its_neighbours(tmp_path):
    put(tmp_path / "llama-tiny", "config.json")
    assert "llama-tiny" in refused(tmp_path / "lama-tiny").hint


def test_directory_has_no_revision(tmp_path):
    assert "no revisions" in refused(put(tmp_path, "config.json"), revision="v2").message


# Aliases


def test_aliases_are_hub_ids():
    for alias, repo in hub.ALIASES.items():
        assert alias == alias.lower()
        validate_repo_id(repo)
        assert repo.count("/") == 1
    assert hub.ALIASES["mistral-7b"] == MISTRAL
    assert hub.is_gated(hub.ALIASES["llama-3.2-1b"])


@pytest.mark.parametrize("alias", sorted(hub.ALIASES))
def test_alias_resolves_from_the_cache(tmp_path, alias):
    snapshot = cached(tmp_path, hub.ALIASES[alias], *WHOLE)
    assert hub.resolve(alias, cache_dir=tmp_path) == snapshot


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("mistral7b", "mistral-7b"), ("Llama-3-8B", "llama-3-8b"), ("llama-3.1-8B-instuct", "llama-3.1-8b-instruct")],
)
def test_typo_gets_a_suggestion(typo, meant):
    error = refused(typo)
    assert meant in error.hint.split("?")[0]
    assert "llama-2-70b" in error.hint, "all aliases are listed"


@pytest.mark.parametrize("name", ["", "gpt2", "x" * 5000, "tell me a story", "a\0b"])
def test_no_such_name(name):
    assert "embedded" in refused(name).hint


def test_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED_DIRECTORY", put(tmp_path / "embedded", "config.json"))
    assert hub.resolve("embedded") == tmp_path / "embedded"
    monkeypatch.setattr(hub, "EMBEDDED_DIRECTORY", tmp_path / "gone")
    assert "reinstall" in refused("embedded").hint


# The cache


def test_whole_snapshot_needs_no_network(tmp_path, online):
    calls = online(AssertionError("asked the network"))
    snapshot = cached(tmp_path, "org/name", *WHOLE)
    assert hub.resolve("org/name", cache_dir=tmp_path) == snapshot
    assert not calls


def test_sharded_snapshot(tmp_path):
    snapshot = cached(tmp_path, "org/name", "config.json", "a.safetensors", "b.safetensors")
    sharded(snapshot, "a.safetensors", "b.safetensors")
    assert hub.resolve("org/name", cache_dir=tmp_path, offline=True) == snapshot


def test_cache_of_the_hub_library(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = cached(tmp_path, "org/name", *WHOLE)
    assert hub.resolve("org/name") == snapshot


def test_revision(tmp_path):
    snapshot = cached(tmp_path, "org/name", *WHOLE, ref="v2")
    assert hub.resolve("org/name", revision="v2", cache_dir=tmp_path) == snapshot
    assert "revision v3" in refused("org/name", revision="v3", cache_dir=tmp_path).message


def test_offline_and_not_in_the_cache_fails_at_once(tmp_path, online):
    calls = online(AssertionError("asked the network"))
    start = time.perf_counter()
    error = refused(MISTRAL, cache_dir=tmp_path, offline=True)
    assert time.perf_counter() - start < 1
    assert "not in the cache" in error.message
    assert str(tmp_path) in error.message
    assert not calls


def test_offline_and_gated_names_the_licence(tmp_path):
    hint = refused("llama-3-8b", cache_dir=tmp_path).hint
    assert "https://huggingface.co/meta-llama/Meta-Llama-3-8B" in hint
    assert "hf auth login" in hint


@pytest.mark.parametrize("have", [("a.safetensors",), ("config.json",), ("config.json", "a.safetensors")])
def test_incomplete_and_offline_names_what_is_missing(tmp_path, have):
    snapshot = cached(tmp_path, "org/name", *have)
    sharded(snapshot, "a.safetensors", "b.safetensors")
    error = refused("org/name", cache_dir=tmp_path, offline=True)
    assert "incomplete" in error.message
    assert "b.safetensors" in error.message
    assert "online" in error.hint


def test_missing_list_is_short(tmp_path):
    snapshot = cached(tmp_path, "org/name", "config.json")
    sharded(snapshot, *(f"s{i}.safetensors" for i in range(9)))
    assert "and 6 more" in refused("org/name", cache_dir=tmp_path).message


def test_link_to_a_lost_blob_is_missing(tmp_path):
    snapshot = cached(tmp_path, "org/name", *WHOLE)
    (snapshot / "model.safetensors").resolve().unlink()
    assert "model.safetensors" in refused("org/name", cache_dir=tmp_path).message


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_unreadable_index(tmp_path, text):
    snapshot = cached(tmp_path, "org/name", *WHOLE)
    (snapshot / hub.INDEX).write_text(text)
    assert "unreadable" in refused("org/name", cache_dir=tmp_path).message


def test_pickles_in_the_cache_are_refused(tmp_path):
    cached(tmp_path, "org/name", "config.json", "pytorch_model.bin")
    error = refused("org/name", cache_dir=tmp_path)
    assert "only pickle weights" in error.message
    assert "save_pretrained" in error.hint


def test_incomplete_by_the_hubs_listing_but_enough(tmp_path, online, monkeypatch):
    snapshot = cached(tmp_path, "org/name", *WHOLE)
    known = errors.IncompleteSnapshotError("lacks generation_config.json", snapshot_path=str(snapshot))
    calls = online(known)
    fake = huggingface_hub.snapshot_download

    def snapshot_download(repo, *, local_files_only, **options):
        if local_files_only:
            raise known
        return fake(repo, local_files_only=False, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("org/name", cache_dir=tmp_path) == snapshot, "tried to complete it, then did without"
    assert len(calls) == 1
    assert hub.resolve("org/name", cache_dir=tmp_path, offline=True) == snapshot
    assert len(calls) == 1


# Downloads


def test_download_asks_for_what_a_model_needs(tmp_path, online):
    calls = online(lambda: cached(tmp_path, "org/name", *WHOLE))
    assert hub.resolve("org/name", cache_dir=tmp_path, revision="v2").name == COMMIT
    [(repo, options)] = calls
    assert (repo, options["revision"]) == ("org/name", "v2")
    needed = {*WHOLE, "tokenizer.model", "chat_template.jinja", hub.INDEX, "model-00001-of-00002.safetensors"}
    useless = {"pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors", "original/params.json"}
    wanted = filter_repo_objects(
        [*needed, *useless, "README.md"],
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert set(wanted) == needed


def test_incomplete_download_goes_on_online(tmp_path, online):
    partial = cached(tmp_path, "org/name", "config.json")

    def finish():
        shutil.rmtree(tmp_path / "models--org--name")
        return cached(tmp_path, "org/name", *WHOLE)

    online(finish)
    assert hub.resolve("org/name", cache_dir=tmp_path) == partial
    assert not hub.missing_files(partial)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (http_error(errors.GatedRepoError), "is gated", "https://huggingface.co/org/mistral-7b-x, then run `hf auth"),
        (http_error(errors.RepositoryNotFoundError), "no repository org/mistral-7b-x", "did you mean mistral-7b"),
        (http_error(errors.RevisionNotFoundError), "no revision v9", "/tree/main"),
        (http_error(errors.HfHubHTTPError), "401 Client Error.", "run again"),
        (errors.LocalEntryNotFoundError("down"), "cannot be reached", "network"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "HF_HUB_CACHE"),
        (RuntimeError("xet: No space left on device"), "the disk is full", "free some space"),
        (PermissionError(errno.EACCES, "denied"), "not writable", "HF_HUB_CACHE"),
        (TimeoutError("slow"), "failed: TimeoutError: slow", "what is downloaded is kept"),
    ],
)
def test_failed_download(tmp_path, online, error, message, hint):
    online(error)
    caught = refused("org/mistral-7b-x", revision="v9", cache_dir=tmp_path)
    assert message in caught.message
    assert hint in caught.hint
    assert "\n" not in str(caught)
    assert caught.__cause__ is error


@pytest.mark.parametrize("name", ["org/na me", "org/-name", "org/a--b", "org/a.git", "o:rg/a"])
def test_malformed_id(tmp_path, name):
    assert "neither a directory nor a hub id" in refused(name, cache_dir=tmp_path).message


@pytest.mark.parametrize(
    ("in_repo", "message"),
    [
        (["config.json", "pytorch_model.bin"], "only pickle weights (pytorch_model.bin)"),
        (["config.json", "model.Q4.gguf"], "no HF checkpoint of safetensors: it lacks model.safetensors"),
        (["config.json", "model.safetensors"], "incomplete: it lacks model.safetensors"),
        (errors.LocalEntryNotFoundError("down"), "no HF checkpoint of safetensors"),
    ],
)
def test_repository_without_usable_weights(tmp_path, online, monkeypatch, in_repo, message):
    def list_repo_files(repo, *, revision):
        if isinstance(in_repo, Exception):
            raise in_repo
        return in_repo

    online(lambda: cached(tmp_path, "org/name", "config.json"))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    assert message in refused("org/name", cache_dir=tmp_path).message
