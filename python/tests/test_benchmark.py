"""The benchmark from cases to the README's figures, in small. Against: float64 attention, and what
the columns of its files say of one another."""

import csv
import re
import subprocess
from dataclasses import replace

import pytest
import torch
from reference import attention, relative_error, token_mask
from torch.nn.functional import scaled_dot_product_attention

import flex_block_attn as package
from benchmark import __main__ as program
from benchmark import cost, machine, peers
from benchmark import measure as measuring
from benchmark import video as video_ways
from benchmark.__main__ import AGAIN, Job, chosen, goes_on, main, options
from benchmark.attention import Attention, Prepared
from benchmark.clock import peak_mib
from benchmark.measure import Broken, measure
from benchmark.problem import Problem
from benchmark.report.__main__ import main as report
from benchmark.report.load import devices
from benchmark.report.plots import text_of_png
from benchmark.report.tables import number
from benchmark.results import ABSENT_COLUMNS, COLUMNS, GIVEN_UP
from benchmark.suites import LENGTHS, MASKS, RATES, SUITES

CPU = torch.device("cpu")
SMOKE = {case.name: case for case in SUITES["smoke"].cases}
# Those of which ours is there whatever else the package has.
PRESENT = [name for name, case in SMOKE.items() if case.mask != "causal"]

COLUMNS_AS_PUBLISHED = (
    "suite case impl pass batch heads q_len kv_len head_dim dtype q_block kv_block density "
    "ms_median ms_min ms_max tflops peak_mib mask_ms device driver torch commit"
)


def run(results, *more, peers=("SDPA",), commit="first"):
    """`python -m benchmark`, as fast as it goes."""
    return main(
        ["--device", "cpu", "--suite", "smoke", "--rounds", "2", "--turn", "0.1"]
        + ["--results", str(results), "--commit", commit, "--peers", *peers, *more]
    )


def rows(results, name="results.csv"):
    (path,) = results.glob(f"*/{name}")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Cases are so small that others only disturb."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Results of all tiny cases."""
    results = tmp_path_factory.mktemp("results")
    assert run(results) == 0
    return results


@pytest.fixture
def results(finished, tmp_path):
    """A copy that may be changed."""
    (folder,) = (path.parent for path in finished.glob("*/results.csv"))
    (tmp_path / folder.name).mkdir()
    for path in folder.glob("*.csv"):
        (tmp_path / folder.name / path.name).write_bytes(path.read_bytes())
    return tmp_path


# --- cases ---------------------------------------------------------------------------------------


def test_cases_are_told_apart_by_name_and_have_masks_that_exist():
    for suite in SUITES.values():
        names = [case.name for case in suite.cases]
        assert len(set(names)) == len(names), suite.name
        assert {case.mask for case in suite.cases} <= set(MASKS)


@pytest.mark.parametrize("mask", ["window", "random"])
@pytest.mark.parametrize("heads", [1, 24])
def test_the_references_suites_are_whole(mask, heads):
    cases = SUITES[f"{mask}-h{heads}"].cases
    assert {(case.q_len, case.rate) for case in cases} == {(n, r) for n in LENGTHS for r in RATES}
    for case in cases:
        assert (case.heads, case.head_dim, case.q_block, case.kv_block) == (heads, 128, 384, 384)
        assert case.q_len % 384 == 0


def test_the_videos_have_the_lengths_of_their_padded_tiles():
    # 361 tiles and a block of text, of 384 tokens each; 168 and one.
    assert [case.q_len for case in SUITES["ssta"].cases] == [138624, 64896]


@pytest.mark.parametrize("name", PRESENT)
def test_exact_attention_is_that_of_the_tests(name):
    case = SMOKE[name]
    problem = Problem.of(case, CPU)
    exact = problem.exact()
    q, k, v, dout, blocks = problem.q, problem.k, problem.v, problem.dout, problem.blocks
    if case.video:
        q, k, v, dout = problem.tiled(q, k, v, dout)
        blocks = problem.choose(q, k)
    sizes = case.q_block, case.kv_block
    if problem.rule:
        places = (torch.arange(n) for n in (case.q_len, case.kv_len))
        query, key = torch.meshgrid(*places, indexing="ij")
        blocks, sizes = problem.mask_mod(0, 0, query, key)[None, None], (1, 1)
    elif blocks is None:
        blocks = torch.ones(1, 1, -(-case.q_len // 64), -(-case.kv_len // 64), dtype=torch.bool)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, _ = attention(*leaves, blocks, *sizes)
    gradients = torch.autograd.grad(out, leaves, dout.double())
    if case.video:
        # Gradients of keys would be those of padded ones, too.
        out, gradients = problem.untiled(out), [problem.untiled(gradients[0])]
    results = [out.detach(), *gradients]
    assert len(exact.gradients) == len(gradients)
    assert exact.error(results) < 1e-12
    assert exact.error([x + 0.1 for x in results]) > 0.01

    mask = token_mask(blocks, case.q_len, case.kv_len, *sizes)
    assert problem.density == pytest.approx(mask.double().mean().item())


def test_long_cases_are_checked_by_some_rows():
    case = replace(SMOKE["window s200"], q_len=2100, kv_len=2100)
    problem = Problem.of(case, CPU)
    exact = problem.exact()
    assert len(exact.tokens) == 128 and len(exact.gradients) == 1
    results = Prepared(peers.ours(problem), problem, True).once()
    assert exact.error(results) < 2e-2
    results[1][:, :, exact.tokens[3]] += 1
    assert exact.error(results) > 2e-2


def test_a_case_has_the_same_numbers_in_every_run():
    one, other = (Problem.of(SMOKE["random s200"], CPU) for _ in range(2))
    assert torch.equal(one.q, other.q) and torch.equal(one.blocks, other.blocks)
    assert not torch.equal(one.k, Problem.of(SMOKE["window s200"], CPU).k)


def test_memory_is_that_of_the_call():
    floats = 2**23
    mib = peak_mib(lambda: torch.ones(floats).sum(), CPU)
    assert mib is None or 31 < mib < 40


# --- measuring -----------------------------------------------------------------------------------


def test_columns_agree_with_one_another(finished):
    table = rows(finished)
    assert list(table[0]) == list(COLUMNS) == COLUMNS_AS_PUBLISHED.split()
    assert {(r["case"], r["impl"], r["pass"]) for r in table} >= {
        (name, impl, which)
        for name in PRESENT
        for impl in ("ours", "SDPA")
        for which in ("forward", "backward")
    }
    for r in table:
        least, median, most = (float(r[f"ms_{name}"]) for name in ("min", "median", "max"))
        assert 0 < least <= median <= most
        pairs = int(r["q_len"]) * int(r["kv_len"]) * float(r["density"])
        products = 2 if r["pass"] == "forward" else 5
        operations = 2 * products * pairs * int(r["head_dim"]) * int(r["heads"])
        assert float(r["tflops"]) == pytest.approx(operations / median / 1e9, rel=0.01)
        has_mask = r["case"].split()[0] not in ("dense", "causal") or r["impl"] == "ours"
        if r["case"].startswith("dense"):
            assert r["mask_ms"] == ""
        elif has_mask:
            assert float(r["mask_ms"]) > 0
    # Ours begins a run.
    assert [r["impl"] for r in table[:4]] == ["ours", "SDPA", "ours", "SDPA"]


def test_a_restart_measures_what_is_missing(results, capsys):
    (path,) = results.glob("*/results.csv")
    text = path.read_text()
    assert run(results) == 0
    assert path.read_text() == text

    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:30])
    capsys.readouterr()
    assert run(results) == 0
    assert capsys.readouterr().out.count("smoke: ") == 1
    assert [list(r.values())[:4] for r in rows(results)] == [
        line.split(",")[:4] for line in lines[1:]
    ]


def test_a_peer_that_comes_later_has_ours_beside_it(results, monkeypatch):
    before = rows(results)
    monkeypatch.setitem(peers.PEERS, "FA2", peers.sdpa)
    assert run(results, "--case", "window s200", peers=("SDPA", "FA2")) == 0
    after = rows(results)
    assert after[: len(before)] == before
    new = [(r["impl"], r["pass"]) for r in after[len(before) :]]
    assert new == [(impl, which) for which in ("forward", "backward") for impl in ("ours", "FA2")]


def test_ratios_are_those_of_one_run(results, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "FA2", peers.sdpa)
    assert run(results, "--case", "window s200", peers=("FA2",)) == 0
    found = [r for r in rows(results) if (r["case"], r["pass"]) == ("window s200", "forward")]
    ours, sdpa, ours_again, flash = (float(r["ms_median"]) for r in found)
    (device,) = devices(results)
    entry = next(x for x in device.entries["smoke", "forward"] if x.ours.case == "window s200")
    assert entry.ours.ms == ours_again
    assert entry.ratios == {"FA2": flash / ours_again, "SDPA": sdpa / ours}
    assert entry.best == min(entry.ratios, key=entry.ratios.get)


def test_the_commit_is_that_of_what_figures_depend_on(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout

    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    with pytest.raises(ValueError, match="name it by --commit"):
        machine.describe(CPU, None)
    (tmp_path / "crates").mkdir()
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    (tmp_path / "crates" / "lib.rs").write_text("one")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    first = git("rev-parse", "HEAD").decode()[:10]
    # Results are not what they depend on.
    (tmp_path / "benchmark" / "results" / "a.csv").write_text("a")
    git("add", "-A")
    git("commit", "-qm", "two")
    assert machine.describe(CPU, None).commit == first
    (tmp_path / "crates" / "lib.rs").write_text("two")
    assert machine.describe(CPU, None).commit == first + "+"
    assert machine.describe(CPU, "named").commit == "named"


def test_another_commit_is_measured_again(results):
    count = len(rows(results))
    assert run(results, "--case", "dense*", "--passes", "forward", commit="second") == 0
    assert {r["commit"] for r in rows(results)[count:]} == {"second"}


def test_the_budget_ends_a_run(tmp_path, capsys):
    assert run(tmp_path, "--budget", "0.001", peers=()) == 0
    assert len(rows(tmp_path)) == 1
    assert "the budget ends here: 1 of" in capsys.readouterr().out


def test_what_no_longer_fits_makes_way_for_what_does(tmp_path, monkeypatch, capsys):
    """Time is told by a clock that each case puts on by what it was told to take."""
    clock = [0.0]
    told = {"dense s100": 10.0, "dense s400": 200.0, "random s100": 20.0, "random s400": 70.0}

    def measured(problem, *_):
        # The machine is half as fast as was thought.
        clock[0] += 2 * told[problem.case.name]
        return measuring.Measured(absent={"ours": "is not here"})

    monkeypatch.setattr(program.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(program, "measure", measured)
    monkeypatch.setattr(Job, "seconds", lambda job, args: told[job.case.name])
    case = ["--case", *told, "--passes", "forward", "--peers"]
    assert run(tmp_path, *case, "--budget", "210") == 0
    assert {r["case"] for r in rows(tmp_path, "absent.csv")} == set(told) - {"dense s400"}
    assert "the budget ends here: 3 of 4" in capsys.readouterr().out


def test_the_most_important_cases_come_first():
    args = options(["--device", "cpu", "--passes", "forward"])
    importance = [job.case.importance for job in chosen(args)]
    assert importance == sorted(importance) and len(set(importance)) > 1
    # Tiny cases are no figures.
    assert {job.suite for job in chosen(args)} == {"cpu"}


def test_every_suite_of_a_gpu_has_cases_among_the_first(monkeypatch):
    """Within nine minutes, by what they are told to take, also lengths enough for a plot."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = options(["--device", "cuda", "--budget", "540"])
    assert "Flex" not in args.peers and {"FA3", "FA4", "cuDNN", "FA2", "VSA"} <= set(args.peers)
    assert "Flex" in options(["--device", "cuda", "--budget", "540", "--peers", "Flex"]).peers
    assert {job.case.q_block for job in chosen(args) if "VSA" in job.peers} == {64}
    assert max(job.case.q_len for job in chosen(args) if "FA2" in job.peers) == 30720
    named = options(["--device", "cuda", "--budget", "540", "--peers", "VSA", "FA2"])
    assert max(job.case.q_len for job in chosen(named) if "FA2" in job.peers) > 30720
    assert {job.case.q_block for job in chosen(named) if "VSA" in job.peers} > {64, 384}
    left, first = args.budget, []
    for job in chosen(args):
        left -= job.seconds(args)
        if left < 0:
            break
        first.append(job)
    assert {(job.suite, job.passed) for job in first} == {
        (name, passed)
        for name, suite in SUITES.items()
        if suite.devices == ("cuda",)
        for passed in ("forward", "backward")
    }
    for name in ("full-h1", "full-h24", "window-h24", "random-h1"):
        assert len({job.case.q_len for job in first if job.suite == name}) >= 3
    # Those of equal importance take turns.
    assert len({job.suite for job in first[:8]}) == 4


def test_what_a_pass_takes_grows_with_its_work():
    def of(case, peers=(), backward=False, rounds=3, turn=50):
        return cost.seconds(case, peers, backward, "cuda", rounds, turn)

    short, long = (case for case in SUITES["full-h24"].cases if case.q_len in (LENGTHS[0], 84480))
    assert of(short) < of(long) < of(long, backward=True) < of(long, ["FA4"], True)
    assert of(long, rounds=3) < of(long, rounds=5) and of(short, turn=50) < of(short, turn=500)
    # Nobody waits for who is not there: FA3 has no backward pass, and no blocks.
    blocks = SUITES["random-h24"].cases[0]
    assert of(long, ["FA3"], True) == of(long, [], True) and of(blocks, ["FA3"]) == of(blocks)
    small = next(case for case in SUITES["bars"].cases if case.name == "64 0.2 h24 s30720")
    assert of(small, ["FA4", "Flex"]) == of(small) < of(small, ["VSA"])


@pytest.mark.parametrize("name", PRESENT)
def test_densities_are_about_what_they_are_told_to_be(name):
    case = SMOKE[name]
    told = cost.operations(case, True) / Problem.of(case, CPU).operations(True)
    assert 0.5 < told < 2


def test_another_process_goes_on_with_what_is_left_of_the_budget():
    assert goes_on(["--device", "cpu"], 100.0) == ["--device", "cpu"]
    more = goes_on(["--device", "cpu", "--budget", "540"], 100.4)
    assert options(more).budget == 440
    assert options(goes_on(more, 10_000)).budget == 1


@pytest.mark.parametrize("ends", ["time.sleep(600)", "os.abort()"])
def test_who_does_not_end_is_given_up(tmp_path, monkeypatch, ends):
    process = (
        f"import os, time; from benchmark import peers; peers.PEERS['SDPA'] = lambda _: {ends}"
    )
    monkeypatch.setattr(program, "PROCESS", f"{process}; {program.PROCESS}")
    arguments = ["--device", "cpu", "--suite", "smoke", "--case", "dense s200", "window s200"]
    arguments += ["--rounds", "1", "--turn", "0.1", "--passes", "forward", "--peers", "SDPA"]
    arguments += ["--results", str(tmp_path), "--commit", "first", "--patience", "8"]
    assert program.processes(arguments) == 0
    assert {(r["case"], r["impl"]) for r in rows(tmp_path)} == {
        ("dense s200", "ours"),
        ("window s200", "ours"),
    }
    # Nor is it asked in the other case.
    (given_up,) = rows(tmp_path, "absent.csv")
    assert (given_up["impl"], given_up["reason"]) == ("SDPA", GIVEN_UP)
    assert not list(tmp_path.glob("*/underway.json"))
    # Where nobody was being measured, no other process goes on.
    assert main([*arguments, "--given-up"]) == 2


@pytest.mark.parametrize("length", [None, 10, 0])
def test_who_was_measured_when_somebody_else_ended_the_process_is_asked_again(tmp_path, length):
    case = ["--case", "dense s200", "--passes", "forward"]
    assert run(tmp_path, *case) == 0
    (folder,) = tmp_path.iterdir()
    underway = '{"suite": "smoke", "case": "dense s200", "passed": "backward", "impl": "SDPA"}'
    # The file may be cut short.
    (folder / "underway.json").write_text(underway[:length])
    assert run(tmp_path, "--case", "dense s200") == 0
    assert [(r["impl"], r["pass"]) for r in rows(tmp_path)] == [
        ("ours", "forward"),
        ("SDPA", "forward"),
        ("ours", "backward"),
        ("SDPA", "backward"),
    ]


def test_what_is_compiled_serves_cases_of_one_shape(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(peers, "_compiled_for", set())
    for shape in (1, 2, 1, 3, 2, 1):
        peers._compile_for((shape,))
    assert not resets
    # torch compiles a function for 8 shapes, with and without gradients, and no more.
    for shape in range(4, 14):
        peers._compile_for((shape,))
        assert 2 * len(peers._compiled_for) <= 8
    assert resets and (13,) in peers._compiled_for


def test_folders_are_named_by_devices():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA H100 PCIe": "h100-pcie",
        "AMD EPYC, 2 cores": "amd-epyc-2-cores",
    }
    for name, folder in names.items():
        assert machine.Machine(name, "", "", "").folder == folder


@pytest.mark.parametrize(
    "more, said",
    [
        (["--case", "nothing*"], "there is none"),
        (["--rounds", "0"], "--rounds must be positive, got 0"),
        (["--suite", "full-h1"], "is for cuda"),
    ],
)
def test_options_without_sense_are_refused(more, said, capsys):
    with pytest.raises(SystemExit):
        options(["--device", "cpu", *more])
    assert said in capsys.readouterr().err


def test_who_is_absent_is_named_with_the_reason(finished):
    if not hasattr(package, "create_block_mask"):
        absent = {(r["impl"], r["case"]): r["reason"] for r in rows(finished, "absent.csv")}
        assert absent["ours", "causal s200"] == "has no create_block_mask"
    # All but the one that would be compiled.
    names = [name for name in peers.PEERS if name != "Flex"]
    measured = measure(Problem.of(SMOKE["dense s200"], CPU), names, False, 1, 0.1)
    assert set(measured.figures) | set(measured.absent) == {"ours", *names}
    assert measured.absent["cuDNN"] == "is for GPUs"
    assert measured.absent["FA3"].startswith("is ")


def test_wrong_results_are_not_timed(tmp_path, monkeypatch):
    wrong = Attention(lambda q, k, v, _: 1.1 * scaled_dot_product_attention(q, k, v))
    monkeypatch.setitem(peers.PEERS, "SDPA", lambda problem: wrong)
    case = ["--case", "dense s200", "--passes", "forward"]
    assert run(tmp_path, *case) == 0
    assert [r["impl"] for r in rows(tmp_path)] == ["ours"]
    (absent,) = rows(tmp_path, "absent.csv")
    assert absent["impl"] == "SDPA" and "differs from ours by 1.0e-01" in absent["reason"]

    # Not tried again, unless that is asked for.
    monkeypatch.setitem(peers.PEERS, "SDPA", peers.sdpa)
    assert run(tmp_path, *case) == 0
    assert len(rows(tmp_path)) == 1
    assert run(tmp_path, *case, "--retry") == 0
    assert [r["impl"] for r in rows(tmp_path)] == ["ours", "ours", "SDPA"]

    monkeypatch.setattr(peers, "ours", lambda problem: wrong)
    assert run(tmp_path, *case, commit="second") == 1
    assert {r["commit"] for r in rows(tmp_path)} == {"first"}


def test_wrong_gradients_are_not_timed(monkeypatch):
    def run(q, k, v, _):
        return scaled_dot_product_attention(q, k, 0.9 * v.detach() + 0.1 * v)

    monkeypatch.setitem(peers.PEERS, "SDPA", lambda problem: Attention(run))
    measured = measure(Problem.of(SMOKE["dense s200"], CPU), ["SDPA"], True, 1, 0.1)
    assert "differs from ours" in measured.failed["SDPA"]
    assert list(measured.figures) == ["ours"]


def test_turns_that_warm_up_are_not_counted(monkeypatch):
    numbers = iter(range(100))
    seconds = [0.0]

    def turn(*_):
        seconds[0] += 0.01
        return next(numbers)

    monkeypatch.setattr(measuring, "turn", turn)
    monkeypatch.setattr(measuring.time, "monotonic", lambda: seconds[0])
    problem = Problem.of(SMOKE["dense s200"], CPU)
    # Of no length by what they are told: two rounds of two turns take 40 milliseconds all the same.
    measured = measure(problem, ["SDPA"], False, 3, 0.0, warm_up=35.0)
    assert measured.figures["ours"].turns == [4, 6, 8]
    assert measured.figures["SDPA"].turns == [5, 7, 9]


def test_who_fails_while_timed_is_told_and_others_go_on(monkeypatch):
    calls = []

    def run(q, k, v, _):
        calls.append(q)
        if len(calls) > 4:
            raise RuntimeError("called too often")
        return scaled_dot_product_attention(q, k, v)

    monkeypatch.setitem(peers.PEERS, "SDPA", lambda problem: Attention(run))
    measured = measure(Problem.of(SMOKE["dense s200"], CPU), ["SDPA"], False, 3, 0.1)
    assert measured.failed == {"SDPA": "fails: RuntimeError: called too often"}
    assert len(measured.figures["ours"].turns) == 3
    assert list(measured.figures) == ["ours"]


def test_a_failure_that_ends_the_process_is_kept(tmp_path, monkeypatch, capsys):
    def breaks(problem):
        raise RuntimeError("an illegal\nmemory access")

    monkeypatch.setitem(peers.PEERS, "VSA", breaks)
    monkeypatch.setattr(
        measuring, "_failure", lambda name, error, _: (_ for _ in ()).throw(Broken(name, "breaks"))
    )
    case = ["--case", "dense s200", "--passes", "forward"]
    assert run(tmp_path, *case, peers=("VSA",)) == AGAIN
    assert "Start again" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(tmp_path, *case, peers=("VSA",)) == 0
    assert [r["impl"] for r in rows(tmp_path)] == ["ours"]
    assert [r["reason"] for r in rows(tmp_path, "absent.csv")] == ["breaks"]


def test_a_gpu_that_no_longer_answers_is_told_from_a_failure(monkeypatch):
    error = RuntimeError("an illegal\nmemory access")
    reason = measuring._failure("VSA", error, CPU)
    assert reason == "fails: RuntimeError: an illegal memory access"

    def synchronize():
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(Broken, match="VSA fails: RuntimeError"):
        measuring._failure("VSA", error, torch.device("cuda"))


def test_mask_expressions_are_measured_once_the_package_has_them(tmp_path, monkeypatch):
    def create_block_mask(rule, batch, heads, q_len, kv_len, device, BLOCK_SIZE):
        query, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
        return rule(0, 0, query, key)

    def attend(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    monkeypatch.setattr(package, "create_block_mask", create_block_mask, raising=False)
    monkeypatch.setattr(package, "flex_block_attn", attend)
    assert run(tmp_path, "--case", "causal s200") == 0
    found = rows(tmp_path)
    assert [r["impl"] for r in found] == ["ours", "SDPA"] * 2
    assert float(found[0]["density"]) == pytest.approx(201 / 400, abs=1e-4)
    assert float(found[0]["mask_ms"]) > 0


# --- ways of videos ------------------------------------------------------------------------------

CLIP = SMOKE["ssta 3x6x8 h2"]


def test_every_way_of_a_video_is_checked_and_measured(monkeypatch, capsys):
    monkeypatch.setattr(video_ways, "SMALL", CLIP)
    video_ways.main(["--small", "--device", "cpu", "--rounds", "1", "--turn", "0.1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    names = [re.split(r"\s\s+", line)[1] for line in lines]
    assert names == [
        *(f"ssta, {padding}" for padding in ("zero", "repeat", "exact", "zero, by copies")),
        *(f"{way}, {p}" for way in ("video_attention", "choosing") for p in ("exact", "zero")),
    ]
    assert all(line.endswith("% of the call") for line in lines[-2:])


def test_ways_of_a_video_by_copies_and_in_place_are_one():
    q, k, v, _ = video_ways.tensors(CLIP, 4, CPU)
    masks = {p: video_ways.planned(CLIP.video, p, q, k) for p in ("zero", "exact")}
    ways = video_ways.ways(CLIP.video, masks)
    wanted = ways["ssta, zero"](q, k, v)
    for name in ("ssta, zero, by copies", "video_attention, zero"):
        assert relative_error(ways[name](q, k, v), wanted) < 5e-3
    exact = ways["ssta, exact"](q, k, v)
    assert relative_error(ways["video_attention, exact"](q, k, v), exact) < 5e-3
    assert relative_error(exact, wanted) > 0.05


def test_a_wrong_way_of_a_video_is_not_measured(monkeypatch):
    monkeypatch.setattr(video_ways, "SMALL", CLIP)
    monkeypatch.setattr(video_ways, "by_copies", lambda of: lambda q, k, v: q + k + v)
    with pytest.raises(AssertionError, match="ssta, zero, by copies: differs from float64"):
        video_ways.check(CPU)


def test_masks_are_made_anew_each_time():
    """The package would find it among those that it keeps."""
    problem = Problem.of(SMOKE["causal s200"], CPU)
    make = peers.ours(problem).make_mask
    one, other = make(None, False), make(None, False)
    assert one.plan.data_ptr() != other.plan.data_ptr()


# --- report --------------------------------------------------------------------------------------

PAGE = """# A page

<!-- bench:summary -->
<!-- /bench -->

Between.

<!-- bench:{folder}/smoke -->
old figures
<!-- /bench -->
"""


@pytest.fixture
def reported(results):
    """Results with their pages, and a page with blocks of figures."""
    (folder,) = (path.parent for path in results.glob("*/results.csv"))
    page = results / "page.md"
    page.write_text(PAGE.format(folder=folder.name))
    assert report(["--results", str(results), "--readme", str(page)]) == 0
    return results, folder, page


def is_current(results, page):
    return report(["--results", str(results), "--readme", str(page), "--check"]) == 0


def test_figures_of_pages_are_those_of_the_files(reported):
    results, folder, page = reported
    found = {(r["case"], r["impl"], r["pass"]): r for r in rows(results)}
    ours, theirs = (found["window s200", impl, "forward"] for impl in ("ours", "SDPA"))
    ratio = float(theirs["ms_median"]) / float(ours["ms_median"])
    for text in ((folder / "README.md").read_text(), page.read_text()):
        line = next(x for x in text.splitlines() if x.startswith("| window s200 |"))
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        density, ms, speed, their_speed, ratio_cell = map(float, cells[1:])
        assert density == pytest.approx(float(ours["density"]), rel=0.01)
        assert ms == pytest.approx(float(ours["ms_median"]), rel=0.01)
        assert speed == pytest.approx(float(ours["tflops"]) * 1e3, rel=0.01)
        assert their_speed == pytest.approx(float(theirs["tflops"]) * 1e3, rel=0.01)
        assert ratio_cell == pytest.approx(ratio, rel=0.01)
    text = page.read_text()
    assert "Between." in text and "old figures" not in text
    assert f"]({folder.name}/speed-up.png)" in text and (folder / "speed-up.png").exists()


def test_a_report_is_the_same_each_time(reported):
    results, folder, page = reported
    files = [page, *sorted(folder.iterdir())]
    assert {path.name for path in files} >= {"speed-up.png", "speed-smoke.png", "memory-smoke.png"}
    before = [path.read_bytes() for path in files]
    assert report(["--results", str(results), "--readme", str(page)]) == 0
    assert [path.read_bytes() for path in files] == before
    assert is_current(results, page)


def test_drift_is_found(reported, capsys):
    results, folder, page = reported

    def names():
        capsys.readouterr()
        assert not is_current(results, page)
        lines = capsys.readouterr().out.splitlines()[:-1]
        return {line.split(" is not ")[0].rsplit("/", 1)[1] for line in lines}

    text = page.read_text()
    page.write_text(text.replace("| window s200 |", "| window s201 |"))
    assert names() == {"page.md"}
    page.write_text(text)
    (folder / "old.png").write_bytes(b"")
    assert names() == {"old.png"}
    (folder / "old.png").unlink()
    table = folder / "results.csv"
    # A run in which ours was slower.
    last = table.read_text().splitlines(keepends=True)[-2].split(",")
    last[13] = "9999"
    with table.open("a") as file:
        file.write(",".join(last))
    assert names() >= {"README.md", "page.md"}
    table.write_text("suite,case\n")
    assert report(["--results", str(results), "--check"]) == 2


def test_figures_that_nobody_measured_are_refused(reported, capsys):
    results, _, page = reported
    page.write_text("<!-- bench:another-card/full-h1 -->\n<!-- /bench -->\n")
    assert report(["--results", str(results), "--readme", str(page)]) == 2
    assert "bench:another-card/full-h1: there are results of" in capsys.readouterr().err


def test_the_newest_commit_counts(reported):
    results, folder, page = reported
    case = ["--case", "window s200", "--passes", "forward"]
    assert run(results, *case, peers=(), commit="second") == 0
    assert report(["--results", str(results)]) == 0
    lines = (folder / "README.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| window s200 |"))
    # Nobody was beside us in it.
    assert row.endswith("|  |  |")
    assert "commit first, second." in "\n".join(lines)


def test_numbers_have_three_digits():
    numbers = [0.0, 0.00123, 0.04, 0.9999, 1.0, 12.34, 123.4, 999.6, 12345.6]
    texts = ["0", "0.00123", "0.0400", "1.00", "1.00", "12.3", "123", "1000", "12346"]
    assert [number(x) for x in numbers] == texts
    assert number(None) == ""


def test_who_was_tried_again_has_the_last_reason(results):
    (folder,) = (path.parent for path in results.glob("*/results.csv"))
    row = rows(results)[0]
    with (folder / "absent.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ABSENT_COLUMNS)
        writer.writeheader()
        for reason in ("is not installed", "is late"):
            known = {name: row[name] for name in ABSENT_COLUMNS if name in row}
            writer.writerow({**known, "impl": "FA3", "reason": reason})
    (device,) = devices(results)
    assert device.absent == {("FA3", "is late"): 1}


def test_a_plot_says_what_it_shows(reported):
    _, folder, _ = reported
    words = text_of_png((folder / "speed-up.png").read_bytes())
    assert list(words) == ["Shows"] and len(words["Shows"]) == 64


def test_the_repositorys_pages_are_those_of_its_results():
    assert report(["--check"]) == 0


def test_relative_errors_are_what_they_say():
    x = torch.randn(100)
    assert measuring.relative(1.5 * x, x) == pytest.approx(0.5, rel=1e-5)
    assert measuring.relative(x, x) == relative_error(x, x) == 0
