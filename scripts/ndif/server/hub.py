"""A read-only look-alike of the Hugging Face hub for folders on this machine.

It answers what huggingface_hub and transformers ask to resolve a repo id, list its files and download them, so that
neither server nor client needs a patch to work with a model that is on no hub. Standard library only.

    hub.py PORT REPO_ID=DIR [REPO_ID=DIR ...]
"""

import hashlib
import json
import shutil
import struct
import sys
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

HOST = "127.0.0.1"


class Repo(NamedTuple):
    """One folder, as the hub shows it."""

    id: str
    files: dict[str, Path]
    """Name inside the repository -> file on disk. Nothing else can be read."""
    commit: str
    """Changes with the files, so that a client's cache never serves an earlier folder of the same id."""
    parameters: Counter[str]
    """Parameters in the safetensors files, by dtype."""


def read_repo(repo_id: str, folder: Path) -> Repo:
    """All files below a folder, links followed, under a repo id."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    parameters: Counter[str] = Counter()
    for name, path in files.items():
        if name.endswith(".safetensors"):
            parameters += _count_parameters(path)
    return Repo(repo_id, files, _digest(repo_id, *map(_stamp, files.values())), parameters)


def _count_parameters(path: Path) -> Counter[str]:
    """Parameters by dtype, from the header of a safetensors file: its length in eight bytes, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    count: Counter[str] = Counter()
    for tensor in header.values():
        count[tensor["dtype"]] += prod(tensor["shape"])
    return count


def _version(repo: Repo, name: str) -> str:
    """Changes with the file."""
    return _digest(repo.id, name, _stamp(repo.files[name]))


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _digest(*parts: str) -> str:
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()


class _MissingError(Exception):
    """What is not here. The hub names it in a header, from which huggingface_hub picks its exception."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, Repo]] = {}
    """Lower-case repo id -> repo: the hub takes any case and answers with the right one."""

    def do_GET(self) -> None:
        """Answer with what the path names, or with what is missing."""
        try:
            self._answer(unquote(urlsplit(self.path).path).strip("/").split("/"))
        except _MissingError as missing:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": str(missing)}, missing.headers)

    def do_HEAD(self) -> None:
        """Answer like GET, without a body."""
        self.do_GET()

    def _answer(self, path: list[str]) -> None:
        match path:
            case ["api", "models", owner, name]:
                repo = self._repo(owner, name)
                self._send_json(HTTPStatus.OK, _description(repo), _commit_header(repo))
            case ["api", "models", owner, name, "revision", revision]:
                repo = self._repo(owner, name, revision)
                self._send_json(HTTPStatus.OK, _description(repo), _commit_header(repo))
            case ["api", "models", owner, name, "tree", revision, *folder]:
                repo = self._repo(owner, name, revision)
                self._send_json(HTTPStatus.OK, _tree(repo, "/".join(folder)), _commit_header(repo))
            case [owner, name, "resolve", revision, *file]:
                self._send_file(self._repo(owner, name, revision), "/".join(file))
            case _:
                raise _MissingError("RepoNotFound", "Repository not found")

    def _repo(self, owner: str, name: str, revision: str = "main") -> Repo:
        repo = self.repos.get(f"{owner}/{name}".lower())
        if repo is None:
            raise _MissingError("RepoNotFound", "Repository not found")
        if revision not in ("main", repo.commit):
            raise _MissingError("RevisionNotFound", "Revision not found")
        return repo

    def _send_file(self, repo: Repo, name: str) -> None:
        path = repo.files.get(name)
        if path is None:
            raise _MissingError("EntryNotFound", "Entry not found")
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(path.stat().st_size),
            "ETag": f'"{_version(repo, name)}"',
        }
        self._send_head(HTTPStatus.OK, headers | _commit_header(repo))
        if self.command != "HEAD":
            with path.open("rb") as file:
                shutil.copyfileobj(file, self.wfile)

    def _send_json(self, status: HTTPStatus, value: Any, headers: dict[str, str]) -> None:
        body = json.dumps(value).encode()
        self._send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _commit_header(repo: Repo) -> dict[str, str]:
    return {"X-Repo-Commit": repo.commit}


def _description(repo: Repo) -> dict[str, Any]:
    return {
        "_id": repo.commit[:24],
        "id": repo.id,
        "modelId": repo.id,
        "sha": repo.commit,
        "private": False,
        "tags": [],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": name} for name in repo.files],
        "safetensors": {"parameters": repo.parameters, "total": repo.parameters.total()},
    }


def _tree(repo: Repo, folder: str) -> list[dict[str, Any]]:
    """The files below a folder, "" being the top; folders have no entries of their own."""
    files = [
        {"type": "file", "path": name, "size": path.stat().st_size, "oid": _version(repo, name)}
        for name, path in repo.files.items()
        if not folder or name.startswith(folder + "/")
    ]
    if not files:
        raise _MissingError("EntryNotFound", "Entry not found")
    return files


def main(port: str, *models: str) -> None:
    """Serve the models until killed."""
    for model in models:
        repo_id, _, folder = model.partition("=")
        Handler.repos[repo_id.lower()] = read_repo(repo_id, Path(folder))
    ThreadingHTTPServer((HOST, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
