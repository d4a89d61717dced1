"""Settings of the documentation; `make docs` builds it into docs/_build/html without the network."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ.setdefault(
    "PRTS_DATA", "data"
)  # what `prts --help` and the config reference show does not depend on the machine

from prts import __version__  # noqa: E402

project = "prts"
author = "The prts authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "generated_reference",
]
exclude_patterns = ["_build", "_ext", "Thumbs.db", ".DS_Store"]
templates_path = ["_templates"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make test` runs the notebooks; the pages show the outputs they were saved with
nb_ipywidgets_js = {}  # no scripts from elsewhere

default_role = "code"  # `name` in a docstring is code
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc shows the parameters, the signature their types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "sphinx_book_theme"
html_title = "prts"
html_static_path = ["_static"]
html_css_files = ["prts.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has a search field
}


def _copy_notebooks() -> None:
    """The notebooks live at the top level, where people look for them; Sphinx reads only what is below docs/."""
    for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        target = HERE / "tutorials" / notebook.name
        if not target.is_file() or target.read_bytes() != notebook.read_bytes():
            shutil.copyfile(notebook, target)


_copy_notebooks()
