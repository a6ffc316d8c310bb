"""Results that survive an interruption."""

import json
from pathlib import Path
from typing import Any


class Results:
    """A JSON file of runs that is written after each, so that an interrupted comparison goes on."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["settings"] != settings:
                raise SystemExit(f"{path} was measured with other settings; choose another --results")

    def save(self) -> None:
        """Writes the file, never half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)
