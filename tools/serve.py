"""Show the built book on the loopback address, until interrupted."""

import argparse
import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from tools.repository import ROOT


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make serve", description=__doc__)
    parser.add_argument("port", type=int, nargs="?", default=8000, help="8000 by default")
    options = parser.parse_args(arguments)
    html = ROOT / "_build" / "html"
    if not (html / "index.html").is_file():
        print(f"{html} holds no book: run make book first", file=sys.stderr)
        return 1
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(html))
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
