"""The documentation is true: its code runs and prints what it says, its tables are those of the declarations, its links lead somewhere.

What a fence's first line says decides what happens to the block, in the order of the page, in a folder of the page's own:

- ``python``: run; all blocks of a page share their names, and what they print is compared with nothing (they assert);
- ``python file=NAME`` (or toml, yaml, text): written to that file;
- ``console``: each line ``$ qcompile ..`` (or ``ls``, ``cat``, ``make``) is run and its output compared with the lines after it. ``...``
  stands for anything within a line, a line ``...`` for any lines. ``$ pip install ./FOLDER`` makes the package's module and entry points
  visible, as an installation would, without a network;
- anything else (``sh``, ``text``, no name): shown only.

A command that should be refused ends in ``# exit code 2``. Tables between ``<!-- begin NAME -->`` and ``<!-- end -->`` are printed
from the declarations;
``pytest tests/test_docs.py --update-golden`` writes them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
TOOLS = {"edge.md": ("arm-none-eabi-gcc", "gcc", "make", "qemu-system-arm")}  # a page is skipped where one is missing
PROCESS_OF_ITS_OWN = {"write_a_pass.md"}  # its first command runs in a fresh interpreter, as it does for a reader


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- blocks ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: language, file to write (or empty), text, and its first line in the page."""

    language: str
    file: str
    text: str
    line: int


FENCE = re.compile(r"^```(\w*)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"{page_name(page)} has a fence without an end"
    return [Block(m[1], m[2] or "", m[3], text[: m.start(3)].count("\n") + 1) for m in FENCE.finditer(text)]


def is_run(page: Path) -> bool:
    return any(block.language in ("python", "console") for block in blocks(page))


class Runner:
    """Runs the blocks of one page in the current folder."""

    def __init__(self, page: Path, cli: Callable[..., Any], site: Path) -> None:
        self.page, self.cli, self.site = page, cli, site
        self.names: dict[str, Any] = {"__name__": "__docs__"}
        self.fresh = page.name in PROCESS_OF_ITS_OWN

    def run(self, block: Block) -> None:
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # As many empty lines as stand before the block: a traceback then names the page's own line.
            source = compile("\n" * (block.line - 1) + block.text, page_name(self.page), "exec", dont_inherit=True)
            exec(source, self.names)
        elif block.language == "console":
            for command, expected, line in commands(block):
                self._command(command, expected, f"{page_name(self.page)}:{line}: {command}")

    def _command(self, command: str, expected: list[str], place: str) -> None:
        command, _, code = command.partition("  # exit code ")
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            install(Path(words[2]), self.site)
            return
        assert words[0] in ("qcompile", "cat", "ls", "make"), f"{place}: only qcompile, cat, ls, make and pip install are run"
        found, output = self._output(words)
        if found != int(code or 0):
            pytest.fail(f"{place}: exit code {found}\n{output}", pytrace=False)
        if not output_fits(expected, output):
            pytest.fail(f"{place} printed\n{output}\nwhere the page has\n" + "\n".join(expected), pytrace=False)

    def _output(self, words: list[str]) -> tuple[int, str]:
        if words[0] != "qcompile":
            return 0, subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
        if self.fresh:
            self.fresh = False
            environment = os.environ | {"PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "qcompile.cli", *words[1:]]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            return done.returncode, done.stderr + done.stdout
        ended = self.cli(*words[1:])
        return ended.code, ended.err + ended.out


def commands(block: Block) -> Iterator[tuple[str, list[str], int]]:
    """Yield each command of a console block, the lines that it should print, and its line in the page."""
    lines = block.text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    assert starts[:1] == [0], "a console block begins with a command"
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield lines[start].removeprefix("$ "), lines[start + 1 : stop], block.line + start


def output_fits(expected: list[str], output: str) -> bool:
    """Compare lines without the spaces at their ends; an output that the page does not show may be anything."""
    if not expected:
        return True
    pattern = "".join(
        r"(?:[^\n]*\n)*" if line.strip() == "..." else ".*".join(map(re.escape, line.rstrip().split("..."))) + r"\n" for line in expected
    )
    return re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in output.splitlines())) is not None


def install(folder: Path, site: Path) -> None:
    """Copy a package's modules to ``site`` with the metadata that ``pip install`` would leave there."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for module in folder.glob("*.py"):
        shutil.copy(module, site)
    information = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
        for group, points in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages that this process sees; the names that plug in are read again before and after."""
    from qcompile import registry

    folder = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(str(folder))
    registry._known.cache_clear()
    yield folder
    registry._known.cache_clear()


@pytest.mark.parametrize("page", [page for page in PAGES if is_run(page)], ids=page_name)
def test_code_runs(page: Path, cli: Callable[..., Any], site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in TOOLS.get(page.name, ()):
        if shutil.which(tool) is None:
            pytest.skip(f"{page_name(page)} needs {tool} ('make edge-tools')")
    monkeypatch.chdir(tmp_path)
    runner = Runner(page, cli, site)
    for block in blocks(page):
        runner.run(block)


def test_the_comparison_of_outputs() -> None:
    assert output_fits(["a ... c", "...", "end"], "a b c\nx\ny\nend  \n")
    assert output_fits(["...", "end"], "end\n")
    assert not output_fits(["a ... c"], "a b d\n")
    assert not output_fits(["a"], "a\nb\n")
    assert not output_fits(["a.c"], "abc\n")


def test_pages_that_show_code_are_run() -> None:
    assert {"README.md", "docs/tour.md", "docs/write_a_pass.md", "docs/operators.md"} <= {page_name(page) for page in PAGES if is_run(page)}


# ---- tables printed from declarations -------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def methods_table() -> str:
    from qcompile.methods import read_methods

    return table(
        ["number", "method", "piece", "status", "command"],
        [
            [m.number, m.name, m.piece, m.status, f"`{m.command}`" if m.command else ""]
            for m in sorted(read_methods(), key=lambda m: m.number)
        ],
    )


def kernels_table() -> str:
    from qcompile.registry import find_target, names

    rows = []
    for target in map(find_target, names("target")):
        for kernel in target.kernels:
            bits = "1 to 8" if kernel.weight_bits == tuple(range(1, 9)) else ", ".join(map(str, kernel.weight_bits))
            weight = [", ".join(kernel.formats), bits, ", ".join(kernel.weight_granularity)]
            rows.append([target.name, f"`{kernel.operator}`", *weight, kernel.activation, kernel.summary])
    return table(["target", "operator", "weight formats", "weight bits", "weight scales by", "activations", "what it is"], rows)


def recipes_table() -> str:
    from qcompile.recipe import load_recipe, recipe_names

    return table(
        ["recipe", "what it does", "needs data"],
        [[f"`{r.name}`", r.summary, "yes" if r.needs_data else "no"] for r in map(load_recipe, recipe_names())],
    )


def passes_table() -> str:
    from qcompile.registry import find_pass, names

    rows = []
    for kind in map(find_pass, names("pass")):
        stage = kind.stage.value if kind.gives is None else f"{kind.stage.value} -> {kind.gives.value}"
        shown = [f for f in dataclasses.fields(kind) if f.name != "options"]
        options = ", ".join(f"{f.name}={f.default}" if f.default != "" else f"{f.name}" for f in shown)
        rows.append([f"`{kind.name()}`", stage, kind.keeps, f"`{options}`" if options else "", (kind.__doc__ or "").splitlines()[0]])
    return table(["pass", "stage", "keeps", "options", "what it does"], rows)


def solvers_table() -> str:
    from qcompile.registry import find_solver, names, solver_options

    rows = []
    for name in names("solver"):
        module = sys.modules[find_solver(name).__module__]
        takes = [*getattr(module, "NEEDS", ()), *(f"{statistic} (if there is data)" for statistic in getattr(module, "USES", ()))]
        options = ", ".join(f"{key}={parameter.default}" for key, parameter in solver_options(name).items())
        summary = (module.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        rows.append([f"`{name}`", ", ".join(takes), f"`{options}`" if options else "", summary])
    return table(["solver", "statistics", "options", "what it does"], rows)


def options_text() -> str:
    from qcompile.cli.main import COMMANDS, cli

    parts = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        operands = [p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)]
        rows = [
            [", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts)), _value_text(p), p.help or ""]
            for p in command.params
            if isinstance(p, click.Option)
        ]
        about = (command.help or "").splitlines()[0]
        parts.append(f"### qcompile {' '.join([name, *operands])}\n\n{about}\n\n{table(['option', 'value', 'meaning'], rows)}")
    return "\n".join(parts)


def _value_text(option: click.Option) -> str:
    if option.is_flag:
        return ""
    default = f", default {option.default}" if option.show_default else ""
    kind = "one of " + ", ".join(option.type.choices) if isinstance(option.type, click.Choice) else option.metavar or option.type.name
    return f"{'number' if isinstance(option.type, click.IntRange) else kind}{default}"


def stages_table() -> str:
    from qcompile.graph.stage import _FLOAT_QC, LEGAL, Stage

    def word(allowed: bool) -> str:
        return "yes" if allowed else "no"

    early = ", ".join(f"`{name}`" for name in sorted(_FLOAT_QC))
    return table(
        ["", *(f"`{stage.value}`" for stage in Stage)],
        [
            ["ATen operators", *("yes" for _ in Stage)],
            ["quantizers", *(word(LEGAL[stage]["quantizers"]) for stage in Stage)],
            [early, *(word(LEGAL[stage]["qc"] is None or LEGAL[stage]["qc"] >= _FLOAT_QC) for stage in Stage)],
            ["other `qc` operators", *(word(LEGAL[stage]["qc"] is None) for stage in Stage)],
            ["other modules, method calls", *("no" for _ in Stage)],
        ],
    )


def processors_table() -> str:
    from qcompile.backends.edge.processors import PROCESSORS

    return table(
        ["name", "what it is", "compiler", "runs under", "features", "arena begins at a multiple of"],
        [
            [
                f"`{p.name}`",
                p.summary,
                f"`{' '.join([f'{p.prefix}gcc', *p.flags])}`",
                f"`{p.emulator[0]}`" + (f", machine `{p.emulator[2]}`" if p.machine else ""),
                ", ".join(sorted(p.features)),
                f"{p.alignment} bytes",
            ]
            for p in PROCESSORS.values()
        ],
    )


def boards_table() -> str:
    from qcompile.backends.edge.boards import BOARDS

    return table(
        ["board", "processor", "clock", "flash", "RAM", "data sheet"],
        [
            [f"`{b.name}`", f"`{b.processor}`", f"{b.clock_mhz} MHz", f"{b.flash_bytes // 1024} KB", f"{b.ram_bytes // 1024} KB", b.chip]
            for b in BOARDS.values()
        ],
    )


TABLES = {
    ("design.md", "stages"): stages_table,
    ("methods.md", "methods"): methods_table,
    ("targets.md", "kernels"): kernels_table,
    ("recipes.md", "recipes"): recipes_table,
    ("recipes.md", "passes"): passes_table,
    ("recipes.md", "solvers"): solvers_table,
    ("cli.md", "options"): options_text,
    ("edge.md", "processors"): processors_table,
    ("edge.md", "boards"): boards_table,
}


@pytest.mark.parametrize(("file", "name"), TABLES, ids=lambda part: part)
def test_tables_are_those_of_the_declarations(file: str, name: str, request: pytest.FixtureRequest) -> None:
    page = ROOT / "docs" / file
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(f"<!-- begin {name} -->\n")
    found, end, tail = rest.partition("<!-- end -->\n")
    assert begin, f"{file} has no line <!-- begin {name} -->"
    assert end, f"{file} has no line <!-- end --> after {name}"
    expected = f"\n{TABLES[file, name]()}\n"
    if request.config.getoption("--update-golden"):
        page.write_text(head + begin + expected + end + tail, encoding="utf-8")
        return
    assert found == expected, f"the table '{name}' of {file} is out of date: pytest tests/test_docs.py --update-golden"


# ---- links, files, words --------------------------------------------------------------------------------------------------

LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:qcompile|passes|backends|tests|docs|benchmarks)/[\w./*-]*)(?::\w+)?`")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = []
    for link in LINK.findall(FENCE.sub("", text)):
        place, _, anchor = link.partition("#")
        if "://" in place:
            continue
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    wrong += [name for name in NAMED_FILE.findall(text) if not list(ROOT.glob(name))]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_files_that_commands_name_exist(page: Path) -> None:
    names = [
        name for block in blocks(page) if block.language == "sh" for name in re.findall(r"\b(?:benchmarks|tests)/[\w./-]+", block.text)
    ]
    assert not [name for name in names if not (ROOT / name).exists()]


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {page_name(page) for page in PAGES if page.parent.name == "docs"} <= {link.partition("#")[0] for link in linked}


def test_recipes_and_passes_that_the_pages_name_exist() -> None:
    """``--recipe NAME`` anywhere in the pages, shown or run, unless the line says that it is refused."""
    from qcompile.recipe import recipe_names

    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines() if "# exit code" not in line]
    named = {name for line in lines for name in re.findall(r"--recipe ([a-z][\w-]*)(?=\s|`|$)", line)}
    assert {"w8a8", "dfq"} <= named
    assert named <= set(recipe_names())


def test_the_json_keys_of_every_command(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Run each command with ``--json`` and compare its keys with the table in cli.md."""
    from qcompile.cli.main import COMMANDS

    model, path = f"python:{ROOT / 'tests' / 'tiny_models.py'}:mlp", tmp_path / "model.qc"
    compiling = ("compile", model, "--target", "reference", "--calibrate", "random")
    calls = {
        "compile": (*compiling, "-o", path),
        "compile --dry-run": (*compiling, "--dry-run"),
        "run": ("run", path),
        "generate": ("generate", tmp_path / "decoder.qc", "--prompt-tokens", "1,2", "--max-tokens", 2),
        "tune": ("tune", tmp_path / "cpu.qc", "--seconds", 0),
        "bench": ("bench", path, "--rounds", 1, "--calls", 1),
        "evaluate": ("evaluate", path, "--data", "random"),
        "compare": ("compare", model, "--recipes", "float", "--target", "reference"),
        "inspect": ("inspect", path),
        "diff": ("diff", path, path),
        "verify": ("verify", path),
        "export": ("export", path),
        **{name: (name,) for name in ("passes", "solvers", "recipes", "targets", "formats", "methods")},
    }
    assert {name.split()[0] for name in calls} == set(COMMANDS)
    assert cli("compile", model, "--calibrate", "random", "-o", tmp_path / "cpu.qc").code == 0  # the reference has no kernels to tune
    decoder = (
        "compile",
        model.replace(":mlp", ":language_model"),
        "--recipe",
        "float",
        "--target",
        "reference",
        "-o",
        tmp_path / "decoder.qc",
    )
    assert cli(*decoder).code == 0
    rows = re.findall(r"^\| `([\w -]+)` \| ((?:`\w+`(?:, )?)+) \|$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name: re.findall(r"`(\w+)`", keys) for name, keys in rows}
    found = {}
    for name, call in calls.items():
        content = cli(*call, "--json").json
        found[name] = sorted(content[0] if isinstance(content, list) else content)
    assert found == {name: sorted(keys) for name, keys in documented.items()}
