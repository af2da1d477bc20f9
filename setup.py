"""What of the project's metadata only the checkout knows: its addresses. See pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tools.repository import links

setup(project_urls=links())
