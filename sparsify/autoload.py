"""Makes transformers know sparsify checkpoints, without importing torch or transformers for it.

`install()` runs on `import sparsify`, and through sparsify_autoload at the end of `import torch`. It leaves an import
hook that calls `sparsify.plugin.register()` once transformers' table of quantizers exists. Processes that never
import transformers pay a few milliseconds. Nothing here raises: a failure to register is logged, and the checkpoint
then loads as the dense model that it also is.
"""

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
# The second is for a process whose first `import torch` comes from inside the first: no hook sees that one end.
# Both run before a model can be loaded.
_TRIGGERS = (_TABLE, "transformers.modeling_utils")


def install() -> None:
    """Registers with transformers now if its table of quantizers is imported, else when it is. Idempotent."""
    table = sys.modules.get(_TABLE)
    if table is not None and not _importing(table):
        _register()
    elif not any(isinstance(finder, _TransformersHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TransformersHook())


def _importing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _register() -> None:
    plugin = sys.modules.get("sparsify.plugin")
    if plugin is not None and _importing(plugin):
        return  # it registers at its end
    try:
        from sparsify.plugin import register

        register()
    # Runs inside other people's imports: whatever is wrong with this installation is said, and is not theirs.
    except Exception as error:  # noqa: BLE001
        logging.getLogger("sparsify").warning(
            "sparsify could not register with transformers (%s: %s): sparsify checkpoints will load as dense models",
            type(error).__name__,
            error,
        )


class _TransformersHook(MetaPathFinder):
    """Finds the trigger modules as the other finders do, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TRIGGERS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(Loader):
    """Runs the module with its own loader, hands that back to it, then registers and removes the hook."""

    def __init__(self, loader: Loader, hook: _TransformersHook) -> None:
        self._loader = loader
        self._hook = hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._hook in sys.meta_path:
            sys.meta_path.remove(self._hook)
            _register()
