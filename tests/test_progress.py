"""Long work says what it does: lines of the log by stage, and one status line on a terminal, which leaves no trace."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

import adaptc
from adaptc import progress
from adaptc.cli import app
from adaptc.progress import LEVELS, LOGGER, stage
from adaptc.tuning import matmul_times as product_times
from tests.support.terminals import TerminalRun, on_terminal


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


CONFIG = adaptc.LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False)


def program(backend: str = "eager") -> adaptc.AdaptedProgram:
    torch.manual_seed(0)
    return adaptc.compile(Net().eval(), CONFIG, example_inputs=torch.randn(2, 7), backend=backend)


@pytest.fixture(autouse=True)
def same_level(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The level is as it was after each test."""
    monkeypatch.delenv(progress.VERBOSITY_VARIABLE, raising=False)
    before = LOGGER.level
    yield
    LOGGER.setLevel(before)


class Log(logging.Handler):
    """What the logger of adaptc is told, which pytest's own would drop below the level it is configured for."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [r.getMessage() for r in self.records]


@pytest.fixture
def log() -> Iterator[Log]:
    """The lines of the log from here on, at the level that tells stages."""
    adaptc.set_verbosity("info")
    out = Log()
    logging.getLogger().addHandler(out)
    yield out
    logging.getLogger().removeHandler(out)


def begun(log: Log) -> list[str]:
    """The stages that have begun since this was last asked, in order; each has ended."""
    records = [r for r in log.records if r.name == "adaptc"]
    assert {r.levelno for r in records} <= {logging.INFO}
    texts = [r.getMessage() for r in records]
    ends = [m[1] for t in texts if (m := re.fullmatch(r"(.*): (?:done in|failed after) \d+\.\d s", t))]
    out = [t for t in texts if not re.search(r": (done in|failed after|stopped after) ", t)]
    assert sorted(ends) == sorted(out)
    log.records.clear()
    return out


# -- levels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_is_a_name_or_a_number_of_logging(name: str) -> None:
    number = getattr(logging, name.upper())
    for level in (name, name.upper(), number):
        adaptc.set_verbosity("critical" if name != "critical" else "debug")
        adaptc.set_verbosity(level)
        assert adaptc.get_verbosity() == number == logging.getLogger("adaptc").level


def test_the_first_level_is_that_of_transformers() -> None:
    code = "import adaptc; print(adaptc.get_verbosity())"
    assert _python(code).stdout.split() == [str(logging.WARNING)]


@pytest.mark.parametrize("wrong", ["loud", "", -1, True, None, 1.5, ["info"]])
def test_what_is_no_level_is_refused_and_the_level_stays(wrong: object) -> None:
    before = adaptc.get_verbosity()
    with pytest.raises(adaptc.ConfigError, match="'debug', 'info', 'warning', 'error', 'critical'"):
        adaptc.set_verbosity(wrong)  # type: ignore[arg-type]
    assert adaptc.get_verbosity() == before


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=True
    )


def test_the_environment_sets_the_first_level_alone() -> None:
    code = "import adaptc; print(adaptc.get_verbosity()); adaptc.set_verbosity(40); print(adaptc.get_verbosity())"
    assert _python(code, ADAPTC_VERBOSITY="info").stdout.split() == ["20", "40"]
    code = "import logging; logging.getLogger('adaptc').setLevel(10); import adaptc; print(adaptc.get_verbosity())"
    assert _python(code, ADAPTC_VERBOSITY="error").stdout.split() == ["10"]


def test_a_wrong_name_in_the_environment_is_told() -> None:
    done = _python("import adaptc; print(adaptc.get_verbosity())", ADAPTC_VERBOSITY="loud")
    assert done.stdout.split() == [str(logging.WARNING)]
    assert "ADAPTC_VERBOSITY='loud'" in done.stderr
    assert "debug, info, warning, error, critical" in done.stderr


LINES = """
    import logging, adaptc
    from adaptc.progress import stage
    {}
    adaptc.set_verbosity("info")
    with stage("working"):
        pass
"""


def test_lines_go_to_stderr_where_nobody_configures_logging() -> None:
    done = _python(LINES.format(""))
    assert done.stdout == ""
    assert re.fullmatch(r"\[adaptc\] working\n\[adaptc\] working: done in \d\.\d s\n", done.stderr)


@pytest.mark.parametrize("name", ["", "adaptc"])
def test_who_configures_logging_has_each_line_once(name: str) -> None:
    own = f"h = logging.StreamHandler(); h.setFormatter(logging.Formatter('own %(message)s')); \
logging.getLogger({name!r}).addHandler(h)"
    lines = _python(LINES.format(own)).stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("own working") for line in lines)


# -- stages ------------------------------------------------------------------------------------------------------------


def test_stages_tell_how_they_ended(log: Log) -> None:
    with stage("outer"), pytest.raises(ValueError, match="inside"), stage("inner"):
        raise ValueError("inside")
    with pytest.raises(KeyboardInterrupt), stage("long"):
        raise KeyboardInterrupt
    texts = [re.sub(r"\d+\.\d s", "", m) for m in log.messages]
    ends = ["inner: failed after ", "outer: done in ", "long", "long: stopped after "]
    assert texts == ["outer", "inner", *ends]


def test_a_stage_counts_what_it_goes_over() -> None:
    with stage("counting") as counting:
        seen = [(item, counting.done, counting.total) for item in counting.track("abc")]
    assert seen == [("a", 0, 3), ("b", 1, 3), ("c", 2, 3)]
    assert counting.done == 3


def test_a_stage_counts_bytes_and_tells_the_time_left() -> None:
    with stage("writing") as writing:
        add = writing.count_bytes(3 << 30)
        assert writing.describe_count() == "0 B of 3.0 GiB"
        add(1 << 29)
        add(1 << 29)
        writing.start_time = time.perf_counter() - 65.2
        assert writing.describe_count() == "1.0 GiB of 3.0 GiB, 2:10 left"
        add(2 << 30)
        assert writing.describe_count() == "3.0 GiB of 3.0 GiB"
        assert list(writing.track("ab")) == ["a", "b"]
        assert writing.describe_count() == "2 of 2"


def test_stages_of_many_threads(log: Log) -> None:
    barrier = threading.Barrier(8)

    def work(n: int) -> None:
        barrier.wait()
        for _ in range(20):
            with stage(f"work {n}"), stage(f"inner {n}"):
                pass

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(begun(log)) == sorted([f"{w} {n}" for w in ("work", "inner") for n in range(8)] * 20)


# -- what says something -----------------------------------------------------------------------------------------------


def test_compile_says_what_it_does(log: Log) -> None:
    program()
    assert begun(log) == [
        "capturing Net",
        "exporting Net with free sizes",
        "checking the program of Net against the model at sizes of one",
        "making the adapter's values at 2 sites of Net",
        "inserting adapters at 2 sites of Net",
    ]


def test_each_attempt_of_a_capture_says_so(log: Log) -> None:
    adaptc.compile(Net(), CONFIG, example_inputs=torch.randn(1, 7))
    assert begun(log)[:3] == [
        "capturing Net",
        "exporting Net with larger example inputs",
        "checking the program of Net against the model at sizes of one",
    ]


@pytest.mark.long
def test_verify_merge_and_check_method_say_what_they_do(log: Log) -> None:
    prog = program()
    begun(log)
    assert adaptc.verify(prog, shapes=1).ok
    names = ["base equals model", "identity equals base", "merged equals adapted", "unmerge is bitwise"]
    assert [t for t in begun(log) if t.startswith("verifying")] == [f"verifying: {n}" for n in names]
    adaptc.merge(prog)
    assert begun(log) == ["merging 2 sites"]


def test_inductor_says_when_it_compiles(log: Log) -> None:
    prog = program("inductor")
    begun(log)
    for rows in (4, 6):
        prog(torch.randn(rows, 7))
    assert begun(log) == ["compiling a program of 2 sites with inductor"]


def test_a_bank_says_what_it_makes(log: Log) -> None:
    prog = program()
    begun(log)
    bank = prog.bank({"a": prog.binding}, capacity=4)
    assert begun(log) == ["finding the rows of the batch in the program"]
    bank.warm()
    found = begun(log)
    assert found[:2] == ["warming the program of the bank", "warming the bank for calls of up to 4 adapters"]
    assert set(found[2:]) == {"making the code of a bank for any number of adapters"}


@pytest.mark.long
def test_a_package_says_what_it_compiles(tmp_path: Path, log: Log) -> None:
    prog = program()
    begun(log)
    made = adaptc.package(prog, tmp_path / "net.pt2", max_rank=4)
    assert begun(log) == [
        "preparing the program for its package",
        "compiling 'model' with AOTInductor (1 of 1)",
        "packaging the compiled code",
        "writing the package net.pt2",
    ]
    assert adaptc.verify(adaptc.load_package(made), prog, shapes=1).ok
    assert begun(log)[:2] == ["reading the package net.pt2", "verifying: package equals program"]


@pytest.mark.long
def test_files_say_that_they_are_read_and_written(tmp_path: Path, log: Log) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).eval()
    merged = adaptc.merge(adaptc.compile(model, adaptc.LoraConfig(r=3, target_modules=["q_proj"])))
    begun(log)
    adaptc.load(adaptc.save(merged, tmp_path / "net.pt2"))
    assert begun(log) == ["writing net.pt2", "reading net.pt2"]
    merged.module().save_pretrained(tmp_path / "model")
    assert begun(log) == ["writing LlamaForCausalLM to model"]


def test_timing_says_what_is_timed(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_times, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(product_times, "_POOL_BYTES", 20_000_000)
    product_times.measure_times(torch.float32)
    product_times.measure_transposed(torch.bfloat16)
    assert begun(log) == ["timing matmuls in float32", "timing matmuls of gradients in bfloat16"]


@pytest.mark.long
def test_generation_says_what_it_captures_and_checks(log: Log) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config).eval()
    adaptc.compile_for_generation(model, adaptc.LoraConfig(r=3, target_modules=["q_proj"]), max_batch=2, max_length=32)
    found = begun(log)
    wanted = [
        "capturing LlamaForCausalLM as a step with its cache (attempt 1 of at most 4)",
        "capturing LlamaForCausalLM",
        "inserting adapters at 1 sites of LlamaForCausalLM",
        "checking a step with its cache against LlamaForCausalLM",
    ]
    assert [t for t in found if t in wanted] == wanted


def test_nothing_is_printed_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert adaptc.get_verbosity() == logging.WARNING
    adaptc.merge(program(), progress=True)
    assert capsys.readouterr() == ("", "")


def test_commands_are_verbose_or_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = str(adaptc.save(program(), tmp_path / "program.pt2"))
    caplog.set_level(logging.INFO, LOGGER.name)  # what pytest keeps, too
    for flag, level in (("-q", logging.ERROR), ("--quiet", logging.ERROR), ("--verbose", logging.INFO)):
        caplog.clear()
        assert CliRunner().invoke(app, [flag, "verify", saved, "--runs", "1"]).exit_code == 0
        assert adaptc.get_verbosity() == level
        assert bool(caplog.messages) == (level == logging.INFO)
    refused = CliRunner().invoke(app, ["-v", "-q", "methods"])
    assert refused.exit_code == 2


# -- on a terminal -----------------------------------------------------------------------------------------------------

HEAD = """
import os, signal, sys, threading, time
from adaptc import progress
from adaptc.progress import stage
progress.DELAY, progress.REFRESH_SECONDS = 0.0, 0.01

def alone():
    return [t.name for t in threading.enumerate()] == ["MainThread"]

def shown(text):
    # until the line has had time to be drawn
    end = time.monotonic() + 60
    while "adaptc-status" not in [t.name for t in threading.enumerate()] and time.monotonic() < end:
        time.sleep(0.01)
    while sys.stderr is first and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)

first = sys.stderr
print("before", file=sys.stderr)
"""
FOOT = """
print("after", file=sys.stderr)
assert sys.stderr is first and alone(), threading.enumerate()
"""


def session(code: str, **environment: str) -> TerminalRun:
    return on_terminal(HEAD + textwrap.dedent(code) + FOOT, **environment)


def check_clean(run: TerminalRun, *lines: str) -> None:
    """Nothing is left of the status line."""
    assert (run.code, run.screen) == (0, ["before", *lines, "after"])


@pytest.mark.long
def test_a_terminal_shows_the_innermost_stage_and_its_count_and_is_cleaned() -> None:
    run = session("""
        with stage("outer work"):
            shown("outer work")
            with stage("inner work") as inner:
                for _ in inner.track(range(3)):
                    time.sleep(0.2)
                inner.count_bytes(2048)(1024)
                time.sleep(0.2)
            print("a warning", file=sys.stderr)
            print("a result")
            time.sleep(0.1)
    """)
    check_clean(run, "a warning")
    for text in ("outer work", "inner work", "2 of 3", "1.0 KiB of 2.0 KiB, 0:00 left"):
        assert text in run.terminal_text
    assert run.out == "a result\n"  # which is no terminal


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        ("", {"TQDM_DISABLE": "1"}),
        ("", {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}),
        ("", {"ADAPTC_VERBOSITY": "error"}),
        ("progress.DELAY = 60.0", {}),
    ],
)
def test_nothing_is_shown_where_nobody_wants_it_or_work_is_short(code: str, environment: dict[str, str]) -> None:
    run = session(code + "\nwith stage('work'):\n    time.sleep(0.3)\n", **environment)
    assert (run.code, run.terminal_text.split()) == (0, ["before", "after"])


@pytest.mark.long
def test_errors_and_interrupts_leave_the_terminal_as_it_was() -> None:
    run = session("""
        try:
            with stage("failing"):
                shown("failing")
                raise ValueError
        except ValueError as error:
            kept = error  # with the frames that it came through
        try:
            with stage("counting") as counting:
                for _ in counting.track(range(2)):
                    shown("counting")
                    raise ValueError
        except ValueError as error:
            more = error
        try:
            with stage("interrupted"):
                shown("interrupted")
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
        except KeyboardInterrupt:
            pass
    """)
    check_clean(run)
    for text in ("failing", "counting", "interrupted"):
        assert text in run.terminal_text


def test_stages_of_many_threads_have_one_line() -> None:
    run = session("""
        most = 0
        def work(n):
            global most
            for _ in range(10):
                with stage(f"work {n}"):
                    time.sleep(0.02)
                    names = [t.name for t in threading.enumerate()]
                    most = max(most, names.count("adaptc-status"))
        with stage("all of it"):
            threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
            for t in threads: t.start()
            for t in threads: t.join()
        assert most == 1, most
    """)
    check_clean(run)
    assert "work" in run.terminal_text


def test_a_forked_process_shows_nothing_of_its_parents() -> None:
    run = session("""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in processes that have threads
        with stage("parent's"):
            shown("parent's")
            pid = os.fork()
            if pid == 0:
                ok = type(sys.stderr) is type(first) and alone()
                os._exit(0 if ok else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """)
    check_clean(run)


def test_what_others_write_stands_above_the_line_in_one_piece() -> None:
    run = session("""
        with stage("work"):
            shown("work")
            print("the first part", end="", file=sys.stderr, flush=True)
            time.sleep(0.2)
            sys.stderr.writelines([" and the rest\\n", "more\\n"])
            time.sleep(0.2)
    """)
    check_clean(run, "the first part and the rest", "more")


def test_stderr_that_others_put_in_its_place_meanwhile_comes_back() -> None:
    """A ``redirect_stderr`` in one thread may begin or end while the line of another does."""
    run = session("""
        import contextlib, io
        usual = progress.can_show_status
        def meanwhile(always):
            if threading.current_thread() is not threading.main_thread():
                sys.stderr = io.StringIO()  # after the line has seen that this is the terminal
                return True
            return usual(always)
        progress.can_show_status = meanwhile
        with stage("begins"):
            shown("begins")
            time.sleep(0.2)
            sys.stderr = first  # as the other thread has it again
        assert sys.stderr is first
        progress.can_show_status = usual
        other = contextlib.redirect_stderr(io.StringIO())
        with stage("ends"):
            shown("ends")
            other.__enter__()
        other.__exit__(None, None, None)
        print("told", file=sys.stderr)
        with stage("again"):
            shown("again")
    """)
    check_clean(run, "told")
    for text in ("begins", "ends", "again"):
        assert text in run.terminal_text


@pytest.mark.long
@pytest.mark.parametrize("options", ["", ", redirect_stderr=False"])
def test_a_live_display_of_the_users_own_stays_alone(options: str) -> None:
    code = """
        from rich.console import Console
        from rich.progress import Progress
        import torch, adaptc
        net = torch.nn.Sequential(torch.nn.Linear(7, 5))
        with Progress(console=Console(stderr=True), transient=True OPTIONS) as bar:
            task = bar.add_task("the user's", total=2)
            config = adaptc.LoraConfig(r=2, target_modules=["0"])
            prog = adaptc.compile(net, config, example_inputs=torch.randn(3, 7))
            adaptc.merge(prog, progress=True)
            bar.advance(task)
        os._exit(0)  # torch's own threads are there still
    """
    run = session(code.replace(" OPTIONS", options))
    assert run.code == 0
    assert "the user's" in run.terminal_text
    assert "capturing" not in run.terminal_text
    assert "merging" not in run.terminal_text
    assert run.screen == ["before"]


@pytest.mark.long
def test_compile_shows_its_stages_on_a_terminal() -> None:
    run = session("""
        import torch, adaptc
        net = torch.nn.Sequential(torch.nn.Linear(7, 5))
        config = adaptc.LoraConfig(r=2, target_modules=["0"])
        prog = adaptc.compile(net, config, example_inputs=torch.randn(3, 7))
        assert sys.stderr is first
        os._exit(0)
    """)
    assert (run.code, run.screen) == (0, ["before"])
    assert "Sequential" in run.terminal_text
