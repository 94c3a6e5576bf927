"""The `tinker` command, several times in one process: what it wrote, as JSON.

python client_commands.py OUT '[["checkpoint", "list"], ...]'
"""

import contextlib
import io
import json
import sys
from importlib.metadata import entry_points


def main(out: str, commands: list[list[str]]) -> None:
    (script,) = entry_points(group="console_scripts", name="tinker")
    command, said = script.load(), []
    for arguments in commands:
        sys.argv = ["tinker", *arguments]
        written = io.StringIO()
        try:
            with contextlib.redirect_stdout(written):
                command()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        said.append([code, written.getvalue()])
    with open(out, "w", encoding="utf-8") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
