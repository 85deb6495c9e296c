"""A local server that answers as the hub does."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The hub's endpoints as huggingface_hub calls them: files that are read, and commits.

    HEAD and GET of /{owner}/{name}/resolve/{revision}/{file}; POST of what makes a repository, asks
    how files are to come, sends the large ones through LFS and commits. Who writes has the key.
    """

    root: Path
    asked: list[str]
    large: dict[str, bytes]

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer key":
            return self.refuse(401, "RepoNotFound")
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            folder = self.root / asked["organization"] / asked["name"]
            there = folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self.asked.append(f"CREATE {asked['name']} {asked.get('visibility')}")
            url = {"url": f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"}
            return self.say(409 if there else 200, url)
        if self.path == "/api/validate-yaml":
            return self.say(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            return self.say(200, {"files": [self.mode(f) for f in json.loads(content)["files"]]})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self.say(
                200, {"objects": [self.place(o) for o in json.loads(content)["objects"]]}
            )
        if "/commit/" in self.path:
            return self.commit(content.decode().splitlines())
        return self.refuse(404, "EntryNotFound")

    def do_PUT(self):
        oid = self.path.removeprefix("/large/")
        self.large[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        self.say(200, {})

    def mode(self, file: dict) -> dict:
        large = file["path"].endswith(".safetensors")
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def place(self, wanted: dict) -> dict:
        href = f"http://{self.headers['Host']}/large/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def commit(self, lines: list[str]):
        _, _, _, owner, name, _, revision = self.path.split("?")[0].split("/")
        if revision != "main":
            return self.refuse(404, "RevisionNotFound")
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                self.asked.append(f"COMMIT {name}: {value['summary']}")
                continue
            file = self.root / owner / name / value["path"]
            if line["key"] == "lfsFile":
                file.write_bytes(self.large[value["oid"]])
            else:
                file.write_bytes(base64.b64decode(value["content"]))
            self.asked.append(f"{line['key']} {name}/{value['path']}")
        url = f"http://{self.headers['Host']}/{owner}/{name}/commit/{COMMIT}"
        return self.say(200, {"commitUrl": url, "commitOid": COMMIT})

    def say(self, status: int, content: dict):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        if "/resolve/" not in self.path:
            return self.refuse(404, "EntryNotFound")
        owner, name, _, revision, file = self.path.lstrip("/").split("/", 4)
        self.asked.append(f"{self.command} {name}/{file}")
        path = self.root / owner / name / file
        if not path.parent.is_dir():
            return self.refuse(401, "RepoNotFound")
        if name == "gated" and self.headers.get("Authorization") != "Bearer key":
            return self.refuse(403, "GatedRepo")
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        if name == "ill":
            return self.refuse(500, "Ill")
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if name == "breaks" else content)
            self.close_connection = True

    def refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass
