"""The trainer's checkpoints in a state folder: which one a run can go on from."""

import json
from pathlib import Path


def newest_checkpoint(state: Path) -> Path | None:
    """Returns the newest checkpoint that was written to its end: the trainer writes trainer_state.json last."""
    found = sorted(state.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
