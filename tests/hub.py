"""A server that answers as the Hugging Face hub does, for one model and several troubles; run as a program, it lets the
program load the model from each of them, with nothing replaced but the hub's address:

    python hub.py FOLDER      prints a JSON object: {case: [the files that are there, or what was said; and those that
                              were fetched for it]}
"""

import hashlib
import http.server
import json
import os
import pathlib
import sys
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"gated": (403, "GatedRepo"), "gated-too": (401, "GatedRepo"), "hidden": (401, "RepoNotFound")}
REFUSALS |= {"missing": (404, "RepoNotFound"), "forbidden": (403, None), "broken": (500, None)}
ONLINE = ["whole", "excluded", *REFUSALS, "gated-files", "cut"]
fetched = []


def serve(folder: pathlib.Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Serve the files of a folder as each of the models someone/CASE, with that case's trouble."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self, status, body=b"", size=None, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(size or len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked, _, file = self.path.partition("?")[0].strip("/").partition(f"resolve/{COMMIT}/")
            parts = asked.split("/")
            case = next((part for part in parts if part in ONLINE), "missing")
            if case in REFUSALS or (case == "gated-files" and file):
                status, code = REFUSALS.get(case, (403, "GatedRepo"))
                self.answer(status, **({"X_Error_Code": code} if code else {}))
            elif "tree" in parts:
                sizes = [(name, (folder / name).stat().st_size) for name in files]
                tree = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif not file:
                siblings = [{"rfilename": name} for name in files]
                about = {"id": f"someone/{case}", "sha": COMMIT, "siblings": siblings, "private": False}
                self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            elif file in files:
                body = (folder / file).read_bytes()
                about = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
                is_cut = case == "cut" and file.endswith(".safetensors") and self.command == "GET"
                self.close_connection = is_cut
                if self.command == "GET":
                    fetched.append(file)
                self.answer(200, body[: len(body) // 2] if is_cut else body, len(body), **about)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(folder: str) -> None:
    server = serve(pathlib.Path(folder))
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    import speculative_decoding as sd

    sd.LibraryWarnings(sd.Console(stderr=True))  # as the program does
    results = {}

    def load(case, name):
        fetched.clear()
        try:
            sd.load_model(sd.read_model(f"someone/{name}", sd.torch.float32), sd.torch.device("cpu"))
            said = sorted(os.listdir(sd.fetch(f"someone/{name}")))
        except sd.UsageError as error:
            said = str(error)
        results[case] = [said, sorted(fetched)]

    # As another program leaves it, such as `hf download --exclude`.
    sd.huggingface_hub.snapshot_download("someone/excluded", ignore_patterns=["consolidated*", "original/*"])
    for case in ONLINE:
        load(case, case)
    server.shutdown()
    server.server_close()
    for name in ("whole", "excluded", "refused"):
        load(f"{name}, offline", name)
    shard = next(pathlib.Path(sd.fetch("someone/whole")).glob("*-00002-*"))
    shard.resolve().unlink()
    load("a shard is missing, offline", "whole")
    serve(pathlib.Path(folder), server.server_port)
    load("a shard is missing", "whole")
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
