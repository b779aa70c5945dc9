"""The entry point in the group `torch.backends`, which torch calls at the end of `import torch`.

It is a module of its own, outside the package, so that SPARSIFY_AUTOLOAD=0 leaves sparsify unimported (a later
`import sparsify` still registers), and so that no state of the package can break `import torch`.
"""

import logging
import os


def install() -> None:
    """Installs sparsify's transformers hook unless SPARSIFY_AUTOLOAD=0; logs what goes wrong and never raises."""
    if os.environ.get("SPARSIFY_AUTOLOAD", "1") == "0":
        return
    try:
        from sparsify.autoload import install as install_hook

        install_hook()
    # torch turns any exception from here into a failed `import torch`.
    except Exception as error:  # noqa: BLE001
        logging.getLogger("sparsify").warning(
            "sparsify's autoload failed (%s: %s); SPARSIFY_AUTOLOAD=0 switches it off", type(error).__name__, error
        )
