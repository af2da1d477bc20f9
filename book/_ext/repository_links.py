"""Gives the pages their repository's address, where there is one: no dead buttons."""

from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

from tools.repository import address

# Hosts whose forms the theme knows how to open, and where they edit a file.
EDIT = {"github": "edit", "gitlab": "-/edit"}


def add_links(app: Sphinx, config: Config) -> None:
    """Turn on the theme's repository, issue, edit and Colab buttons, or none of them."""
    try:
        repository = address()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    host = next((name for name in EDIT if name in (repository or "")), None)
    options: dict[str, Any] = config.html_theme_options
    options |= {
        "repository_url": repository if host else "",
        "use_repository_button": bool(host),
        "use_issues_button": bool(host),
        "use_edit_page_button": bool(host),
        "launch_buttons": (
            {"colab_url": "https://colab.research.google.com"} if host == "github" else {}
        ),
    }
    if host:
        # A notebook is made from the percent source beside it: that is what to edit.
        file = "{{ file_name | replace('.ipynb', '.py') }}"
        branch = options["repository_branch"]
        config.html_context |= {
            "edit_page_url_template": f"{repository}/{EDIT[host]}/{branch}/{file}",
            "edit_page_provider_name": host,
        }


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("config-inited", add_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
