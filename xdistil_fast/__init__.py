"""Tag and classify text with small BiLSTM students of large models, in compiled code.

    from xdistil_fast import Classifier, Tagger

    tagger = Tagger.from_pretrained("en-ner")
    tagger("Angela Merkel met Tim Cook in Berlin.")
    classifier = Classifier.from_pretrained("classifier/")
    classifier("A film one would gladly see again.")

Inference needs NumPy, tokenizers and safetensors; `xdistil_fast.nn` and `xdistil_fast.train` need
torch and are loaded only when imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdistil_fast.classifier import Classifier
    from xdistil_fast.model_config import PRECISIONS
    from xdistil_fast.model_io import ModelError
    from xdistil_fast.tagger import Tagger

_EXPORTS = {
    "Classifier": "xdistil_fast.classifier",
    "ModelError": "xdistil_fast.model_io",
    "PRECISIONS": "xdistil_fast.model_config",
    "Tagger": "xdistil_fast.tagger",
}

__all__ = ["PRECISIONS", "Classifier", "ModelError", "Tagger", "__version__"]


def _check_extension() -> str:
    """Loads the compiled kernels and returns the version they and the package agree on."""
    try:
        from xdistil_fast import _core
    except ModuleNotFoundError as error:
        raise ImportError(
            "xdistil_fast's compiled kernels (xdistil_fast._core) are missing for this Python. "
            "Install a wheel or build one: pip install --force-reinstall xdistil-fast. In a source "
            "tree run pip install . and start Python elsewhere, or with PYTHONSAFEPATH=1."
        ) from error
    try:
        installed = importlib.metadata.version("xdistil-fast")
    except importlib.metadata.PackageNotFoundError:
        # Run from a source tree, where the extension is all there is to ask.
        return _core.__version__
    if installed != _core.__version__:
        raise ImportError(
            f"xdistil-fast {installed} found compiled kernels of version {_core.__version__} at "
            f"{_core.__file__}; they must be equal: pip install --force-reinstall xdistil-fast"
        )
    return installed


__version__ = _check_extension()


def __getattr__(name: str) -> Any:
    """Loads an export on first use, so that importing the package stays cheap."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'xdistil_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
