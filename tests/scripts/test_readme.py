"""The commands of every README exist, and their arguments are accepted."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT
from torch.distributed.run import get_args_parser

import sample_min
import train_min

ROOMS = [room.name for room in ROOT.iterdir() if not room.name.startswith(".")]
PAGES = ["README.md", "NOTES.md", *(f"{room}/README.md" for room in sorted(ROOMS))]
PAGES = [page for page in PAGES if (ROOT / page).exists()]


def commands_of(page):
    """The commands of a page's ```sh blocks, each as a list of words without environment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def script_of(words):
    """A command's file, the launcher's options before it and the arguments behind it; or None."""
    if words[0] not in ("python", "torchrun"):
        return None
    for i, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[1:i], words[i + 1 :]
        if word == "-m":
            file = Path(*words[i + 1].split(".")).with_suffix(".py")
            return str(file), words[1:i], words[i + 2 :]
    raise AssertionError(words)


COMMANDS = [(page, words) for page in PAGES for words in commands_of(page)]
SCRIPTS = [(page, *script_of(words)) for page, words in COMMANDS if script_of(words)]
IN_ROOM = [case for case in SCRIPTS if case[1] not in ("setup.py", "pytest.py", "pip.py")]


def named(*files):
    """Cases of these scripts alone: (file, arguments)."""
    return [(file, arguments) for _, file, _, arguments in SCRIPTS if file in files]


def test_the_first_page_trains_samples_and_evaluates():
    files = {file for page, file, *_ in SCRIPTS if page == "README.md"}
    assert {"train_min.py", "sample_min.py", "eval_min.py", "setup.py"} <= files


@pytest.mark.parametrize("words", [words for _, words in COMMANDS if words[0] == "make"])
def test_make_has_every_target(words):
    command = ["make", "-n", *words[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert result.returncode == 0, result.stderr


def test_make_refuses_a_target_that_it_has_not():
    command = ["make", "-n", "no-such-target"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=20).returncode != 0


@pytest.mark.parametrize(("page", "file", "options", "arguments"), IN_ROOM)
def test_every_script_and_flag_exists(page, file, options, arguments, script):
    assert (ROOT / file).exists()
    get_args_parser().parse_args([*options, file])  # torchrun's own options; python has none
    help_text = script(file, "--help")[1]
    if file == "experiments/ablate.py":  # it passes unknown options on
        help_text += script("train_min.py", "--help")[1]
    for word in arguments:
        if word.startswith("--"):
            flag = re.escape(word.split("=")[0])
            assert re.search(rf"(^|[\s,\[]){flag}\b(?!-)", help_text, re.MULTILINE), word


@pytest.mark.parametrize(("file", "arguments"), named("setup.py"))
def test_setup_py_takes_its_options(file, arguments):
    command = [sys.executable, file, arguments[0], "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    for word in arguments[1:]:
        assert word in text


@pytest.mark.parametrize(("file", "arguments"), named("train_min.py", "experiments/train.py"))
def test_every_train_command_is_accepted(file, arguments):
    from experiments import baselines

    arguments = [a for a in arguments if a != "..."]
    if file == "train_min.py":
        train_min.parse(arguments)
    else:
        train_min.parse(arguments, preset=baselines.preset)


@pytest.mark.parametrize(("file", "arguments"), named("sample_min.py"))
def test_every_sample_command_is_accepted(file, arguments):
    sample_min.check(sample_min.command_line().parse_args(arguments))


@pytest.mark.parametrize(("file", "arguments"), named("experiments/ablate.py"))
def test_every_ablate_command_is_accepted(file, arguments, monkeypatch):
    from experiments import ablate

    planned = []
    monkeypatch.setattr(train_min, "fit_to_data", lambda *_: None)
    monkeypatch.setattr(ablate, "complete", lambda runs, *_: planned.extend(runs))
    monkeypatch.setattr(ablate, "report", lambda *_: "")
    ablate.main(arguments)
    assert planned


def test_links_into_dydilit_lead_to_the_definitions():
    lines = (ROOT / "dydilit.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(dydilit\.py#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 8
    for name, number in links:
        assert re.match(rf"(def|class) {name}\b", lines[int(number) - 1]), (name, number)
