"""A stand-in for the Hugging Face Hub on the loopback: repositories, commits and files, kept in memory.

It speaks as much of the Hub's API as creating a repository, committing to it and downloading from it need, over LFS
(set HF_HUB_DISABLE_XET=1), and keeps its rules: a token for writing and for private repositories, front matter checked,
a commit taken whole or not at all.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"


class Repo:
    """Commits from oldest to newest, `{id: {path: bytes}}`; like the Hub's it starts with one of its own."""

    def __init__(self, private):
        self.private = bool(private)
        self.commits = {}
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, files):
        self.sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[self.sha] = files

    @property
    def files(self):
        return self.commits[self.sha]


class HubStandIn(ThreadingHTTPServer):
    """`with HubStandIn() as hub`: serves at `hub.url`; `hub.repos` and `hub.requests` tell what happened."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.blobs, self.requests = {}, {}, []
        self.broken_path = None  # requests whose path ends so get an error 500
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __exit__(self, *details):
        self.shutdown()
        super().__exit__(*details)

    @property
    def environment(self):
        """What a process needs to take this for the Hub."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


class Answer(BaseHTTPRequestHandler):
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main", "preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main", "commit"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def dispatch(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, path))
        method = "GET" if self.command == "HEAD" else self.command
        found = ((re.fullmatch(pattern, path), name) for verb, pattern, name in self.ROUTES if verb == method)
        match, name = next((pair for pair in found if pair[0]), (None, None))
        if name is None:
            return self.reply(404, {"error": f"the stand-in has no {self.command} {path}"})
        if self.server.broken_path and path.endswith(self.server.broken_path):
            return self.reply(500, {"error": "broken on purpose"})
        return self.checked(name, {key: value for key, value in match.groupdict().items() if value is not None})

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def checked(self, name, arguments):
        """Answer, unless a token, the repository or the revision is missing."""
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or name in ("lfs_put", "validate")
        repo = self.server.repos.get(arguments.get("repo"))
        if not allowed and (self.command in ("POST", "PUT") or (repo and repo.private)):
            return self.reply(401, {"error": "Invalid username or password."})
        if "repo" in arguments:
            if repo is None:
                return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            arguments["repo"] = repo
        if "revision" in arguments:
            sha = repo.sha if arguments["revision"] == "main" else arguments["revision"]
            if sha not in repo.commits:
                return self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            arguments["revision"] = sha
        return getattr(self, name)(**arguments)

    def reply(self, status, content, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def create(self):
        wish = json.loads(self.body)
        name = f"{wish.get('organization') or 'me'}/{wish['name']}"
        known = name in self.server.repos
        self.server.repos.setdefault(name, Repo(wish.get("private") or wish.get("visibility") == "private"))
        self.reply(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def validate(self):
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        fault = not front or not isinstance(yaml.safe_load(front[1]), dict)
        errors = [{"message": "front matter is missing"}] if fault else []
        self.reply(400 if fault else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.reply(200, {"files": files})

    def lfs_batch(self, repo):
        objects = json.loads(self.body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        fits = hashlib.sha256(self.body).hexdigest() == oid
        if fits:
            self.server.blobs[oid] = self.body
        self.reply(200 if fits else 400, {})

    def commit(self, repo):
        header, *operations = map(json.loads, self.body.splitlines())
        files = dict(repo.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                del files[value["path"]]
        if header["value"].get("parentCommit", repo.sha) != repo.sha:
            return self.reply(412, {"error": "A commit has happened since."})
        repo.commit(files)
        url = f"{self.server.url}/{self.name_of(repo)}/commit/{repo.sha}"
        return self.reply(200, {"commitUrl": url, "commitOid": repo.sha})

    def name_of(self, repo):
        return next(name for name, known in self.server.repos.items() if known is repo)

    def info(self, repo, revision=None):
        siblings = [{"rfilename": path} for path in repo.commits[revision or repo.sha]]
        card = {"id": self.name_of(repo), "sha": revision or repo.sha, "private": repo.private, "siblings": siblings}
        self.reply(200, card | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo, revision, folder=""):
        start = folder.strip("/") + "/" if folder else ""
        found = {path: data for path, data in repo.commits[revision].items() if path.startswith(start)}
        if not found:
            return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        entries = [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in found.items()]
        return self.reply(200, entries)

    def resolve(self, repo, revision, path):
        data = repo.commits[revision].get(path)
        headers = {"X-Repo-Commit": revision}
        if data is None:
            return self.reply(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        return self.reply(200, data, headers | {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def log_message(self, *details):
        """Silence: `hub.requests` holds what happened."""
