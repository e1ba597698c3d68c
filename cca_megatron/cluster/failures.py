"""stub"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Failure:
    kind: str
    rank: int | None
    node: str | None
    time: float | None
    message: str
    log: Path | None = None
    line: int | None = None


def first_failure(attempt: Path) -> Failure | None:
    for p in attempt.glob("*/node.json"):
        d = json.loads(p.read_text())
        for f in d["failures"]:
            code = f["exit_code"]
            kind = {16: "transient fault", 17: "result validation", -9: "killed"}.get(code, "program")
            if d["end"] == "hung":
                kind = "hang"
            return Failure(kind, f["rank"], d["node"], f["time"], f["message"])
    return None
