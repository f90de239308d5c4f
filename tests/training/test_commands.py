import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from okavango.training.commands import data


def rows(*questions: str) -> str:
    conversations = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
        for question in questions
    )
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)


def test_the_check_command_reports_and_exits_by_what_it_found(tmp_path: Path) -> None:
    run = CliRunner().invoke
    train, test, bad = (str(tmp_path / f"{name}.jsonl") for name in ("train", "test", "bad"))
    Path(train).write_text(rows("Is it red?", "Is it big?"))
    Path(test).write_text(rows("Is it far?", "Is it near?"))
    Path(bad).write_text(rows("Is it far?", "Is it near?") + "{\n" + "\n" * 5 + rows("Is it far?"))
    good = run(data, ["check", train, test])
    assert (good.exit_code, good.stdout.count("no faults")) == (0, 2)
    found = run(data, ["check", bad, "--max-faults", "2"])
    assert found.exit_code == 1
    assert f"{bad}:3: is not JSON" in found.stdout
    assert "… and 4 more faults" in found.stdout
    assert "6 faults in 6 rows" in found.stdout.splitlines()[-1]
    assert "the same conversation as line 1 (warning)" in found.stdout
    raw = run(data, ["check", bad, train, "--json"])
    assert raw.exit_code == 1
    reports = [json.loads(line) for line in raw.stdout.splitlines()]
    assert [report["ok"] for report in reports] == [False, True]
    assert [fault["line"] for fault in reports[0]["faults"]] == list(range(3, 9))
    gone = run(data, ["check", str(tmp_path / "gone.jsonl")])
    assert (gone.exit_code, "no such file" in gone.stdout) == (1, True)


def test_commands_and_the_check_are_cheap_to_import() -> None:
    for module, heavy in {"commands": {"torch", "PIL", "rich.progress"}, "check": {"torch", "numpy"}}.items():
        code = f"import sys, okavango.training.{module}; print({heavy} & set(sys.modules))"
        command = [sys.executable, "-P", "-c", code]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "set()\n"
