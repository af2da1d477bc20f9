"""Gives the pages their repository's address, where there is one: no dead buttons."""

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

from tools.repository import address


def add_links(app: Sphinx, config: Config) -> None:
    """Turn on the theme's repository, issue and Colab buttons, or none of them."""
    try:
        repository = address()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    config.html_theme_options |= {
        "repository_url": repository or "",
        "use_repository_button": bool(repository),
        "use_issues_button": bool(repository),
        "launch_buttons": {"colab_url": "https://colab.research.google.com"} if repository else {},
    }


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("config-inited", add_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
