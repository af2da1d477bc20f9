"""What is shown on the loopback address: the book, and its own page where there is none."""

import functools
import threading
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tools.serve import Handler


@pytest.mark.parametrize("path", ["/%00", "/a%00b.html", "/../secret", "/nowhere"])
def test_an_address_that_no_file_can_have(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    html = tmp_path / "html"
    html.mkdir()
    (html / "404.html").write_text("not allocated")
    handler = functools.partial(Handler, directory=str(html))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (404, b"not allocated")
        connection.close()
        server.shutdown()
    assert "Traceback" not in capfd.readouterr().err
