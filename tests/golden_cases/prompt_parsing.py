"""prompt_parsing.json: what the reference finds in scripts, and where it refuses them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pixelstory_jax.data.story_script import reference_characters, reference_plan


def _found(case: dict[str, Any]) -> dict[str, Any]:
    """Our results in the form of JSON; with "error" where a script is refused, and what was found before that."""
    try:
        characters = reference_characters(case["general_prompt"])
    except ValueError as error:
        return {"error": str(error)}
    try:
        plan = reference_plan(case["general_prompt"], case["prompts"], case["id_length"])
    except ValueError as error:
        return {"character_dict": characters, "character_list": list(characters), "error": str(error)}
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def check(path: Path) -> list[tuple[bool, str]]:
    """One (passed, line) per case of the file. The wording of errors is free, everything else is exact."""
    lines = []
    for number, case in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        expected = {key: value for key, value in case.items() if key not in ("general_prompt", "prompts", "id_length")}
        ours = _found(case)
        wrong = sorted(
            key for key in expected.keys() | ours.keys() if key != "error" and expected.get(key) != ours.get(key)
        )
        if ("error" in expected) != ("error" in ours):
            wrong.append("error")
        verdict = f"differs in {', '.join(wrong)}" if wrong else "equal" if "error" not in ours else "refused, equal"
        lines.append((not wrong, f"prompt_parsing case {number}: {verdict}"))
    return lines
