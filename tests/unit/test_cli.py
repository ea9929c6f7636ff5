"""The dist-adamw command: its line, its help, its exit statuses. Verbs have files of their own."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_adamw._version import __version__
from dist_adamw.cli import main
from dist_adamw.cli.arguments import read_arguments
from dist_adamw.cli.verbs import VERBS

Capture = pytest.CaptureFixture[str]
SIZES = ["--batch_size=32", "--epoch_size=1000"]


def run(capsys: Capture, *args: str, status: int = 0) -> str:
    """Run the command in this process; return stdout."""
    assert main(args) == status
    return capsys.readouterr().out


def refused(capsys: Capture, *args: str) -> str:
    """Run a command that cannot be carried out; return its one sentence."""
    assert main(args) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("dist-adamw: ")
    assert error.count("\n") == 1
    return error


def answer(capsys: Capture, *args: str, status: int = 0) -> Any:
    """Run the command with --json; return the data."""
    return json.loads(run(capsys, *args, "--json", status=status))


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_has_a_line_for_each_verb(args: list[str], capsys: Capture) -> None:
    lines = run(capsys, *args).splitlines()
    for verb in VERBS:
        assert sum(line.startswith(f"  {verb} ") for line in lines) == 1
    assert "  2  the question cannot be answered; stderr says why" in lines


def test_the_version(capsys: Capture) -> None:
    assert run(capsys, "--version") == f"dist-adamw {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: Capture) -> None:
    out = run(capsys, verb, "--help")
    assert out.startswith(f"usage: dist-adamw {verb} ")
    assert f"dist-adamw {verb} {VERBS[verb].examples[0]}" in out
    assert "--json" in out
    assert "exit status:" in out
    assert "None" not in out
    assert run(capsys, "help", verb) == out
    assert run(capsys, verb, "too", "many", "-h") == out if verb != "lr-range" else True


def test_help_does_not_import_torch() -> None:
    code = "import sys; from dist_adamw.cli import main; main(['export', '--help']); main([]); "
    code += "print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert found.stdout.splitlines()[-1] == "False"


# ---------------------------------------------------------------- options


def test_dashes_and_underscores_are_the_same(capsys: Capture) -> None:
    expected = run(capsys, "batch", "--size=256", "--micro_batch_size=8", "--data_parallel_size=4")
    assert expected == "256 samples = 8 per micro-batch x 8 accumulation steps x 4 ranks\n"
    assert run(capsys, "batch", "--size", "256", "--micro-batch-size", "8", "--data-parallel_size", "4") == expected


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["previw"], "there is no verb 'previw'. Did you mean preview?"),
        (["frobnicate"], "there is no verb 'frobnicate'. It has preview, plot, batch"),
        (["--batch_size", "32"], "name a verb before its options: preview"),
        (["preview", "--restart_periods", "2"], "no option --restart_periods. Did you mean --restart_period?"),
        (["preview", "--restart-periods", "2"], "no option --restart-periods. Did you mean --restart_period?"),
        (["preview", "--restart", "2"], "no option --restart. Did you mean --restart_period"),
        (["preview", "--recipe", "a.yaml"], "preview has no option --recipe. Pass RECIPE without a name."),
        (["version"], "there is no verb 'version'. Did you mean --version?"),
        (["preview", "-lr", "2"], "no option -lr. Did you mean --lr?"),
        (["preview", "--xyzzy", "2"], "preview has no option --xyzzy. See dist-adamw preview --help."),
        (["batch", "--size", "256", "--micro_batch_size"], "--micro_batch_size needs a value: a whole number"),
        (["batch", "--size", "--micro_batch_size", "8"], "--size needs a value: a whole number"),
        (["batch"], "batch needs --size and --micro_batch_size."),
        (["batch", "256"], "batch takes options only, and '256' is one argument too many"),
        (["batch", "--size=big", "--micro_batch_size=8"], "--size must be a whole number, got 'big'"),
        (["batch", "--size=1.5", "--micro_batch_size=8"], "--size must be a whole number, got '1.5'"),
        (["batch", "--size=null", "--micro_batch_size=8"], "--size must be a whole number, got 'null'"),
        (["batch", "--size=100", "--micro_batch_size=8"], "nearest sizes that work: 96 and 104"),
        (["preview", "--batch_size=[1]", "--epoch_size=9"], "must be a whole number or a mapping such as {0: 256"),
        (["preview", *SIZES, "--decay_shape", "cosin"], "--decay_shape must be linear, one_minus_sqrt or cosine, got"),
        (["preview", *SIZES, "--decay_shape", "cosin"], "got 'cosin'. Did you mean cosine?"),
        (["preview", *SIZES, "--policy=cosin"], "unknown policy 'cosin'"),
        (["preview", *SIZES, "--min_lr=1"], "min_lr must lie between 0"),
        (["preview", *SIZES, "--min_lr", "-1e-3"], "min_lr must lie between 0"),
        (
            ["preview", *SIZES, "--t_mult=1e300"],
            "cycle 1 would end after more than 1e+300 samples, which cannot be shown",
        ),
        (["preview", *SIZES, "--restart_period=1e308"], "cannot be shown. Lower restart_period=1e+308."),
        (["plot", *SIZES, "--cycles=1000000000"], "cycles must be at most 1,000, got 1,000,000,000."),
        (["preview", *SIZES, "--fit=scale"], "--fit scale needs --total_samples"),
        (["preview", "--batch_size=32"], "--epoch_size must be given, or a recipe file that has it"),
        (["preview"], "--batch_size and --epoch_size must be given"),
        (["preview", *SIZES, "--plot=x.jpg"], "x.jpg: a picture's name must end in .png, .svg, .pdf"),
        (["preview", "a.yaml", "b.yaml"], "preview takes RECIPE, and 'b.yaml' is one argument too many"),
        (["diff", "a"], "diff needs RUN_B: dist-adamw diff RUN_A RUN_B."),
        (["completion", "fish"], "SHELL must be bash, zsh or tcsh, got 'fish'"),
    ],
)
def test_a_mistake_is_one_sentence(args: list[str], sentence: str, capsys: Capture) -> None:
    assert sentence in refused(capsys, *args)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--lowest=1", "--highest=1e-3", __file__], "lowest must be smaller than highest, got 1.0 and 0.001"),
        (["--updates", "3", __file__, "--lowest", "2"], "updates must be a whole number of at least 20, got 3"),
        (["--divergence", "0.5", __file__], "divergence must be above 1, got 0.5"),
        (["no/such/script.py", "--lowest", "2"], "no/such/script.py: there is no such script"),
        (["--ranks=0", __file__], "--ranks must be at least 1, got 0"),
        (["--rank=2", __file__], "no option --rank. Did you mean --ranks"),
        (["--ranks=2"], "lr-range needs SCRIPT"),
    ],
)
def test_a_mistake_of_lr_range_is_one_sentence(args: list[str], sentence: str, capsys: Capture) -> None:
    assert sentence in refused(capsys, "lr-range", *args)


def test_ranks_inside_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("RANK", "0")
    assert "a launcher has already started this process" in refused(capsys, "lr-range", "--ranks", "2", __file__)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["-1B"], "a number of parameters must be from 1 to 1e15, got -1000000000.0"),
        (["1.3Q"], "'1.3Q' is not a number of parameters. Write it as 1.3B"),
        (["1,3B"], "'1,3B' is not a number of parameters"),
        (["1M", "--memory=80"], 'memory must be a size with its unit, such as "80GiB"'),
        (["1M", "--layers=Block"], "layers='Block' is the class of a model's modules"),
        (["1M", "--ranks=2000000"], "ranks must be at most 1,000,000, got 2,000,000"),
        (["recipe.yaml", "1M"], "recipe.yaml looks like a recipe, and the model comes first"),
    ],
)
def test_a_mistake_of_plan_is_one_sentence(args: list[str], sentence: str, capsys: Capture) -> None:
    assert sentence in refused(capsys, "plan", *args)


@pytest.mark.parametrize("options", [["--memory=1MiB"], ["--ranks=3", "--batch_size=7", "--micro_batch_size=2"]])
def test_plan_says_no_by_its_status(options: list[str], capsys: Capture) -> None:
    found = answer(capsys, "plan", "1B", *options, status=1)
    assert found["feasible"] is False
    assert answer(capsys, "plan", "1B", "--ranks=1,3", "--memory=80GiB")["feasible"] is True


def test_everything_after_the_script_is_the_scripts(tmp_path: Path, capsys: Capture) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:])\n")
    args = ["--lowest", "1e-5", str(script), "--updates", "3", "--json", "a b", "--help"]
    assert main(["lr-range", *args]) == 2  # the script prepares nothing
    out, error = capsys.readouterr()
    assert out == "['--updates', '3', '--json', 'a b', '--help']\n"
    assert "the script has not called dist_adamw.prepare" in error


# ---------------------------------------------------------------- exit statuses


def test_a_closed_pipe_is_no_error() -> None:
    """As in ``dist-adamw preview ... | head -1``."""
    command = [sys.executable, "-m", "dist_adamw.cli", "preview", "--help"]
    # 20,000 lines are more than a pipe holds.
    code = "import sys; from dist_adamw.cli.answer import Answer; from dist_adamw.cli.command import _print; "
    code += "sys.exit(_print(Answer('x\\n' * 200_000, {}, 1), False))"
    for one, status in ((command, 0), ([sys.executable, "-c", code], 1)):
        process = subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(timeout=100) == status


def test_an_interrupted_command_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_adamw.cli.schedule.batch", interrupted)
    assert main(["batch"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dist_adamw.cli", "--version"]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    assert found.returncode == 2
    assert "No space left on device" in found.stderr
    assert "Traceback" not in found.stderr


# ---------------------------------------------------------------- JSON


def test_batch_as_json(capsys: Capture) -> None:
    found = answer(capsys, "batch", "--size=256", "--micro_batch_size=8", "--data_parallel_size=4")
    assert found == {
        "size": 256,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 8,
        "data_parallel_size": 4,
    }


@pytest.mark.parametrize(
    "args",
    [
        ["batch", "--size=100", "--micro_batch_size=8"],
        ["batch", "--size=100", "--xyzzy"],
        ["previw"],
        ["preview", "no/such.yaml"],
        ["inspect", "no/such"],
        ["lr-range", "no/such.py"],
    ],
)
def test_a_mistake_as_json(args: list[str], capsys: Capture) -> None:
    assert main([args[0], "--json", *args[1:]]) == 2
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert found.keys() == {"error"}
    assert error == f"dist-adamw: {found['error']}\n"


# ---------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_verbs_and_options(shell: str, capsys: Capture) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'dist_adamw[completion]'")
    script = run(capsys, "completion", shell)
    for word in ("preview", "lr-range", "restart_period", "one_minus_sqrt"):
        assert word in script


def test_completion_in_bash(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'dist_adamw[completion]'")
    (tmp_path / "script").write_text(run(capsys, "completion", "bash"))
    (tmp_path / "weights.pt").touch()
    code = """
        source ./script
        name=$(complete -p dist-adamw | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        of() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $name dist-adamw "${@: -1}"; echo "${COMPREPLY[*]}"; }
        of dist-adamw pre
        of dist-adamw preview --restart
        of dist-adamw preview --decay_shape cos
        of dist-adamw import wei
    """
    found = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert found.stdout.split() == ["preview", "--restart_period", "cosine", "weights.pt"], found.stderr


@pytest.mark.parametrize(
    ("module", "args", "extra"),
    [
        ("shtab", ["completion", "bash"], "dist_adamw[completion]"),
        ("uniplot", ["plot", *SIZES], "dist_adamw[terminal]"),
        ("matplotlib.figure", ["plot", *SIZES, "--out=x.png"], "dist_adamw[tracking]"),
    ],
)
def test_a_missing_library_is_one_sentence(
    module: str, args: list[str], extra: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert extra in refused(capsys, *args)


# ---------------------------------------------------------------- what the documentation shows

ROOT = Path(__file__).parents[2]
_PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"(?:^[ $]*|`)dist-adamw ([a-z][a-z-]* [^`#>\n|]*)", re.MULTILINE)
_SHOWN = sorted(
    {match[1].strip() for page in _PAGES for match in _COMMAND.finditer(page.read_text()) if "--help" not in match[1]}
)


@pytest.mark.parametrize("line", [*_SHOWN, *(f"{name} {one}" for name, verb in VERBS.items() for one in verb.examples)])
def test_a_command_that_is_shown_can_be_typed(line: str) -> None:
    name, *args = shlex.split(line.partition(" > ")[0])
    read_arguments(name, VERBS[name], args)


def test_the_documentation_shows_commands() -> None:
    assert {line.split()[0] for line in _SHOWN} >= {"preview", "plot", "inspect", "import", "diff", "lr-range"}
