"""Show the built book on the loopback address, until interrupted."""

import argparse
import functools
import sys
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tools.repository import ROOT


class Handler(SimpleHTTPRequestHandler):
    """Serves the book, and its own page where there is none."""

    def translate_path(self, path: str) -> str:
        """The file of an address; a name that no file can have is one that is not there."""
        return super().translate_path(path.replace("%00", "%EF%BF%BD"))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with 404.html what is not there, anything else as usual."""
        if code != HTTPStatus.NOT_FOUND:
            super().send_error(code, message, explain)
            return
        page = Path(self.directory, "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make serve", description=__doc__)
    parser.add_argument("port", type=int, nargs="?", default=8000, help="8000 by default")
    options = parser.parse_args(arguments)
    html = ROOT / "_build" / "html"
    if not (html / "index.html").is_file():
        print(f"{html} holds no book: run make book first", file=sys.stderr)
        return 1
    handler = functools.partial(Handler, directory=str(html))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", options.port), handler)
    except (OSError, OverflowError) as error:
        print(
            f"port {options.port} cannot be used ({error}): name another, make serve PORT=8080",
            file=sys.stderr,
        )
        return 1
    print(f"The book: http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
