"""python -m bench NAME|all|gpu|served [--out FOLDER] [--docs PAGE]: measure, print a table, keep both.

NAMEs: see COMMANDS. gpu, served and headroom want what not every machine has: a GPU, a Python with vLLM, apt and a
network. hostile (180,000 files made to harm) takes half an hour, and is not of `all` either. What `all` cannot measure
here is said, and ends with code 1 when the others are done; with --docs it puts the tables that the page has marks for.
"""

import argparse
import json
import sys
from pathlib import Path

COMMANDS = (
    "steps", "others", "profile", "scaling", "inference", "mixed", "switching", "optimizer", "tune", "memory", "attach",
    "basis", "images", "hidden", "quantised", "qlora", "reduce", "peft_parity", "combine", "retention", "gguf",
    "on_disk", "loading", "kills", "full_disk", "writers", "attacks", "equal", "two_hosts", "search_rule", "grouped",
    "regret", "coverage", "rerank", "masked", "lottery", "order",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=(*COMMANDS, "all", "gpu", "served", "hostile", "headroom"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="llama94m")
    parser.add_argument("--tokens", default="4x256", help="batch x length")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--arms",
        help="arms of `steps`, `others`, `hidden`, parts of `on_disk`, `kills`, `grouped`, `order`, between |; the "
        "others stay",
    )
    parser.add_argument("--device", default="cuda", help="of `gpu`, which measures nothing else here")
    parser.add_argument(
        "--quick", action="store_true", help="of `gpu`, `hostile`, `coverage`, `masked`, `order`: little"
    )
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--docs", type=Path, help="page whose <!-- name --> … <!-- end --> the table replaces")
    given = parser.parse_args()
    from importlib import import_module

    import peft  # every process is forked from this one: what is imported here is imported once
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    from addenda.models.machine import hardware, versions

    transformers.logging.set_verbosity_error()
    wanted = COMMANDS if given.what == "all" else (given.what,)
    marked: set[str] = set()
    if given.docs is not None:  # before what takes minutes
        page = given.docs.read_text()
        marked = {what for what in wanted if "<!-- end -->" in page.partition(f"<!-- {what} -->\n")[2]}
        if not marked:
            name = "NAME" if given.what == "all" else given.what
            sys.exit(f"{given.docs} has no <!-- {name} --> with an <!-- end --> below: give the page that has it.")
    left_out = []
    for what in wanted:
        record = given.out and given.out / f"{what}.json"
        earlier = json.loads(record.read_text()) if given.arms and record and record.exists() else {}
        given.earlier = earlier.get("found", {})
        try:
            found, text = import_module(f"bench.{what}").run(given)
        except SystemExit as why:  # what this machine lacks
            if given.what != "all":
                raise
            left_out.append(what)
            print(f"{what} was not measured: {why}", file=sys.stderr)
            continue
        print(text)
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            command = "python -m bench " + " ".join(sys.argv[1:])
            about = {"command": command, "versions": versions() | {"peft": peft.__version__}, "hardware": hardware()}
            if earlier:  # some rows are new, the others stay
                about |= {"command": earlier.get("command", command), "then": [*earlier.get("then", ()), command]}
            record.write_text(json.dumps(about | {"found": found}, indent=1) + "\n")
        if what in marked:
            where = hardware()
            text += f"\n\n*{where['cpu']}, {where['cores']} cores.*"
            given.docs.write_text(_put(given.docs.read_text(), what, text))
    if left_out:
        sys.exit(f"Not measured: {', '.join(left_out)}.")


def _put(page: str, what: str, text: str) -> str:
    """The page with the text between its marks."""
    head, mark, rest = page.partition(f"<!-- {what} -->\n")
    return head + mark + text + "\n" + rest[rest.index("<!-- end -->") :]


if __name__ == "__main__":
    main()
