"""What tests need of the shipped checkpoint: its folder, texts to try it on, and a reason to skip where one is missing.

Does not know what is tested with them.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

ROOT = Path(__file__).parent.parent
STORE = ROOT / "model_store"
DIALOGSUM = ROOT.parent / "shared" / "data" / "dialogsum"

CONVERSATIONS = (
    "#Person1#: Good morning. I would like to return this jacket, the zip broke after two days.\n"
    "#Person2#: I am sorry about that. Do you have the receipt?\n"
    "#Person1#: Yes, here it is. I paid by card.\n"
    "#Person2#: Thank you. We can give you a new one or your money back.\n"
    "#Person1#: I would rather have my money back, please.\n"
    "#Person2#: It will be on your card within three days.",
    "#Person1#: Tom, have you finished the slides for Friday?\n"
    "#Person2#: Almost. I still need the sales figures from Anna.\n"
    "#Person1#: She is away until Thursday. Ask Marc, he has them too.\n"
    "#Person2#: All right, I will call him after lunch.",
    "#Person1#: Shall we go to the lake on Sunday?\n#Person2#: It is going to rain all day. How about the museum?",
)


def shipped_folder() -> Path | None:
    """The newest version of the checkpoint that the repository ships, or None where there is none."""
    manifests = sorted(STORE.glob("*/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return manifests[-1].parent if manifests else None


def dialogsum_documents(split: str, count: int) -> list[str]:
    """The first documents of a DialogSum split; an empty list where the data is not at hand."""
    file = DIALOGSUM / f"{split}.jsonl.xz"
    if not file.is_file():
        return []
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines))["document"] for _ in range(count)]
