"""A server that answers as the Hugging Face hub does, for one model and several troubles; run as a program, it lets
`fetch` ask for each of them, with nothing replaced but the hub's address:

    python hub.py FOLDER      prints a JSON object: {case: [the files that were fetched, or what was said, seconds]}
"""

import hashlib
import http.server
import json
import logging
import os
import pathlib
import sys
import threading
import time

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"gated": (403, "GatedRepo"), "gated-too": (401, "GatedRepo"), "hidden": (401, "RepoNotFound")}
REFUSALS |= {"missing": (404, "RepoNotFound"), "forbidden": (403, None), "broken": (500, None)}
CASES = ["whole", "late", *REFUSALS, "gated-files", "cut", "silent", "refused"]


def serve(folder: pathlib.Path) -> http.server.ThreadingHTTPServer:
    """Serve the files of a folder as each of the models someone/CASE, with that case's trouble."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            case = next((part for part in parts if part in CASES), None)
            file = parts[-1] if "resolve" in parts else None
            if case == "silent":
                time.sleep(30)
            if case in REFUSALS or (case == "gated-files" and file):
                status, code = REFUSALS.get(case, (403, "GatedRepo"))
                self.answer(status, **({"X_Error_Code": code} if code else {}))
            elif "tree" in parts and case:
                sizes = [(name, (folder / name).stat().st_size) for name in files]
                tree = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif parts[:2] == ["api", "models"] and case:
                siblings = [{"rfilename": name} for name in files]
                about = {"id": f"someone/{case}", "sha": COMMIT, "siblings": siblings, "private": False}
                self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            elif file in files and case:
                body = (folder / file).read_bytes()
                etag = hashlib.sha256(body).hexdigest()
                if case == "cut" and file.endswith(".safetensors") and self.command == "GET":
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.send_header("ETag", f'"{etag}"')
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(folder: str) -> None:
    server = serve(pathlib.Path(folder))
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    import speculative_decoding as sd

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # as the program does

    results = {}
    for case in CASES:
        name = "someone/whole" if case == "late" else f"someone/{case}"
        if case in ("late", "refused"):  # the hub is gone; what was fetched before is still there
            server.shutdown()
            server.server_close()
        sd.ask_hub.cache_clear(), sd.fetch.cache_clear()
        start = time.perf_counter()
        try:
            said = sorted(os.listdir(sd.fetch(name, "*.safetensors")))
        except sd.UsageError as error:
            said = str(error)
        results[case] = [said, time.perf_counter() - start]
        if case == "late":
            address = ("127.0.0.1", server.server_port)
            server = http.server.ThreadingHTTPServer(address, server.RequestHandlerClass)
            threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
