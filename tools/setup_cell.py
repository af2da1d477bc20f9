"""The beginning of every notebook's set-up cell: a notebook has to find the book's code.

In a source it is the line ``# set-up``, or ``# set-up with bitsandbytes`` where a
notebook needs more packages than the rest; `tools.notebooks.made` puts what
follows in its place.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # filled in with the book's address when the notebook is made
PACKAGES = ["platformdirs", "sortedcontainers", "tabulate"]
PARTS = ("_toc.yml", "helpers", "every_byte")

# The book's folder: above this notebook, or wherever it was installed from.
here = Path.cwd()
folders = [here, *here.parents]
spec = importlib.util.find_spec("every_byte")
if spec is not None and spec.origin is not None:
    folders.append(Path(spec.origin).parent.parent)
for book in folders:
    if all((book / x).exists() for x in PARTS):
        break
else:  # on Colab, or with the notebook alone
    if not REPOSITORY:
        raise ModuleNotFoundError(
            "helpers: run this notebook in the book's folder; its copy of "
            "the book knows no address to fetch them from"
        )
    book = here / "every-byte"
    if not book.exists():
        git = ["git", "clone", "--quiet", "--depth=1", REPOSITORY, str(book)]
        subprocess.run(git, check=True)
    missing = [x for x in PACKAGES if importlib.util.find_spec(x) is None]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *missing], check=True)

# Its packages come before any others of the same names.
if sys.path[0] != str(book):
    sys.path.insert(0, str(book))
    told = [str(book), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, told))
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ("every_byte", "helpers"):
        origin = Path(getattr(module, "__file__", None) or ".").resolve()
        if not origin.is_relative_to(book.resolve()):
            print(f"{name}: from now on the book's, not {origin}")
            del sys.modules[name]
