"""From a model's name to a local directory: HF directory, saved artifact, alias or hub id, resolved once.

Everything after `resolve` reads local files only; nothing else in this library talks to the hub for a model.
"""

import difflib
import errno
import json
import os
from pathlib import Path
from typing import NamedTuple

from teal_jax.errors import ModelNotFoundError

ALIASES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3-70b-instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",  # the TEAL paper's
    "mistral-7b-v0.1": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "mistral-7b-instruct-v0.1": "mistralai/Mistral-7B-Instruct-v0.1",
    "mistral-7b-instruct-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "mistral-7b-instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
}
"""Every short name and its hub id; a name must match exactly. `EMBEDDED` is one more, and no hub id."""

EMBEDDED = "embedded"
"""Alias of the small model shipped in the package."""

EMBEDDED_DIRECTORY = Path(__file__).parent / "embedded"

PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
"""What is downloaded of a repository: never pickle weights (`*.bin`, `*.pth`)."""

IGNORED = ("*/*", "consolidated*.safetensors")
"""What is not: subfolders (original/, onnx/), and the second copy of the weights in Mistral's repositories."""

PICKLED = (".bin", ".pth", ".pt")
INDEX = "model.safetensors.index.json"


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> Path:
    """The local directory of a model: an existing directory, else an alias, else a hub id `org/name`.

    A snapshot that is complete in the cache is used as it is, without asking the network whether a branch has moved;
    otherwise it is downloaded, with a progress bar, and what a broken download had finished is kept.

    Args:
      name_or_path: directory with a `config.json` (HF) or `teal.json` (saved artifact), alias, or hub id.
      revision: branch, tag or commit of a hub repository; None is its main branch.
      cache_dir: the hub's cache; None is the hub library's own (`HF_HUB_CACHE`).
      offline: never use the network, as with `HF_HUB_OFFLINE=1`.

    Raises:
      ModelNotFoundError: with what to do about it.
    """
    name = os.fspath(name_or_path)
    directory = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown ~user
    if name and is_model_directory(directory):
        return _local(directory, name, revision)
    if name == EMBEDDED:
        if not is_model_directory(EMBEDDED_DIRECTORY):
            raise ModelNotFoundError("the embedded model is missing from this installation", hint="reinstall teal-jax")
        return _local(EMBEDDED_DIRECTORY, name, revision)
    if name in ALIASES:
        return _snapshot(ALIASES[name], revision, cache_dir, offline=offline)
    if name and os.path.exists(directory):
        raise _not_a_model(directory)
    if isinstance(name_or_path, os.PathLike) or _looks_like_path(name):
        raise ModelNotFoundError(f"no directory {name}", hint=f"{_listing(directory.parent)}check the path")
    if "/" not in name:
        raise _unknown_alias(name)
    return _snapshot(name, revision, cache_dir, offline=offline)


def is_model_directory(directory: Path) -> bool:
    """Whether it holds an HF checkpoint or a saved artifact."""
    # os.path, here and below: unlike Path's, its tests take any text for a name, however long
    return any(os.path.isfile(directory / file) for file in ("config.json", "teal.json"))


def is_gated(repo: str) -> bool:
    """Whether the hub id is known to ask for its licence to be accepted before a download."""
    return repo.startswith("meta-llama/")


def missing_files(snapshot: Path) -> list[str]:
    """Names of the files that a checkpoint directory lacks: its config, its index's shards or its only weights file."""
    missing = [] if (snapshot / "config.json").is_file() else ["config.json"]
    if (snapshot / INDEX).is_file():
        try:
            weights = sorted(set(json.loads((snapshot / INDEX).read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [*missing, f"{INDEX} (unreadable: delete it)"]
    else:
        weights = ["model.safetensors"]
    return missing + [file for file in weights if not (snapshot / file).is_file()]


def _local(directory: Path, name: str, revision: str | None) -> Path:
    if revision is not None:
        raise ModelNotFoundError(f"{name} is a local directory and has no revisions", hint="leave the revision out")
    return directory.resolve()


def _not_a_model(path: Path) -> ModelNotFoundError:
    if path.is_file():
        return ModelNotFoundError(f"{path} is a file", hint=f"give the directory it is in: {path.parent}")
    pickled = sorted(file.name for file in path.iterdir() if file.name.endswith(PICKLED))
    holds = f"{', '.join(pickled[:3])} but " if pickled else ""
    return ModelNotFoundError(
        f"{path} holds {holds}neither config.json (HF checkpoint) nor teal.json (saved artifact)",
        hint="give the directory that save_pretrained, snapshot_download or `teal sparsify` wrote",
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1


def _listing(parent: Path) -> str:
    """What model directories `parent` has, as the first part of a hint."""
    try:
        found = sorted(child.name for child in parent.iterdir() if is_model_directory(child))
    except OSError:
        return f"{parent} does not exist either; "
    return f"{parent} has {', '.join(found[:5])}; " if found else ""


def _suggestions(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), [*ALIASES, EMBEDDED], n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _unknown_alias(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"no model or directory is called {name!r}",
        hint=f"{_suggestions(name)}aliases: {', '.join([EMBEDDED, *ALIASES])}; a hub id is written org/name",
    )


class _Repo(NamedTuple):
    """What is asked of the hub, as the messages name it."""

    id: str
    revision: str | None
    cache: Path

    def __str__(self) -> str:
        return f"{self.id} (revision {self.revision})" if self.revision else self.id

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.id}"

    @property
    def licence_first(self) -> str:
        return f"; accept its licence at {self.page} and run `hf auth login` first" if is_gated(self.id) else ""


def _snapshot(name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, *, offline: bool) -> Path:
    # Late: the hub library is slow to import, and `teal --help` does without.
    import huggingface_hub
    from huggingface_hub import constants, errors

    offline = offline or constants.HF_HUB_OFFLINE
    repo = _Repo(name, revision, Path(cache_dir or constants.HF_HUB_CACHE).expanduser())

    def fetch(*, local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo.id,
                revision=repo.revision,
                cache_dir=repo.cache,
                allow_patterns=list(PATTERNS),
                ignore_patterns=list(IGNORED),
                local_files_only=local_files_only,
            )
        )

    snapshot, whole = None, False
    try:
        snapshot = fetch(local_files_only=True)
        whole = True
    except errors.HFValidationError as error:
        raise ModelNotFoundError(
            f"{name!r} is neither a directory nor a hub id",
            hint=f"{_suggestions(name)}a hub id is written org/name, with letters, digits and - _ . only",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        # The hub library knows that a file we ask for is not there yet. It may be one that we can do without.
        if path := getattr(error, "snapshot_path", None):
            snapshot = Path(path)

    missing = missing_files(snapshot) if snapshot else []
    if snapshot and not missing and (whole or offline):
        return snapshot
    if offline:
        raise _offline(repo, snapshot, missing)
    try:
        fetched = fetch(local_files_only=False)
    except errors.LocalEntryNotFoundError as error:
        if snapshot and not missing:
            return snapshot
        raise _unreachable(repo, error, missing) from error
    except Exception as error:  # from unrelated families: HTTP, the operating system's, the transport's own
        raise _download_failed(repo, error) from error
    if missing := missing_files(fetched):
        raise _unusable(repo, fetched, missing)
    return fetched


def _lacks(missing: list[str]) -> str:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"it lacks {', '.join(missing[:3])}{more}"


def _offline(repo: _Repo, snapshot: Path | None, missing: list[str]) -> ModelNotFoundError:
    if snapshot is None:
        return ModelNotFoundError(
            f"{repo} is no directory here and not in the cache {repo.cache}, and nothing is downloaded offline",
            hint=f"run once online (without --offline and HF_HUB_OFFLINE){repo.licence_first}",
        )
    if pickled := _pickled_instead(missing, [path.name for path in snapshot.iterdir()]):
        return _only_pickles(repo, pickled)
    return ModelNotFoundError(
        f"the download of {repo} is incomplete: {_lacks(missing)}",
        hint=f"run again online to finish it{repo.licence_first}",
    )


def _unreachable(repo: _Repo, error: Exception, missing: list[str]) -> ModelNotFoundError:
    cause = error.__cause__ or error
    state = f"its download is incomplete: {_lacks(missing)}" if missing else f"it is not in the cache {repo.cache}"
    return ModelNotFoundError(
        f"the hub cannot be reached ({type(cause).__name__}) for {repo}, and {state}",
        hint="check the network or proxy and run again; what is downloaded is kept",
    )


def _download_failed(repo: _Repo, error: Exception) -> ModelNotFoundError:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():  # a subclass of RepositoryNotFoundError
            return ModelNotFoundError(
                f"{repo} is gated and this account has no access yet",
                hint=f"accept its licence at {repo.page}, then run `hf auth login`",
            )
        case errors.RepositoryNotFoundError():
            return ModelNotFoundError(
                f"the hub has no repository {repo.id}, and there is no such directory",
                hint=f"{_suggestions(repo.id.split('/')[-1])}check the spelling; if it is private: `hf auth login`",
            )
        case errors.RevisionNotFoundError():
            return ModelNotFoundError(
                f"{repo.id} has no revision {repo.revision}", hint=f"see its branches at {repo.page}/tree/main"
            )
        case _ if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return ModelNotFoundError(
                f"the disk is full: {repo} does not fit into {repo.cache}",
                hint="free some space and run again (what is downloaded is kept), or set HF_HUB_CACHE to a larger disk",
            )
        case OSError() if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return ModelNotFoundError(
                f"the cache {repo.cache} is not writable", hint="set HF_HUB_CACHE to a directory of yours"
            )
    first_line = str(error).strip().split("\n")[0]
    return ModelNotFoundError(
        f"the download of {repo} failed: {type(error).__name__}: {first_line}",
        hint="run again; what is downloaded is kept",
    )


def _unusable(repo: _Repo, snapshot: Path, missing: list[str]) -> ModelNotFoundError:
    """Why a finished download is no checkpoint: the repository's own list of files tells."""
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(repo.id, revision=repo.revision)
    except Exception:  # only makes the message better
        names = [path.name for path in snapshot.iterdir()]
    if pickled := _pickled_instead(missing, names):
        return _only_pickles(repo, pickled)
    if set(missing) <= set(names):
        return ModelNotFoundError(f"the download of {repo} is incomplete: {_lacks(missing)}", hint="run again")
    return ModelNotFoundError(
        f"{repo} is no HF checkpoint of safetensors: {_lacks(missing)}",
        hint=f"see its files at {repo.page}/tree/{repo.revision or 'main'}",
    )


def _pickled_instead(missing: list[str], names: list[str]) -> list[str]:
    """The pickle weights among `names` where the safetensors are missing."""
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    return pickled if "model.safetensors" in missing else []


def _only_pickles(repo: _Repo, pickled: list[str]) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{repo} has only pickle weights ({pickled[0]}), which can run code when read: they are refused",
        hint="look for a revision with safetensors, or write them with transformers: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR)",
    )
