"""The hub's API as far as a trained part needs it, on this machine: repositories in memory.

Answers huggingface_hub's own client: create, validate-yaml, preupload, commit, revision, resolve.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

TOKEN = "hf_stand_in"
COMMIT = "c" * 40


class _Kind(BaseModel):
    type: str
    name: str | None = None


class _Metric(_Kind):
    value: float | int | str


class _Result(BaseModel):
    task: _Kind
    dataset: _Kind
    metrics: list[_Metric] = Field(min_length=1)


class _Model(BaseModel):
    name: str
    results: list[_Result]


class CardMetadata(BaseModel):
    """The hub's schema of a model card's metadata, as its documentation lists the fields."""

    model_config = ConfigDict(extra="allow")

    license: Literal["apache-2.0", "mit", "other", "openrail++", "creativeml-openrail-m"] | None = (
        None
    )
    library_name: str
    pipeline_tag: Literal["any-to-any", "text-to-image", "image-to-text", "image-text-to-text"]
    tags: list[str]
    base_model: str | list[str] | None = None
    model_index: list[_Model] | None = Field(None, alias="model-index")


class HubStandIn:
    """`with HubStandIn() as hub:` serves at `hub.address`; `hub.repositories` is what it holds."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                path = self.path.partition("?")[0]
                if got := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                    if (files := hub.repositories.get(got[1])) is None:
                        return self._refuse(404, "RepoNotFound")
                    if got[2] not in (None, "main", COMMIT):
                        return self._refuse(404, "RevisionNotFound")
                    names = [{"rfilename": name} for name in sorted(files)]
                    return self._send({"id": got[1], "sha": COMMIT, "siblings": names})
                if got := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+.*", path):
                    if (files := hub.repositories.get(got[1])) is None:
                        return self._refuse(404, "RepoNotFound")
                    return self._send(
                        [
                            {
                                "type": "file",
                                "path": name,
                                "size": len(content),
                                "oid": hashlib.sha1(content).hexdigest(),
                            }
                            for name, content in sorted(files.items())
                        ]
                    )
                if got := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                    content = hub.repositories.get(got[1], {}).get(got[2])
                    if content is None:
                        return self._refuse(404, "EntryNotFound")
                    digest = hashlib.sha256(content).hexdigest()
                    return self._send(content, ETag=f'"{digest}"', **{"X-Repo-Commit": COMMIT})
                return self._refuse(404, "")

            do_HEAD = do_GET  # noqa: N815

            def do_POST(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/api/validate-yaml":
                    return self._validate(json.loads(body)["content"])
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._refuse(401, "")
                if self.path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    hub.repositories.setdefault(name, {})
                    return self._send({"url": f"{hub.address}/{name}", "name": name, "id": name})
                if got := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
                    files = json.loads(body)["files"]
                    return self._send(
                        {
                            "files": [
                                {
                                    "path": one["path"],
                                    "uploadMode": "regular",
                                    "shouldIgnore": False,
                                }
                                for one in files
                            ]
                        }
                    )
                if got := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
                    for line in body.splitlines():
                        if (one := json.loads(line))["key"] == "file":
                            content = base64.b64decode(one["value"]["content"])
                            hub.repositories[got[1]][one["value"]["path"]] = content
                    url = f"{hub.address}/{got[1]}/commit/{COMMIT}"
                    return self._send({"commitUrl": url, "commitOid": COMMIT, "success": True})
                return self._refuse(404, "")

            def _validate(self, card: str) -> None:
                try:
                    CardMetadata.model_validate(yaml.safe_load(card.split("---\n")[1]))
                except (ValidationError, IndexError, yaml.YAMLError) as error:
                    self._send({"errors": [{"message": str(error)}], "warnings": []}, status=400)
                else:
                    self._send({"errors": [], "warnings": []})

            def _refuse(self, status: int, code: str) -> None:
                self._send({"error": code or "no"}, status=status, **{"X-Error-Code": code})

            def _send(self, answer: Any, *, status: int = 200, **headers: str) -> None:
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubStandIn:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
